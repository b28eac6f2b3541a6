"""`tiercel.tokenizer` under its name in version 0.1."""

from tiercel.tokenizer.stream import Piece, TextStream
from tiercel.tokenizer.tokenizer import Tokenizer as Text

__all__ = ["Piece", "Text", "TextStream"]
