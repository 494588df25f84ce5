"""Models side by side: which ones, and how their answers are measured and shown."""
