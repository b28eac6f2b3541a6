"""Real client programs against a server with a tiny model, each installed in a folder of its own.

    make clients                        all; the registries are needed, node and npm for the second half
    pytest -m slow tests/clients -k "openai or codex"

Each client runs in its default configuration, with nothing set but the server's address and the model's name.  A run
writes its rows of docs/clients.md.  A row is good where the client ended well and the server answered none of its
requests with an error.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from clients.server import Served, served

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "clients.md"
INSTALL_SECONDS, RUN_SECONDS = 900, 600
ROW = re.compile(r"^\| ([^|]+?) \| ([^|]*?) \| ([^|]*?) \| ([^|]*?) \|$", re.MULTILINE)


@dataclass(frozen=True)
class Client:
    """packages: the first names the row.  command: what to run, else the script; {url} and {model} are replaced.

    before: run ahead of it, whatever comes of that.  files: written into the folder first.  environment: set for it.
    """

    packages: tuple[str, ...]
    script: str = ""
    does: str = ""
    command: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    files: tuple[tuple[str, str], ...] = ()

    @property
    def npm(self) -> bool:
        return bool(self.command) or self.script.endswith(".mjs")

    @property
    def name(self) -> str:
        return self.packages[0] + (" (npm)" if self.npm else "")


OPENCODE = json.dumps({"provider": {"tiercel": {"npm": "@ai-sdk/openai-compatible", "name": "Tiercel",
                       "options": {"baseURL": "{url}/v1"}, "models": {"{model}": {"name": "tiny"}}}}})  # fmt: skip
CLIENTS = (
    Client(("openai", "pydantic"), "use_openai.py"),
    Client(("ollama", "pydantic"), "use_ollama.py"),
    Client(("anthropic",), "use_anthropic.py"),
    Client(("litellm",), "use_litellm.py"),
    Client(("langchain-openai",), "use_langchain_openai.py"),
    Client(("langchain-ollama",), "use_langchain_ollama.py"),
    Client(("llama-index-core", "llama-index-llms-openai-like", "llama-index-llms-ollama"), "use_llama_index.py"),
    Client(("instructor",), "use_instructor.py"),
    Client(("pydantic-ai-slim", "openai"), "use_pydantic_ai.py"),
    Client(("openai-agents",), "use_openai_agents.py"),
    Client(("dspy",), "use_dspy.py"),
    Client(("outlines", "openai", "ollama"), "use_outlines.py"),
    Client(("lm-eval", "tenacity", "aiohttp", "requests", "tiktoken", "pydantic", "transformers"), "use_lm_eval.py"),
    Client(("inspect-ai", "openai"), "use_inspect_ai.py"),
    Client(("openai",), "use_openai.mjs"),
    Client(("ollama",), "use_ollama.mjs"),
    Client(("ai", "@ai-sdk/openai-compatible"), "use_ai.mjs"),
    Client(("@openai/codex",), does="codex exec with a provider of wire_api responses",
           command=("codex", "exec", "--skip-git-repo-check", "-m", "{model}", "-c", "model_provider=tiercel", "-c",
                    'model_providers.tiercel={name="Tiercel",base_url="{url}/v1",wire_api="responses"}', "Say hi.")),
    Client(("@openai/codex",), does="codex exec --oss",
           command=("codex", "exec", "--oss", "--local-provider", "ollama", "--skip-git-repo-check", "-m", "{model}",
                    "Say hi."),
           environment=(("CODEX_OSS_BASE_URL", "{url}/v1"),)),
    Client(("opencode-ai",), does="opencode run with an openai-compatible provider",
           before=("opencode", "models"),  # its first start loads its list of models, and may lose a race with itself
           command=("opencode", "run", "-m", "tiercel/{model}", "Say hi."), files=(("opencode.json", OPENCODE),)),
    Client(("@anthropic-ai/claude-code",), does="claude -p",
           command=("claude", "-p", "Say hi.", "--model", "{model}"),
           environment=(("ANTHROPIC_BASE_URL", "{url}"), ("ANTHROPIC_AUTH_TOKEN", "none"),
                        ("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1"))),
)  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("clients")) as running:
        yield running


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: f"{client.name} {client.does}".strip())
def test_client(client: Client, server: Served, tmp_path: Path) -> None:
    if client.npm and not shutil.which("npm"):
        pytest.skip("no npm here")
    try:
        version = install_npm(client, tmp_path) if client.npm else install_pip(client, tmp_path)
    except subprocess.SubprocessError as error:
        pytest.skip(f"not installed here: {str(getattr(error, 'stderr', '') or error)[-300:]}")
    before = server.statuses()
    ended = run(client, server, tmp_path)
    errors = {key: count - before.get(key, 0) for key, count in server.statuses().items() if key[1] >= "400"}
    errors = {key: count for key, count in errors.items() if count > 0}
    asked = sum(server.statuses().values()) - sum(before.values())
    good = ended.returncode == 0 and not errors and asked
    does = client.does or ((HERE / client.script).read_text().splitlines()[0].strip('"/ '))
    said = "" if ended.returncode == 0 else (ended.stderr or ended.stdout).strip().splitlines()[-1:][0][:160]
    refused = ", ".join(f"{path} {status}" for path, status in errors)
    write_row(
        client.name,
        version,
        does,
        "works" if good else f"fails: {said or refused or 'no request came'}",
    )
    assert good, f"{errors} {asked} requests\n{ended.stdout[-1500:]}\n{ended.stderr[-3000:]}"


def install_pip(client: Client, folder: Path) -> str:
    """A virtual environment in the folder; the version of the first package."""
    quiet = {"check": True, "capture_output": True, "text": True, "timeout": INSTALL_SECONDS}
    python = folder / "venv" / "bin" / "python"
    if uv := shutil.which("uv"):
        subprocess.run([uv, "venv", "-q", "--python", sys.executable, folder / "venv"], **quiet)
        subprocess.run([uv, "pip", "install", "-q", "--python", python, *client.packages], **quiet)
    else:
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], **quiet)
        subprocess.run([python, "-m", "pip", "install", "-q", *client.packages], **quiet)
    show = f"import importlib.metadata as m; print(m.version({client.packages[0]!r}))"
    return subprocess.run([python, "-c", show], **quiet).stdout.strip()


def install_npm(client: Client, folder: Path) -> str:
    """node_modules in the folder; the version of the first package."""
    quiet = {"check": True, "capture_output": True, "text": True, "timeout": INSTALL_SECONDS, "cwd": folder}
    (folder / "package.json").write_text('{"private": true, "type": "module"}')
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", *client.packages], **quiet)
    return str(json.loads((folder / "node_modules" / client.packages[0] / "package.json").read_text())["version"])


def run(client: Client, server: Served, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the script or the command in the folder, with a home of its own."""

    def filled(text: str) -> str:
        return text.replace("{url}", server.url).replace("{model}", server.model)

    for name, text in client.files:
        (folder / name).write_text(filled(text))
    if client.command:
        command = [str(folder / "node_modules" / ".bin" / client.command[0]), *map(filled, client.command[1:])]
    else:
        shutil.copy(HERE / client.script, folder)
        shutil.copy(HERE / "common.py", folder)
        command = ["node", client.script] if client.npm else [str(folder / "venv" / "bin" / "python"), client.script]
    home = folder / "home"
    home.mkdir()
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TIERCEL", "VIRTUAL"))}
    own |= {
        "HOME": str(home),
        "CLIENTS_URL": server.url,
        "CLIENTS_MODEL": server.model,
        "CLIENTS_FOLDER": server.folder,
    }
    own |= {name: filled(value) for name, value in client.environment}
    if client.before:
        first = [str(folder / "node_modules" / ".bin" / client.before[0]), *client.before[1:]]
        subprocess.run(first, cwd=folder, env=own, capture_output=True, timeout=RUN_SECONDS, stdin=subprocess.DEVNULL)
    try:
        return subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, timeout=RUN_SECONDS,
                              stdin=subprocess.DEVNULL)  # fmt: skip
    except subprocess.TimeoutExpired as error:
        out = [part.decode() if isinstance(part, bytes) else part or "" for part in (error.stdout, error.stderr)]
        return subprocess.CompletedProcess(command, 124, out[0], out[1] + f"\nno end within {RUN_SECONDS} s")


def write_row(name: str, version: str, does: str, result: str) -> None:
    """Put a row into the page's table, in the order of CLIENTS."""
    head, found = PAGE.read_text().split("|---|---|---|---|\n")
    rows = {(row[0], row[2]): row for row in ROW.findall("|---|---|---|---|\n" + found)}
    rows[name, does] = (name, version, does, result.replace("|", "/").replace("\n", " "))
    table = "".join(f"| {' | '.join(row)} |\n" for _, row in sorted(rows.items()))
    PAGE.write_text(f"{head}|---|---|---|---|\n{table}")
