"""Models: the transformer, its families, and Hugging Face folders to and from parameters."""
