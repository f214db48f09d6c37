"""Comparing finished runs over seeds: `python -m lib.compare RUN... --against RUN...`."""
