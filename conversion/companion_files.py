"""The files that come along with the weights: tokenizer, chat template and encoding, generation config, licence."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path

from .checkpoint import ConversionError, Source
from .shard_writer import BLOCK_BYTES, write_blocks

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


def copy_companions(source: Source, output: Path) -> list[str]:
    """Copy them; returns their names."""
    names = companion_files(source.list_files())
    for name in names:
        target = output / name
        target.parent.mkdir(parents=True, exist_ok=True)
        size = source.size(name)
        blocks = (
            source.read_range(name, begin, min(begin + BLOCK_BYTES, size)) for begin in range(0, size, BLOCK_BYTES)
        )
        write_blocks(target, blocks)
    return names


def companion_warnings(source: Source) -> list[str]:
    """What a user of the tokenizer will miss."""
    files = source.list_files()
    if "tokenizer_config.json" not in files:
        return []
    try:
        settings = json.loads(source.read_range("tokenizer_config.json", 0, source.size("tokenizer_config.json")))
    except ValueError as error:
        raise ConversionError(f"{source.location}: tokenizer_config.json is not valid JSON ({error})") from error
    warnings = []
    if not isinstance(settings, dict):
        raise ConversionError(f"{source.location}: tokenizer_config.json holds no JSON object")
    if "auto_map" in settings:
        warnings.append("the tokenizer has code of its own (auto_map in tokenizer_config.json), which stays behind")
    if "chat_template" not in settings and not any(file.startswith("chat_template.") for file in files):
        instead = (
            " (its chat format is the code in encoding/)" if any(f.startswith("encoding/") for f in files) else ""
        )
        warnings.append(f"the source has no chat template{instead}: tokenizer.apply_chat_template will not work")
    return warnings
