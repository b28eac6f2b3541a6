"""The network: embed → blocks → norm → logits.  One forward for a prompt, a chunk of it, and one step.

Letters: T tokens of all rows together, L of one row, D width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, cast, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tiercel.errors import RequestError
from tiercel.model.batch import Batch
from tiercel.model.block import Block
from tiercel.model.config import ModelConfig
from tiercel.model.layers import Embedding, Linear, RMSNorm, pack, set_weight
from tiercel.model.lora import Adapters
from tiercel.model.state import State
from tiercel.model.varlen import VarlenBatch
from tiercel.ops.cpu import native
from tiercel.ops.qtensor import QTensor, torch_multiplies_bf16
from tiercel.runtime.allocator import CachingAllocator, default_allocator


class LayerStates(Protocol):
    """States of one sequence (`State`) or of all (`StateCache`), by layer and mixer."""

    @property
    def layers(self) -> Sequence[Sequence[Any]]: ...


class AnyBatch(Protocol):
    """What a forward needs of a batch (`Batch`, `state_cache.DeviceBatch`) besides what its mixers do."""

    native: bool
    lengths: list[int]
    spans: list[slice]
    last_B: Tensor | None

    @property
    def adapters(self) -> Sequence[str | None]: ...


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.width, config.embed_scale / config.residual_scale)
        self.layers = nn.ModuleList(
            Block(layer, config.width, config.norm_eps, config.stream_eps) for layer in config.layers
        )
        self.norm = RMSNorm(config.width, config.stream_eps)
        self.head = Linear(config.width, config.vocab_size, bias=False)
        self._tie()
        self.adapters = Adapters(self)
        self.layout_version = 0  # raised when weights are laid out anew: what was captured of them is void then

    @overload
    def forward(self, tokens: Tensor, states: State | None = None, *, logits_to_keep: int | None = None) -> Tensor: ...
    @overload
    def forward(
        self, tokens: Sequence[Tensor], states: Sequence[State] | None = None, *, logits_to_keep: int | None = None
    ) -> list[Tensor]: ...

    def forward(
        self,
        tokens: Tensor | Sequence[Tensor],
        states: State | Sequence[State] | None = None,
        *,
        logits_to_keep: int | None = None,
    ) -> Tensor | list[Tensor]:
        """Return the logits of each token's successor.

        Args:
            tokens: int64: one row (L,), a (B, L) tensor, or a list of rows of any lengths.
            states: one for each row, which goes on where its state ended; the states grow, and there are no gradients.
            logits_to_keep: how many of every row's last tokens get logits; None: all.

        Returns:
            Float32: (L, V) for one row, (B, L, V) for a tensor, a list of (L, V) for a list.

        Raises:
            RequestError: an empty row, a token outside the vocabulary, or states that do not fit the rows.
        """
        if isinstance(tokens, Tensor) and tokens.dim() == 1:
            one = None if states is None else [cast(State, states)]
            return self._rows([tokens], one, logits_to_keep)[0]
        rows = self._rows(list(tokens), cast("Sequence[State] | None", states), logits_to_keep)
        return torch.stack(rows) if isinstance(tokens, Tensor) else rows

    def _rows(self, rows: list[Tensor], states: Sequence[State] | None, logits_to_keep: int | None) -> list[Tensor]:
        if states is None and self.native and not torch.is_grad_enabled():
            states = [self.new_state() for _ in rows]
        lengths = [len(row) for row in rows]
        if states is None:
            tokens_T = self.check(rows)
            return self.logits(tokens_T, Batch(lengths, None, tokens_T.device), None, logits_to_keep)
        with torch.no_grad(), self.growing(rows, states) as tokens_T:
            return self.logits(tokens_T, Batch(lengths, states, tokens_T.device), states, logits_to_keep)

    @contextmanager
    def growing(self, rows: Sequence[Tensor], states: Sequence[State]) -> Iterator[Tensor]:
        """Around a forward of rows over their states: checks, memory before it, and lengths after it.

        Yields:
            int64 (T,): all rows' tokens.

        Raises:
            RequestError: as `forward`.
        """
        tokens_T = self.check(rows, states)
        for row, state in zip(rows, states, strict=True):
            state.validate()
            state.reserve(len(row))
        yield tokens_T
        for row, state in zip(rows, states, strict=True):
            state.length += len(row)

    def logits(
        self, tokens_T: Tensor, batch: Batch, states: Sequence[State] | None, logits_to_keep: int | None
    ) -> list[Tensor]:
        """`compute`, cut into a tensor for each row."""
        lengths = [length if logits_to_keep is None else min(logits_to_keep, length) for length in batch.lengths]
        return list(self.compute(tokens_T, batch, states, logits_to_keep).split(lengths))

    def compute(
        self,
        tokens_T: Tensor,
        batch: AnyBatch,
        states: Sequence[LayerStates] | None,
        logits_to_keep: int | None = None,
    ) -> Tensor:
        """Return the logits of one forward; states are read and written, their lengths are the caller's.

        Args:
            tokens_T: int64 (T,): all rows' tokens, one row after another.
            batch: which rows these are, on the device of the states.
            states: one for each row, or the one that holds all of them (`StateCache`); what the batch was made for.
            logits_to_keep: how many of every row's last tokens get logits; None: all.

        Returns:
            (T, V) float32, or of the tokens that are kept.
        """
        lengths = batch.lengths
        # with states there are no gradients; the logits, made outside of the mode, are tensors like any other
        adapters = batch.adapters if any(batch.adapters) else []
        try:
            if adapters:
                self.adapters.set_active(adapters, lengths)
            with nullcontext() if states is None else torch.inference_mode():
                x_TD = self._body(tokens_T, batch, states)
            if batch.last_B is not None:
                x_TD = x_TD[batch.last_B]
            elif logits_to_keep is not None and any(length > logits_to_keep for length in lengths):
                x_TD = torch.cat([x_TD[span][-logits_to_keep:] for span in batch.spans])
                if adapters:
                    self.adapters.set_active(adapters, [min(logits_to_keep, length) for length in lengths])
            return self.head(self.norm(x_TD), self.config.logit_scale).float()
        finally:
            if adapters:
                self.adapters.clear_active()

    def _body(self, tokens_T: Tensor, batch: AnyBatch, states: Sequence[LayerStates] | None) -> Tensor:
        """The blocks' output for the tokens, (T, D)."""
        x_TD: Tensor = self.embed(tokens_T)
        if self.config.residual_fp32 or batch.native:
            x_TD = x_TD.float()
        for i, block in enumerate(self.layers):
            x_TD = block(x_TD, batch, self._layer_states(i, states, len(batch.lengths)))
        return x_TD

    def hidden_states(self, tokens: Tensor, context: State | VarlenBatch) -> Tensor:
        """Return the outputs of the last norm, the inputs of `head`.

        Args:
            tokens: int64 (L,), or (B, L) for a `VarlenBatch`.
            context: the state that the tokens continue, which grows, without gradients; or, for training, the
                documents that the rows consist of.

        Returns:
            (T, D); float32 with a state.

        Raises:
            RequestError: no tokens, or one outside the vocabulary.
        """
        if isinstance(context, VarlenBatch):
            return self._training_states(tokens, context)
        state = context
        try:
            with self.growing([tokens], [state]) as tokens_L, torch.inference_mode():
                self.adapters.set_active([state.adapter], [len(tokens_L)])
                x_LD = self._body(tokens_L, Batch([len(tokens_L)], [state], tokens_L.device), [state])
                return self.norm(x_LD).float()
        finally:
            self.adapters.clear_active()

    def _training_states(self, tokens_BL: Tensor, batch: VarlenBatch) -> Tensor:
        x_TD, is_bf16 = self.embed(tokens_BL.flatten()), self.dtype == torch.bfloat16
        if self.config.residual_fp32 or is_bf16:
            x_TD = x_TD.float()
        # between bfloat16 matrices the products of attention and scans are rounded as theirs are
        rounding = torch.autocast(x_TD.device.type, torch.bfloat16) if is_bf16 else nullcontext()
        with rounding:
            for i, block in enumerate(self.layers):
                nothing = self._layer_states(i, None, len(batch.lengths))
                if batch.recompute and torch.is_grad_enabled():
                    x_TD = checkpoint(block, x_TD, batch, nothing, use_reentrant=False)
                else:
                    x_TD = block(x_TD, batch, nothing)
        return self.norm(x_TD)

    def _layer_states(self, layer: int, states: Sequence[LayerStates] | None, rows: int) -> list[list[Any]]:
        """For every mixer of a layer, the state of each row."""
        mixers = len(self.config.layers[layer].mixers)
        if states is None:
            return [[None] * rows] * mixers
        return [[state.layers[layer][j] for state in states] for j in range(mixers)]

    def check(self, rows: Sequence[Tensor], states: Sequence[State] | None = None) -> Tensor:
        """All rows' tokens (T,), which the vocabulary has; RequestError as in `forward`."""
        if not rows or any(row.dim() != 1 or len(row) == 0 for row in rows):
            raise RequestError("a forward needs at least one token in every row")
        if states is not None and (len(states) != len(rows) or len({id(s) for s in states}) != len(rows)):
            raise RequestError(f"{len(rows)} rows need {len(rows)} different states, not {len(states)}")
        V, tokens_T = self.config.vocab_size, torch.cat(list(rows))
        low, high = torch.aminmax(tokens_T)
        if low < 0 or high >= V:
            raise RequestError(f"token id {int(low if low < 0 else high)} is outside the vocabulary of {V}")
        return tokens_T

    # ── plain for training, packed for running ──

    def pack(self) -> None:
        """Lay all weights out for running, where there are kernels: matrices in panels, the rest in float32."""
        if not native.available:
            return
        for module in self.modules():
            for name, p in list(module._parameters.items()):
                if p is None or (module is self.head and self.config.tied):
                    continue
                matrix = (isinstance(module, (Linear, Embedding)) and name == "weight") or p.dim() == 3
                packed = pack(p) if matrix else None
                if packed is not None:
                    set_weight(module, name, packed)
                elif not matrix and p.dtype == torch.bfloat16:
                    set_weight(module, name, nn.Parameter(p.detach().float(), requires_grad=False))
        self._tie()
        self.layout_version += 1

    def unpack(self) -> None:
        """Plain tensors again, for training, other devices, copies, state dicts.  What is quantized stays packed."""
        for module in self.modules():
            for name, value in list(vars(module).items()):
                if isinstance(value, QTensor) and not value.packed and module is not self.head:
                    set_weight(module, name, nn.Parameter(value.numbers(), requires_grad=False))
                elif isinstance(value, list) and value and isinstance(value[0], QTensor) and not value[0].packed:
                    stack = torch.stack([expert.numbers() for expert in value])
                    set_weight(module, name, nn.Parameter(stack, requires_grad=False))
        if not self.config.tied and isinstance(self.head.weight, QTensor) and not self.head.weight.packed:
            set_weight(self.head, "weight", nn.Parameter(self.head.weight.numbers(), requires_grad=False))
        self._tie()
        self.layout_version += 1

    def _tie(self) -> None:
        if self.config.tied:
            set_weight(self.head, "weight", self.embed.weight)

    def train(self, mode: bool = True) -> Decoder:
        if mode and not (self.frozen and self.dtype == torch.bfloat16 and not torch_multiplies_bf16()):
            self.unpack()
        return super().train(mode)

    @property
    def frozen(self) -> bool:
        """Whether PEFT's adapters are what is trained: then what the kernels read may stay as they read it."""
        return any(".lora_" in name for name, p in self.named_parameters() if p.requires_grad)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Decoder:
        probe = torch.empty(0)
        if not (self.frozen and fn(probe) is probe):
            self.unpack()  # packed weights have one device and one dtype
        if isinstance(self.embed.weight, QTensor) and fn(torch.empty(0)).device.type != "cpu":
            raise RequestError("quantized weights run on the CPU; load the model with dtype='bfloat16' to move it")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def native(self) -> bool:
        """Whether all matrices lie as the native kernels read them."""
        return isinstance(self.embed.weight, QTensor) and self.embed.weight.repacked

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.embed.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """What states keep of the inputs: that of the matrices, bfloat16 beside quantized ones."""
        weight = self.embed.weight
        packed = isinstance(weight, QTensor) and weight.packed
        return torch.bfloat16 if packed and (self.native or weight.device.type == "cuda") else weight.dtype

    def new_state(self, adapter: str | None = None, allocator: CachingAllocator | None = None) -> State:
        """Return an empty state for one sequence.

        Args:
            adapter: the LoRA adapter that it uses.
            allocator: where its memory comes from; by default one that all networks share.

        Raises:
            RequestError: there is no adapter of that name.
        """
        model = self.fingerprint if adapter is None else f"{self.fingerprint}+{self.adapters[adapter].id}"
        mixers = [layer.mixers for layer in self.config.layers]
        return State(mixers, self.dtype, self.device, model, allocator or default_allocator, adapter)

    def host_state(self, adapter: str | None = None, allocator: CachingAllocator | None = None) -> State:
        """Return an empty state for reading and writing files."""
        return self.new_state(adapter, allocator)

    @property
    def fingerprint(self) -> str:
        """Names this network in saved states: its configuration, dtype and a sample of its weights."""
        if not hasattr(self, "_fingerprint"):
            h = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode() + str(self.dtype).encode())
            ends = torch.tensor([0, self.config.vocab_size - 1], device=self.embed.weight.device)
            sample = [self.embed(ends), self.norm.weight]
            sample += [
                p
                for name, p in self.named_parameters()
                if "layers." in name and "mixer" in name and name.endswith("norm.weight")
            ]
            for tensor in sample:
                h.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
            self._fingerprint = h.hexdigest()
        return self._fingerprint
