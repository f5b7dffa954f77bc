"""What requests mean and what is answered, as OpenAI's Images API has it; no queue, and no HTTP."""
