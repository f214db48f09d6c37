"""The leaderboard of finished runs: `python -m lib.compare --leaderboard RUN...`."""
