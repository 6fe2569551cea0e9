"""How good a model is: graded answers, and KL on held-out prompts."""
