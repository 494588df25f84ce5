"""One stage trained at several values of its recipe: which, how they came out, and which differences are noise."""
