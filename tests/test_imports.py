"""The code points one way, and what must be light stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tiercel

SRC = Path(tiercel.__file__).parent
LEVELS = {  # a part imports from its own level or below; the command line may import anything
    "errors": 0, "child": 0, "leave": 0, "memory": 0, "pool": 0, "model.config": 0,
    "sampling": 1, "plan": 1, "quant": 1, "ops": 2, "families": 2,
    "model": 3, "text": 3, "weights": 4, "problems": 4, "steering": 5, "reply": 5, "generate": 5, "engine": 5,
    "voting": 6, "llm": 6, "serve": 7, "train": 7, "evals": 7, "cli": 7,
}  # fmt: skip
# what a file at the root belongs to
PART = {
    "console": "cli",
    "run": "cli",
    "commandline": "cli",
    "show": "cli",
    "doctor": "cli",
    "bench": "cli",
    "shrink": "cli",
    "planning": "cli",
    "chart": "cli",
    "__main__": "cli",
}
# families need only configs; a state writes files; the tokenizer reads and writes them
ALLOWED = {("model", "weights"), ("text", "weights")}


def part_of(module: str) -> str:
    if module in ("model.config", "model.parameters"):  # data, no torch
        return "model.config"
    top = module.split(".")[0]
    return PART.get(top, top)


def imports():
    for file in sorted(SRC.rglob("*.py")):
        module = ".".join(file.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tiercel."):
                names = [node.module.removeprefix("tiercel.")]
            elif isinstance(node, ast.ImportFrom) and node.module == "tiercel":
                names = [alias.name for alias in node.names]
            for name in names:
                yield module, name


def test_imports_point_one_way():
    seen = 0
    for module, imported in imports():
        a, b = part_of(module), part_of(imported)
        if a in LEVELS and b in LEVELS and (a, b) not in ALLOWED:
            assert LEVELS[b] <= LEVELS[a], f"{module} imports {imported}"
            seen += 1
    assert seen > 50


def test_every_part_has_a_level():
    unknown = {part_of(m) for m, _ in imports()} - set(LEVELS) - {"__init__"}
    assert not unknown


@pytest.mark.parametrize(
    "code",
    [
        "import tiercel",
        "from tiercel import SamplingParams",
        "from tiercel import FormatError, pattern",
        "import tiercel.families, tiercel.plan",
    ],
)
def test_light_things_do_not_import_torch(code):
    check = f"{code}\nimport sys\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_the_public_names_are_these():
    assert set(tiercel.__all__) == set(tiercel._HOME)
    for name in tiercel.__all__:
        assert getattr(tiercel, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tiercel.nothing  # noqa: B018


def test_nothing_dangerous_is_called():
    """No pickle, no eval, no code from model folders: the rule that removes whole classes of holes."""
    forbidden = {"eval", "exec", "__import__"}
    modules = {"pickle", "marshal", "shelve", "joblib", "dill", "cloudpickle"}
    for file in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in forbidden, f"{file.name}:{node.lineno}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                assert node.attr not in ("load", "save"), f"{file.name}:{node.lineno}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not modules & {name.split(".")[0] for name in names}, f"{file.name}:{node.lineno}"
