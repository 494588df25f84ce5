"""From an adapter to files that other programs load, checked to be the same model."""
