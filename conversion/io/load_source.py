"""Load a DSA checkpoint in its own format straight into an IndexCache model, without converting it on disk."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers.generation.configuration_utils import GenerationConfig
from transformers.quantizers.auto import AutoQuantizationConfig

from ...configuration.share_pattern import SharePattern
from ...modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM
from ..convert.families import CONFIG_FAULTS, load_config
from .checkpoint import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, read_json
from .hub_source import HubSource
from .open_checkpoint import OpenedCheckpoint, open_checkpoint
from .sources import ConversionError, FolderSource, Source

GENERATION_FILE = "generation_config.json"


def load_source(
    source: str | Path | OpenedCheckpoint,
    *,
    pattern: SharePattern | str | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> IndexCacheForCausalLM:
    """The model of a DSA or IndexCache checkpoint, running `pattern`; weight names are the same on disk.

    Every weight comes from the checkpoint: it is checked whole before a tensor is read, and again behind
    `from_pretrained`, which fills what it does not find with random numbers.

    Args:
        source: a folder, a Hub id, or what `open_checkpoint` found whole (with the pattern asked for there).
        pattern: the pattern to load with; the source's own when None (all full for plain DSA).
        revision: of a Hub source.
        **kwargs: for `from_pretrained`, such as `dtype`, `device_map`, `attn_implementation`, `token`.

    Raises:
        ConversionError: unknown family, a config that does not validate, files or weights that are missing, unknown
            or damaged, or a full layer whose indexer the checkpoint lacks.
    """
    if isinstance(source, OpenedCheckpoint):
        opened = source
    else:
        wanted = None if pattern is None else SharePattern.parse(pattern)
        opened = open_checkpoint(source, wanted, revision=revision, token=kwargs.get("token"))
    place = where_to_load(opened.source)
    config = load_config(opened.fields, opened.source.location)
    _check_quantisation(opened.fields, opened.source.location)
    kwargs.pop("token", None)
    try:
        loaded: Any = IndexCacheForCausalLM.from_pretrained(
            place, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    except SafetensorError as error:
        raise ConversionError(f"{opened.source.location}: its weights cannot be read ({error})") from error
    except (ImportError, ValueError) as error:
        # What this machine or these versions cannot load, in the loader's own words.
        raise ConversionError(f"{opened.source.location} cannot be loaded: {error}") from error
    except (KeyError, TypeError) as error:
        raise ConversionError(
            f"{opened.source.location} cannot be loaded ({type(error).__name__}: {error}): transformers does not find "
            "what it looks for in model.safetensors.index.json (its metadata) or generation_config.json: fix them"
        ) from error
    model: IndexCacheForCausalLM = loaded[0]
    refuse_filled_weights(model, filled_weights(loaded[1]), opened.source.location)
    return model


def _check_quantisation(fields: dict[str, Any], location: str) -> None:
    """Let transformers check how weights are quantised, where its message can be given the file and the field."""
    given = fields.get("quantization_config")
    if given is None:
        return
    try:
        AutoQuantizationConfig.from_dict(copy.deepcopy(given))
    except CONFIG_FAULTS as error:
        raise ConversionError(
            f"{location}: config.json has a quantization_config that transformers cannot use: {error}"
        ) from error


def _check_generation(settings: dict[str, Any], location: str) -> None:
    """As `_check_quantisation`, for generation_config.json, which `from_pretrained` reads."""
    try:
        GenerationConfig.from_dict(copy.deepcopy(settings))
    except CONFIG_FAULTS as error:
        raise ConversionError(
            f"{location}: {GENERATION_FILE} cannot be used ({type(error).__name__}: {error}): fix it"
        ) from error


def where_to_load(source: Source) -> Path:
    """The folder for `from_pretrained`: a checkpoint's own, or the Hub's cache with config and weights, each checked.

    Raises:
        ConversionError: a file of a Hub repository is not what its commit holds, or settings that transformers reads
            beside the weights are no JSON object or refused by it.
    """
    files = source.list_files()
    if GENERATION_FILE in files:
        _check_generation(read_json(source, GENERATION_FILE), source.location)
    if isinstance(source, FolderSource):
        return source.folder
    assert isinstance(source, HubSource)
    shards = [SINGLE_FILE]
    if INDEX_FILE in files:
        shards = [INDEX_FILE, *sorted(set(read_json(source, INDEX_FILE)["weight_map"].values()))]
    return source.fetch([CONFIG_FILE, *([GENERATION_FILE] if GENERATION_FILE in files else []), *shards])


def filled_weights(info: dict[str, Any]) -> set[str]:
    """Weights that `from_pretrained` filled in: missing ones and, with `ignore_mismatched_sizes`, misshapen ones.

    Args:
        info: transformers' loading info.
    """
    return {*info["missing_keys"], *(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])}


def refuse_filled_weights(model: nn.Module, filled: Iterable[str], location: str) -> None:
    """Refuse a model some of whose weights did not come from its checkpoint; tied ones share another's.

    Args:
        model: loaded.
        filled: of `filled_weights`, without those that are meant to be new.
        location: how the message names the checkpoint.

    Raises:
        ConversionError: naming the weights.
    """
    lacking = sorted(set(filled) - set(getattr(model, "all_tied_weights_keys", None) or ()))
    if lacking:
        raise ConversionError.collect(
            f"{location} lacks weights of its model, or parts of them, which would be random numbers: fetch it again",
            lacking,
        )
