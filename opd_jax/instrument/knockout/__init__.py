"""What happens to a model's answers when it may not say certain tokens."""
