"""An adapter learns in the checkpoint's names and values, loads in PEFT and back, merges, and is chosen by request."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import tiercel
import tiny
from families import nasty
from golden import nano
from tiercel.engine.engine import Engine
from tiercel.errors import FormatError, ModelNotFound, RequestError, UnsupportedError
from tiercel.hub import local_models
from tiercel.model.layers import named_weights
from tiercel.ops.qtensor import QTensor, multiply_reference
from tiercel.train.causal_lm import CausalLM, coverage
from tiercel.train.lora import adapt, matched, save
from tiercel.train.lora_layer import LowRank, kept
from tiercel.weights import adapters
from tiercel.weights import load as weights
from tiercel.weights.checkpoint import open_checkpoint, parameter_shapes
from tiercel.weights.export import export

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
THEIRS = ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "gate_proj", "up_proj", "down_proj"]  # PEFT: no out_proj
IDS = tiny.ids(40)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models(name) → a nasty checkpoint's folder, made once."""
    folder, made = tmp_path_factory.mktemp("nasty"), {}

    def get(name):
        if name not in made:
            nasty.make(name, folder / name)
            made[name] = folder / name
        return made[name]

    return get


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Every kind of layer, and two adapters with something to say."""
    folder = tmp_path_factory.mktemp("base")
    path = tiny.checkpoint(folder / "model", template=tiny.TEMPLATE)
    for seed, name in enumerate(("poet", "judge")):
        random_adapter(path, folder / name, seed)
    return folder


def random_adapter(path, out, seed=0, targets=(), **settings):
    network, _, layout = weights.load(path, **settings)
    torch.manual_seed(seed)
    adapted = adapt(network, layout, rank=3, alpha=6, targets=targets)
    randomize(adapted)
    return save(adapted, out)


@torch.no_grad()
def randomize(adapted):
    for name, p in adapted.named_parameters():
        if ".lora_" in name:
            p.copy_(torch.randn(p.shape) * (0.15 / p.shape[1] ** 0.5))


# ── PEFT over transformers, and back


@pytest.mark.parametrize("name", ["h1-gate_first", "h1-no_norm", "llama-biases", "mamba2-groups2", "jamba-experts"])
def test_an_adapter_made_here_loads_in_peft_over_transformers_with_the_same_logits(models, tmp_path, name):
    path, x = models(name), nasty.tokens(23)
    there = [name for name in THEIRS if name in matched(open_checkpoint(path).layout, ())]
    network, _, layout = weights.load(path)
    adapted = adapt(network, layout, rank=3, targets=there)
    randomize(adapted)
    save(adapted, tmp_path / "a")
    with torch.no_grad():
        here = adapted(input_ids=x[None])["logits"][0]
    bare = nasty.load_hf(path)
    without = nasty.whole(bare, x)
    judge = nasty.whole(PeftModel.from_pretrained(bare, tmp_path / "a").eval(), x)
    assert (judge - without).abs().max() > 0.02
    assert (here - judge).abs().max() < 1e-5
    served = tiercel.load(path, adapters={"a": tmp_path / "a"})
    assert (served.logits(x, adapter="a") - judge).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["h1-norm_first", "llama-tied", "mamba-biases", "bamba-biases"])
def test_an_adapter_made_by_peft_over_transformers_loads_here_with_the_same_logits(models, tmp_path, name):
    path, x = models(name), nasty.tokens(19)
    torch.manual_seed(1)
    alpha = {"q_proj": 9} if name == "llama-tied" else {"in_proj": 9}
    config = LoraConfig(r=4, lora_alpha=6, target_modules=THEIRS, use_rslora=True, alpha_pattern=alpha)
    theirs = get_peft_model(nasty.load_hf(path), config)
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "a")
    judge = nasty.whole(theirs.eval(), x)
    model = tiercel.load(path, adapters={"a": tmp_path / "a"})
    assert (model.logits(x, adapter="a") - judge).abs().max() < 2e-5
    continued = PeftModel.from_pretrained(CausalLM(tiercel.load(path)), tmp_path / "a", is_trainable=True)
    assert (continued(input_ids=x[None])["logits"][0] - judge).abs().max() < 2e-5


def test_peft_works_from_the_outside_and_counts_packed_weights(models, capsys):
    network, _, layout = weights.load(models("h1-no_norm"), quantize="q8_0")
    config = LoraConfig(r=2, target_modules=["q_proj", "out_proj", "gate_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(CausalLM(network, layout), config)
    model.print_trainable_parameters()
    total = sum(torch.Size(s).numel() for s in parameter_shapes(layout).values())
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"trainable params: {learned:,} || all params: {total + learned:,}" in capsys.readouterr().out
    assert coverage(model) == f"3/3 blocks, {100 * learned / (total + learned):.2f} % of parameters"
    with pytest.raises(RequestError, match="tiercel merge"):
        model.merge_adapter()


def test_a_target_that_matches_nothing_is_refused(models):
    layout = open_checkpoint(models("h1-no_norm")).layout
    with pytest.raises(RequestError, match=r"'x_proj' matches nothing.*down_proj.*in_proj"):
        matched(layout, ["q_proj", "x_proj"])
    assert matched(layout, ()) == sorted([*THEIRS, "out_proj"])


# ── learning


@pytest.mark.parametrize("quantize", [None, "q8_0", "nf4"])
def test_every_adapter_weight_of_every_target_has_a_gradient_after_one_step(base, quantize):
    network, _, layout = weights.load(base / "model", quantize=quantize)
    adapted = adapt(network, layout, rank=3).train()
    held = {name: w for name, w in named_weights(network) if isinstance(w, QTensor)}
    assert held or quantize is None, "packed matrices stay packed"
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 1e-2)
    x, losses = torch.tensor([IDS]), []
    for _ in range(2):
        optimizer.zero_grad()
        loss = adapted(input_ids=x, labels=x)["loss"]
        loss.backward()
        losses.append(float(loss))
        optimizer.step()
    found = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    targets = {"q", "k", "v", "o", "in_proj", "out_proj", "gate", "up", "down"}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in found} == targets
    assert all(bool((g.abs().amax() > 0) and g.isfinite().all()) for g in found.values())
    assert losses[1] < losses[0]


@pytest.mark.parametrize("type", ["F32", "BF16", "Q8_0", "Q4_K"])
def test_the_way_back_through_a_frozen_matrix_is_that_of_its_numbers(type):
    torch.manual_seed(0)
    q = QTensor(type, (48, 256), exact=True)
    W = torch.randn(48, 256) / 16
    q.put(0, tiercel.quant.quantize(type, W) if q.packed else W)
    x = torch.randn(2, 5, 256, requires_grad=True)
    dy = torch.randn(2, 5, 48)
    bias = torch.randn(48, requires_grad=True)
    y = q.multiply(x, bias, 0.7)
    y.backward(dy)
    got, got_bias = x.grad.clone(), bias.grad.clone()
    x.grad = bias.grad = None
    again = torch.nn.functional.linear(x, q.numbers().float()) * 0.7 + bias
    again.backward(dy)
    assert torch.allclose(got, x.grad, atol=1e-5) and torch.allclose(got_bias, bias.grad, atol=1e-5)
    assert torch.allclose(y, multiply_reference(x, q, bias, 0.7), atol=1e-4)


def test_an_adapter_adds_its_product_with_gradients_of_the_formula_and_drops_what_dropout_says():
    y, x, A, B, m = (torch.randn(*s) for s in ((9, 20), (9, 16), (3, 16), (20, 3), (20,)))
    x[0, 0] = 0.5

    def ours(y, x, A, B):
        return LowRank.apply(y, x, A, B, 0.7, m, 0.0)

    def formula(y, x, A, B):
        return y + 0.7 * m * (x @ A.t() @ B.t())

    found = []
    for f in (ours, formula):
        leaves = [t.clone().requires_grad_() for t in (y, x, A, B)]
        out = f(*leaves)
        found.append([out, *torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).view(out.shape))])
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*found, strict=True))

    mask = kept(torch.empty(400, 500), 0.05)
    assert mask.shape == (400, 500) and abs(mask.float().mean() - 0.95) < 0.002
    one = torch.ones(2000, 16, requires_grad=True)
    out = LowRank.apply(torch.zeros(2000, 16), one, torch.eye(16), torch.eye(16), 1.0, None, 0.25)
    (back,) = torch.autograd.grad(out.sum(), one)
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()} and back.equal(
        out
    )  # the same are dropped


def test_frozen_matrices_of_bfloat16_learn_as_those_of_float32_do(base):
    losses = []
    for dtype in ("float32", "bfloat16"):
        network, _, layout = weights.load(base / "model", dtype=dtype)
        torch.manual_seed(3)
        adapted = adapt(network, layout, rank=3).train()
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 1e-2)
        x = torch.tensor([IDS])
        for _ in range(6):
            loss = adapted(input_ids=x, labels=x)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss))
        assert all(p.dtype == torch.float32 for p in adapted.parameters() if p.requires_grad)
    assert abs(losses[0] - losses[1]) < 0.05 * losses[0]


def test_train_lora_writes_an_adapter_that_learned(base, tmp_path):
    from tiercel.train.loop import Settings
    from tiercel.train.lora import lora

    data = tmp_path / "d.jsonl"
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "abcabc"}]
    data.write_text((json.dumps({"messages": talk}) + "\n") * 4)
    settings = Settings(steps=25, lr=3e-2, out=tmp_path / "a", quiet=True)
    found = lora(base / "model", data, settings, rank=4, rows=1, length=64)
    assert found["coverage"].startswith("4/4 blocks") and found["loss"] < 2.0
    model = tiercel.load(base / "model", adapters={"abc": tmp_path / "a"})
    greedy = tiercel.SamplingParams(temperature=0, max_tokens=6)
    assert model.generate("hi", greedy, adapter="abc") == "abcabc" != model.generate("hi", greedy)


# ── merged


@pytest.mark.parametrize("name", ["h1-gate_first", "llama-biases"])
def test_merged_is_unmerged(models, tmp_path, name):
    path = models(name)
    random_adapter(path, tmp_path / "a")
    x = nasty.tokens(21)
    worn = tiercel.load(path, adapters={"a": tmp_path / "a"}).logits(x, adapter="a")
    adapters.merge(path, tmp_path / "a", tmp_path / "merged")
    assert (tiercel.load(tmp_path / "merged").logits(x) - worn).abs().max() < 1e-5
    if name == "llama-biases":
        return  # biases on every matrix have no GGUF form
    assert (nasty.whole(nasty.load_hf(tmp_path / "merged"), x) - worn).abs().max() < 2e-5


def test_an_adapter_over_a_packed_model_is_merged_into_its_unpacked_values(tmp_path, models):
    from tiercel.weights.quantize import quantize

    quantize(models("llama-tied"), tmp_path / "q8.gguf", "q8_0")
    random_adapter(tmp_path / "q8.gguf", tmp_path / "a")
    x = nasty.tokens(21)
    worn = tiercel.load(tmp_path / "q8.gguf", exact=True, adapters={"a": tmp_path / "a"}).logits(x, adapter="a")
    adapters.merge(tmp_path / "q8.gguf", tmp_path / "a", tmp_path / "m.gguf", dtype="float32")
    assert (tiercel.load(tmp_path / "m.gguf").logits(x) - worn).abs().max() < 1e-5


def test_a_gguf_file_that_forgot_its_multipliers_takes_only_its_own_adapters(models, tmp_path):
    path = models("h1-no_norm")
    random_adapter(path, tmp_path / "a")
    export(path, tmp_path / "m.gguf")
    with pytest.raises(UnsupportedError, match="multipliers"):
        tiercel.load(tmp_path / "m.gguf", adapters={"a": tmp_path / "a"})
    random_adapter(tmp_path / "m.gguf", tmp_path / "b")
    tiercel.load(tmp_path / "m.gguf", adapters={"b": tmp_path / "b"})
    with pytest.raises(UnsupportedError, match="GGUF"):
        tiercel.load(path, adapters={"b": tmp_path / "b"})


# ── served


def run(model, wanted, **engine):
    """Tokens of every (prompt, adapter), all in one engine at once."""
    e = Engine(model, **engine)
    requests = [e.add(ids, tiny.GREEDY, adapter=adapter) for ids, adapter in wanted]
    while not e.idle:
        e.step()
    return [request.sequences[0].token_ids for request in requests], requests


def test_rows_of_several_adapters_share_a_step_and_get_what_they_get_alone(base, tmp_path):
    model = tiercel.load(base / "model", adapters={"poet": base / "poet", "judge": base / "judge"})
    wanted = [(tiny.ids(20, i), adapter) for i, adapter in enumerate([None, "poet", "judge", "poet", None])]
    together, _ = run(model, wanted)
    assert together == [run(model, [one])[0][0] for one in wanted]
    bare = tiercel.load(base / "model")
    assert [together[0], together[4]] == run(bare, [wanted[0], wanted[4]])[0]
    for name in ("poet", "judge"):
        adapters.merge(base / "model", base / name, tmp_path / name, dtype="float32")
        merged = tiercel.load(tmp_path / name, dtype="float32").logits(IDS)
        assert torch.allclose(model.logits(IDS, adapter=name), merged, atol=2e-4 * float(merged.abs().max()))


def test_rows_without_an_adapter_keep_their_bits(base):
    bare = tiercel.load(base / "model")
    model = tiercel.load(base / "model", adapters={"poet": base / "poet"})
    rows = [torch.tensor(tiny.ids(n, n)) for n in (7, 9)]
    alone = bare.network(rows[0], bare.network.new_state())
    mixed = model.network(rows, [model.network.new_state(), model.network.new_state("poet")])
    assert torch.equal(mixed[0], alone) or not bare.network.native
    worn = model.network(rows[1], model.network.new_state("poet"))
    assert torch.equal(mixed[1], worn) or not bare.network.native
    assert not torch.allclose(worn, bare.logits(rows[1]))


def test_what_was_read_with_one_adapter_is_not_reused_with_another(base):
    model = tiercel.load(base / "model", adapters={"poet": base / "poet", "judge": base / "judge"})
    e = Engine(model)
    cached = []
    for adapter in ("poet", "judge", None, "poet"):
        request = e.add(IDS, tiny.GREEDY, adapter=adapter)
        while not e.idle:
            e.step()
        cached.append(request.cached_tokens)
    assert cached[:3] == [0, 0, 0] and cached[3] > 0


def test_a_conversation_is_saved_for_its_adapter_alone(base, tmp_path):
    model = tiercel.load(base / "model", adapters={"poet": base / "poet"})
    session = model.session(adapter="poet")
    for _ in session.generate(IDS, tiny.GREEDY):
        pass
    session.save(tmp_path / "talk")
    assert model.session(adapter="poet").load(tmp_path / "talk")
    with pytest.raises(FormatError):
        model.session().load(tmp_path / "talk")


def test_adapters_are_named_and_replaced_only_when_not_in_use(base):
    model = tiercel.load(base / "model")
    with pytest.raises(RequestError, match="no adapter 'poet': none are loaded"):
        model.generate("hi", adapter="poet")
    model.load_adapter("poet", base / "poet")
    model.load_adapter("poet", base / "poet")  # the same bytes
    with pytest.raises(RequestError, match="another adapter"):
        model.load_adapter("poet", base / "judge")
    model.engine.add(IDS, tiny.GREEDY, adapter="poet")
    with pytest.raises(RequestError, match="in use by a running request"):
        model.unload_adapter("poet")
    while not model.engine.idle:
        model.engine.step()
    model.unload_adapter("poet")
    assert model.adapters == []
    assert torch.equal(model.logits(IDS), tiercel.load(base / "model").logits(IDS))


@pytest.mark.parametrize(
    "change, error, words",
    [
        (lambda c: c.update(peft_type="IA3"), UnsupportedError, "IA3"),
        (lambda c: c.update(use_dora=True), UnsupportedError, "use_dora"),
        (lambda c: c.update(bias="all"), UnsupportedError, "biases"),
        (lambda c: c.update(lora_alpha="much"), FormatError, "lora_alpha"),
        (None, FormatError, "no place for"),
        ("gone", ModelNotFound, "no adapter"),
    ],
)
def test_what_is_no_adapter_for_this_model_is_refused_in_one_line(base, models, tmp_path, change, error, words):
    folder = shutil.copytree(base / "poet", tmp_path / "a")
    model = tiercel.load(models("llama-tied") if change is None else base / "model")
    if change == "gone":
        (folder / "adapter_config.json").unlink()
    elif change is not None:
        config = json.loads((folder / "adapter_config.json").read_text())
        change(config)
        (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=words) as caught:
        model.load_adapter("a", folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "OLoRA", "corda", "loftq", "something-new"])
def test_an_initialisation_that_changes_the_base_is_refused_by_its_name(base, tmp_path, init):
    folder = shutil.copytree(base / "poet", tmp_path / "a")
    edit(folder, init_lora_weights=init)
    with pytest.raises(UnsupportedError, match=f"(?s){init}.*path_initial_model_for_weight_conversion"):
        tiercel.load(base / "model", adapters={"a": folder})


@pytest.mark.parametrize("init", [False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_an_initialisation_that_leaves_the_base_alone_changes_nothing(base, tmp_path, init):
    folder = shutil.copytree(base / "poet", tmp_path / "a")
    edit(folder, init_lora_weights=init)
    model = tiercel.load(base / "model", adapters={"a": folder, "b": base / "poet"})
    assert torch.equal(model.logits(IDS, adapter="a"), model.logits(IDS, adapter="b"))


def test_a_pissa_adapter_that_peft_has_converted_is_peft_s(models, tmp_path):
    path, x = models("llama-biases"), nasty.tokens(17)
    torch.manual_seed(2)
    theirs = get_peft_model(nasty.load_hf(path), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"],
                                                            init_lora_weights="pissa"))  # fmt: skip
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "initial")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.add_(0.05 * torch.randn_like(p))
    judge = nasty.whole(theirs.eval(), x)
    theirs.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    served = tiercel.load(path, adapters={"a": tmp_path / "a"})
    assert (served.logits(x, adapter="a") - judge).abs().max() < 2e-5


@pytest.mark.parametrize("name, both", [("granite-hybrid", "input_linear"), ("qwen3_5-shared_keys", "q_proj")])
def test_an_adapter_on_a_matrix_that_is_two_of_ours_reaches_both(models, tmp_path, name, both):
    path, x = models(name), nasty.tokens(19)
    torch.manual_seed(1)
    theirs = get_peft_model(nasty.load_hf(path), LoraConfig(r=4, lora_alpha=6, target_modules=[both, "v_proj"]))
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "a")
    judge = nasty.whole(theirs.eval(), x)
    served = tiercel.load(path, adapters={"a": tmp_path / "a"})
    assert (served.logits(x, adapter="a") - judge).abs().max() < 2e-5
    assert both not in matched(open_checkpoint(path).layout, ())  # trained here it would be the first of the two only
    with pytest.raises(RequestError, match=both):
        matched(open_checkpoint(path).layout, [both])


@pytest.mark.parametrize("leaf", ["in_proj_qkv", "in_proj_z", "out_proj"])
def test_an_adapter_on_a_matrix_whose_heads_lie_in_another_order_is_served_in_ours(models, tmp_path, leaf):
    path, x = models("qwen3_5-shared_keys"), nasty.tokens(19)
    torch.manual_seed(1)
    theirs = get_peft_model(nasty.load_hf(path), LoraConfig(r=4, lora_alpha=6, target_modules=[leaf]))
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "a")
    judge = nasty.whole(theirs.eval(), x)
    served = tiercel.load(path, adapters={"a": tmp_path / "a"})
    assert (served.logits(x, adapter="a") - judge).abs().max() < 2e-5


def test_what_lies_in_another_order_is_no_target_of_training(tmp_path):
    """q_proj of Qwen3.5 holds query and gate, and its value heads are tiled here."""
    layout = weights.load(nano.build("qwen35", tmp_path / "model"))[2]
    leaves = {name.rpartition(".")[2] for name in adapters.linear_rows(layout)}
    assert {"k_proj", "o_proj", "up_proj"} <= leaves and not {"q_proj", "in_proj_qkv", "out_proj"} & leaves


def test_an_adapter_on_experts_is_refused_by_name(models, tmp_path):
    path = models("nemotron_h-latent")
    folder = random_adapter(path, tmp_path / "a")
    tensors = load_file(folder / adapters.TENSORS)
    tensors["base_model.model.model.layers.1.mixer.experts.0.up_proj.lora_A.weight"] = torch.ones(3, 18)
    save_file(tensors, folder / adapters.TENSORS)
    with pytest.raises(FormatError, match="experts"):
        tiercel.load(path, adapters={"a": folder})


def test_the_largest_rank_that_is_trained_is_read_and_a_larger_one_is_refused_before(base, tmp_path):
    network, _, layout = weights.load(base / "model")
    rows, shapes = adapters.linear_rows(layout), parameter_shapes(layout)
    limit = min(max(shapes[row.ours]) for name, row in rows.items() if name.endswith(".down_proj") or ".down" in name)
    with pytest.raises(RequestError, match=f"rank {limit + 1} is larger than"):
        adapt(network, layout, rank=limit + 1, targets=["down"])
    folder = save(adapt(network, layout, rank=limit, targets=["down"]), tmp_path / "a")
    assert tiercel.load(base / "model", adapters={"a": folder}).adapters == ["a"]


def test_names_that_hold_the_adapter_s_name_are_read(base, tmp_path):
    folder = rename(base / "poet", tmp_path / "a", lambda name: name.replace(".weight", ".poet.weight"))
    model = tiercel.load(base / "model", adapters={"a": folder, "b": base / "poet"})
    assert torch.equal(model.logits(IDS, adapter="a"), model.logits(IDS, adapter="b"))
    tensors = load_file(folder / adapters.TENSORS)
    save_file(
        tensors | {name.replace("poet", "judge"): t.clone() for name, t in tensors.items()}, folder / adapters.TENSORS
    )
    with pytest.raises(UnsupportedError, match="several adapters"):
        tiercel.load(base / "model", adapters={"a": folder})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("embed.weight", "no place for"),
        ("model.embed_tokens.weight", "whole embedding or head"),
        ("lm_head.weight", "whole embedding or head"),
        ("layers.0.mixer_norm.lora_A.weight", "no place for"),
        ("layers.0.mixers.attention.q.lora_magnitude_vector", "DoRA"),
    ],
)
def test_a_tensor_that_is_no_lora_is_refused_by_what_it_is(base, tmp_path, name, words):
    folder = shutil.copytree(base / "poet", tmp_path / "a")
    tensors = load_file(folder / adapters.TENSORS)
    save_file(tensors | {f"base_model.model.{name}": torch.zeros(4, 4)}, folder / adapters.TENSORS)
    with pytest.raises((UnsupportedError, FormatError), match=words) as caught:
        tiercel.load(base / "model", adapters={"a": folder})
    assert "\n" not in str(caught.value)


def test_a_pickle_is_named_with_the_way_out(base, tmp_path):
    folder = shutil.copytree(base / "poet", tmp_path / "a")
    (folder / adapters.TENSORS).rename(folder / "adapter_model.bin")
    with pytest.raises(UnsupportedError, match=r"adapter_model\.bin, a pickle.*save_pretrained"):
        tiercel.load(base / "model", adapters={"a": folder})


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rename(folder, out, change):
    shutil.copytree(folder, out)
    save_file({change(name): t for name, t in load_file(folder / adapters.TENSORS).items()}, out / adapters.TENSORS)
    return out


# ── Modelfiles


def test_a_modelfile_puts_an_adapter_on(models, tmp_path, monkeypatch):
    from tiercel.hub import store

    monkeypatch.setenv("TIERCEL_HOME", str(tmp_path / "home"))
    export(models("llama-tied"), tmp_path / "m.gguf")
    random_adapter(tmp_path / "m.gguf", tmp_path / "poet")
    wanted = store.parse_modelfile("FROM ./m.gguf\nADAPTER ./poet")
    store.create("bard", wanted, tmp_path)
    store.copy("bard", "bard2")
    x = nasty.tokens(9)
    direct = tiercel.load(tmp_path / "m.gguf", adapters={"a": tmp_path / "poet"}).logits(x, adapter="a")
    for name in ("bard", "bard2"):
        assert local_models.adapter_of(name) is not None
        assert torch.equal(tiercel.load(name).logits(x), direct)
    assert peft.LoraConfig.from_pretrained(local_models.adapter_of("bard")).r == 3
