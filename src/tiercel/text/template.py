"""`tiercel.tokenizer.template` under its name in version 0.1."""

from tiercel.tokenizer.template import render

__all__ = ["render"]
