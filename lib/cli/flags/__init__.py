"""The flags of a run, each declared once, in the groups of `--help`."""
