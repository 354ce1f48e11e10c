"""Text and tokens: tokenizer, chat templates, streamed text with stop strings."""
