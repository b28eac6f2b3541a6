"""Which tensor gets which type.  A recipe has a base type and spends more bits where errors cost most.

    output (the embedding too, when it is the output)     Q6_K, or Q8_0
    attention v, feed-forward down, attention o           more bits in some layers, as the table says
    everything else with two axes or more                 the base type
    norms, convolutions, A, D, dt bias, router, biases    never packed

The choices are those of llama.cpp's quantizer (src/llama-quant.cpp, llama_tensor_get_type), so that a file of ours
is laid out as its own; ours beside them are int8 and nf4.  One difference: rows that no block size divides stay
as they are stored, where llama.cpp would write float16.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from tiercel.mixers.spec import Param
from tiercel.quant.types import fits


class Place(NamedTuple):
    """Where a tensor stands: the i-th of n tensors of its role, and how many query heads share a key head."""

    i: int
    n: int
    queries_per_key: int


Rule = Callable[[Place], str]


def _early_late_and_every_third(at: Place) -> bool:
    """The first and the last eighth, and every third tensor between them."""
    eighth = at.n // 8
    return at.i < eighth or at.i >= 7 * at.n // 8 or (at.i - eighth) % 3 == 2


def _more(base: str, better: str) -> Rule:
    return lambda at: better if _early_late_and_every_third(at) else base


class Recipe(NamedTuple):
    """file_type: general.file_type of a GGUF file · v, down, o: rules for these roles, None for the base type.

    qkv: the type of q, k and v where files hold them in one matrix.
    """

    base: str
    file_type: int | None
    v: Rule | None = None
    down: Rule | None = None
    o: Rule | None = None
    qkv: str | None = None


RECIPES: dict[str, Recipe] = {
    "q4_0": Recipe("Q4_0", 2),
    "q4_1": Recipe("Q4_1", 3),
    "q5_0": Recipe("Q5_0", 8),
    "q5_1": Recipe("Q5_1", 9),
    "q8_0": Recipe("Q8_0", 7),
    "q2_k": Recipe(
        "Q2_K", 10, v=lambda at: "Q4_K" if at.queries_per_key >= 4 else "Q3_K", down=lambda at: "Q3_K",
        o=lambda at: "Q3_K",
    ),
    "q3_k_s": Recipe("Q3_K", 11),
    "q3_k_m": Recipe(
        "Q3_K", 12, v=lambda at: "Q5_K" if at.i < 2 else "Q4_K",
        down=lambda at: "Q5_K" if at.i < at.n // 16 else "Q4_K", o=lambda at: "Q4_K",
        qkv="Q4_K",
    ),
    "q3_k_l": Recipe("Q3_K", 13, v=lambda at: "Q5_K", down=lambda at: "Q5_K", o=lambda at: "Q5_K", qkv="Q4_K"),
    "q4_k_s": Recipe(
        "Q4_K", 14, v=lambda at: "Q5_K" if at.i < 4 else "Q4_K",
        down=lambda at: "Q5_K" if at.i < at.n // 8 else "Q4_K",
    ),
    "q4_k_m": Recipe("Q4_K", 15, v=_more("Q4_K", "Q6_K"), down=_more("Q4_K", "Q6_K"), qkv="Q5_K"),
    "q5_k_s": Recipe("Q5_K", 16),
    "q5_k_m": Recipe("Q5_K", 17, v=_more("Q5_K", "Q6_K"), down=_more("Q5_K", "Q6_K"), qkv="Q6_K"),
    "q6_k": Recipe("Q6_K", 18),
    "int8": Recipe("INT8", None),  # every matrix, one scale per row
    "nf4": Recipe("NF4", None),  # as bitsandbytes: embedding and output stay as they are
}  # fmt: skip
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}  # llama.cpp's too

NARROWER = {  # rows that are not made of blocks of 256 (64 for NF4) take the next better type with shorter blocks
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "NF4": "INT8",
}
Q5_OUT = ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m")  # with eight experts: attention o in Q5_K


def find(name: str) -> str | None:
    """The recipe meant by a name in any spelling of case: "Q4_K_M", "q4_k" → "q4_k_m"; None for no recipe."""
    name = name.lower()
    name = ALIASES.get(name, name)
    return name if name in RECIPES else None


def quant_types(params: Mapping[str, Param], recipe: str, *, importance: bool = False) -> dict[str, str]:
    """Our parameter name → the type it is packed in; a name that is left out stays unpacked.

    params: all parameters of the network, layers in order (`model.parameters`); without `head.weight` the embedding
    is the output.  importance: whether an importance matrix is there (llama.cpp then protects the first `down`
    matrices of Q4_0 and Q5_0).
    """
    chosen = RECIPES[recipe]
    matrices = {name: param for name, param in params.items() if param.packs}
    layers = 1 + max((_layer(name) for name in params if name.startswith("layers.")), default=-1)
    experts = next((param.shape[0] for param in matrices.values() if len(param.shape) == 3), 1)
    shared = _queries_per_key(params)
    attentions = sum(param.role == "attn_v" for param in matrices.values())
    is_70b = layers == attentions == 80 and shared > 1
    seen = {"attn_v": 0, "ffn_down": 0}
    found: dict[str, str] = {}
    for name, param in matrices.items():
        role, row = param.role, param.shape[-1]
        quant_type: str | None = chosen.base
        if role == "output" or (role == "embed" and "head.weight" not in params):
            quant_type = output(chosen.base, row)
        elif role == "embed":
            quant_type = None if chosen.base == "NF4" else chosen.base
        elif chosen.file_type is None:
            pass  # our own recipes know one type
        elif role == "attn_qkv":
            quant_type = chosen.qkv or chosen.base
        elif role == "attn_v":
            place = Place(seen[role], attentions, shared)
            quant_type = chosen.v(place) if chosen.v else chosen.base
            if is_70b and quant_type in ("Q3_K", "Q4_K"):
                quant_type = "Q5_K"
            quant_type = "Q8_0" if experts == 8 else quant_type
        elif role == "attn_k" and experts == 8:
            quant_type = "Q8_0"
        elif role == "ffn_down":
            # the i-th of its role, but the i-th layer in models with experts, where not every layer has them
            place = Place(_layer(name) if experts > 1 else seen[role], layers, shared)
            quant_type = chosen.down(place) if chosen.down else chosen.base
            if importance and chosen.base in ("Q4_0", "Q5_0") and place.i < place.n // 8:
                quant_type = {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}[chosen.base]
        elif role == "attn_output" and experts == 8:
            quant_type = "Q5_K" if recipe in Q5_OUT else chosen.base
        elif role == "attn_output" and chosen.o:
            quant_type = chosen.o(Place(0, 1, shared))
        if role in seen:
            seen[role] += 1
        if quant_type is not None and not fits(quant_type, row):
            quant_type = NARROWER.get(quant_type)
        if quant_type is not None and fits(quant_type, row):
            found[name] = quant_type
    return found


def output(base: str, row: int) -> str | None:
    """The type of the output projection where everything else has the base type."""
    if base == "NF4":
        return None
    if base == "INT8" or base == "Q8_0":
        return base
    return "Q6_K" if fits(base, row) else "Q8_0"


def file_type(types: Iterable[str]) -> int:
    """general.file_type of a GGUF file whose matrices have these types: the name of what most of them are.

    A base type that several recipes share counts as the most usual of them: Q4_K as Q4_K_M.
    """
    counts = Counter(type for type in types if type != "F32")
    if not counts:
        return 0
    most = max(counts, key=lambda type: (counts[type], type))
    plain = {"F16": 1, "BF16": 32}
    return plain[most] if most in plain else FILE_TYPES[most]


FILE_TYPES = {recipe.base: recipe.file_type or 0 for recipe in RECIPES.values()}  # the last recipe of a base counts
FILE_TYPES["Q3_K"] = 12


def _layer(name: str) -> int:
    return int(name.split(".")[1])


def _queries_per_key(params: Mapping[str, Param]) -> int:
    """Of the first layer; 0 when it has no attention."""
    rows = {p.role: p.shape[0] for name, p in params.items() if name.startswith("layers.0.") and len(p.shape) > 1}
    return rows["attn_q"] // rows["attn_k"] if "attn_q" in rows and "attn_k" in rows else 0
