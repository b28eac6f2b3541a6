"""A network under its checkpoint's names, as PEFT and transformers' Trainer expect a model to be.

    model = CausalLM(tiercel.load("smollm2"))
    model = peft.get_peft_model(model, LoraConfig(target_modules=["q_proj", "in_proj", "out_proj", "gate_proj"]))
    model(input_ids=ids, labels=ids)["loss"].backward()
    model.save_pretrained("adapter")                       # loads in PEFT over transformers' model too

The modules are the network's own, found in two places: model.layers.0.self_attn.q_proj here is
layers.0.mixers.attention.q there, and what is put in one place is put in the other.  Our matrices hold the
checkpoint's multipliers (`TensorMapping.scale`); an adapter learns in the checkpoint's values, so its files need no
conversion, and its output is scaled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tiercel.errors import RequestError
from tiercel.families.family import Layout, Runs
from tiercel.model.decoder import Decoder
from tiercel.model.layers import Linear, named_weights
from tiercel.model.varlen import VarlenBatch
from tiercel.ops.qtensor import QTensor
from tiercel.train.loss import chunked_cross_entropy, learns

if TYPE_CHECKING:
    from tiercel.api import Model

IGNORED_LABEL = -100  # a label that is not learned


class Names(nn.Module):
    """A node of the tree of names.  real: for a child, whose it is there, its name there, and its multiplier."""

    real: dict[str, tuple[Any, str, float | Runs]]

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["real"] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module) and name in self.__dict__.get("real", {}):
            owner, own, scale = self.real[name]
            value = _with_multiplier(value, scale)
            setattr(owner, own, value)
        super().__setattr__(name, value)


class Config:
    """What PEFT and Trainer ask a model's config."""

    model_type = "tiercel"
    _name_or_path = ""
    use_cache = False

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": self.model_type}

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


class CausalLM(Names):
    """model: a `tiercel.Model`, or a network and its layout."""

    network: Decoder
    layout: Layout

    def __init__(self, model: Model | Decoder, layout: Layout | None = None) -> None:
        super().__init__()
        network = model if isinstance(model, Decoder) else model.network
        layout = layout if isinstance(model, Decoder) else model.layout
        if layout is None:
            raise RequestError("a network needs the layout it came in: CausalLM(network, layout)")
        if len(network.adapters):
            raise RequestError("the network has adapters to serve: train on one that has none")
        self.__dict__.update(network=network, layout=layout)
        self.config = Config(network.config.to_dict())
        self.name_or_path = "" if isinstance(model, Decoder) else str(model.name)
        for row in layout.rows:
            # a stack of experts is one parameter, under the first one's name, and no module that PEFT could take
            first, reordered = row.hf if isinstance(row.hf, str) else row.hf[0], row.hf_forms or row.hf_rows
            if reordered and isinstance(network.get_submodule(row.ours.rpartition(".")[0]), Linear):
                # an adapter of it would not be one of the checkpoint's matrix: it has our name
                theirs = f"{first.rsplit('.', 2)[0]}.{'.'.join(row.ours.split('.')[-2:])}"
            elif isinstance(row.hf, str):
                theirs = row.hf
            else:
                theirs = f"{row.hf[0].rsplit('.', 2)[0]}.stacked_" + row.ours.rpartition(".")[2]
            self._place(row.ours, theirs, row.scale)
        if network.config.tied and "lm_head" not in self._modules:
            self._place("head.weight", "lm_head.weight", 1.0)
        packed = [w for _, weight in named_weights(network) for w in (weight if isinstance(weight, list) else [weight])]
        nothing = nn.Parameter(torch.empty(0), requires_grad=False)
        # matrices that are no parameters: PEFT counts an empty parameter by this name, as DeepSpeed's
        nothing.ds_numel = sum(w.numel() for w in packed if isinstance(w, QTensor))  # type: ignore[attr-defined]
        self.register_parameter("packed", nothing)

    def _place(self, ours: str, theirs: str, scale: float | Runs) -> None:
        """Register our parameter's module, or the parameter if no module has it, by the checkpoint's name."""
        owner, _, leaf = ours.rpartition(".")
        path = theirs.split(".")
        module = self.network.get_submodule(owner)
        node: Names = self
        whole = leaf in ("weight", "bias") and isinstance(module, nn.Module) and not list(module.children())
        for name in path[: -2 if whole else -1]:
            if name not in node._modules:
                node.add_module(name, Names())
            if not isinstance(node._modules[name], Names):  # the bias of a matrix that is part of another module here
                path[-1] = f"{name}_{path[-1]}"
                break
            node = node._modules[name]  # type: ignore[assignment]
        if whole:
            name = path[-2]
            if name not in node._modules:
                holder, _, own = owner.rpartition(".")
                node.real[name] = (self.network.get_submodule(holder), own, scale)
                node.add_module(name, module)
        elif isinstance(parameter := getattr(module, leaf), nn.Parameter):
            node.register_parameter(path[-1], parameter)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> dict[str, Tensor]:
        """input_ids (B, L) → {"loss"} where there are labels (B, L), the tokens themselves, −100 for those not
        learned; else {"logits"} (B, L, V).  Rows are filled up on the right.

        num_items_in_batch: what the sum of losses is divided by, the tokens learned without it.
        """
        if unknown := [name for name, value in others.items() if value is not None and name not in ACCEPTED_ARGUMENTS]:
            raise RequestError(f"forward has no argument {unknown[0]!r}; it takes input_ids, attention_mask and labels")
        if attention_mask is not None and not bool((attention_mask[:, :1] == 1).all()):
            raise RequestError("rows are filled up on the right: set the tokenizer's padding_side to 'right'")
        network, scale = self.network, self.network.config.logit_scale
        starts_BL = torch.zeros_like(input_ids, dtype=torch.bool)
        x_TD = network.hidden_states(input_ids, VarlenBatch(starts_BL, recompute=self.training and self.recompute))
        if labels is None:
            return {"logits": network.head(x_TD, scale).float().unflatten(0, input_ids.shape)}
        x_TD = x_TD.unflatten(0, input_ids.shape)[:, :-1].flatten(0, 1)
        targets_T = labels[:, 1:].flatten()
        learned_T = (targets_T != IGNORED_LABEL).nonzero().squeeze(1)
        total = chunked_cross_entropy(
            x_TD[learned_T],
            targets_T[learned_T],
            lambda x: network.head(x, scale),
            network.config.vocab_size,
            frozen=not learns(network.head),
        )
        return {"loss": total / (num_items_in_batch if num_items_in_batch is not None else max(1, len(learned_T)))}

    recompute = False  # keep no activations of blocks: see `gradient_checkpointing_enable`

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        self.recompute = True

    def gradient_checkpointing_disable(self) -> None:
        self.recompute = False

    @property
    def device(self) -> torch.device:
        return self.network.norm.weight.device

    def get_input_embeddings(self) -> nn.Module:
        return self.network.embed

    def prepare_inputs_for_generation(self, input_ids: Tensor, **_: Any) -> dict[str, Tensor]:
        return {"input_ids": input_ids}

    def train(self, mode: bool = True) -> CausalLM:
        self.network.train(mode)
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CausalLM:
        self.network._apply(fn, recurse)  # the same modules; the network repacks its weights
        self._parameters["packed"].data = fn(self._parameters["packed"].data)  # type: ignore[union-attr]
        return self


ACCEPTED_ARGUMENTS = (
    "use_cache",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "position_ids",
    "token_type_ids",
)


def _with_multiplier(module: nn.Module, scale: float | Runs) -> nn.Module:
    """A tuner's layer that stands for a Linear of ours, with the multiplier between its values and the network's."""
    if isinstance(module, Linear) or not hasattr(module, "base_layer"):
        return module
    from peft.tuners import lora

    from tiercel.train.lora_layer import LoraLinear

    if type(module) is lora.Linear and not module.lora_variant:
        return LoraLinear.of(module, scale)
    if scale != 1.0 and not isinstance(module, LoraLinear):
        raise RequestError(f"{type(module).__name__} is not known here: this network takes plain LoRA")
    return module


def coverage(model: nn.Module) -> str:
    """What learns of a CausalLM, bare or in PEFT's hands: "44/44 blocks, 0.26 % of parameters"."""
    own = next(module for module in model.modules() if isinstance(module, CausalLM))
    network: Decoder = own.network
    blocks = [any(".lora_A." in name for name, _ in block.named_parameters()) for block in network.layers]
    learned = sum(p.numel() for p in network.parameters() if p.requires_grad)
    adapter = sum(p.numel() for name, p in network.named_parameters() if ".lora_" in name)
    total = sum(_numel(weight) for name, weight in named_weights(network) if ".lora_" not in name)
    share = 100 * learned / (total + adapter)
    digits = max(2, 1 - math.floor(math.log10(share))) if 0 < share < 1 else 2
    return f"{sum(blocks)}/{len(blocks)} blocks, {share:.{digits}f} % of parameters"


def _numel(weight: Any) -> int:
    return sum(w.numel() for w in (weight if isinstance(weight, list) else [weight]))
