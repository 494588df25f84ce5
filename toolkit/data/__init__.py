"""From rows to tokens: sources, schemas, selection, masking, and the account of every row. Pure."""
