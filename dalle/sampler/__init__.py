"""How a token is drawn from logits."""
