"""How a model is trained and scored: plain functions that the loop calls."""
