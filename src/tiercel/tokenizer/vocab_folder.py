"""Vocabularies in a Hugging Face folder: tokenizer.json, and the small files around it.

tokenizer.json              the tokenizer itself, as the `tokenizers` library reads it
tokenizer_config.json       names of the special tokens, extra_special_tokens, added_tokens_decoder (4.x), chat_template
special_tokens_map.json     the names again (4.x)
generation_config.json      eos_token_id: one or a list; config.json has it too
chat_template.jinja         (5.x) before a chat_template inside tokenizer_config.json, text or [{name, template}]
additional_chat_templates/  NAME.jinja, chosen by name
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

from tiercel.errors import FormatError
from tiercel.runtime.atomic import atomic_write
from tiercel.runtime.free_memory import check_free
from tiercel.tokenizer.control import Added
from tiercel.tokenizer.vocab import Recipe, added_json

TOKENIZER_BYTES = 256 << 20
SMALL_BYTES = 16 << 20
BYTES_PER_FILE_BYTE = 24  # of memory while a tokenizer.json is opened
MOST_TEMPLATES = 64
EXTRA_SPECIAL = ("extra_special_tokens", "additional_special_tokens", "model_specific_special_tokens")
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def from_folder(folder: Path) -> Recipe | None:
    """None when there is no tokenizer.json (`why_none` says what there is).  Raises FormatError."""
    tokenizer = _json(folder / "tokenizer.json", TOKENIZER_BYTES)
    if tokenizer is None:
        return None
    config, tokens_map, generation, model = (
        _json(folder / f"{name}.json", SMALL_BYTES) or {}
        for name in ("tokenizer_config", "special_tokens_map", "generation_config", "config")
    )
    names = _names(tokens_map) | _names(config)
    _complete_added(tokenizer, config, set(names.values()), _extra_special(config) | _extra_special(tokens_map))
    ids = known_ids(tokenizer)
    _check_one_text(tokenizer, ids)
    _name_bos(tokenizer, config, names, ids)
    eos = (
        _ids(generation, "eos_token_id") | _ids(model, "eos_token_id") | _ids(model.get("text_config"), "eos_token_id")
    )
    if names.get("eos_token") in ids:
        eos.add(ids[names["eos_token"]])
    for name in ("bos_token", "eos_token"):  # a checkpoint that names them by number only
        numbers = _ids(generation, f"{name}_id") or _ids(model, f"{name}_id")
        texts = [text for text, id in ids.items() if id in numbers]
        if name not in names and len(texts) == 1:
            names[name] = texts[0]
    templates = _templates(config) | _template_files(folder)
    return Recipe(tokenizer, {n: text for n, text in names.items() if text in ids}, templates, eos)


def why_none(folder: Path) -> str:
    """Why a folder has no usable tokenizer, and what to do."""
    if (folder / "tekken.json").is_file():
        return (
            f"{folder.name} has tekken.json, Mistral's own format, but no tokenizer.json; take tokenizer.json from the "
            "model's Hugging Face repository, or a GGUF file"
        )
    for name in ("tokenizer.model", "vocab.json", "vocab.txt"):
        if (folder / name).is_file():
            return (
                f"{folder.name} has {name} but no tokenizer.json; make one with transformers: "
                f"AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
    return f"{folder.name} has no tokenizer.json; the model takes and gives token ids only"


def _json(path: Path, most_bytes: int) -> dict[str, Any] | None:
    data = _read(path, most_bytes)
    if data is None:
        return None
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path.name} must be a table of fields")
    return value


def _read(path: Path, most_bytes: int) -> bytes | None:
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
    except OSError as error:
        raise FormatError(f"cannot read {path.name}: {error.strerror}") from None
    if len(data) > most_bytes:
        raise FormatError(f"{path.name} is larger than {most_bytes >> 20} MiB, no {path.name} is")
    check_free(BYTES_PER_FILE_BYTE * len(data), f"{path.name}, of {len(data)} bytes,")
    return data


def _names(table: dict[str, Any]) -> dict[str, str]:
    """ "bos_token": "<s>" or {"content": "<s>", …}; what is null is not there."""
    found = {}
    for name in NAMES:
        value = table.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if value is not None and not isinstance(value, str):
            raise FormatError(f"{name} must be text, not {str(value)[:40]!r}")
        if value:
            found[name] = value
    return found


def _ids(table: Any, name: str) -> set[int]:
    value = table.get(name) if isinstance(table, dict) else None
    values = value if isinstance(value, list) else [] if value is None else [value]
    if len(values) > 1024 or not all(type(v) is int for v in values):
        raise FormatError(f"{name} must be a token id or a short list of them, not {str(value)[:40]!r}")
    return {v for v in values if v >= 0}


def known_ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Token text: id, the added ones included."""
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):  # Unigram: [[piece, score], …]
        vocab = {entry[0]: id for id, entry in enumerate(vocab) if isinstance(entry, list) and entry}
    if not isinstance(vocab, dict):
        raise FormatError("tokenizer.json has no model with a vocab")
    found = vocab | {token.content: token.id for token in added_tokens(tokenizer)}
    if not all(type(text) is str and type(id) is int and 0 <= id < 1 << 24 for text, id in found.items()):
        raise FormatError("tokenizer.json has a token whose id is not a whole number from 0 to 2^24")
    return found


def added_tokens(tokenizer: dict[str, Any]) -> list[Added]:
    entries = tokenizer.get("added_tokens")
    if entries is None:
        return []
    if not isinstance(entries, list):
        raise FormatError("tokenizer.json's added_tokens must be a list")
    return [_added(entry, entry.get("id") if isinstance(entry, dict) else None) for entry in entries]


def _check_one_text(tokenizer: dict[str, Any], ids: dict[str, int]) -> None:
    """Raise FormatError where an added token has the id of another token: the library would number it anew."""
    added = {token.id: token.content for token in added_tokens(tokenizer)}
    for text, id in ids.items():
        if added.get(id, text) != text:
            raise FormatError(f"tokenizer.json gives the id {id} to {text[:60]!r} and to {added[id][:60]!r}")


def _added(entry: Any, id: Any) -> Added:
    content = entry.get("content") if isinstance(entry, dict) else None
    flags = {f: entry.get(f, False) for f in ("special", "lstrip", "rstrip", "single_word")} if content else {}
    if not _is_text(content) or type(id) is not int or not 0 <= id < 1 << 24:
        raise FormatError(f"an added token needs a text and an id, not {str(entry)[:60]!r}")
    if not all(type(flag) is bool for flag in flags.values()):
        raise FormatError(f"the flags of an added token are true or false, not {str(entry)[:60]!r}")
    return Added(id, content, **flags)


def _is_text(value: Any) -> TypeGuard[str]:
    """Something written, without half surrogate pairs (which JSON can spell)."""
    return type(value) is str and bool(value) and not any("\ud800" <= character <= "\udfff" for character in value)


def _extra_special(table: dict[str, Any]) -> set[str]:
    """Tokens that are special because the model's processor has a name for them.

    Only the form {name: token}: of a list transformers leaves the flags to tokenizer.json.
    """
    found: set[str] = set()
    for key in EXTRA_SPECIAL:
        value = table.get(key)
        for entry in value.values() if isinstance(value, dict) else ():
            content = entry.get("content") if isinstance(entry, dict) else entry
            if not isinstance(content, str):
                raise FormatError(f"{key} must name tokens by text, not {str(content)[:40]!r}")
            found.add(content)
    return found


def _complete_added(tokenizer: dict[str, Any], config: dict[str, Any], special: set[str], extra: set[str]) -> None:
    """Tokens that only tokenizer_config.json calls added or special, put where the library looks for them."""
    added = {token.content: token for token in added_tokens(tokenizer)}
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise FormatError("added_tokens_decoder must be a table of tokens by id")
    ids = known_ids(tokenizer)
    for number, entry in decoder.items():
        token = _added(entry, int(number) if isinstance(number, str) and number.isdecimal() else number)
        if ids.get(token.content, token.id) != token.id:
            raise FormatError(f"{token.content!r} is token {ids[token.content]} and, in the config, token {token.id}")
        added[token.content] = token
    for content in extra & added.keys():
        added[content] = replace(added[content], special=True)
    for content in (special | extra) & (ids.keys() - added.keys()):
        added[content] = Added(ids[content], content, special=True)
    written = {token.content: token for token in added_tokens(tokenizer)}
    changed = [token for token in added.values() if written.get(token.content) != token]
    if changed:
        kept = [
            entry
            for entry in tokenizer.get("added_tokens") or []
            if entry["content"] not in {c.content for c in changed}
        ]
        entries = [*kept, *(added_json(token) for token in changed)]
        tokenizer["added_tokens"] = sorted(entries, key=lambda entry: entry["id"])


def _name_bos(tokenizer: dict[str, Any], config: dict[str, Any], names: dict[str, str], ids: dict[str, int]) -> None:
    """The post-processor in tokenizer.json decides what stands around a text, as in transformers 5: a single token that
    it puts first is the begin token, also where no file names it so.  add_bos_token and add_eos_token do nothing."""
    if not all(type(config.get(key)) in (bool, type(None)) for key in ("add_bos_token", "add_eos_token")):
        raise FormatError("add_bos_token and add_eos_token are true or false")
    first = _first_token(tokenizer.get("post_processor"))
    if "bos_token" not in names and first in ids:
        names["bos_token"] = first


def _first_token(processor: Any) -> str:
    """The token that a TemplateProcessing (perhaps in a Sequence) puts before a text, if it is one."""
    if not isinstance(processor, dict):
        return ""
    if processor.get("type") == "Sequence":
        inner = processor.get("processors")
        return next(filter(None, map(_first_token, inner)), "") if isinstance(inner, list) else ""
    single, table = processor.get("single"), processor.get("special_tokens")
    first = (
        single[0].get("SpecialToken") if isinstance(single, list) and single and isinstance(single[0], dict) else None
    )
    named = table.get(first.get("id")) if isinstance(first, dict) and isinstance(table, dict) else None
    tokens = named.get("tokens") if isinstance(named, dict) else None
    return tokens[0] if isinstance(tokens, list) and len(tokens) == 1 and isinstance(tokens[0], str) else ""


def _templates(config: dict[str, Any]) -> dict[str, str]:
    value = config.get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and len(value) <= MOST_TEMPLATES:
        pairs = [(e.get("name"), e.get("template")) for e in value if isinstance(e, dict)]
        if len(pairs) == len(value) and all(isinstance(x, str) for pair in pairs for x in pair):
            return {str(name): str(template) for name, template in pairs}
    raise FormatError("chat_template must be text, or a list of tables with a name and a template")


def _template_files(folder: Path) -> dict[str, str]:
    files = {"default": folder / "chat_template.jinja"}
    extra = folder / "additional_chat_templates"
    if extra.is_dir():
        files |= {path.stem: path for path in sorted(extra.glob("*.jinja"))[:MOST_TEMPLATES]}
    data = {name: _read(path, SMALL_BYTES) for name, path in files.items()}
    try:
        return {name: text.decode() for name, text in data.items() if text is not None}
    except UnicodeDecodeError as error:
        raise FormatError(f"a chat template is not UTF-8 text: {error}") from None


def to_folder(recipe: Recipe, folder: Path) -> None:
    """Writes the files that `from_folder` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **recipe.names}
    files = {
        "tokenizer.json": json.dumps(recipe.tokenizer, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2) + "\n",
    }
    if recipe.eos and not (folder / "generation_config.json").exists():
        files["generation_config.json"] = json.dumps({"eos_token_id": sorted(recipe.eos)}) + "\n"
    for name, template in recipe.templates.items():
        place = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{_single(name)}.jinja"
        files[place] = template
    for name, text in files.items():
        _write(folder / name, text)


def _single(name: str) -> str:
    """The name as one path component; names come from files."""
    if not name.replace("_", "").replace("-", "").isalnum() or not name.isascii():
        raise FormatError(f"the chat template name {name[:40]!r} cannot be a file name")
    return name


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.encode())
