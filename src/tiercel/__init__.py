"""Tiercel: hybrid language models, run, served, shrunk, taught and judged."""

__version__ = "0.1.0"
