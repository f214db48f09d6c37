"""Reaching the Hugging Face hub, or doing without it."""
