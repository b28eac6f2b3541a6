"""The front door as a user opens it: text in, text out, with a real tokenizer on a tiny network."""

import warnings

import pytest
import torch

import tiercel
import tiny
from by_hand import generate_reference
from tiercel import LLM, RequestError, SamplingParams, TiercelError
from tiercel.llm import LoRARequest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("model"), template=tiny.TEMPLATE)


@pytest.fixture(scope="module")
def model(folder):
    return tiercel.load(folder)


GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


def test_generate_answers_with_a_string_that_knows_more(model):
    out = model.generate("Hello", GREEDY)
    assert isinstance(out, str) and len(out.token_ids) == 20
    assert out.finish_reason == "length" and out.prompt_tokens == len("Hello") + 2 and out.thinking == ""
    assert out.times.total > 0


def test_text_is_a_users_message_where_there_is_a_template_and_raw_is_raw(model):
    bot, user = model.tokenizer.encode("<|bot|>", special=True), model.tokenizer.encode("<|user|>", special=True)
    assert (
        model.encode("Hi")
        == [*user, *model.tokenizer.encode("Hi"), *bot]
        == model.encode([{"role": "user", "content": "Hi"}])
    )
    assert model.encode("Hi", raw=True) == model.tokenizer.encode("Hi")
    assert model.encode([5, 6]) == [5, 6]


def test_a_stream_adds_up_to_the_answer(model):
    assert "".join(model.stream("Hello", GREEDY)) == model.generate("Hello", GREEDY)


def test_logits_are_what_scorers_need(model):
    logits = model.logits([1, 2, 3])
    assert logits.shape == (3, 300) and logits.dtype == torch.float32 and not logits.requires_grad


def test_the_tokens_are_the_networks_own(model):
    out = model.generate("abc", GREEDY, raw=True)
    ids, tokenizer = model.tokenizer.encode("abc"), model.tokenizer
    assert out.token_ids == generate_reference(model.network, ids, 20, tokenizer.vocab_size)
    assert out == model.tokenizer.decode(out.token_ids)


def test_rows_of_logits_without_a_token_are_never_sampled(model):
    for params in (SamplingParams(temperature=5.0, max_tokens=200, seed=1, ignore_eos=True),
                   SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logit_bias={299: 100.0})):  # fmt: skip
        assert max(model.generate("abc", params, raw=True).token_ids) < model.tokenizer.vocab_size < 300
    with pytest.raises(RequestError, match="no token is left"):
        model.generate("abc", SamplingParams(allowed_token_ids=[299]))


def test_a_stop_string_is_found_across_tokens_and_cut_off(model):
    free = model.generate("abc", GREEDY, raw=True)
    at = 8
    stop = free[at : at + 3]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop=[stop, "never said"])
    out = model.generate("abc", params, raw=True)
    assert out == free[: free.index(stop)] and (out.finish_reason, out.stop_reason) == ("stop", stop)
    assert "".join(model.stream("abc", params, raw=True)) == out
    params.include_stop_str_in_output = True
    assert model.generate("abc", params, raw=True) == free[: free.index(stop) + 3]


def test_half_a_stop_string_at_the_end_is_text(model):
    free = model.generate("abc", GREEDY, raw=True)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop=free[-1] + "never said")
    assert model.generate("abc", params, raw=True) == free


def test_thoughts_are_kept_apart_in_a_chat(tmp_path):
    model = tiercel.load(tiny.checkpoint(tmp_path, template=tiny.TEMPLATE))
    said = iter(
        [*model.tokenizer.encode("<think>why</think>Because"), *model.tokenizer.encode("<|end|>", special=True)]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tiercel.sampling.sampler.Sampler.sample", lambda self, logits: next(said))
        out = model.generate("Hi", SamplingParams(max_tokens=99))
    assert (out, out.thinking, out.finish_reason) == ("Because", "why", "stop")


def test_the_context_can_be_smaller_and_not_larger_than_the_models(folder):
    assert tiercel.load(folder, max_length=64).max_length == 64
    with pytest.raises(RequestError, match="1 to 512"):
        tiercel.load(folder, max_length=4096)


def test_a_checkpoint_without_a_tokenizer_scores_and_generates_ids(tmp_path):
    folder = tiny.checkpoint(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    model = tiercel.load(folder)
    assert model.tokenizer is None and model.logits([1, 2]).shape == (2, 300)
    out = model.generate([1, 2, 3], GREEDY)
    assert out == "" and out.token_ids == generate_reference(model.network, [1, 2, 3], 20)
    with pytest.raises(RequestError, match="no tokenizer"):
        model.generate("words")
    with pytest.raises(RequestError, match="stop_token_ids"):
        model.generate([1], SamplingParams(stop="x"))


def test_recommended_sampling_settings_are_used(tmp_path):
    folder = tiny.checkpoint(tmp_path)
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.95, "do_sample": true}')
    params = tiercel.load(folder).default_params()
    assert (params.temperature, params.top_p, params.max_tokens) == (0.6, 0.95, None)


# ── vLLM's names ──


def test_the_popular_vllm_example_runs_with_only_its_import_changed(folder):
    with pytest.warns(UserWarning, match="trust_remote_code: no code from a model folder is ever run"):
        llm = LLM(
            model=str(folder), trust_remote_code=True, dtype="half", max_model_len=512, gpu_memory_utilization=0.85
        )
    params = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=8)
    outputs = llm.generate(["The capital of France is", "2 + 2 ="], params)
    for output, prompt in zip(outputs, ["The capital of France is", "2 + 2 ="], strict=True):
        assert output.prompt == prompt and isinstance(output.outputs[0].text, str)
        assert output.prompt_token_ids == llm.get_tokenizer().encode(prompt)
        assert 0 < len(output.outputs[0].token_ids) <= 8 and output.outputs[0].finish_reason in ("stop", "length")


def test_arguments_that_ask_for_nothing_are_silent_and_unknown_ones_refused(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LLM(model=folder, tensor_parallel_size=1, trust_remote_code=False)
    with pytest.raises(RequestError, match="no argument 'tensor_paralel_size'"):
        LLM(model=folder, tensor_paralel_size=2)


def said(llm, **more):
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    return [out.outputs[0].token_ids for out in llm.generate(["abcabcabc", "xyz"], params, use_tqdm=False, **more)]


def test_drafts_of_any_kind_change_no_token(folder, tmp_path):
    plain = said(LLM(model=folder))
    for config in (
        {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 3},
        {"model": str(folder)},
        {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3},
        {"model": "[ngram]", "prompt_lookup_min": 1, "prompt_lookup_max": 2},
    ):
        llm = LLM(model=folder, speculative_config=config)
        assert said(llm) == plain, config
    for config, what in (
        ({"method": "eagle"}, "eagle"),
        ({"method": "draft_model"}, "draft model's name"),
        ({"method": "ngram", "num_speculative_tokens": 99}, "num_speculative_tokens"),
        ({"method": "ngram", "prompt_lookup_max": 0}, "prompt_lookup_max"),
        ({"draft_tensor_parallel_size": 2}, "draft_tensor_parallel_size"),
    ):
        with pytest.raises(RequestError, match=what):
            LLM(model=folder, speculative_config=config)
    other = tiny.checkpoint(tmp_path, vocab_size=280)
    (other / "tokenizer.json").unlink()
    with pytest.raises(RequestError, match="cannot draft"):
        tiercel.load(folder, draft_model=other)


def test_quantization_and_device_are_vllms_names(folder):
    assert said(LLM(model=folder, quantization="q8_0")) == said(LLM(model=folder, quantization="q8_0", device="cpu"))
    with pytest.raises(RequestError, match="device is auto, cpu or cuda"):
        LLM(model=folder, device="tpu")
    with pytest.raises(RequestError, match="marlin"):
        LLM(model=folder, quantization="marlin")


def test_lora_requests_need_their_switch(folder):
    request = LoRARequest("a", 1, "nowhere")
    with pytest.raises(RequestError, match="enable_lora"):
        said(LLM(model=folder), lora_request=request)
    with pytest.raises(TiercelError, match="nowhere"):
        said(LLM(model=folder, enable_lora=True), lora_request=request)


def test_processes_that_share_a_model_say_what_one_says(tmp_path):
    folder = tiny.checkpoint(tmp_path, "attention+mamba2 attention mamba2/-")
    one = LLM(model=folder, dtype="float32")
    expected = said(one)
    several = LLM(model=folder, dtype="float32", tensor_parallel_size=2)
    assert said(several) == expected == said(several), "also from its cache"
    assert several.model.engine.stats.hit_tokens > 0
    both = SamplingParams(n=2, seed=3, max_tokens=12, ignore_eos=True)
    assert [[c.token_ids for c in llm.generate("abc", both, use_tqdm=False)[0].outputs] for llm in (one, several)] == [
        [c.token_ids for c in several.generate("abc", both, use_tqdm=False)[0].outputs]
    ] * 2
    assert torch.allclose(several.model.logits([1, 2, 3]), one.model.logits([1, 2, 3]), atol=1e-3)
    for refused in (lambda: several.model.export(tmp_path / "out"), lambda: several.model.load_adapter("a", "b")):
        with pytest.raises(RequestError, match="without tensor_parallel"):
            refused()
    session = several.model.session()
    for _ in session.generate([1, 2, 3], GREEDY):
        pass
    with pytest.raises(RequestError, match="neither saves"):
        session.save(tmp_path / "session")
    with pytest.raises(RequestError, match="group already"):
        tiercel.load(folder, tensor_parallel=2)


@pytest.mark.parametrize(
    "changes, what",
    [
        (dict(tensor_parallel=0), "from 1 to 64"),
        (dict(tensor_parallel=2, quantize="q8_0"), "choose one"),
        (dict(tensor_parallel=2, device="cuda"), "runs on the CPU"),
        (dict(tensor_parallel=2), "mamba1 layers cannot be split"),
    ],
)
def test_what_cannot_be_shared_is_refused(folder, changes, what):
    with pytest.raises(RequestError, match=what):
        tiercel.load(folder, **changes)


def test_n_answers_fork_one_reading_of_the_prompt(folder):
    llm = LLM(model=folder, seed=7)
    params = SamplingParams(temperature=4.0, n=3, max_tokens=10, ignore_eos=True)
    (three,) = llm.generate("Once upon a time", params)
    assert [o.index for o in three.outputs] == [0, 1, 2]
    assert len({tuple(o.token_ids) for o in three.outputs}) == 3
    (one,) = llm.generate("Once upon a time", SamplingParams(temperature=4.0, max_tokens=10, ignore_eos=True))
    assert one.outputs[0].token_ids == three.outputs[0].token_ids


def test_prompts_as_text_dicts_or_ids_each_with_own_params(folder):
    llm = LLM(model=folder)
    ids = llm.get_tokenizer().encode("abc")
    many = llm.generate(
        [{"prompt": "abc"}, {"prompt_token_ids": ids}, "abc"],
        [GREEDY, GREEDY, SamplingParams(temperature=0, max_tokens=2)],
    )
    assert many[0].outputs[0].token_ids == many[1].outputs[0].token_ids and many[1].prompt is None
    assert len(many[2].outputs[0].token_ids) == 2
    with pytest.raises(RequestError, match="as many sampling params"):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(RequestError, match="prompt_token_ids"):
        llm.generate([3.5], GREEDY)


def test_chat_renders_the_template(folder):
    llm = LLM(model=folder)
    (out,) = llm.chat([{"role": "user", "content": "Hi"}], GREEDY)
    assert out.prompt == "<|user|>Hi<|bot|>" and out.outputs[0].token_ids
    assert len(llm.chat([[{"role": "user", "content": "Hi"}]] * 2, GREEDY)) == 2
