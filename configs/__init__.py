"""Recipes: `base.py` has every key, each other file is one recipe."""
