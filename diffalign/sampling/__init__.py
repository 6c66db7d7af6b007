"""Moves along a noise path: transitions between noise levels, and inversion."""
