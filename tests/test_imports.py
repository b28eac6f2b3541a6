"""The code points one way, and what must be light stays light."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest

import tiercel

SRC = Path(tiercel.__file__).parent


def test_import_contracts_hold():
    """Layers, as pyproject.toml lists them; the same as `lint-imports`."""
    done = subprocess.run([sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()",
                           "--no-cache", "--no-logo"], cwd=SRC.parents[1], capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_no_module_imports_itself_by_way_of_others():
    """Imports inside functions count, those for type checkers do not."""
    graph = grimp.build_graph("tiercel", exclude_type_checking_imports=True, cache_dir=None)
    left = {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}
    while ends := {m for m in left if not left[m]} | set(left) - set().union(*left.values()):
        left = {module: imported - ends for module, imported in left.items() if module not in ends}
    assert not left, f"cycles through {sorted(left)}"


def test_every_part_is_in_a_layer():
    contract = tomllib.loads((SRC.parents[1] / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    layers = {name.strip(" ()").removeprefix("tiercel.") for line in contract["layers"] for name in line.split(":")}
    parts = {path.stem for path in SRC.iterdir() if (path.is_dir() and any(path.glob("*.py"))) or path.suffix == ".py"}
    assert parts - {"__init__", "__pycache__"} <= layers


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
