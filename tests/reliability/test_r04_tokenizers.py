"""R4: mutated tokenizers are refused by a FormatError, or encode, save and open again with the same ids."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest

import tiny
from tiercel.errors import TiercelError
from tiercel.tokenizer.tokenizer import Tokenizer

VALUES: list[Any] = [
    None,
    True,
    0,
    1,
    -1,
    2**31,
    2**53,
    1.5,
    "",
    "a",
    "<|end|>",
    "\ud800",
    "x" * 5000,
    [],
    [1],
    {},
    {"a": 1},
]
TEXT = "Hello <|end|> wörld 12345\n\t 日本"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, Any]:
    folder = tiny.checkpoint(tmp_path_factory.mktemp("sound"), "mamba2")
    found = json.loads((folder / "tokenizer.json").read_text())
    found["model"]["vocab"] |= {"he": 259, "th": 260}
    found["model"]["merges"] = [["h", "e"], ["t", "h"]]
    for entry in found["added_tokens"]:
        entry["id"] += 100
    return found


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values, of long lists and tables a few."""
    found = [path] if path else []
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, inner in items[:6] + items[-4:] if len(items) > 10 else items:
        found += places(inner, (*path, key))
    return found


def mutated(sound: dict[str, Any], spots: list[tuple[Any, ...]], random: random.Random) -> Any:
    value = copy.deepcopy(sound)
    for _ in range(random.choice([1, 1, 2, 3])):
        path = random.choice(spots)
        holder = value
        try:
            for key in path[:-1]:
                holder = holder[key]
            kind = random.random()
            if kind < 0.15 and isinstance(holder, dict):
                del holder[path[-1]]
            elif kind < 0.3 and isinstance(holder, list):
                holder.append(copy.deepcopy(random.choice(holder)))
            elif isinstance(holder[path[-1]], int) and kind < 0.7:
                holder[path[-1]] += random.choice([-1, 1, 2, 100, 70_000])
            else:
                holder[path[-1]] = random.choice(VALUES)
        except (KeyError, IndexError, TypeError):
            continue
    return value


def test_mutated_tokenizers_are_refused_or_consistent(sound, tmp_path, cases, figure):
    spots, opened = places(sound), 0
    count = cases(150, 50_000)
    for case in range(count):
        made = mutated(sound, spots, random.Random(f"tokenizer {case}"))
        (tmp_path / "tokenizer.json").write_text(json.dumps(made))
        (tmp_path / "tokenizer_config.json").write_text("{}")
        try:
            tokenizer = Tokenizer.from_folder(tmp_path)
            assert tokenizer is not None
            ids = tokenizer.encode(TEXT, special=True)
            tokenizer.decode(ids, special=True)
            tokenizer.save(tmp_path / "out")
            again = Tokenizer.from_folder(tmp_path / "out")
            vocab = list(made["model"]["vocab"].values())  # two texts of one id are one after a round trip
            assert again is not None
            assert len(set(vocab)) < len(vocab) or again.encode(TEXT, special=True) == ids, case
            opened += 1
        except TiercelError as error:
            assert "\n" not in str(error) and len(str(error)) <= 1000, case
        except BaseException as error:
            raise AssertionError(f"case {case}: {error!r}") from error
    assert 0.02 < opened / count < 0.98
    what = f"{count} mutated tokenizers: {opened} open, and again with the same ids after saving"
    figure("R4", f"{what}; the others are refused in one line")
