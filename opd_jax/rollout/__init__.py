"""Rollouts: sampling from logits, the decode loop, answers to lists of prompts."""
