"""A run: assembled, trained, watched, written down, repeated over arms and seeds."""
