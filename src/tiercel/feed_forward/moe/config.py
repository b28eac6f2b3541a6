"""Mixture of experts, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from tiercel.errors import RequestError
from tiercel.feed_forward.gated_mlp.config import ACTIVATIONS, GatedMLPConfig, matrices
from tiercel.mixers.checks import check, check_sizes
from tiercel.mixers.spec import Cost, FeedForwardSpec, Param, linear


@dataclass(frozen=True, kw_only=True)
class MoEConfig(FeedForwardSpec):
    """A router sends every token to `active` of `experts`; formula: `ops.moe`.

    The softmax of the chosen scores alone (Granite) is the softmax over all of them, renormalised.

    scores           softmax over all experts, or the sigmoid of each
    correction       a bias on the scores for the choice alone, not for the weights
    groups, active_groups   experts are chosen in the groups whose two best scores have the largest sum
    renormalize      the weights of a token are divided by their sum + renormalize_eps
    scale            what the weights are multiplied by (routed_scaling_factor)
    gated            act(gate x) · up x, else act(up x); the shared expert alike
    latent           width of the residual stream as the experts see it: down before them, up after them; 0: its own
    latent_bias      biases on these two projections
    shared_width     of the expert that every token goes to; 0: there is none
    shared_gate      whether its output is multiplied by the sigmoid of a product of its own
    shared_bias      biases on its matrices
    """

    kind: ClassVar[str] = "moe"
    layer: ClassVar[str] = "tiercel.feed_forward.moe.layer:MoE"
    word: ClassVar[str | None] = "moe"
    width: int
    experts: int
    active: int
    renormalize: bool = True
    activation: str = "silu"
    scores: str = "softmax"
    correction: bool = False
    groups: int = 1
    active_groups: int = 1
    renormalize_eps: float = 0.0
    scale: float = 1.0
    gated: bool = True
    latent: int = 0
    latent_bias: bool = False
    shared_width: int = 0
    shared_gate: bool = False
    shared_bias: bool = False

    def __post_init__(self) -> None:
        check_sizes(self, "width", "experts", "active", "groups", "active_groups")
        check(self.active <= self.experts, f"{self.active} active experts of {self.experts}")
        check(self.activation in ACTIVATIONS, f"unknown activation {self.activation!r}")
        check(self.scores in ("softmax", "sigmoid"), f"unknown scores of a router {self.scores!r}")
        check(self.experts % self.groups == 0, f"{self.experts} experts cannot be {self.groups} groups")
        each = self.experts // self.groups
        check(self.groups == 1 or each > 1, f"a group of experts has at least two, not {self.experts}/{self.groups}")
        check(
            self.active_groups <= self.groups and self.active <= self.active_groups * each,
            f"{self.active} active experts cannot come from {self.active_groups} groups of {each}",
        )
        check(bool(self.shared_width) or not self.shared_gate, "a gate of the shared expert without a shared expert")
        check(self.latent >= 0 and self.shared_width >= 0, "widths of latent and shared experts are not negative")
        check(0 <= self.renormalize_eps < 1, f"renormalize_eps must be small, not {self.renormalize_eps!r}")
        check(0 < self.scale < 1e6, f"the factor of routed experts must be positive, not {self.scale!r}")

    @property
    def shared(self) -> GatedMLPConfig | None:
        """The shared expert."""
        if not self.shared_width:
            return None
        return GatedMLPConfig(
            width=self.shared_width, activation=self.activation, gated=self.gated, bias=self.shared_bias
        )

    def params(self, width: int) -> tuple[Param, ...]:
        E, F, D = self.experts, self.width, self.latent or width
        out = [
            Param(name="router.weight", shape=(E, width), hf="gate.weight", gguf="ffn_gate_inp.weight", keep_fp32=True)
        ]
        if self.correction:
            out.append(
                Param(
                    name="correction", shape=(E,), hf="gate.e_score_correction_bias", gguf="exp_probs_b.bias",
                    init="zeros", keep_fp32=True, fp32_on_gpu=True, decay=False,
                )
            )  # fmt: skip
        out += [
            Param(
                name=name, shape=(E, D, F) if name == "down" else (E, F, D), hf=f"experts.{{e}}.{name}_proj.weight",
                gguf=f"ffn_{name}_exps.weight", init="residual" if name == "down" else "linear", role=f"ffn_{name}",
                reads_input=name != "down" and not self.latent,
            )
            for name in matrices(self.gated)
        ]  # fmt: skip
        if self.latent:
            fields: dict[str, Any] = {"bias": self.latent_bias, "bias_gguf": None, "lora": True}
            out += linear("latent_down", (D, width), "fc1_latent_proj", "ffn_latent_down", **fields)
            out += linear("latent_up", (width, D), "fc2_latent_proj", "ffn_latent_up", init="residual", **fields)
        if self.shared is not None:
            out += [
                replace(
                    p, name=f"shared.{p.name}", hf=f"shared_expert.{p.hf}", shard="replicate", reads_input=False,
                    gguf=None if p.gguf is None else p.gguf.replace(".", "_shexp."),
                )
                for p in self.shared.params(width)
            ]  # fmt: skip
        if self.shared_gate:
            out.append(
                Param(
                    name="shared_gate.weight", shape=(1, width), hf="shared_expert_gate.weight", keep_fp32=True,
                    gguf="ffn_gate_inp_shexp.weight",
                )
            )  # fmt: skip
        return tuple(out)

    def cost(self, tokens: int) -> Cost:
        count = len(matrices(self.gated)) * (self.width * self.active + self.shared_width) + 2 * self.latent
        return Cost(width=count, between=count)

    def routing(self) -> tuple[int, int]:
        return self.active, self.experts

    @property
    def label(self) -> str:
        return f"moe {self.active} of {self.experts}"

    def describe(self) -> str:
        shared = f", shared {self.shared_width}" if self.shared_width else ""
        latent = f", latent {self.latent}" if self.latent else ""
        return f"moe {self.active} of {self.experts} experts of {self.width}{shared}{latent}, {self.activation}"

    def shard(self, size: int) -> Self:
        raise RequestError(f"layers of experts cannot be split over {size} processes yet")

    @classmethod
    def from_pattern(cls, width: int, **sizes: Any) -> Self:
        return cls(
            width=sizes.get("ffn_width") or 4 * width, experts=sizes.get("experts", 8), active=sizes.get("active", 2)
        )
