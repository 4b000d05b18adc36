"""The files that come along with the weights: tokenizer, chat template and encoding, generation config, licence."""

from __future__ import annotations

import json
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..io.checkpoint import read_json
from ..io.shard_writer import mode_of, path_inside, write_blocks
from ..io.sources import ConversionError, Source
from ..io.tensor_stream import BLOCK_BYTES

_PATTERNS = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
)
# Read for the new card, which is written in its place.
CARD_FILE = "README.md"
# Whole folders: DeepSeek-V3.2 ships its chat format as Python code in `encoding/` in place of a template.
_FOLDERS = ("additional_chat_templates/", "encoding/")
_NEVER = ("*.bin", ".*", "*/.*", "*.pyc")


def companion_files(files: list[str]) -> list[str]:
    """Those of a source's files that belong beside the converted weights."""
    return [
        file
        for file in files
        if not any(fnmatch(file, never) for never in _NEVER)
        and (file.startswith(_FOLDERS) or ("/" not in file and any(fnmatch(file, pattern) for pattern in _PATTERNS)))
    ]


@dataclass(frozen=True)
class Companion:
    """A file that comes along: `content` where it is written anew, `None` where it is copied byte for byte."""

    name: str
    content: bytes | None = None


def plan_companions(source: Source) -> tuple[list[Companion], list[str]]:
    """The files that come along, each looked at before anything is written.

    Configs lose what would make `trust_remote_code=True` fetch code that does not travel with the checkpoint: entries
    of `auto_map` that name another repository, or a file that stays behind.

    Args:
        source: the checkpoint.

    Returns:
        The files, and what their user will miss, one sentence each.

    Raises:
        ConversionError: a companion that is no regular file, lies outside the checkpoint, or is no valid JSON.
    """
    files = source.list_files()
    names = companion_files(files)
    companions, notes, settings = [], [], {}
    if CARD_FILE in files:
        source.size(CARD_FILE)
    for name in names:
        source.size(name)
        if "/" in name or not name.endswith("_config.json"):
            companions.append(Companion(name))
            continue
        settings[name] = read_json(source, name)
        kept, removed = _without_foreign_code(settings[name], set(names))
        companions.append(Companion(name, _as_json(kept) if removed else None))
        if removed:
            notes.append(f"{name}: code that does not come along is no longer named: {', '.join(removed)}")
    tokenizer = settings.get("tokenizer_config.json")
    if (
        tokenizer is not None
        and "chat_template" not in tokenizer
        and not any(file.startswith("chat_template.") for file in files)
    ):
        instead = (
            " (its chat format is the code in encoding/)" if any(f.startswith("encoding/") for f in files) else ""
        )
        notes.append(f"the source has no chat template{instead}: tokenizer.apply_chat_template will not work")
    return companions, notes


def copy_companions(source: Source, output: Path, companions: list[Companion] | None = None) -> list[str]:
    """Write them, with the modes of the source's files; returns their names.

    Args:
        source: the checkpoint.
        output: the folder to write to.
        companions: of `plan_companions`, which is asked when they are not given.
    """
    if companions is None:
        companions, _ = plan_companions(source)
    for companion in companions:
        target = path_inside(output, companion.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        size = source.size(companion.name)
        blocks = (
            source.read_range(companion.name, begin, min(begin + BLOCK_BYTES, size))
            for begin in range(0, size, BLOCK_BYTES)
        )
        content = blocks if companion.content is None else [companion.content]
        written = write_blocks(target, content, mode=mode_of(source, companion.name))
        if companion.content is None and written.size != size:
            raise ConversionError(
                f"{source.location}: {companion.name} has {written.size} bytes where {size} were due: it changed "
                "meanwhile, run again"
            )
    return [companion.name for companion in companions]


def _as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _without_foreign_code(value: Any, travelling: set[str]) -> tuple[Any, list[str]]:
    """A JSON value without the entries of `auto_map`, at any depth, whose code stays behind; and those entries."""
    removed: list[str] = []

    def visit(part: Any) -> Any:
        if isinstance(part, list):
            return [visit(item) for item in part]
        if not isinstance(part, dict):
            return part
        kept = {name: visit(item) for name, item in part.items() if name != "auto_map"}
        if "auto_map" in part:
            remains = own_classes(part["auto_map"])
            if remains:
                kept = {name: remains if name == "auto_map" else kept[name] for name in part}
        return kept

    def own_classes(auto_map: Any) -> dict[str, Any]:
        entries = auto_map if isinstance(auto_map, dict) else {"auto_map": auto_map}
        remains = {}
        for auto, classes in entries.items():
            listed = classes if isinstance(classes, list) else [classes]
            own = [one if _travels(one, travelling) else None for one in listed]
            removed.extend(f"{auto} -> {one}" for one, kept in zip(listed, own) if one is not None and kept is None)
            if any(own):
                remains[auto] = own if isinstance(classes, list) else own[0]
        return remains

    return visit(value), removed


def _travels(reference: Any, travelling: set[str]) -> bool:
    """Whether `module.Class` lies in a file that comes along; `org/name--module.Class` never does."""
    return isinstance(reference, str) and f"{reference.rpartition('.')[0]}.py" in travelling
