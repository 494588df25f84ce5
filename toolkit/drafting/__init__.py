"""A recipe for a model and rows that no shipped one is for: what they tell, each value with its source beside it."""
