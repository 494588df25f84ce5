"""A new recipe: what a model's files and rows are, read as a run reads them."""
