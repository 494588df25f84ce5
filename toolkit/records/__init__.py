"""The JSON files that a run leaves: one frozen type each, written and read through it alone."""
