"""Adapters over HTTP: their own model names, one network."""

from __future__ import annotations

import pytest
import torch

import tiercel
from tiercel.serve.service import Service
from tiercel.train.lora import adapt, save
from tiercel.weights import load as weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
GREEDY = {"max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def poet(checkpoints, tmp_path_factory):
    pytest.importorskip("peft")
    network, _, layout = weights.load(checkpoints["tiny"])
    torch.manual_seed(3)
    adapted = adapt(network, layout, rank=2)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if ".lora_B" in name:
                p.normal_()
    return save(adapted, tmp_path_factory.mktemp("served") / "poet")


def test_a_request_chooses_its_adapter_by_the_model_name(start, checkpoints, poet):
    server = start()
    service: Service = server.service
    service.models.adapters["tiny:poet"] = "tiny", poet
    model = tiercel.load(checkpoints["tiny"], adapters={"poet": poet})
    said = {}
    for name in ("tiny", "tiny:poet"):
        body = {"model": name, "messages": [{"role": "user", "content": "Hello"}], **GREEDY}
        status, answer = server.ask("POST", "/v1/chat/completions", body)
        assert status == 200 and answer["model"] == name, answer
        said[name] = answer["choices"][0]["message"]["content"]
    params = tiercel.SamplingParams(temperature=0, max_tokens=8)
    assert said["tiny"] == model.generate("Hello", params)
    assert said["tiny:poet"] == model.generate("Hello", params, adapter="poet") != said["tiny"]
    assert len(service.models.loaded) == 1
    assert "tiny:poet" in [entry["id"] for entry in server.ask("GET", "/v1/models")[1]["data"]]
    assert "tiny:poet" in [entry["name"] for entry in server.ask("GET", "/api/tags")[1]["models"]]
    assert server.ask("GET", "/api/ps")[1]["models"][0]["adapters"] == ["tiny:poet"]
    shown = server.ask("POST", "/api/show", {"model": "tiny:poet"})[1]
    assert shown["modelfile"].startswith("FROM tiny\nADAPTER poet")
    lines = server.lines("/api/generate", {"model": "tiny:poet", "prompt": "Hello", "options": {"temperature": 0}})
    assert lines[-1]["done"]
    embedded = [
        server.ask("POST", "/api/embed", {"model": name, "input": "Hello"})[1]["embeddings"][0] for name in said
    ]
    assert embedded[0] != embedded[1]


def test_an_adapter_that_does_not_fit_is_refused(start, poet, tmp_path):
    server = start()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "adapter_config.json").write_text("{}")
    (tmp_path / "bad" / "adapter_model.safetensors").write_bytes(b"x")
    server.service.models.adapters["tiny:bad"] = "tiny", tmp_path / "bad"
    body = {"model": "tiny:bad", "messages": [{"role": "user", "content": "Hello"}], **GREEDY}
    status, answer = server.ask("POST", "/v1/chat/completions", body)
    assert 400 <= status <= 500 and "LoRA" in answer["error"]["message"]
