"""Every recipe gives every tensor the type that llama.cpp's quantizer gives it (golden/recipes.json)."""

import json
import sys
from pathlib import Path

import pytest

from tiercel.families import from_hf
from tiercel.mixers.spec import Param
from tiercel.model.parameters import parameters
from tiercel.quant import PACKED_TYPES, fits
from tiercel.quant.recipes import RECIPES, file_type, find, quant_types

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
from make_recipes import CONFIGS, shortened  # noqa: E402

FOUND = json.loads((GOLDEN / "recipes.json").read_text())


@pytest.fixture(scope="module", params=CONFIGS)
def network(request):
    """(name, parameters)"""
    return request.param, parameters(from_hf(CONFIGS[request.param]).config)


def test_every_tensor_gets_the_type_llama_cpp_gives_it(network):
    name, params = network
    assert set(FOUND[name]) == set(RECIPES) - {"int8", "nf4"}
    for recipe, theirs in FOUND[name].items():
        ours = {}
        for tensor, type in quant_types(params, recipe).items():
            ours.setdefault(type, []).append(tensor)
        assert {type: shortened(names) for type, names in ours.items()} == theirs, recipe


def test_what_the_recurrence_rests_on_is_never_packed(network):
    _, params = network
    for recipe in RECIPES:
        for name, type in quant_types(params, recipe).items():
            leaf = name.rpartition(".")[2]
            assert leaf in ("weight", "gate", "up", "down") and "norm" not in name and "router" not in name
            assert type in PACKED_TYPES and fits(type, params[name].shape[-1])


def matrices(*entries):
    """(name, shape, role) → what `kinds` takes."""
    return {name: Param(name=name, shape=shape, hf="", gguf=None, role=role) for name, shape, role in entries}


def test_nf4_leaves_the_embedding_and_the_output_as_bitsandbytes_does():
    up = "layers.0.feed_forward.up.weight"
    ends = ("embed.weight", (10, 64), "embed"), ("head.weight", (10, 64), "output")
    params = matrices(ends[0], (up, (96, 64), "ffn_up"), ends[1])
    assert quant_types(params, "nf4") == {up: "NF4"}
    assert quant_types(params, "int8") == dict.fromkeys(params, "INT8")


@pytest.mark.parametrize(
    "width, types", [(256, "Q4_K Q5_K Q6_K NF4"), (96, "Q5_0 Q5_1 Q8_0 INT8"), (20, "None None None INT8")]
)
def test_rows_of_any_width_find_a_type_or_stay_as_they_are(width, types):
    name = "layers.0.mixers.mamba2.in_proj.weight"
    params = matrices(
        (name, (8, width), "other"), ("embed.weight", (9, 256), "embed"), ("head.weight", (9, 256), "output")
    )
    found = [quant_types(params, recipe).get(name) for recipe in ("q4_k_m", "q5_k_m", "q6_k", "nf4")]
    assert " ".join(map(str, found)) == types


def test_an_importance_protects_the_first_down_matrices_of_the_simplest_types():
    down = ((f"layers.{i}.feed_forward.down.weight", (8, 32), "ffn_down") for i in range(16))
    params = matrices(*down, ("head.weight", (8, 32), "output"))
    assert set(quant_types(params, "q4_0").values()) == {"Q4_0", "Q8_0"}
    first = [name for name, type in quant_types(params, "q4_0", importance=True).items() if type == "Q4_1"]
    assert first == [f"layers.{i}.feed_forward.down.weight" for i in range(2)]


def test_recipes_are_found_under_the_names_people_use():
    assert find("Q4_K_M") == find("q4_k") == "q4_k_m" and find("Q8_0") == "q8_0" and find("iq2_xs") is None


def test_a_file_is_called_after_what_most_of_it_is():
    assert file_type(["Q4_K"] * 5 + ["Q6_K", "F32"]) == 15
    assert [file_type([t]) for t in ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q3_K")] == [0, 1, 32, 7, 18, 12]
