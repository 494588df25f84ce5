"""What leaves the project: an export on disk, its card, its upload."""
