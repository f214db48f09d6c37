"""A comparison as text, a page or a picture."""
