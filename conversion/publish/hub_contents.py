"""Which files of a checkpoint's folder go to the Hub: an explicit list, so that nothing travels by oversight."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from ..convert.companion_files import companion_files
from ..convert.journal import RECIPE_FILE
from ..io.checkpoint import CONFIG_FILE, INDEX_FILE, Checkpoint
from ..io.hub_requests import redact
from ..io.sources import ConversionError, is_unicode

# What the verbs write for people, beside what a model is loaded from.
_RECORDS = (
    "README.md",
    RECIPE_FILE,
    "training_log.json",
    "patterns.json",
    "evaluation.json",
    "bench.json",
    "report.html",
    "*.png",
)
_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")
_PICTURE_LINK = re.compile(r"!\[[^\]]*\]\(\s*<?([^)\s>]+)|<img\s[^>]*src=[\"']([^\"']+)")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
_SEARCHED_BYTES = 64 << 20
TOKENIZER_SETTINGS = "tokenizer_config.json"


@dataclass(frozen=True)
class HubContents:
    """What is sent of a folder (POSIX path -> bytes) and what stays (path -> why; a whole folder ends in `/`)."""

    folder: Path
    files: dict[str, int]
    left: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of all files that are sent."""
        return sum(self.files.values())


def hub_contents(checkpoint: Checkpoint, folder: str | os.PathLike[str]) -> HubContents:
    """Sort a checkpoint's files into those that belong on the Hub and the rest.

    Sent are: the weights that the index names, index and config, tokenizer, chat format, generation config and
    licence, the code that config and tokenizer name, card, recipe, and the records and pictures that the verbs write
    or the card shows. Hidden files, pickles, training state, other weights, and whatever a link brings in from
    outside stay, each with its reason.

    Args:
        checkpoint: the folder's checkpoint, as `read_checkpoint` found it.
        folder: the folder.

    Raises:
        ConversionError: code that the checkpoint names is not there.
    """
    folder = Path(folder)
    found = dict(_walk(folder))
    usable = [name for name, why_not in found.items() if why_not is None]
    belongs = {CONFIG_FILE, *checkpoint.shards, *([INDEX_FILE] if checkpoint.is_sharded else [])}
    belongs |= set(code_files(checkpoint, folder)) | set(companion_files(usable))
    belongs |= {name for name in usable if any(fnmatch(name, record) for record in _RECORDS) and "/" not in name}
    belongs |= set(_pictures_of_card(folder, usable))
    files, left = {}, {}
    for name, why_not in found.items():
        if why_not is None and name in belongs and not name.endswith(_PICKLES):
            files[name] = (folder / name).stat().st_size
        else:
            left[name] = why_not or _why_left(name)
    return HubContents(folder, dict(sorted(files.items())), _by_folder(left, files))


def code_files(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """The code that config and tokenizer name, with all that it imports; ConversionError when some is missing."""
    auto_maps = {
        CONFIG_FILE: checkpoint.config.get("auto_map"),
        TOKENIZER_SETTINGS: _tokenizer_settings(folder).get("auto_map"),
    }
    named = {
        f"{name.partition('.')[0]}.py": f"{name!r} in the auto_map of {file}"
        for file, auto_map in auto_maps.items()
        for name in _references(auto_map)
    }
    entries = sorted(named)
    missing = [f"{name}, for {named[name]}" for name in entries if not (folder / name).is_file()]
    found = set(entries)
    if not missing:
        try:
            for name in entries:
                found |= {Path(path).name for path in get_relative_import_files(folder / name)}
        except FileNotFoundError as error:
            missing = [f"{Path(error.filename).name}, which their code imports"]
    if missing:
        raise ConversionError.collect(
            f"{folder} lacks code that loading it with trust_remote_code=True needs: convert or save it again", missing
        )
    return sorted(found)


def tokenizer_code(folder: str | os.PathLike[str]) -> list[str]:
    """The classes of its own that a checkpoint's tokenizer is loaded with: `module.Class` beside the weights."""
    return list(_references(_tokenizer_settings(Path(folder)).get("auto_map")))


def check_no_token(contents: HubContents, token: str | None) -> None:
    """Refuse to send a Hub token that stands in a card, a recipe or a config.

    Args:
        contents: what is about to be sent.
        token: the token in use, looked for as well.

    Raises:
        ConversionError: naming the file, never the token.
    """
    for name, size in contents.files.items():
        if name.endswith(".safetensors") or size > _SEARCHED_BYTES:
            continue
        content = (contents.folder / name).read_text(encoding="utf-8", errors="replace")
        if redact(content, token) != content:
            raise ConversionError(
                f"{contents.folder / name} holds a Hub token: nothing was sent. Take it out, and revoke it under "
                "https://huggingface.co/settings/tokens if others have seen the file"
            )


def _walk(folder: Path) -> Iterator[tuple[str, str | None]]:
    """Every file and link below a folder, with the reason why it cannot be sent, if there is one."""
    root = folder.resolve()
    roots = [root]
    # A snapshot in the Hub's cache is made of links into the blobs beside it.
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        roots.append(root.parent.parent / "blobs")
    for at, folders, names in os.walk(folder):
        for name in list(folders):
            path = Path(at) / name
            relative = path.relative_to(folder).as_posix()
            if name.startswith(".") or name == "__pycache__" or path.is_symlink():
                folders.remove(name)
                yield f"{relative}/", "a link to a folder" if path.is_symlink() else "hidden or a cache"
        for name in names:
            path = Path(at) / name
            yield path.relative_to(folder).as_posix(), _why_unfit(path, roots)


def _why_unfit(path: Path, roots: list[Path]) -> str | None:
    if path.name.startswith("."):
        return "hidden"
    if not is_unicode(str(path)):
        return "its name is no UTF-8"
    if not path.is_file():
        return "a broken link" if path.is_symlink() else "no regular file"
    real = path.resolve()
    if not any(real.is_relative_to(root) for root in roots):
        return f"a link to {real}, outside the folder"
    return None


def _why_left(name: str) -> str:
    if name.startswith("training/"):
        return "training state"
    if name.endswith(_PICKLES):
        return "may hold pickled objects"
    if name.endswith(".safetensors"):
        return "weights that the index does not name"
    if name.endswith(".py"):
        return "code that the model does not import"
    return "not part of a checkpoint"


def _by_folder(left: dict[str, str], files: dict[str, int]) -> dict[str, str]:
    """Whole folders of which nothing is sent stand as one entry."""
    sending = {parent for name in files for parent in _parents(name)}
    grouped: dict[str, list[str]] = {}
    for name in sorted(left):
        top = next((parent for parent in _parents(name) if parent not in sending), name)
        grouped.setdefault(top, []).append(left[name])
    return {
        name: reasons[0] if len(set(reasons)) == 1 else f"{len(reasons)} files that are not part of a checkpoint"
        for name, reasons in grouped.items()
    }


def _parents(name: str) -> list[str]:
    """`a/b/c` -> `a/`, `a/b/`."""
    parts = name.split("/")[:-1]
    return ["/".join(parts[: depth + 1]) + "/" for depth in range(len(parts))]


def _pictures_of_card(folder: Path, files: list[str]) -> Iterator[str]:
    if "README.md" not in files:
        return
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        # The Hub's own check of the card reads it so.
        raise ConversionError(f"{folder / 'README.md'} is no UTF-8 text ({error}): write it again") from error
    for match in _PICTURE_LINK.finditer(card):
        name = (match[1] or match[2]).removeprefix("./")
        if name in files and name.lower().endswith(_PICTURES):
            yield name


def _tokenizer_settings(folder: Path) -> dict[str, Any]:
    path = folder / TOKENIZER_SETTINGS
    if not path.is_file():  # what is no regular file is not sent either
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{folder / TOKENIZER_SETTINGS} is not valid JSON ({error})") from error
    return settings if isinstance(settings, dict) else {}


def _references(auto_map: object) -> Iterator[str]:
    """The classes that an auto_map finds beside the checkpoint; `org/repo--module.Class` lies elsewhere."""
    if isinstance(auto_map, dict):
        for value in auto_map.values():
            yield from _references(value)
    elif isinstance(auto_map, list):
        for value in auto_map:
            yield from _references(value)
    elif isinstance(auto_map, str) and "--" not in auto_map:
        yield auto_map


__all__ = ["HubContents", "check_no_token", "code_files", "hub_contents", "tokenizer_code"]
