"""On-policy distillation of language models in JAX, with an instrument for Rock Tokens."""

__version__ = "0.1.0"
