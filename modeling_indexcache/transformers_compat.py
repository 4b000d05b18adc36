"""What differs between the supported releases of transformers, 5.23 to the newest, and nowhere else in the package.

5.24 renamed `past_key_values` to `cache` in every signature and output. Models here take both names, and their outputs
answer to both, whichever release is installed.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NoReturn

import transformers
from packaging.version import Version
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils.generic import TransformersKwargs

#: What this transformers calls the cache in outputs, and passes it as in `generate`.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(MoeModelOutputWithPast)} else "past_key_values"

#: What loading leaves in fp32 of a router. Of its weight transformers' own classes did so from 5.24 on.
ROUTER_IN_FP32 = ["e_score_correction_bias"]
if Version(transformers.__version__) >= Version("5.24"):
    ROUTER_IN_FP32.append("gate.weight")

#: Options of a forward that transformers itself may pass to any model.
TRANSFORMERS_OPTIONS = frozenset(TransformersKwargs.__optional_keys__) | {
    "debug_io",
    "debug_io_dir",
    "prune_layers",
    "return_dict",
    # `generate` passes the one that it looks for stop strings with.
    "tokenizer",
}


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache that came under one of its two names, or None.

    Raises:
        ValueError: when two different ones were given.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are two names of one argument, and were given different caches")
    return past_key_values if cache is None else cache


def refuse_continuous_batching(model: Any, *_: Any, **__: Any) -> NoReturn:
    """What `generate_batch` and `transformers serve --continuous-batching` begin with.

    Raises:
        NotImplementedError: always, before anything is allocated.
    """
    raise NotImplementedError(
        f"{type(model).__name__} has no continuous batching: transformers' pages hold keys and values by head, not "
        "latents and index keys. Use `generate`, or `indexcache export` and serve the weights with vLLM or SGLang"
    )


class CacheUnderBothNames:
    """Mixin of outputs: `cache` beside `past_key_values`, attribute and item, where transformers has one only."""

    if CACHE_NAME == "past_key_values":

        @property
        def cache(self) -> Cache | None:
            """The cache, under its newer name."""
            output: Any = self
            return output.past_key_values

        def __getitem__(self, key: Any) -> Any:
            output: Any = super()
            return output.__getitem__("past_key_values" if key == "cache" else key)
