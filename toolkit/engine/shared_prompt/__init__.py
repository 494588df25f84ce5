"""Pairs whose prompt goes through the model once: layout, attention, hooks, and the check that it is right."""
