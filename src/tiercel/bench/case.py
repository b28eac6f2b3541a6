"""What `tiercel bench` measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiercel.errors import RequestError

PEERS = ("llama.cpp", "transformers")  # what `vs` may name; see `peers.py`
SHORT_PROMPT = 16  # tokens read before the first one of an answer, where load and first token are timed

Report = Callable[[str, int, int], None]  # (what, done, total)


@dataclass(frozen=True)
class Case:
    """What to measure.

    model: anything `load` takes; with `random`, a named shape (`families.shapes`), a config.json or a pattern file
    prompts: prefill lengths · generate, context: tokens to decode, and of context before them · batch: rows at once
    random: the recipe of weights made on the spot · write: where to keep these as GGUF · vs: peers, see `peers.py`
    """

    model: str
    prompts: tuple[int, ...] = (512,)
    generate: int = 64
    context: int = 0
    batch: int = 1
    threads: int | None = None
    repeat: int = 5
    dtype: str = "auto"
    random: str | None = None
    write: Path | None = None
    vs: tuple[str, ...] = ()
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, least in (("generate", 0), ("context", 0), ("batch", 1), ("repeat", 1), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RequestError(f"{name} must be a whole number from {least}, not {value}")
        if any(length < 0 for length in self.prompts):
            raise RequestError("a prompt has a length from 0 (none is measured)")
        if not self.generate and not any(self.prompts):
            raise RequestError("nothing is left to measure: give --prompt or --generate a number above 0")
        if self.write is not None and (self.random is None or self.write.suffix != ".gguf"):
            raise RequestError("--write keeps random weights (--random) as a file whose name ends in .gguf")
        unknown = [peer for peer in self.vs if peer not in PEERS]
        if unknown:
            raise RequestError(f"no peer {unknown[0]!r}; known: {', '.join(PEERS)}")
        if self.device not in ("cpu", "cuda"):
            raise RequestError(f"a device is cpu or cuda, not {self.device!r}")
        if self.device != "cpu" and "llama.cpp" in self.vs:
            raise RequestError("llama.cpp is measured on the CPU: leave out --device or --vs llama.cpp")
        if self.batch > 1 and "llama.cpp" in self.vs:
            raise RequestError("llama-bench decodes one row at a time: leave out --batch or --vs llama.cpp")

    @property
    def round(self) -> dict[str, Any]:
        """What an engine is asked for."""
        prompts = [length for length in self.prompts if length]
        return {"prompts": prompts, "generate": self.generate, "context": self.context, "batch": self.batch}
