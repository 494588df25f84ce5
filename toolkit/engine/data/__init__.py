"""Sets -> tokenised datasets on disk."""
