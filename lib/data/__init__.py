"""From files or a hub dataset to checked, tokenized rows, and from rows to batches."""
