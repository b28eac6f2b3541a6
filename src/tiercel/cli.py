"""The command line by its first name; it is `commands.cli`."""

from tiercel.commands.cli import app

__all__ = ["app"]
