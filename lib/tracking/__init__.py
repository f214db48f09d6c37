"""What a run logs while it trains: metrics.jsonl, the terminal, wandb and other trackers."""
