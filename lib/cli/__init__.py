"""The command line: flags, the configuration they make, and how a run exits."""
