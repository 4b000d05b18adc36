"""Load a DSA checkpoint in its own format straight into an IndexCache model, without converting it on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..configuration.share_pattern import SharePattern
from ..modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM
from .bundle import AUTO_MAP
from .families import convert_config, load_config


def load_source(
    source: str | Path, *, pattern: SharePattern | None = None, revision: str | None = None, **kwargs: Any
) -> IndexCacheForCausalLM:
    """The model of a DSA or IndexCache checkpoint, running `pattern`; weight names are the same on disk.

    Args:
        source: a folder, or a Hub id.
        pattern: the pattern to load with; the source's own when None (all full for plain DSA).
        revision: of a Hub source.
        **kwargs: for `from_pretrained`, such as `dtype`, `device_map`, `attn_implementation`, `token`.

    Raises:
        ConversionError: unknown family, or a config that does not validate.
        ValueError: a full layer whose indexer the checkpoint lacks.
    """
    from transformers import PreTrainedConfig

    fields, _ = PreTrainedConfig.get_config_dict(source, revision=revision, token=kwargs.get("token"))
    fields = convert_config(fields, pattern, None, AUTO_MAP, str(source))
    return IndexCacheForCausalLM.from_pretrained(
        source, config=load_config(fields, str(source)), revision=revision or "main", **kwargs
    )
