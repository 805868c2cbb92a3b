"""Gradient transformations that change how another one's state is stored."""
