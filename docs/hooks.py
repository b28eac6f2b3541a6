"""Pages of the documentation site that come from code or from the repository's root (see `hooks` in mkdocs.yml)."""

from __future__ import annotations

import dataclasses
import posixpath
import re
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md",
              "changelog.md": "CHANGELOG.md"}  # fmt: skip
SOURCE_URL = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Source"]
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s]+)(?=\))")
SOURCE_PAGES = {"src/tiercel/serve/settings.py": "settings.md", "src/tiercel/commands/cli.py": "command-line.md"}
PICTURES = (".svg", ".png")
COMMAND_LINE_INTRO = """\
`tiercel COMMAND --help` prints the same. `--json` prints one JSON value instead of text, an error included.
Exit codes: 0 ok, 1 failed, 2 usage, 3 model not found, 4 does not fit, 130 interrupted."""
SETTINGS_INTRO = """\
Each is an environment variable (`TIERCEL_QUEUE=16`) and an option of `tiercel serve` (`--set queue=16`; the common ones
have a name of their own, see [tiercel serve](command-line.md#tiercel-serve)). Options win."""

sys.path.insert(0, str(ROOT / "src"))


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that have no file in docs/, and the pictures that pages show from other folders."""
    for page, source in ROOT_PAGES.items():
        if (ROOT / source).exists():
            files.append(File.generated(config, page, content=_moved((ROOT / source).read_text(), "", files)))
    files.append(File.generated(config, "command-line.md", content=command_line()))
    files.append(File.generated(config, "settings.md", content=settings()))
    for page in list(files.documentation_pages()):
        for link in LINK.findall(page.content_string):
            path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.src_uri), link))
            outside = path.endswith(PICTURES) and not path.startswith("docs/") and (ROOT / path).is_file()
            if outside and files.get_file_from_path(path) is None:
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links that leave docs/ to the page made from the file, or to the file in the repository."""
    return markdown if page.file.src_uri in ROOT_PAGES else _moved(markdown, "docs", files)


def _moved(markdown: str, folder: str, files: Files) -> str:
    pages = SOURCE_PAGES | {source: page for page, source in ROOT_PAGES.items()}

    def target(match: re.Match[str]) -> str:
        path, mark, anchor = match[1].partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        if path.startswith("docs/"):
            return path.removeprefix("docs/") + mark + anchor
        if path in pages:
            return pages[path] + mark + anchor
        if path.endswith(PICTURES) and files.get_file_from_path(path) is not None:
            return path
        return f"{SOURCE_URL}/blob/main/{path}"

    return LINK.sub(target, markdown)


# ── command line


def command_line() -> str:
    """Every command with its arguments and options, from typer."""
    from typer.main import get_command

    from tiercel.commands.cli import app

    lines = ["# Command line", "", COMMAND_LINE_INTRO, ""]
    for name, command in _commands(get_command(app), "tiercel"):
        lines += [f"## {name}", "", *_help(command), "```sh", _usage(name, command), "```", ""]
        rows = [row for row in map(_row, command.params) if row]
        if rows:
            lines += ["| | | default |", "|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _commands(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


def _help(command: Any) -> list[str]:
    return [_cell(line) if line else "" for line in (command.help or "").strip().splitlines()] + [""]


def _usage(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    words = [p.name.upper() + ("…" if p.nargs == -1 else "") for p in arguments]
    words = [word if p.required else f"[{word}]" for word, p in zip(words, arguments, strict=True)]
    return " ".join([name, *words, "[OPTIONS]"])


def _row(parameter: Any) -> str | None:
    if parameter.name == "help" or getattr(parameter, "hidden", False):
        return None
    if parameter.param_type_name == "argument":
        names = f"`{parameter.name.upper()}`"
    else:
        names = ", ".join(f"`{option}`" for option in [*parameter.opts, *parameter.secondary_opts])
    default = parameter.default
    empty = default is None or default is False or callable(default) or str(default) in ("", "[]", "()")
    return f"| {names} | {_cell(parameter.help or '')} | {'' if empty else f'`{default}`'} |"


# ── settings of the server


def settings() -> str:
    """Every field of `Settings`: its option, variable, default and the comment beside it."""
    from tiercel.serve import settings as module

    comments = _comments(Path(module.__file__))
    lines = ["# Server settings", "", SETTINGS_INTRO, "", "| setting | type | default | |", "|---|---|---|---|"]
    for part in dataclasses.fields(module.Settings):
        default = "" if part.default in ("", (), None) else f"`{part.default}`"
        lines.append(
            f"| `{part.name}` | `{_cell(str(part.type))}` | {default} | {_cell(comments.get(part.name, ''))} |"
        )
    return "\n".join([*lines, ""])


def _comments(path: Path) -> dict[str, str]:
    """The comment that follows each field of a dataclass, by the field's name."""
    found: dict[str, str] = {}
    name = ""
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            match = re.match(r"    (\w+): ", token.line)
            if match and token.type == tokenize.NAME and token.start[1] == 4:
                name = match[1]
            if token.type == tokenize.COMMENT and name and token.start[1] > 4:
                found.setdefault(name, token.string.removeprefix("#").strip())
    return found


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
