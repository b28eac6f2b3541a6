"""The parity tests can fail: any one thing done wrong moves the logits ten times beyond the tolerance.

Two kinds of wrong.  A checkpoint with one field or tensor changed is loaded by us and compared with
transformers on the unchanged one: we must not notice less than 1e-3.  And where a fault lies in the
mathematics (causal mask, groups of the norm), transformers is made to commit it and we must differ.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import tiercel
from families import nasty

SEEN = 1e-3  # ten times the tolerance of test_parity
H1 = [name for name in nasty.NASTY if name.startswith("h1-")]
SCALARS = [
    "lm_head_multiplier", "embedding_multiplier", "key_multiplier", "attention_in_multiplier",
    "attention_out_multiplier", "ssm_in_multiplier", "ssm_out_multiplier",
]  # fmt: skip
MULTIPLIERS = (
    [(field, None) for field in SCALARS]
    + [("mlp_multipliers", i) for i in range(2)]
    + [("ssm_multipliers", i) for i in range(5)]
)


@torch.no_grad()
def ours(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    return tiercel.load(folder, dtype="float32").network(tokens)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def changed_config(model: Any, out: Path, **fields: Any) -> Path:
    """A copy with these fields changed, each of which must have been there with another value."""

    def change(config: dict[str, Any]) -> None:
        for name, value in fields.items():
            assert name in config and config[name] != value, f"{name} is {config.get(name)!r} already"
            config[name] = value

    folder = nasty.copy(model.folder, out)
    nasty.edit_config(folder, change)
    return folder


# -- configuration ---------------------------------------------------------------------------------


def test_falcon_h1_has_fourteen_multipliers() -> None:
    assert len(MULTIPLIERS) == 14


@pytest.mark.parametrize(("field", "index"), MULTIPLIERS)
@pytest.mark.parametrize("name", H1)
def test_a_multiplier_set_to_one_is_seen(
    name: str, field: str, index: int | None, built: Callable, tmp_path: Path
) -> None:
    model, tokens, value = built(name), nasty.tokens(24), 1.0
    if index is not None:
        value = list(nasty.NASTY[name].config[field])
        value[index] = 1.0
    wrong = changed_config(model, tmp_path / "wrong", **{field: value})
    assert apart(ours(wrong, tokens), model.logits(tokens)) > SEEN


FIELDS: list[tuple[str, dict[str, Any]]] = [
    ("h1-no_norm", {"rms_norm_eps": 1e-5}),
    ("h1-gate_first", {"mamba_norm_before_gate": True}),
    ("h1-norm_first", {"mamba_norm_before_gate": False}),
    ("h1-norm_first", {"time_step_limit": [0.0, 1e9]}),
    ("h1-expand", {"num_key_value_heads": 2, "num_attention_heads": 6}),
    ("llama-biases", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    ("llama-linear", {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}),
    ("llama-llama3", {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}),
    ("llama-yarn", {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}),
    ("llama-yarn", {"rope_parameters": {"rope_type": "linear", "factor": 3.5, "rope_theta": 777.0}}),
    ("llama-longrope", {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}),
    ("mistral-window", {"sliding_window": None}),
    ("mistral-window", {"sliding_window": 20}),
    ("qwen2-mixed_window", {"sliding_window": 12}),
    ("mixtral-top3", {"sliding_window": 24}),
    ("mixtral-top3", {"num_experts_per_tok": 2}),
    ("jamba-experts", {"num_experts_per_tok": 2}),
    ("mamba-biases", {"layer_norm_epsilon": 1e-5}),
    ("mamba2-groups2", {"time_step_limit": [0.0, 1e9]}),
    ("bamba-biases", {"time_step_limit": [0.07, 1e9]}),
    ("bamba-biases", {"time_step_limit": [0.0, 0.77]}),
    ("lfm2-tied", {"norm_eps": 1e-5}),
    ("lfm2_moe-scaled", {"routed_scaling_factor": 1.0}),
    ("lfm2_moe-scaled", {"norm_topk_prob": True}),
    ("lfm2_moe-renormalized", {"norm_topk_prob": False}),
    ("nemotron_h-experts", {"n_group": 1, "topk_group": 1}),
    ("nemotron_h-experts", {"norm_topk_prob": False}),
    ("nemotron_h-experts", {"routed_scaling_factor": 1.0}),
    ("nemotron_h-experts", {"mlp_hidden_act": "relu"}),
    ("nemotron_h-latent", {"norm_topk_prob": True}),
    ("nemotron_h-dense", {"layer_norm_epsilon": 1e-5}),
    ("granite-experts", {"num_experts_per_tok": 2}),
    ("granite-experts", {"time_step_limit": [0.0, 0.75]}),
    ("granite-experts", {"residual_multiplier": 1.0}),
    ("granite-experts", {"attention_multiplier": 1.0}),
    ("granite-experts", {"rms_norm_eps": 1e-5}),
    ("granite-hybrid", {"embedding_multiplier": 1.0}),
    ("granite-hybrid", {"logits_scaling": 1.0}),
    ("granite-hybrid", {"position_embedding_type": None}),
    ("gemma3-tied", {"query_pre_attn_scalar": 11}),
    ("gemma3-tied", {"sliding_window": 18}),
    ("lfm3-all", {"sliding_window": 16}),
    ("phi3-partial", {"sliding_window": 20}),
    ("gemma3-biases", {"hidden_activation": "silu"}),
    ("lfm2-tied", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
]


@pytest.mark.parametrize(("name", "fields"), FIELDS, ids=[f"{n}-{'-'.join(f)}-{i}" for i, (n, f) in enumerate(FIELDS)])
def test_a_wrong_field_is_seen(name: str, fields: dict[str, Any], built: Callable, tmp_path: Path) -> None:
    """Also a refusal counts as seen: a field that no longer fits the tensors must not load."""
    model, tokens = built(name), nasty.tokens(60)
    if name == "h1-expand":  # another head count no longer fits the tensors
        with pytest.raises(tiercel.errors.FormatError):
            ours(changed_config(model, tmp_path / "wrong", **fields), tokens)
        return
    wrong = changed_config(model, tmp_path / "wrong", **fields)
    assert apart(ours(wrong, tokens), model.logits(tokens)) > SEEN


def test_windows_on_the_wrong_layers_are_seen(built: Callable, tmp_path: Path) -> None:
    model, tokens = built("qwen2-mixed_window"), nasty.tokens(60)
    wrong = nasty.copy(model.folder, tmp_path / "wrong")

    def all_layers(config: dict[str, Any]) -> None:
        config["max_window_layers"] = 0
        config["layer_types"] = ["sliding_attention"] * config["num_hidden_layers"]

    nasty.edit_config(wrong, all_layers)
    assert apart(ours(wrong, tokens), model.logits(tokens)) > SEEN


# -- tensors ---------------------------------------------------------------------------------------

WITH_BIASES = ["h1-gate_first", "h1-norm_first", "llama-biases", "qwen2-mixed_window", "mamba-biases",
               "mamba2-groups2", "bamba-biases", "jamba-experts", "lfm2-biases", "gemma3-biases", "nemotron_h-experts",
               "granite-dense"]  # fmt: skip


@pytest.mark.parametrize("name", WITH_BIASES)
def test_a_forgotten_bias_is_seen(name: str, built: Callable, tmp_path: Path) -> None:
    """Each kind of bias in turn, in one layer that has it."""
    _each_tensor(built(name), tmp_path, lambda key: key.endswith("bias"), torch.zeros_like, at_least=2)


@pytest.mark.parametrize("name", ["h1-gate_first", "mixtral-top3", "mamba-biases", "mamba2-groups3", "bamba-biases",
                                  "jamba-experts", "qwen2-tied", "mistral-full", "lfm2-tied", "gemma3-tied",
                                  "lfm3-all", "phi3-partial", "nemotron_h-latent",
                                  "granite-experts"])  # fmt: skip
def test_every_tensor_matters_row_by_row(name: str, built: Callable, tmp_path: Path) -> None:
    """Each kind of tensor with its rows shifted by one; k_proj.bias too: rotary makes it matter."""
    _each_tensor(built(name), tmp_path, lambda key: True, lambda t: t.roll(1, 0), at_least=8)


def _each_tensor(model: Any, tmp_path: Path, wanted: Callable, wrong: Callable, at_least: int) -> None:
    """One tensor of each kind (its name without the layer) is replaced by wrong(tensor); each must be seen."""
    tokens = nasty.tokens(60)
    expected = model.logits(tokens)
    path = model.folder / "model.safetensors"
    kinds: dict[str, str] = {}
    for key in nasty.load_file(path):
        if wanted(key):
            kinds["".join(c for c in key if not c.isdigit())] = key
    assert len(kinds) >= at_least
    folder = nasty.copy(model.folder, tmp_path / "wrong")
    unseen = []
    for key in kinds.values():
        tensors = nasty.load_file(path)
        tensors[key] = wrong(tensors[key]).contiguous()
        nasty.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if apart(ours(folder, tokens), expected) <= SEEN:
            unseen.append(key)
    assert not unseen


@pytest.mark.parametrize("name", ["h1-no_norm", "h1-gate_first", "mamba2-groups2", "bamba-plain"])
def test_b_and_c_swapped_is_seen(name: str, built: Callable, tmp_path: Path) -> None:
    model, tokens = built(name), nasty.tokens(60)
    wrong = nasty.copy(model.folder, tmp_path / "wrong")

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        keys = [k for k in tensors if "conv1d" in k or "in_proj" in k]
        assert keys
        config = model.judge.config
        groups_state = _first(config, "mamba_n_groups", "n_groups") * _first(config, "mamba_d_state", "state_size")
        heads = _first(config, "mamba_n_heads", "num_heads")
        for key in keys:
            rows = tensors[key]
            end = rows.shape[0] - (heads if "in_proj" in key else 0)
            b, c = end - 2 * groups_state, end - groups_state
            tensors[key] = torch.cat([rows[:b], rows[c:end], rows[b:c], rows[end:]])

    nasty.edit_tensors(wrong, swap)
    assert apart(ours(wrong, tokens), model.logits(tokens)) > SEEN


GEMMA3_ROPES = {
    "bases exchanged": lambda full, local: (full | {"rope_theta": 55.0}, {"rope_theta": 432.0}),
    "windows scaled": lambda full, local: (full, full | local | {"rope_type": "linear"}),
    "not scaled": lambda full, local: ({"rope_theta": full["rope_theta"]}, local),
}  # fmt: skip


@pytest.mark.parametrize("changed", GEMMA3_ROPES)
def test_the_two_rotations_of_gemma3_taken_otherwise_are_seen(changed: str, built: Callable, tmp_path: Path) -> None:
    model, tokens = built("gemma3-tied"), nasty.tokens(60)
    ropes = nasty.NASTY["gemma3-tied"].config["rope_parameters"]
    full, local = GEMMA3_ROPES[changed](ropes["full_attention"], ropes["sliding_attention"])
    tables = {"full_attention": {"rope_type": "default"} | full, "sliding_attention": {"rope_type": "default"} | local}
    wrong = changed_config(model, tmp_path / "wrong", rope_parameters=tables)
    assert apart(ours(wrong, tokens), model.logits(tokens)) > SEEN


@pytest.mark.parametrize("changed", ["whole heads", "partial from the front", "one base"])
def test_the_rotation_of_lfm3_taken_otherwise_is_seen(changed: str, built: Callable, tmp_path: Path) -> None:
    model, tokens = built("lfm3-all"), nasty.tokens(60)
    ropes = nasty.NASTY["lfm3-all"].config["rope_parameters"]
    full = dict(ropes["full_attention"])
    full |= {"whole heads": {"rope_type": "default", "partial_rotary_factor": 1.0}, "one base": {"rope_theta": 45.0},
             "partial from the front": {"rope_type": "default"}}[changed]  # fmt: skip
    wrong = changed_config(model, tmp_path / "wrong", rope_parameters=ropes | {"full_attention": full})
    assert apart(ours(wrong, tokens), model.logits(tokens)) > SEEN


@pytest.mark.parametrize("part", ["qkv_proj", "gate_up_proj"])
def test_another_order_in_a_joined_matrix_is_seen(part: str, built: Callable, tmp_path: Path) -> None:
    """gate and up, q and k of one size, exchanged."""
    model, tokens = built("phi3-partial"), nasty.tokens(60)
    wrong = nasty.copy(model.folder, tmp_path / "wrong")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if part in key]:
            half = len(tensors[key]) // 2
            tensors[key] = torch.cat((tensors[key][half:], tensors[key][:half]))

    nasty.edit_tensors(wrong, change)
    assert apart(ours(wrong, tokens), model.logits(tokens)) > SEEN


@pytest.mark.parametrize("name", ["gemma3-tied"])
def test_norms_of_w_for_those_of_1_plus_w_are_seen(name: str, built: Callable, tmp_path: Path) -> None:
    _each_tensor(built(name), tmp_path, lambda key: "norm" in key, lambda t: t + 1, at_least=7)


def test_an_embedding_that_is_not_scaled_is_seen(built: Callable, tmp_path: Path) -> None:
    """Of an untied model: its table divided by √width, as if the network multiplied by 1."""
    model, tokens = built("gemma3-biases"), nasty.tokens(60)
    wrong = nasty.copy(model.folder, tmp_path / "wrong")
    nasty.edit_tensors(
        wrong, lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"] / 40**0.5})
    )
    assert apart(ours(wrong, tokens), model.logits(tokens)) > SEEN


@pytest.mark.parametrize("changed", ["tap order", "B and C", "C and x"])
def test_a_short_convolution_taken_otherwise_is_seen(changed: str, built: Callable, tmp_path: Path) -> None:
    """B and x may change places: only their product counts."""
    model, tokens = built("lfm2-biases"), nasty.tokens(60)
    wrong = nasty.copy(model.folder, tmp_path / "wrong")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [k for k in tensors if ".conv." in k]:
            if changed == "tap order" and key.endswith("conv.conv.weight"):
                tensors[key] = tensors[key].flip(-1)
            elif changed != "tap order" and "in_proj" in key:
                B, C, x = tensors[key].chunk(3)
                tensors[key] = torch.cat((C, B, x) if changed == "B and C" else (B, x, C))

    nasty.edit_tensors(wrong, change)
    assert apart(ours(wrong, tokens), model.logits(tokens)) > SEEN


@pytest.mark.parametrize("name", ["mamba-biases", "jamba-experts"])
def test_b_and_c_swapped_is_seen_in_mamba1(name: str, built: Callable, tmp_path: Path) -> None:
    model, tokens = built(name), nasty.tokens(60)
    state = _first(model.judge.config, "state_size", "mamba_d_state")
    wrong = nasty.copy(model.folder, tmp_path / "wrong")

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        for key in [k for k in tensors if "x_proj" in k]:
            dt, b, c = tensors[key].split([tensors[key].shape[0] - 2 * state, state, state])
            tensors[key] = torch.cat([dt, c, b])

    nasty.edit_tensors(wrong, swap)
    assert apart(ours(wrong, tokens), model.logits(tokens)) > SEEN


@pytest.mark.parametrize("name", ["h1-no_norm", "llama-biases", "mistral-full", "qwen2-tied", "bamba-plain"])
def test_interleaved_q_and_k_are_seen(name: str, built: Callable, tmp_path: Path) -> None:
    """The row order of llama.cpp's llama files, taken for the rotate-half order."""
    model, tokens = built(name), nasty.tokens(60)
    config = model.judge.config
    wrong = nasty.copy(model.folder, tmp_path / "wrong")

    def permute(tensors: dict[str, torch.Tensor]) -> None:
        keys = [k for k in tensors if k.endswith(("q_proj.weight", "k_proj.weight"))]
        assert keys
        for key in keys:
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            rows, width = tensors[key].shape
            tensors[key] = tensors[key].view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)

    nasty.edit_tensors(wrong, permute)
    assert apart(ours(wrong, tokens), model.logits(tokens)) > SEEN


# -- mathematics -----------------------------------------------------------------------------------


@pytest.fixture
def differs(built: Callable) -> Callable[..., None]:
    """The unmutated folder, loaded by us, must differ from a judge that commits the fault."""

    def check(name: str, fault: Callable[[Any], None], tokens: torch.Tensor | None = None) -> None:
        tokens = nasty.tokens(60) if tokens is None else tokens
        model = built(name)
        right = ours(model.folder, tokens)
        assert apart(right, model.logits(tokens)) < SEEN / 10
        judge = nasty.load_hf(model.folder)
        fault(judge)
        assert apart(right, nasty.whole(judge, tokens)) > SEEN

    return check


@pytest.mark.parametrize("name", ["h1-no_norm", "llama-biases", "mistral-full", "qwen2-tied", "mixtral-top2",
                                  "bamba-biases", "jamba-experts"])  # fmt: skip
def test_a_missing_causal_mask_is_seen(name: str, differs: Callable) -> None:
    def open_mask(judge: Any) -> None:
        forward = judge.forward
        judge.forward = lambda ids, **kw: forward(ids, attention_mask=torch.zeros(1, 1, *[ids.shape[1]] * 2), **kw)

    differs(name, open_mask)


@pytest.mark.parametrize("name", ["h1-gate_first", "h1-norm_first", "mamba2-groups2", "mamba2-groups3", "bamba-biases"])
def test_a_gated_norm_over_all_channels_is_seen(name: str, differs: Callable) -> None:
    def one_group(judge: Any) -> None:
        norms = [m for m in judge.modules() if type(m).__name__.endswith("RMSNormGated")]
        assert norms
        for norm in norms:
            norm.n_groups, norm.group_size = 1, norm.weight.numel()

    differs(name, one_group)


@pytest.mark.parametrize("name", ["bamba-biases", "bamba-plain"])
def test_rotating_the_whole_head_in_bamba_is_seen(name: str, differs: Callable) -> None:
    def rotate_all(judge: Any) -> None:
        rotary = judge.model.rotary_emb
        width = next(m for m in judge.modules() if hasattr(m, "head_dim") and hasattr(m, "q_proj")).head_dim
        theta = judge.config.rope_parameters["rope_theta"]
        rotary.inv_freq = theta ** (-torch.arange(0, width, 2).float() / width)

    differs(name, rotate_all)


@pytest.mark.parametrize("name", ["mixtral-top3", "jamba-experts"])
def test_expert_weights_summed_otherwise_are_seen(name: str, differs: Callable) -> None:
    """Mixtral's chosen weights sum to 1, Jamba's do not."""

    def flip(judge: Any) -> None:
        routers = [m for m in judge.modules() if type(m).__name__.endswith("TopKRouter")]
        assert routers
        for router in routers:
            router.forward = partial(_route, router=router, renormalize=name.startswith("jamba"))

    differs(name, flip)


def _route(hidden: torch.Tensor, router: Any, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = torch.nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight)
    weights, chosen = logits.softmax(-1).topk(router.top_k, dim=-1)
    return logits, weights / weights.sum(-1, keepdim=True) if renormalize else weights, chosen


def test_a_forgotten_attention_factor_is_seen(built: Callable, tmp_path: Path) -> None:
    model, tokens = built("llama-yarn_factor"), nasty.tokens(60)
    wrong = changed_config(
        model, tmp_path / "wrong", rope_parameters={**model.judge.config.rope_parameters, "attention_factor": 1.0}
    )
    assert apart(ours(wrong, tokens), model.logits(tokens)) > SEEN


def _first(config: Any, *names: str) -> Any:
    return next(getattr(config, name) for name in names if hasattr(config, name))


# -- gated delta rule ------------------------------------------------------------------------------

DELTA = ["qwen3_5-shared_keys", "qwen3_5-square", "qwen3_5_moe-shared_keys", "qwen3_next-mixed", "olmo_hybrid-rope"]


@pytest.mark.parametrize("fault", ["beta", "late decay", "head order"])
@pytest.mark.parametrize("name", DELTA)
def test_a_wrong_rule_is_seen(name: str, fault: str, differs: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def commit(judge: Any) -> None:
        module = sys.modules[type(judge).__module__]
        rule = module.torch_chunk_gated_delta_rule

        def wrong(q: Any, k: Any, v: Any, g: Any, beta: Any, **others: Any) -> Any:
            heads = torch.arange(v.shape[2])
            if fault == "beta":
                beta = torch.ones_like(beta)
            elif fault == "late decay":
                g = g.roll(1, 1)
            else:  # value head h reads key head h mod Hk
                heads = heads.view(-1, judge.config.linear_num_key_heads).t().flatten()
            out, state = rule(q, k, v[:, :, heads], g=g[:, :, heads], beta=beta[:, :, heads], **others)
            return out[:, :, heads.argsort()], state

        monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", wrong)

    differs(name, commit)


@pytest.mark.parametrize("name", ["qwen3_5-shared_keys", "qwen3_5-square"])
def test_a_gate_of_silu_is_seen(name: str, differs: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    differs(name, lambda judge: monkeypatch.setattr(torch, "sigmoid", torch.nn.functional.silu))


@pytest.mark.parametrize("name", ["qwen3_5-shared_keys", "qwen3_5-square"])
def test_norms_of_w_for_1_plus_w_are_seen(name: str, built: Callable, tmp_path: Path) -> None:
    plus_one = ("layernorm.weight", "q_norm.weight", "k_norm.weight", "model.norm.weight")
    _each_tensor(built(name), tmp_path, lambda key: key.endswith(plus_one), lambda t: t - 1, at_least=5)


@pytest.mark.parametrize("name", DELTA)
def test_every_tensor_of_a_gated_delta_model_matters(name: str, built: Callable, tmp_path: Path) -> None:
    _each_tensor(built(name), tmp_path, lambda key: True, lambda t: t.roll(1, 0 if len(t) > 1 else -1), at_least=16)


@pytest.mark.parametrize("name", DELTA)
def test_convolution_taps_in_the_other_order_are_seen(name: str, built: Callable, tmp_path: Path) -> None:
    _each_tensor(built(name), tmp_path, lambda key: "conv1d" in key, lambda t: t.flip(-1), at_least=1)
