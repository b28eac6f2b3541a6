"""serve, ps, stop, run, cp, create, rm as a person types them, beside a running server and without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


def tiercel(*words, port, home, input=None):
    env = os.environ | {"TIERCEL_HOST": f"127.0.0.1:{port}", "TIERCEL_HOME": str(home), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "tiercel", *words], env=env, text=True, capture_output=True,
                          timeout=120, input=input or "")  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_ps_run_and_stop_speak_to_the_server(server, tmp_path):
    talk = {"port": server.port, "home": tmp_path}
    server.ask("POST", "/api/generate", {"model": "tiny", "keep_alive": "5m"})
    code, out, _ = tiercel("ps", **talk)
    head, row = out.splitlines()[0], next(line for line in out.splitlines() if line.startswith("tiny:latest"))
    assert code == 0 and head.split() == ["NAME", "ID", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL"]
    assert "512" in row and "minutes from now" in row
    code, out, err = tiercel("run", "tiny", "Hello", "--max-tokens", "5", "--temperature", "0", "--json", **talk)
    answer = json.loads(out)
    assert code == 0 and answer["completion_tokens"] <= 5 and answer["prompt_tokens"] > 5, err
    code, out, _ = tiercel("run", "tiny", "Hello", "--max-tokens", "5", "--temperature", "0", **talk)
    assert code == 0 and answer["text"].strip()[:1] in out
    assert tiercel("stop", "tiny", **talk)[0] == 0
    assert "tiny:latest" not in tiercel("ps", **talk)[1]
    code, _, err = tiercel("stop", "nobody", **talk)
    assert code == 3 and "not found" in err


def test_without_a_server_ps_says_how_to_start_one(tmp_path):
    code, _, err = tiercel("ps", port=1, home=tmp_path)
    assert code == 1 and "tiercel serve" in err and len(err.splitlines()) == 1


def test_create_cp_and_rm_work_on_the_disk(smollm2, tmp_path):
    talk = {"port": 1, "home": tmp_path}
    (tmp_path / "Modelfile").write_text(
        f'# mine\nFROM {smollm2}\nPARAMETER temperature 0\nPARAMETER stop "###"\nSYSTEM """\nBe short.\n"""\n'
        "MESSAGE user Hello\nMESSAGE assistant Hi\nLICENSE apache-2.0\n"
    )
    code, out, err = tiercel("create", "mine", "-f", str(tmp_path / "Modelfile"), **talk)
    assert code == 0 and "created 'mine'" in out, err
    assert tiercel("cp", "mine", "yours:v2", **talk)[0] == 0
    names = [model["name"] for model in json.loads(tiercel("list", "--json", **talk)[1])]
    assert set(names) == {"mine", "yours:v2"}
    extras = json.loads((tmp_path / "models/yours/v2/tiercel.json").read_text())["extras"]
    assert extras["parameters"] == {"temperature": 0, "stop": ["###"]} and extras["system"] == "Be short."
    assert tiercel("rm", "mine", "yours:v2", **talk)[0] == 0
    assert json.loads(tiercel("list", "--json", **talk)[1]) == [] and smollm2.exists()
    assert tiercel("rm", "mine", **talk)[0] == 3


@pytest.mark.parametrize(
    "text, words",
    [
        ("PARAMETER temperature 0", "needs a FROM"),
        ("FROM smollm2\nPARAMETER temperature hot", "needs a number"),
        ("FROM smollm2\nADAPTER x\nADAPTER y", "one ADAPTER"),
        ("FROM smollm2\nFLY away", "no instruction"),
        ('FROM smollm2\nSYSTEM """never closed', 'closing """ is missing'),
        ("FROM smollm2\nTEMPLATE {{ .Prompt }}", "Go's template language"),
        ("FROM smollm2\nTEMPLATE {% for %}", "no Jinja"),
        ("FROM /nowhere/x.gguf", "nothing at"),
    ],
)
def test_a_modelfile_that_cannot_be_followed_is_explained(tmp_path, text, words):
    from tiercel.errors import TiercelError
    from tiercel.hub import store

    with pytest.raises(TiercelError, match=words):
        store.create("mine", store.parse_modelfile(text), tmp_path)


def test_serve_refuses_what_would_be_open_or_impossible(tmp_path, server):
    talk = {"port": 1, "home": tmp_path}
    code, _, err = tiercel("serve", "--host", "0.0.0.0", **talk)
    assert code == 2 and "set a key" in err
    code, _, err = tiercel("serve", "--host", "127.0.0.1", "--port", str(server.port), **talk)
    assert code == 1 and "cannot be listened on" in err.splitlines()[-1]
    code, _, err = tiercel("serve", "--set", "slotz=1", **talk)
    assert code == 2 and "no limit 'slotz'" in err


def test_help_needs_no_server_libraries():
    code = ("import sys\nfrom typer.testing import CliRunner\nfrom tiercel.commands.cli import app\n"
            "assert CliRunner().invoke(app, ['serve', '--help']).exit_code == 0\n"
            "heavy = {'torch', 'starlette', 'uvicorn', 'prometheus_client'} & set(sys.modules)\n"
            "assert not heavy, heavy")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True)


def test_where_the_server_is():
    from tiercel.errors import RequestError
    from tiercel.serve.settings import address

    assert address("") == ("127.0.0.1", 11434)
    assert address("0.0.0.0") == ("0.0.0.0", 11434)
    assert address(":8080") == ("127.0.0.1", 8080)
    assert address("http://box:80/") == ("box", 80)
    assert address("[::1]:99") == ("::1", 99) and address("::1") == ("::1", 11434)
    for wrong in ("host:port", "host:99999"):
        with pytest.raises(RequestError):
            address(wrong)
