"""Size of a model from its config alone, against published counts and against real modules."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from tiercel.errors import DoesNotFit, FormatError
from tiercel.feed_forward.gated_mlp.config import GatedMLPConfig
from tiercel.feed_forward.moe.config import MoEConfig
from tiercel.mixers.attention.config import AttentionConfig
from tiercel.mixers.attention.rope import RopeConfig
from tiercel.mixers.checks import MAX_LAYERS
from tiercel.mixers.mamba1.config import Mamba1Config
from tiercel.mixers.mamba2.config import Mamba2Config
from tiercel.mixers.spec import MixerSpec
from tiercel.model.config import LayerConfig, ModelConfig
from tiercel.plan import check_fits, human_bytes, kv_bytes_per_token, parameter_count, pattern, state_bytes


def falcon_h1(
    layers: int, D: int, heads: int, head_dim: int, H: int, P: int, N: int, F: int, V: int, norm: bool
) -> ModelConfig:
    layer = LayerConfig(
        mixers=(
            AttentionConfig(heads=heads, kv_heads=2, head_dim=head_dim, rope=RopeConfig(theta=1e11)),
            Mamba2Config(heads=H, head_dim=P, state=N, gated_norm="gate_first" if norm else "none"),
        ),
        feed_forward=GatedMLPConfig(width=F),
    )
    return ModelConfig(vocab_size=V, width=D, layers=(layer,) * layers, max_length=262_144)


FALCON_7B = falcon_h1(44, 3072, 12, 128, 24, 128, 256, 12288, 130048, True)


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (FALCON_7B, 7_585_648_736),
        (falcon_h1(24, 2048, 8, 128, 48, 64, 256, 4608, 65537, True), 1_554_863_488),
        (falcon_h1(36, 1024, 8, 64, 24, 64, 128, 2048, 32784, False), 521_411_104),
    ],
)
def test_falcon_h1_has_the_published_number_of_parameters(config: ModelConfig, published: int) -> None:
    assert parameter_count(config) == published


def test_falcon_h1_7b_keeps_45056_bytes_per_token_and_132_mib_per_sequence() -> None:
    assert kv_bytes_per_token(FALCON_7B) == 45_056
    assert state_bytes(FALCON_7B) == 132 * 2**20
    assert state_bytes(FALCON_7B, bytes=2) == 66 * 2**20


def of(*mixers: MixerSpec, feed_forward: GatedMLPConfig | MoEConfig | None = None) -> LayerConfig:
    return LayerConfig(mixers=mixers, feed_forward=feed_forward)


ATTENTION = AttentionConfig(heads=4, kv_heads=2, head_dim=8)
MAMBA1 = Mamba1Config(inner=32, state=4, dt_rank=3)
MAMBA2 = Mamba2Config(heads=4, head_dim=8, state=16)
MLP = GatedMLPConfig(width=40)


def model(*layers: LayerConfig, tied: bool = False) -> ModelConfig:
    return ModelConfig(vocab_size=97, width=24, layers=layers, tied=tied)


def hf_count(name: str, **fields: object) -> int:
    """Parameters of transformers' own module, built without memory."""
    transformers = pytest.importorskip("transformers")
    import torch

    config = getattr(transformers, name + "Config")(vocab_size=97, hidden_size=24, num_hidden_layers=2, **fields)
    with torch.device("meta"):
        return sum(p.numel() for p in getattr(transformers, name + "ForCausalLM")(config).parameters())


@pytest.mark.parametrize("bias", [False, True])
def test_llama_counts_as_its_modules_do(bias: bool) -> None:
    mlp = GatedMLPConfig(width=40, bias=bias)
    attention = AttentionConfig(heads=4, kv_heads=2, head_dim=8, qkv_bias=bias, out_bias=bias)
    fields = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40}
    ours = parameter_count(model(of(attention, feed_forward=mlp), of(attention, feed_forward=mlp)))
    assert ours == hf_count("Llama", **fields, attention_bias=bias, mlp_bias=bias)


@pytest.mark.parametrize("bias", [False, True])
def test_mamba_counts_as_its_modules_do(bias: bool) -> None:
    mixer = Mamba1Config(inner=48, state=4, dt_rank=3, conv=5, conv_bias=bias, proj_bias=bias)
    fields = {"state_size": 4, "expand": 2, "time_step_rank": 3, "conv_kernel": 5}
    ours = parameter_count(model(of(mixer), of(mixer), tied=True))
    assert ours == hf_count("Mamba", **fields, use_conv_bias=bias, use_bias=bias, tie_word_embeddings=True)


def test_mixtral_counts_as_its_modules_do() -> None:
    layer = of(ATTENTION, feed_forward=MoEConfig(width=40, experts=5, active=2))
    fields = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40}
    assert parameter_count(model(layer, layer)) == hf_count("Mixtral", **fields, num_local_experts=5)


def test_tied_embeddings_count_once() -> None:
    assert parameter_count(model(of(ATTENTION))) - parameter_count(model(of(ATTENTION), tied=True)) == 97 * 24


def test_only_attention_grows_and_only_state_spaces_are_constant() -> None:
    hybrid = model(of(ATTENTION), of(MAMBA1), of(MAMBA2), of(ATTENTION, MAMBA2))
    assert kv_bytes_per_token(hybrid) == 2 * (2 * 2 * 2 * 8)
    assert state_bytes(hybrid) == 4 * (32 * 4 + 2 * 4 * 8 * 16)
    assert kv_bytes_per_token(model(of(MAMBA1))) == 0 and state_bytes(model(of(ATTENTION))) == 0


@pytest.mark.parametrize(
    ("config", "picture"),
    [
        (FALCON_7B, "44 × (attention ∥ mamba2 + gated_mlp)"),
        (model(of(ATTENTION, feed_forward=MLP)), "(attention + gated_mlp)"),
        (model(*[of(MAMBA1)] * 48), "48 × mamba1"),
        (model(of(ATTENTION, MAMBA2)), "(attention ∥ mamba2)"),
        (model(*[*[of(MAMBA2)] * 3, of(ATTENTION)] * 4), "4 × [3 × mamba2, attention]"),
        (model(*[of(MAMBA2)] * 3, of(ATTENTION)), "3 × mamba2, attention"),
        (model(*[of(MAMBA2)] * 5, of(ATTENTION), of(MAMBA2)), "5 × mamba2, attention, mamba2"),
        (
            model(of(MAMBA1, feed_forward=MoEConfig(width=8, experts=16, active=2)), of(ATTENTION, feed_forward=MLP)),
            "(mamba1 + moe 2 of 16), (attention + gated_mlp)",
        ),
    ],
)
def test_the_layers_are_drawn_as_they_repeat(config: ModelConfig, picture: str) -> None:
    assert pattern(config) == picture


def test_as_many_layers_as_a_model_may_have_are_planned_and_one_more_is_refused() -> None:
    layers = [of(ATTENTION), of(MAMBA2)] * (MAX_LAYERS // 2)
    config = model(*layers)
    assert parameter_count(config) > 0 and len(pattern(config)) > 0
    with pytest.raises(FormatError, match=f"1 to {MAX_LAYERS} layers"):
        model(*layers, of(MAMBA1))


def test_what_does_not_fit_is_refused_with_both_numbers() -> None:
    check_fits(1, "a small thing")
    with pytest.raises(DoesNotFit, match=r"the model needs \d+ TB of memory and .* are free"):
        check_fits(psutil.virtual_memory().total + 2**45, "the model")


def test_bytes_are_written_as_people_read_them() -> None:
    sizes = [0, 999, 1000, 98_362_432, 4_600_000_000, 10**16]
    assert [human_bytes(n) for n in sizes] == ["0 B", "999 B", "1.0 KB", "98 MB", "4.6 GB", "10000 TB"]


def test_planning_needs_no_torch() -> None:
    assert (
        subprocess.run([sys.executable, "-c", "import sys, tiercel.plan; sys.exit('torch' in sys.modules)"]).returncode
        == 0
    )
