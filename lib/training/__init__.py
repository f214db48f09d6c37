"""The model, its optimizer, and how it is scored: plain functions that the loop calls."""
