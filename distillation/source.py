"""The model to distil: a DSA or IndexCache checkpoint, or a dense MLA one that gets new indexers."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..configuration.configuration_indexcache import IndexCacheConfig
from ..configuration.share_pattern import SharePattern
from ..conversion.convert.families import convert_config, convert_dense_config, is_dense_family, load_config
from ..conversion.convert.pattern_file import choose_pattern
from ..conversion.io.checkpoint import read_json
from ..conversion.io.load_source import filled_weights, refuse_filled_weights, where_to_load
from ..conversion.io.open_checkpoint import open_checkpoint
from ..conversion.io.sources import ConversionError, Source
from ..conversion.publish.bundle import AUTO_MAP
from ..modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM
from ..runs.errors import RunError


@dataclass(frozen=True)
class IndexerShape:
    """New indexers of a dense model. Defaults are GLM-5's.

    Args:
        topk: keys that each query selects.
        heads: query heads.
        head_dim: width of a head.
    """

    topk: int | None = None
    heads: int | None = None
    head_dim: int | None = None

    def fields(self) -> dict[str, int]:
        """As config fields."""
        return {
            "index_topk": self.topk or 2048,
            "index_n_heads": self.heads or 32,
            "index_head_dim": self.head_dim or 128,
        }

    @property
    def is_given(self) -> bool:
        """Whether anything was asked for."""
        return any((self.topk, self.heads, self.head_dim))


@dataclass(frozen=True)
class DistillationSource:
    """A checkpoint and what it shall become.

    Attributes:
        location: folder or Hub id, for messages.
        opened: the same, to read from.
        config: with the pattern to train.
        is_dense: it has no indexers at all.
    """

    location: str
    opened: Source
    config: IndexCacheConfig
    is_dense: bool

    @property
    def pattern(self) -> SharePattern:
        """The pattern to train."""
        return self.config.share_pattern

    def load(self, dtype: torch.dtype, **kwargs: Any) -> tuple[IndexCacheForCausalLM, list[int]]:
        """The model, and the layers whose indexers are new (random, from torch's current seed)."""
        return load_with_new_indexers(where_to_load(self.opened), self.config, dtype=dtype, **kwargs)

    def load_untrained(self, dtype: torch.dtype) -> IndexCacheForCausalLM:
        """The source as it is: dense, or with its own pattern."""
        fields = read_json(self.opened, "config.json")
        if self.is_dense:
            config = copy.deepcopy(self.config)
            config.index_share_pattern = SharePattern.all_full(len(self.pattern)).letters
            config.index_topk = None
            config.layer_types = ["full_attention"] * len(self.pattern)
        else:
            config = load_config(convert_config(fields, None, None, AUTO_MAP, self.location), self.location)
        model, _ = load_with_new_indexers(where_to_load(self.opened), config, dtype=dtype)
        return model

    def written_dtype(self, name: str) -> torch.dtype:
        """The dtype that weights are written in: `auto` is the source's, bf16 where it names none."""
        if name == "auto":
            fields = read_json(self.opened, "config.json")
            name = str(fields.get("dtype") or fields.get("torch_dtype") or "bfloat16")
        found: torch.dtype = getattr(torch, name.removeprefix("torch."))
        return found


def open_distillation_source(
    source: str,
    pattern: str | None = None,
    pattern_file: Path | None = None,
    keep: str | None = None,
    indexer: IndexerShape = IndexerShape(),
    *,
    revision: str | None = None,
    token: str | None = None,
) -> DistillationSource:
    """Read the config of a folder or a Hub id and decide what it becomes.

    `pattern`, `pattern_file` and `keep` are those of `choose_pattern`; an `indexer` shape is for dense sources only.

    Raises:
        ConversionError: an unknown family, a config that does not validate, a checkpoint that is not whole.
        RunError: a pattern that does not fit, a quantised source, a shape for indexers that there are.
    """
    checkpoint = open_checkpoint(source, new_indexers=True, revision=revision, token=token).checkpoint
    opened, fields = checkpoint.source, checkpoint.config
    try:
        chosen = choose_pattern(fields, pattern, pattern_file, keep)
    except ConversionError as error:
        raise RunError(str(error)) from error
    if fields.get("quantization_config") is not None:
        raise RunError(
            f"{source} holds quantised weights, which cannot be trained: run `indexcache convert {source} FOLDER "
            f"--dtype bfloat16` and distil FOLDER"
        )
    is_dense = is_dense_family(fields)
    if is_dense:
        if chosen is None:
            raise RunError("a dense source has no share pattern: give --pattern, --pattern-file or --keep")
        written = convert_dense_config(fields, chosen, indexer.fields(), AUTO_MAP, source)
    else:
        if indexer.is_given:
            raise RunError(
                f"{source} has indexers of its own: --index-topk, --index-n-heads and --index-head-dim are for dense "
                "sources"
            )
        written = convert_config(fields, chosen, None, AUTO_MAP, source)
    # Layers beyond the last, which draft tokens for the untrained model, stay behind.
    written.pop("num_nextn_predict_layers", None)
    return DistillationSource(source, opened, load_config(written, source), is_dense)


def load_with_new_indexers(
    location: str | Path, config: IndexCacheConfig | None = None, **kwargs: Any
) -> tuple[IndexCacheForCausalLM, list[int]]:
    """Load weights; full layers whose indexers the checkpoint lacks get new ones.

    Args:
        location: of weights.
        config: the checkpoint's own when None.
        **kwargs: for `from_pretrained`.

    Returns:
        The model and the layers with new indexers.

    Raises:
        ConversionError: other weights are missing.
        RunError: weights that cannot be read.
    """
    kwargs |= {} if config is None else {"config": config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model, info = IndexCacheForCausalLM.from_pretrained(
                location, new_indexers=True, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except SafetensorError as error:
            raise RunError(f"{location}: its weights cannot be read ({error})") from error
    missing = {name for name in info["missing_keys"] if ".indexer." in name}
    refuse_filled_weights(model, filled_weights(info) - missing, str(location))
    new = sorted({int(name.split("layers.")[1].split(".")[0]) for name in missing})
    return model, new
