"""One training stage, from recipe to report."""
