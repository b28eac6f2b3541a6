"""The public API, the command line and the settings of 002aba0 are all there, with the same defaults."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

import tiercel
import tiny
from golden.make_public_api import INSTANCE, public_api

GOLDEN = json.loads((Path(__file__).parent / "golden" / "public_api.json").read_text())


def missing(before: Any, now: Any, place: str) -> list[str]:
    """What was there and is not, or is another; a dict or a list of names may only grow."""
    if isinstance(before, dict):
        if not isinstance(now, dict):
            return [place]
        gone = [f"{place} {key}" for key in before if key not in now]
        kept = [key for key in before if key in now]
        return gone + [lost for key in kept for lost in missing(before[key], now[key], f"{place} {key}")]
    if isinstance(before, list) and place in ("tiercel", "Answer"):
        return [f"{place} {name}" for name in before if name not in now]
    return [] if before == now else [f"{place}: {now!r}, not {before!r}"]


@pytest.mark.parametrize("part", GOLDEN)
def test_nothing_public_goes_or_changes_its_default(part):
    assert missing(GOLDEN[part], json.loads(json.dumps(public_api()))[part], part) == []


@pytest.mark.parametrize("part", ["load", "pattern", "SamplingParams", "CompletionOutput", "RequestOutput"])
def test_arguments_keep_their_order(part):
    assert [name for name in public_api()[part] if name in GOLDEN[part]] == list(GOLDEN[part])


def test_a_lost_name_and_a_changed_default_are_seen():
    assert missing({"a": {"b": "1"}, "c": None}, {"a": {"b": "2"}}, "x") == ["x c", "x a b: '2', not '1'"]


def test_a_model_has_its_attributes_under_their_old_names_too(tmp_path):
    model = tiercel.load(tiny.checkpoint(tmp_path))
    assert [name for name in INSTANCE if not hasattr(model, name)] == []
    assert model.text is model.tokenizer
    model.text = None
    assert model.tokenizer is None


def test_the_modules_that_users_import_are_there():
    from tiercel.llm import LLM, Model, load

    assert (LLM, Model, load) == (tiercel.LLM, tiercel.Model, tiercel.load)


def public_functions():
    """Functions of `tiercel.__all__`, and the public methods of its classes but exceptions."""
    for name in tiercel.__all__:
        thing = getattr(tiercel, name)
        if inspect.isfunction(thing):
            yield name, thing
        elif not issubclass(thing, Exception):
            yield from ((f"{name}.{n}", f) for n, f in vars(thing).items() if inspect.isfunction(f) and n[0] != "_")


@pytest.mark.parametrize("name, function", public_functions(), ids=lambda value: value if type(value) is str else "")
def test_a_docstring_names_every_argument_and_what_is_returned(name, function):
    doc, signature = inspect.getdoc(function) or "", inspect.signature(function)
    arguments = [argument for argument in signature.parameters if argument != "self"]
    assert [a for a in arguments if not re.search(rf"^    {a}: ", doc.partition("Args:")[2], re.M)] == []
    assert signature.return_annotation == "None" or "Returns:\n" in doc or (not arguments and doc.startswith("Return "))
