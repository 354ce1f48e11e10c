"""How the shipped model is made: its text, its tokenizer, its training and its evaluation."""
