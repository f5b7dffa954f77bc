"""`dalle reconstruct`: one tokenizer, or several side by side."""
