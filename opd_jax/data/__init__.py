"""Prompts and tokenizers: read, checked, rendered, batched."""
