"""The chat page: page.py sends it."""
