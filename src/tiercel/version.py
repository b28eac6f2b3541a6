"""The version, by itself: files that name it need no more of the package."""

__version__ = "0.1.0"
