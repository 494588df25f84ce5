"""Held-out rows measured with error bars: from numbers of rows to a table."""
