"""Whether a checkpoint that a verb called finished is one. Run in a child of the fork server; reads files alone."""

from __future__ import annotations

import contextlib
import io
import json
import math
import warnings
from pathlib import Path

import torch
from safetensors import safe_open

INDEX = "model.safetensors.index.json"


def converted(source: str, output: str, exact: bool, keeps_all: bool = False, load: bool = True) -> list[str]:
    """What is wrong with a conversion: it loads, and each tensor is the source's.

    Args:
        source: the checkpoint that was converted.
        output: what came out.
        exact: whether every byte must be the source's, or only names and shapes.
        keeps_all: whether shared layers keep their indexers.
        load: whether the output is for this package, which then must load it.
    """
    try:
        theirs, ours = _tensors(Path(source)), _tensors(Path(output))
    except Exception as error:
        return [f"safetensors refuses a file that the verb took: {error}"]
    config = json.loads((Path(output) / "config.json").read_text(encoding="utf-8"))
    pattern = config.get("index_share_pattern", "")
    wrong = [f"{name} is in the output and not in the source" for name in sorted(ours.keys() - theirs.keys())]
    for name in sorted(theirs.keys() - ours.keys()):
        layer = name.split(".")[2] if name.startswith("model.layers.") else ""
        shared = ".indexer." in name and layer.isdigit() and pattern[int(layer) : int(layer) + 1] == "S"
        folded = not exact and name.endswith("_scale_inv")
        if not (shared and not keeps_all) and not folded:
            wrong.append(f"{name} is lost")
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name].shape != theirs[name].shape:
            wrong.append(f"{name} has another shape")
        elif exact and not _same_bytes(ours[name], theirs[name]):
            wrong.append(f"{name} has other bytes than the source's")
    fp8 = any(tensor.dtype == torch.float8_e4m3fn for tensor in ours.values())
    # Blocks of odd widths load on machines with fp8 products alone, and say so.
    return wrong or (loads(output, source) if load and not fp8 else [])


def loads(folder: str, source: str | None = None) -> list[str]:
    """What keeps a checkpoint from loading whole, with a tokenizer that loads where the source's does."""
    from indexcache import IndexCacheForCausalLM

    wrong = []
    said = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            model, about = IndexCacheForCausalLM.from_pretrained(folder, output_loading_info=True)
    except Exception as error:
        return [f"the output does not load: {type(error).__name__}: {str(error)[:300]}"]
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        if about.get(kind):
            wrong.append(f"loading the output finds {kind}: {sorted(map(str, about[kind]))[:5]}")
    # MTP layers travel and are not loaded.
    layers = model.config.num_hidden_layers
    strange = [
        name for name in about.get("unexpected_keys", ()) if not _beyond(name, layers) and "indexer" not in name
    ]
    if strange:
        wrong.append(f"loading the output finds unexpected keys: {strange[:5]}")
    if (Path(folder) / "tokenizer.json").exists():
        fault = _tokenizer_fault(folder)
        if fault and (source is None or not _tokenizer_fault(source)):
            wrong.append(f"the output's tokenizer does not load: {fault}")
    return wrong


def _tokenizer_fault(folder: str) -> str | None:
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def finite(folder: str) -> list[str]:
    """Weights of a trained checkpoint that are NaN or infinite."""
    return [
        f"{name} holds NaN or infinity"
        for name, tensor in _tensors(Path(folder)).items()
        if not bool(torch.isfinite(tensor.float()).all())
    ]


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    index = folder / INDEX
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"].values()))
    found = {}
    for file in files:
        with safe_open(folder / file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 -- no mapping
                found[name] = shard.get_tensor(name)
    return found


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype:
        return False
    if math.prod(one.shape) == 0:
        return True
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


def _beyond(name: str, layers: int) -> bool:
    parts = name.split(".")
    return len(parts) > 2 and parts[1] == "layers" and parts[2].isdigit() and int(parts[2]) >= layers
