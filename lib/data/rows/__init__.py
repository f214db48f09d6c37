"""Checked rows: validation rows cut from them, equal rows found, and what is unusual."""
