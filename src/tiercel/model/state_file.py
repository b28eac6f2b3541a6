"""States in files: another process continues where this one stopped.

safetensors, with every layer's tensors by its number, those of earlier snapshots beside them, the tokens, and in the
metadata what must be the same where the state goes on.  A checksum covers the whole file with zeros in its own place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tiercel import version
from tiercel.errors import FormatError
from tiercel.mixers.checks import MAX_SIZE
from tiercel.model.pages import PAGE, min_pos
from tiercel.model.state import Snapshot, State

FORMAT = "tiercel-state-3"
BLANK, SUM = "0" * 64, b'"sha256":"'
FILE_NAMES = {"conv_state": "columns", "ssm_state": "S"}  # buffers that have another name in files


def save(state: State, path: str | Path, tokens: Sequence[int] = (), earlier: Sequence[Snapshot] = ()) -> None:
    """Write a state to a file that names the model, its dtype and our version.

    Args:
        state: in the host's memory.
        path: of the file; replaced as a whole.
        tokens: of the sequence, for readers of the file.
        earlier: snapshots of the same sequence at lesser lengths; those whose keys the state has released are left out.
    """
    from safetensors.torch import save as to_bytes

    from tiercel.runtime.atomic import atomic_write

    tensors = {"tokens": torch.tensor(tokens, dtype=torch.int32)} if tokens else {}
    for i, part in enumerate(state.parts):
        tensors |= {f"{i}.{_in_file(k)}": t.contiguous() for k, t in part.tensors().items()}
    held = max((pages.min_pos for pages in state.groups), default=0)
    places = []
    for j, snapshot in enumerate(one for one in earlier if one.length >= held):
        places.append([snapshot.length, *(position for _, position in snapshot.layers)])
        for i, (layer, _) in enumerate(snapshot.layers):
            tensors |= {f"earlier.{j}.{i}.{_in_file(k)}": t.contiguous() for k, t in layer.items()}
    meta = _about(state) | {
        "length": str(state.length),
        "bases": ",".join(str(part.committed_pos) for part in state.parts),
        "earlier": ";".join(",".join(map(str, place)) for place in places),
        "sha256": BLANK,
    }
    data = to_bytes(tensors, meta)
    digest = hashlib.sha256(data).hexdigest()
    at = data.index(SUM) + len(SUM)
    with atomic_write(Path(path)) as file:
        file.write(memoryview(data)[:at])
        file.write(digest.encode())
        file.write(memoryview(data)[at + len(BLANK) :])


def load(state: State, path: str | Path) -> tuple[list[int], list[Snapshot]]:
    """Set a state in the host's memory to a saved one.

    Returns:
        The tokens and the earlier snapshots that were saved with it.

    Raises:
        FormatError: the file is damaged, or of another model, dtype or version.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            meta = dict(file.metadata() or {})
            for name, ours in _about(state).items():
                if meta.get(name) != ours:
                    raise FormatError(_differs(path, name, meta.get(name), ours))
            if not _sum_matches(path):
                raise FormatError(f"{path} is damaged: its checksum does not match")
            length, bases = int(meta["length"]), [int(b) for b in meta["bases"].split(",")]
            places = [[int(n) for n in place.split(",")] for place in meta["earlier"].split(";") if place]
            expected = _shapes(state, length, bases, places)
            if "tokens" in file.keys():  # noqa: SIM118  (a file, not a dict)
                expected["tokens"] = (length,)
            if set(file.keys()) != set(expected):
                raise FormatError(f"{path} does not hold the layers of this model")
            for name, shape in expected.items():
                if tuple(file.get_slice(name).get_shape()) != shape:
                    raise FormatError(f"{path}: {name} has an unexpected shape")
            tensors = {name: file.get_tensor(name) for name in expected}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise FormatError(f"{path} cannot be read as a saved state: {error}") from error
    state.assign(
        length,
        [
            ({k: tensors[f"{i}.{_in_file(k)}"] for k in part.shapes(length, base)}, base)
            for i, (part, base) in enumerate(zip(state.parts, bases, strict=True))
        ],
    )
    return tensors["tokens"].tolist() if "tokens" in tensors else [], _earlier(state, places, tensors)


def _about(state: State) -> dict[str, str]:
    """What must be the same where the state goes on."""
    return {
        "format": FORMAT,
        "version": version.__version__,
        "dtype": str(state.dtype).removeprefix("torch."),
        "model": state.model,
    }


def _in_file(name: str) -> str:
    return FILE_NAMES.get(name, name)


def _earlier(state: State, places: list[list[int]], tensors: dict[str, Tensor]) -> list[Snapshot]:
    """Snapshots of the first tokens of this sequence, from what a file holds."""
    whole, out = state.share_pages(()), []
    for j, (length, *positions) in enumerate(places):
        layers = [
            ({k: tensors[f"earlier.{j}.{i}.{_in_file(k)}"] for k in part.shapes(length, position)}, position)
            for i, (part, position) in enumerate(zip(state.recurrent, positions, strict=True))
        ]
        out.append(
            replace(whole, length=length, runs=tuple(run.cut(length) for run in whole.runs), layers=tuple(layers))
        )
    return out


def _shapes(state: State, length: int, bases: list[int], places: list[list[int]]) -> dict[str, tuple[int, ...]]:
    """Of every tensor that a file with these lengths must hold."""
    counts = [len(state.parts), *(len(state.recurrent) for _ in places)]
    sequences = [(length, bases), *((place[0], place[1:]) for place in places)]
    for (end, starts), count in zip(sequences, counts, strict=True):
        if len(starts) != count or not all(0 <= start <= end <= length < MAX_SIZE for start in starts):
            raise ValueError("its lengths do not fit together")
    for pages in state.groups:
        firsts = {base for part, base in zip(state.parts, bases, strict=True) if getattr(part, "pages", None) is pages}
        least = min_pos(max(firsts) // PAGE, pages.window)
        if len(firsts) > 1 or any(end < least for end, _ in sequences):
            raise ValueError("its pages do not fit together")
    out: dict[str, tuple[int, ...]] = {}
    for i, (part, base) in enumerate(zip(state.parts, bases, strict=True)):
        out |= {f"{i}.{_in_file(k)}": shape for k, shape in part.shapes(length, base).items()}
    for j, (end, *starts) in enumerate(places):
        for i, (part, base) in enumerate(zip(state.recurrent, starts, strict=True)):
            out |= {f"earlier.{j}.{i}.{_in_file(k)}": shape for k, shape in part.shapes(end, base).items()}
    return out


def _sum_matches(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.read(8)
        header = file.read(int.from_bytes(size, "little"))
        at = header.find(SUM) + len(SUM)
        digest = hashlib.sha256(size + header[:at] + BLANK.encode() + header[at + len(BLANK) :])
        while block := file.read(1 << 20):
            digest.update(block)
    return header[at : at + len(BLANK)] == digest.hexdigest().encode()


def _differs(path: Path, name: str, theirs: str | None, ours: str) -> str:
    if theirs is None or name == "format":
        return f"{path} is not a saved state of this version ({ours})"
    if name == "model":
        return f"{path} was saved by another model or dtype and cannot continue in this one"
    return f"{path} was saved with {name} {theirs[:40]} and cannot continue with {ours}: read the text again"
