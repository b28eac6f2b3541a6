"""What a tensor of ours looks like in a foreign file, and back: `mixers.spec.Transform`, on tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from tiercel.errors import UnsupportedError
from tiercel.families.family import Runs
from tiercel.mixers.spec import Transform
from tiercel.quant.types import BLOCKS

WHOLE = (
    "interleave",
    "groups",
    "column",
    "row",
    "neg_exp",
    "runs",
    "tiled",
)  # forms that cannot be cut into row blocks


def foreign_shape(form: Transform, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the file of a tensor that has `shape` here."""
    if form.name == "conv":
        return (shape[0], 1, *shape[1:])
    if form.name == "column":
        return (*shape, 1)
    if form.name == "row":
        return shape[1:]
    if form.name == "groups":
        return (form.n, shape[0] // form.n)
    if form.name == "runs":
        return (shape[0] // sum(form.sizes[i] for i in form.take) * sum(form.sizes), *shape[1:])
    return shape


def to_ours(form: Transform, x: Tensor) -> Tensor:
    """From the file's form to ours; neg_exp and plus_one answer in float64."""
    if form.name == "conv":
        return x.squeeze(1)
    if form.name == "column":
        return x.squeeze(-1)
    if form.name == "row":
        return x.unsqueeze(0)
    if form.name == "groups":
        return x.flatten()
    if form.name == "neg_exp":
        return x.double().neg().log()
    if form.name == "plus_one":
        return torch.add(x.double(), 1)
    if form.name == "runs":
        parts = torch.unflatten(x, 0, (form.n, -1)).split(_run_lengths(form, len(x)), 1)
        return torch.cat([parts[i].flatten(0, 1) for i in form.take])
    if form.name == "tiled":
        head, before = form.sizes
        tiled = torch.unflatten(x[before:], 0, (form.n, -1, head)).transpose(0, 1).flatten(0, 2)
        return torch.cat((x[:before], tiled))
    if form.name == "tiled_columns":
        return torch.unflatten(x, -1, (form.n, form.sizes[1], -1)).transpose(-3, -2).flatten(-3)
    assert form.name == "interleave"
    return torch.unflatten(x, 0, (form.n, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_foreign(form: Transform, x: Tensor) -> Tensor:
    """From our form to the file's; neg_exp and plus_one answer in float64."""
    if form.name == "conv":
        return x.unsqueeze(1)
    if form.name == "column":
        return x.unsqueeze(-1)
    if form.name == "row":
        return x.squeeze(0)
    if form.name == "groups":
        return torch.unflatten(x, 0, (form.n, -1))
    if form.name == "neg_exp":
        return x.double().exp().neg()
    if form.name == "plus_one":
        return torch.sub(x.double(), 1)
    if form.name == "runs":  # the other runs are zero: mappings of one tensor are added up
        whole = x.new_zeros(foreign_shape(form, tuple(x.shape)))
        lengths = _run_lengths(form, len(whole))
        runs = torch.unflatten(whole, 0, (form.n, -1)).split(lengths, 1)
        for i, part in zip(form.take, x.split([form.n * lengths[i] for i in form.take]), strict=True):
            runs[i].copy_(torch.unflatten(part, 0, (form.n, -1)))
        return whole
    if form.name == "tiled":
        head, before = form.sizes
        grouped = torch.unflatten(x[before:], 0, (-1, form.n, head)).transpose(0, 1).flatten(0, 2)
        return torch.cat((x[:before], grouped))
    if form.name == "tiled_columns":
        return torch.unflatten(x, -1, (form.sizes[1], form.n, -1)).transpose(-3, -2).flatten(-3)
    assert form.name == "interleave"
    return torch.unflatten(x, 0, (form.n, 2, -1)).transpose(1, 2).flatten(0, 2)


def _run_lengths(form: Transform, rows: int) -> list[int]:
    """Rows of each run of a head in a file's tensor of `rows` rows."""
    return [size * (rows // form.n) // sum(form.sizes) for size in form.sizes]


def scaled(x: Tensor, scale: float | Runs, start: int, *, inverse: bool = False) -> Tensor:
    """Rows start … of a tensor times their multiplier (or divided by it), wide enough to round only once later."""
    if scale == 1.0:
        return x
    x = x.double() if x.dtype in (torch.float32, torch.float64) else x.float()
    if isinstance(scale, tuple):
        per_row = torch.cat([torch.full((count,), value, dtype=x.dtype) for count, value in scale])
        factor = per_row[start : start + len(x)].view(-1, *[1] * (x.dim() - 1))
    else:
        factor = torch.tensor(scale, dtype=x.dtype)
    return x / factor if inverse else x * factor


def scaled_rows(type: str, raw: Tensor, scale: float | Runs, start: int, *, inverse: bool = False) -> Tensor:
    """`scaled` of packed rows: INT8 and NF4 have float32 scales, and only these change."""
    if scale == 1.0:
        return raw
    assert type in ("INT8", "NF4"), f"{type} has no place for a multiplier"
    fields = raw.view(*raw.shape[:-1], -1, raw.shape[-1] if type == "INT8" else 36).clone()  # (…, n, bytes)
    factors = scaled(fields[..., :4].contiguous().view(torch.float32), scale, start, inverse=inverse).float()
    fields[..., :4] = factors.view(torch.uint8).view(fields[..., :4].shape)
    return fields.view(raw.shape)


def check_packed(form: Transform, type: str) -> None:
    """Raise UnsupportedError where a form would cut the blocks of a packed type."""
    if form.name == "tiled_columns" and (type not in BLOCKS or form.sizes[0] % BLOCKS[type].values):
        raise UnsupportedError(
            f"rows of {type} cannot be put into another order of heads of {form.sizes[0]}: unpack them, or choose GGUF"
        )
