"""Adapters in PEFT's form: a folder with adapter_config.json and adapter_model.safetensors.

    adapter = read(folder, layout)         LoRA made by PEFT over transformers' model, or by `tiercel train lora`
    export(Merged(source, adapter), out)   W + B A as a checkpoint

The files use the checkpoint's own names and values.  Where a multiplier stands between its values and ours
(`TensorMapping.scale`: ours = theirs × scale, row by row), B takes it: s (W + B A) = s W + (s B) A.
No PEFT is needed here.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tiercel.errors import FormatError, ModelNotFound, RequestError, TiercelError, UnsupportedError
from tiercel.families.family import Layout, TensorMapping
from tiercel.model.lora import Adapter
from tiercel.model.parameters import parameters
from tiercel.tokenizer.tokenizer import Tokenizer
from tiercel.weights.checkpoint import Source, parameter_shapes, read_json
from tiercel.weights.safetensors import open_safetensors
from tiercel.weights.stored import Stored
from tiercel.weights.transforms import foreign_shape, scaled, to_ours

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
FOLDED = "tiercel_folded"  # in the config: made over values that already hold the multipliers (a GGUF file's)
PREFIX = "base_model.model."
LORA_TENSOR = re.compile(
    r"(.+)\.lora_([AB])(?:\.\w+)?\.weight"
)  # with the adapter's name where a state dict was saved raw
# what would change the sum W + B A: named and refused where it is switched on
OTHERS = ("use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save", "target_parameters", "layer_replication",
          "alora_invocation_tokens", "trainable_token_indices", "use_bdlora", "arrow_config", "velora_config",
          "kasa_config", "monteclora_config")  # fmt: skip
# initial values of A and B that leave the base's matrices as they are, so that W + B A is meant
COLUMN_FORMS = ("tiled_columns",)  # transforms of a matrix's columns, which are those of A; others are of its rows, B's
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def is_adapter(path: str | Path) -> bool:
    return (Path(path) / CONFIG).is_file()


def linear_rows(layout: Layout) -> dict[str, TensorMapping]:
    """Return the checkpoint's names of linear layers that are one of ours as they are: what can be trained.

    Not those whose rows or columns lie in another order here, or that hold two matrices of ours.
    """
    linears = _linears(layout).items()
    return {name: rows[0] for name, rows in linears if len(rows) == 1 and not rows[0].hf_forms}


def _linears(layout: Layout) -> dict[str, list[TensorMapping]]:
    """Return the checkpoint's names of linear layers, and the rows of ours in each: several where two lie in one."""
    matrices = {name for name, p in parameters(layout.config).items() if len(p.shape) == 2} - {"embed.weight"}
    found: dict[str, list[TensorMapping]] = {}
    for row in layout.rows:
        if isinstance(row.hf, str) and row.ours in matrices and row.ours.endswith(".weight"):
            for name in row.names:
                found.setdefault(name.removesuffix(".weight"), []).append(row)
    if layout.config.tied:
        found.pop("lm_head", None)
    return found


def folds(layout: Layout) -> bool:
    """Whether the network's values hold multipliers that its file no longer holds: a GGUF file of such a family."""
    return layout.hf_config is None and layout.family.name == "falcon_h1"


def read(folder: str | Path, layout: Layout) -> Adapter:
    """An adapter for a network of that layout.

    Raises ModelNotFound, FormatError (damaged, or for another network), UnsupportedError (not plain LoRA).
    """
    folder = Path(folder)
    if not is_adapter(folder):
        raise ModelNotFound(f"{folder} is no adapter: it has no {CONFIG}")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise FormatError(f"{folder / CONFIG} must hold an object")
    _check_kind(config, folder, layout)
    if not (folder / TENSORS).exists() and (folder / PICKLE).exists():
        raise UnsupportedError(
            f"{folder} has its weights in {PICKLE}, a pickle, which is not read: load it in PEFT, and save it again as "
            "safetensors with save_pretrained"
        )
    with open_safetensors(folder / TENSORS) as file:
        return Adapter(digest(folder), _pairs(file.tensors, config, folder, layout))


def _pairs(
    tensors: Mapping[str, Stored], config: Mapping[str, Any], folder: Path, layout: Layout
) -> dict[str, tuple[Tensor, Tensor]]:
    """Our name of a Linear → A and B, all scales in B."""
    linears, shapes = _linears(layout), parameter_shapes(layout)
    halves: dict[str, dict[str, Stored]] = {}
    for name, tensor in tensors.items():
        found = LORA_TENSOR.fullmatch(name.removeprefix(PREFIX))
        if found is None or found[1] not in linears:
            raise _refused(folder, name, tensors, layout)
        if halves.setdefault(found[1], {}).setdefault(found[2], tensor) is not tensor:
            raise UnsupportedError(f"{folder} holds several adapters for {found[1]}: save each in a folder of its own")
    if not halves:
        raise FormatError(f"{folder / TENSORS} holds no adapter")
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, half in halves.items():
        rows = linears[name]
        N, K = _file_shape(rows[0], shapes[rows[0].ours])
        if set(half) != {"A", "B"}:
            raise FormatError(f"{folder}: {name} has only half of a pair")
        R = half["A"].shape[0] if half["A"].shape else 0
        if half["A"].shape != (R, K) or half["B"].shape != (N, R) or not 1 <= R <= largest_rank(N, K):
            shape = f"{half['A'].shape} and {half['B'].shape}"
            raise FormatError(
                f"{folder}: {name} is {N} × {K}, and A and B are {shape} (rank 1 to {largest_rank(N, K)})"
            )
        A, B = half["A"].rows().float(), half["B"].rows().float()
        if not bool(A.isfinite().all() and B.isfinite().all()):
            raise FormatError(f"{folder}: {name} holds numbers that are not finite")
        for row in rows:
            A_ours, B_ours = A, B
            for form in reversed(row.hf_forms):
                if form.name in COLUMN_FORMS:
                    A_ours = to_ours(form, A_ours)
                else:
                    B_ours = to_ours(form, B_ours)
            B_ours = scaled(B_ours, row.scale, 0) * _scaling(config, name, R, folder)
            pairs[row.ours.removesuffix(".weight")] = A_ours, B_ours.float()
    return pairs


def _file_shape(row: TensorMapping, shape: tuple[int, ...]) -> tuple[int, ...]:
    for form in row.hf_forms:
        shape = foreign_shape(form, shape)
    return shape


def largest_rank(outputs: int, inputs: int) -> int:
    """Return the largest rank that is read and trained; ranks beyond the matrix's own add nothing."""
    return max(outputs, inputs)


def _refused(folder: Path, name: str, tensors: Mapping[str, Stored], layout: Layout) -> TiercelError:
    """Return the error for a tensor that is no half of a pair we serve, by what it is."""
    module = re.sub(r"\.(base_layer|lora_\w+|modules_to_save|weight|bias|default).*$", "", name.removeprefix(PREFIX))
    leaf = module.rpartition(".")[2]
    vocabulary = leaf in ("embed_tokens", "embed_in", "embeddings", "wte", "lm_head")
    merged = "merge it in PEFT (merge_and_unload) and load the result"
    if vocabulary and layout.config.tied and any(f"{leaf}.lora_A" in other for other in tensors):
        return UnsupportedError(
            f"{folder}: trains {leaf}, which is tied to the embedding; only layers are served: {merged}"
        )
    if vocabulary and any(f"{leaf}.lora_embedding" in other for other in tensors):
        return UnsupportedError(f"{folder}: trains the embedding ({leaf}); only layers are served: {merged}")
    if vocabulary and ".lora_" not in name:
        return UnsupportedError(
            f"{folder}: holds a whole embedding or head ({leaf}), as added tokens need; only LoRA on layers is served: "
            f"{merged}, or save it without (save_embedding_layers=False)"
        )
    if "magnitude_vector" in name:
        return UnsupportedError(f"{folder}: is DoRA ({name[:120]!r}); plain LoRA is what is known here")
    names = {
        name
        for row in layout.rows
        if row.hf_forms or row.hf_rows
        for name in ([row.hf] if isinstance(row.hf, str) else row.hf)
    }
    if f"{module}.weight" in names:
        return UnsupportedError(
            f"{folder}: adapts {module}, which lies in another order here, or in a tensor with others: {merged}"
        )
    return FormatError(f"{folder}: {layout.family.name} has no place for {name[:120]!r}")


def digest(folder: Path) -> str:
    """What an adapter is known by: of its bytes, so that another one under its name is another."""
    h = hashlib.sha256()
    for file in (CONFIG, TENSORS):
        h.update(hashlib.sha256((folder / file).read_bytes()).digest())
    return h.hexdigest()[:24]


def _check_kind(config: Mapping[str, Any], folder: Path, layout: Layout) -> None:
    if config.get("peft_type") != "LORA":
        raise UnsupportedError(f"{folder} is a {str(config.get('peft_type'))[:40]} adapter; LoRA is what is known here")
    if config.get("bias", "none") != "none":
        raise UnsupportedError(f"{folder} trains biases (bias {str(config['bias'])[:20]!r}); only matrices are served")
    if found := next((name for name in OTHERS if config.get(name)), None):
        raise UnsupportedError(f"{folder} uses {found}; plain LoRA is what is known here")
    init = config.get("init_lora_weights", True)
    if not any(init is plain or (isinstance(init, str) and init.lower() == plain) for plain in PLAIN_INITS):
        raise UnsupportedError(
            f"{folder} was initialised by {str(init)[:40]!r}, which changes the base's matrices: save it as plain LoRA "
            "(PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if folds(layout) and not config.get(FOLDED):
        raise UnsupportedError(
            f"{folder} was made for a checkpoint with multipliers, and a GGUF file no longer holds them: "
            "load the folder the GGUF file was made from"
        )
    if config.get(FOLDED) and not folds(layout):
        raise UnsupportedError(f"{folder} was made over a GGUF file, whose values differ by multipliers: load that")


def _scaling(config: Mapping[str, Any], module: str, rank: int, folder: Path) -> float:
    """alpha / r, or alpha / √r; alpha may differ by module."""
    alpha = config.get("lora_alpha")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise FormatError(f"{folder / CONFIG}: alpha_pattern must be an object")
    for pattern, value in patterns.items():  # PEFT's regular expressions; here only names and ends of names
        name = pattern.removeprefix("^")
        if not re.fullmatch(r"[\w.]+", name):
            raise UnsupportedError(f"{folder / CONFIG}: alpha_pattern {pattern[:60]!r} is no module's name")
        if module == name or module.endswith(f".{name}"):
            alpha = value
            break
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise FormatError(f"{folder / CONFIG}: lora_alpha must be a number, not {alpha!r:.40}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


@dataclass
class Merged:
    """A source with an adapter added to its matrices.  What was packed is bfloat16 where the adapter reaches."""

    base: Source
    adapter: Adapter

    @property
    def layout(self) -> Layout:
        return self.base.layout

    def _pair(self, row: TensorMapping) -> tuple[Tensor, Tensor] | None:
        return self.adapter.pairs.get(row.ours.removesuffix(".weight"))

    def stored(self, row: TensorMapping) -> str:
        stored = self.base.stored(row)
        return stored if self._pair(row) is None or stored in ("F32", "F64", "BF16", "F16") else "BF16"

    def read(self, row: TensorMapping, start: int, stop: int) -> Tensor:
        x, pair = self.base.read(row, start, stop), self._pair(row)
        if pair is None:
            return x
        A, B = pair
        return x.double() + B[start:stop].double() @ A.double()

    def raw(self, row: TensorMapping, start: int, stop: int) -> Tensor:
        assert self._pair(row) is None, f"{row.ours} is merged, and not packed"
        return self.base.raw(row, start, stop)

    def tokenizer(self) -> Tokenizer | None:
        return self.base.tokenizer()


def merge(model: str | Path, adapter: str | Path, out: str | Path, *, dtype: str | None = None) -> Path:
    """Write a checkpoint with the adapter in its matrices: a .gguf file or a Hugging Face folder.

    dtype None: as stored; matrices that were packed and are changed become bfloat16, "float32" loses nothing.
    """
    from tiercel.weights.checkpoint import open_checkpoint
    from tiercel.weights.export import export

    source = open_checkpoint(model)
    if Path(out).resolve() == Path(adapter).resolve():
        raise RequestError(f"{out} is the adapter itself: choose another place")
    return export(Merged(source, read(adapter, source.layout)), out, dtype=dtype, name=Path(out).stem)
