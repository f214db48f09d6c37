"""The output folder on disk: its lock and status, checkpoints, and the best model."""
