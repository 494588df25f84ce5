"""A run on disk: its directory, what says that something there is complete, its manifest, its log."""
