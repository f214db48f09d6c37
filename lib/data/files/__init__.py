"""Files of rows: which ones are meant, how each format is read, and where rows are cached."""
