"""What a completion is worth, as far as that needs no model."""
