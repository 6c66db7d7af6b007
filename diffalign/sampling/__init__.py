"""Moves along a noise path, from t to a less noisy s."""
