"""A network in which recurrent mixers stand in the place of some attention, with weights made from it.

    attention_layers(config)                      which layers have attention
    choose(teacher, count, "measured", …)         which of them keep it
    convert(teacher, layers, mixer, …)            the new network
    matching_loss(teacher, places)                |new mixer(h) − attention(h)|² on the teacher's own inputs h

Letters: T tokens, D width, I inputs of an output projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from tiercel.errors import RequestError
from tiercel.mixers.registry import MIXERS
from tiercel.mixers.spec import MixerSpec
from tiercel.mixers.take_over import least_squares
from tiercel.model.block import Block
from tiercel.model.config import ModelConfig
from tiercel.model.decoder import Decoder
from tiercel.model.initialize import initialize
from tiercel.train.data import Rows
from tiercel.train.loop import Loss
from tiercel.train.loss import next_token_loss

Places = Mapping[int, tuple[str, str]]  # layer → (kind of the teacher's mixer, kind of the one in its place)
Seen = Callable[[int, tuple[Any, ...], Tensor], Any]  # layer, a mixer's arguments, its output → another output or None


def attention_layers(config: ModelConfig) -> list[int]:
    """The layers with a mixer whose memory grows with every token."""
    return [i for i, layer in enumerate(config.layers) if any(mixer.grows for mixer in layer.mixers)]


def evenly(layers: Sequence[int], count: int) -> list[int]:
    """`count` of the layers, each in the middle of an equal part of them."""
    return [layers[int((i + 0.5) * len(layers) / count)] for i in range(count)]


def converted(config: ModelConfig, layers: Sequence[int], mixer: str) -> tuple[ModelConfig, Places]:
    """The config with a mixer of this word in place of the attention of these layers.

    Raises:
        RequestError: there is no such mixer, no conversion to it, or a layer has one already.
    """
    words, places = MIXERS.words(), dict[int, tuple[str, str]]()
    if mixer not in _recurrent_words():
        raise RequestError(f"--mixer {mixer!r} is not known; choose from {', '.join(_recurrent_words())}")
    changed = list(config.layers)
    for i in layers:
        old = next(m for m in config.layers[i].mixers if m.grows)
        new = words[mixer].in_place_of(old)
        if any(m.kind == new.kind for m in config.layers[i].mixers):
            others = [word for word in _recurrent_words() if word != mixer]
            raise RequestError(f"layer {i} has a {mixer} beside its attention: choose --mixer {' or '.join(others)}")
        mixers = tuple(new if m is old else m for m in config.layers[i].mixers)
        changed[i] = replace(config.layers[i], mixers=mixers)
        places[i] = old.kind, new.kind
    return replace(config, layers=tuple(changed)), places


def _mixer(network: Decoder, layer: int, kind: str) -> Any:
    return cast(Block, network.layers[layer]).mixers[kind]


def _recurrent_words() -> list[str]:
    return [word for word, spec in MIXERS.words().items() if "in_place_of" in vars(spec)]


@contextmanager
def watching(teacher: Decoder, places: Places, seen: Seen) -> Iterator[None]:
    """Within, `seen` is called at each of these layers' attention; what it returns stands for the output."""
    with ExitStack() as stack:
        for i, (kind, _) in places.items():
            mixer = _mixer(teacher, i, kind)
            handle = mixer.register_forward_hook(partial(_call, seen, i))
            stack.callback(handle.remove)
        yield


def _call(seen: Seen, layer: int, mixer: nn.Module, given: tuple[Any, ...], out: Tensor) -> Any:
    return seen(layer, given, out)


@torch.no_grad()
def convert(
    teacher: Decoder, layers: Sequence[int], mixer: str, rows: Sequence[Rows], seed: int
) -> tuple[Decoder, Places]:
    """The network with a mixer of this word in place of the attention of these layers.

    Args:
        teacher: float32; all that is not replaced is copied.
        layers: where attention is replaced.
        mixer: a word of patterns.
        rows: tokens from which gates and output projections are computed.
        seed: of the parameters that attention does not have.

    Returns:
        The network, where the teacher is, and what stands in place of what.

    Raises:
        RequestError: as `converted`.
    """
    config, places = converted(teacher.config, layers, mixer)
    network = Decoder(config)
    initialize(network, seed)
    network.to(teacher.device)
    own = dict(network.named_parameters())
    for name, p in teacher.named_parameters():
        if name in own:
            own[name].copy_(p)
    new = {i: _mixer(network, i, kind) for i, (_, kind) in places.items()}
    sums = _sums(teacher, places, rows, lambda _, given, out: (given[0], torch.ones_like(out[:, :1])))
    for i, (gram, total) in sums.items():
        one_D = least_squares(gram, total)[0].to(gram.dtype)
        new[i].take_over(_mixer(teacher, i, places[i][0]), one_D)
    specs = {i: next(m for m in config.layers[i].mixers if m.kind == kind) for i, (_, kind) in places.items()}
    projections = {i: _projection(specs[i], new[i], config.width) for i in places}

    def inputs(i: int, given: tuple[Any, ...], out: Tensor) -> tuple[Tensor, Tensor]:
        found: list[Tensor] = []
        handle = projections[i].register_forward_pre_hook(lambda _, args: found.append(args[0]))
        new[i](*given)
        handle.remove()
        bias = projections[i].bias
        return found[0], out if bias is None else out - bias

    for i, (gram, cross) in _sums(teacher, places, rows, inputs).items():
        projections[i].weight.copy_(least_squares(gram, cross))
    return network.train(), places


def _sums(
    teacher: Decoder,
    places: Places,
    rows: Sequence[Rows],
    pair: Callable[[int, tuple[Any, ...], Tensor], tuple[Tensor, Tensor]],
) -> dict[int, tuple[Tensor, Tensor]]:
    """For each layer Σ x xᵀ and Σ x yᵀ over the counted tokens, of the x and y that `pair` makes at its attention."""
    sums: dict[int, tuple[Tensor, Tensor]] = {}
    for part in rows:

        def seen(i: int, given: tuple[Any, ...], out: Tensor, part: Rows = part) -> None:
            x_TI, y_TD = (t[part.counted_T].float() for t in pair(i, given, out))
            more = x_TI.T @ x_TI, x_TI.T @ y_TD
            sums[i] = (sums[i][0] + more[0], sums[i][1] + more[1]) if i in sums else more

        with watching(teacher, places, seen):
            teacher.hidden_states(part.tokens_BL, part.batch)
    return sums


def _projection(spec: MixerSpec, module: Any, width: int) -> nn.Linear:
    """The matrix of a mixer that writes into the residual stream."""
    name = next(p.name for p in spec.params(width) if p.init == "residual" and len(p.shape) == 2)
    found: nn.Linear = module.get_submodule(name.removesuffix(".weight"))
    return found


@torch.no_grad()
def choose(
    teacher: Decoder, count: int, how: str, mixer: str, rows: Sequence[Rows], seed: int
) -> tuple[list[int], dict[int, float]]:
    """The layers that keep their attention.

    Args:
        teacher: as of `convert`, and so are mixer, rows and seed.
        count: of layers.
        how: "even", or "measured": where a converted mixer in the place of this layer's attention alone raises the loss
            most.

    Returns:
        The layers, rising; and for each layer with attention the rise in nats a token, where it was measured.
    """
    layers = attention_layers(teacher.config)
    if how == "even":
        return evenly(layers, count), {}
    network, places = convert(teacher, layers, mixer, rows, seed)
    before, rise = _loss(teacher, rows), {}
    for i, (_, kind) in places.items():
        with watching(teacher, {i: places[i]}, partial(_instead, _mixer(network, i, kind))):
            rise[i] = _loss(teacher, rows) - before
    return sorted(sorted(layers, key=lambda i: -rise[i])[:count]), rise


def _instead(new: nn.Module, layer: int, given: tuple[Any, ...], out: Tensor) -> Any:
    return new(*given)


def _loss(network: Decoder, rows: Sequence[Rows]) -> float:
    return sum(float(next_token_loss(network, part)) for part in rows) / sum(part.count for part in rows)


def matching_loss(teacher: Decoder, places: Places) -> Loss:
    """The loss of matching: |new(h) − attention(h)|² / mean |attention(h)|² summed over tokens, the mean of the layers.

    The new mixers read what the teacher's attention reads (hidden-state alignment, Bick et al. 2024, section 3.2), so
    that all layers learn at once and none waits for another.
    """

    def loss(network: Decoder, rows: Rows) -> Tensor:
        parts: list[Tensor] = []
        seen_at: list[tuple[int, tuple[Any, ...], Tensor]] = []
        with torch.no_grad(), watching(teacher, places, lambda *seen: seen_at.append(seen)):
            teacher.hidden_states(rows.tokens_BL, rows.batch)
        for i, given, wanted_TD in seen_at:
            wanted_TD = wanted_TD[rows.counted_T].float()
            found_TD = _mixer(network, i, places[i][1])(*given)[rows.counted_T].float()
            parts.append((found_TD - wanted_TD).square().sum() / wanted_TD.square().sum().clamp(min=1e-30))
        return torch.stack(parts).mean() * rows.count

    return loss
