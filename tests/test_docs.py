"""Documentation names files, commands and settings that exist."""

import re
from pathlib import Path

import pytest

import tiercel

ROOT = Path(__file__).parents[1]
PACKAGE = Path(tiercel.__file__).parent
PAST = {"docs/history.md", "CHANGELOG.md"}  # may name files that are gone
PAGES = [p for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md"),
                     *ROOT.glob("training/*/*.md"), *ROOT.glob(".github/**/*.md")] if p.is_file()]  # fmt: skip
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s]*)\)")
CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"[\w.-]+(/[\w.-]+)*/?\.?(md|py|cpp|h|toml|json|jsonl|svg|txt|yml|cff)|[\w.-]+(/[\w.-]+)+/|[a-z_]+/")
FOLDERS = ("src/", "tests/", "docs/", "benchmarks/", "training/", "examples/", ".github/", ".ci/")


def without_code_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(without_code_blocks(page.read_text())):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{name(page)}: {link}"


@pytest.mark.parametrize("page", [p for p in PAGES if name(p) not in PAST], ids=name)
def test_paths_of_the_repository_exist(page):
    """`engine/request.py` is a file of the package, `tests/golden/` a folder of the repository."""
    for code in CODE.findall(without_code_blocks(page.read_text())):
        path = code.partition(": ")[0]
        inside = (PACKAGE / path.split("/")[0]).is_dir() if "/" in path else False
        if PATH.fullmatch(path) and (path.startswith(FOLDERS) or inside):
            assert (ROOT / path).exists() or (PACKAGE / path).exists(), f"{name(page)}: `{code}`"


def test_files_of_the_diagram_exist():
    """A label such as `engine/scheduler.py` in the Mermaid diagram, a folder or file in the tree above it."""
    text = (ROOT / "docs/architecture.md").read_text()
    (diagram,) = re.findall(r"```mermaid\n(.*?)```", text, flags=re.DOTALL)
    (tree,) = re.findall(r"```text\n(.*?)```", text, flags=re.DOTALL)
    files = re.findall(r"[\w/]+\.py", diagram) + re.findall(r"(?<![\w/])([a-z_/]+(?:\.py|/))(?=[ :])", tree)[1:]
    assert len(files) > 25
    for file in files:
        assert (PACKAGE / file).exists(), file
    folders = {
        path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__" and any(path.iterdir())
    }
    assert folders <= set(re.findall(r"([a-z_]+)/", tree))


@pytest.mark.parametrize("page", [p for p in PAGES if name(p) not in PAST], ids=name)
def test_commands_exist(page):
    """`tiercel …` in code is a command, and its --options are options of that command."""
    from typer.main import get_command

    from tiercel.commands.cli import app

    text = page.read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    for line in [line for block in blocks for line in block.splitlines()] + CODE.findall(without_code_blocks(text)):
        for command in re.split(r"[;|&]+", line.partition("   #")[0]):
            words = command.replace(".venv/bin/", "").split()
            if words[:1] != ["tiercel"]:
                continue
            found = get_command(app)
            rest = words[1:]
            while rest and hasattr(found, "commands") and re.fullmatch(r"[a-z]+", rest[0]):
                assert rest[0] in found.commands, f"{name(page)}: {line}"
                found, rest = found.commands[rest[0]], rest[1:]
            known = {option for p in found.params for option in [*p.opts, *p.secondary_opts]} | {"--help"}
            for word in rest:
                option = word.partition("=")[0].strip("`,.")
                assert not re.fullmatch(r"--[a-z-]+", option) or option in known, f"{name(page)}: {line}"


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").exists()


MIXERS = {"falcon_h1": "attention+mamba2", "llama": "attention", "qwen2": "attention", "qwen3": "attention",
          "qwen3_moe": "attention", "qwen3_5": "gated_delta attention",
          "qwen3_5_moe": "gated_delta attention", "qwen3_next": "gated_delta attention",
          "olmo_hybrid": "gated_delta attention", "mamba": "mamba1/-",
          "mamba2": "mamba2/-", "bamba": "mamba2 attention", "jamba": "mamba1 attention",
          "lfm2": "short_conv attention", "lfm3": "short_conv attention", "gemma3": "attention",
          "phi3": "attention", "llava": "attention", "lfm2_moe": "short_conv/moe attention/moe",
          "nemotron_h": "mamba2/- attention/-", "granite": "mamba2/moe attention/moe",
          "pattern": "attention mamba2"}  # fmt: skip


def runs_on_gpu(family: str) -> bool:
    import tiny
    from tiercel.errors import RequestError
    from tiercel.model.state_cache import StateCache

    try:
        StateCache(tiny.network(MIXERS[family], native=False), 1, 64)
    except RequestError:
        return False
    return True


def test_the_matrix_of_the_readme_is_true():
    """GPU, GGUF in and GGUF out as the code has them; CPU, quantized, LoRA and served hold for every family."""
    from tiercel.families import FAMILIES

    table = re.search(r"<!-- matrix.*?<!-- end -->", (ROOT / "README.md").read_text(), flags=re.DOTALL)[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")][2:]
    assert [row[0] for row in rows] == [family.name for family in FAMILIES]
    for family, row in zip(FAMILIES, rows, strict=True):
        assert set(family.model_types) <= set(re.findall(r"`(\w+)`", row[1])), row
        marks = [cell.startswith("✓") for cell in row[2:]]
        gguf = [family.read_gguf is not None, family.write_gguf is not None]
        assert marks == [True, runs_on_gpu(family.name), *gguf, True, True, True], row
