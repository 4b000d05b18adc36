"""What the models' forward refuses: options that nobody knows, and steps that lack the history they count on.

A forward that swallows a renamed argument decodes every token without the ones before it, and raises no error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from transformers.cache_utils import Cache

from .transformers_compat import TRANSFORMERS_OPTIONS

# token_type_ids: many tokenizers make them, and a decoder has no use for them.
_OPTIONS = TRANSFORMERS_OPTIONS | {
    "ignore_index",
    "indexer_training",
    "output_topk_indices",
    "shift_labels",
    "token_type_ids",
}


def refuse_unknown_options(options: Mapping[str, Any], forward: Callable) -> None:
    """Check the `**kwargs` of a model's `forward`; None is as good as not given.

    Raises:
        TypeError: for a name that neither transformers nor these models know, naming the nearest known one.
        ValueError: for attention that is not causal, which an indexer's selection cannot be.
    """
    unknown = [name for name, value in options.items() if name not in _OPTIONS and value is not None]
    if unknown:
        known = {name for name in inspect.signature(forward).parameters if name not in ("self", "kwargs")} | _OPTIONS
        near = get_close_matches(unknown[0], sorted(known), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
        raise TypeError(f"forward() got an unexpected argument {unknown[0]!r}: {hint}")
    if options.get("is_causal") is False:
        raise ValueError("is_causal=False: a lightning indexer selects among earlier tokens, so attention is causal")


def refuse_lost_history(
    attention_mask: torch.Tensor | Mapping[str, Any] | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    num_queries: int,
    *,
    is_packed: bool,
) -> None:
    """Check that mask and positions speak of no more tokens than cache and input hold.

    Looks at positions only without a cache, where they must begin at 0. `is_packed`: `cu_seq_lens_q` describes the
    input, whose positions are then left alone, and nothing waits for the device.

    Args:
        attention_mask: as `forward` was given it.
        position_ids: `[B or 1, S]`, or None.
        cache: as `forward` was given it.
        num_queries: S.
        is_packed: see above.

    Raises:
        ValueError: naming what is missing.
    """
    past = 0 if cache is None else cache.get_seq_length()
    mask = attention_mask if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2 else None
    if mask is not None and isinstance(past, int):
        masked, there = mask.shape[1], past + num_queries
        if masked < there or (cache is None and masked > there):
            missing = (
                "pass the cache that holds the earlier ones" if masked > there else "it must cover earlier ones too"
            )
            raise ValueError(
                f"attention_mask covers {masked} tokens; the cache holds {past}, {num_queries} are given: {missing}"
            )
    if cache is not None or position_ids is None or is_packed or torch.compiler.is_compiling():
        return
    first = position_ids[:, 0]
    if mask is not None and mask.shape[0] == position_ids.shape[0]:
        # Padding on the left has whatever position.
        first = position_ids.gather(1, mask.to(torch.int32).argmax(dim=1, keepdim=True))
    if bool((first != 0).any()):
        raise ValueError(
            f"position_ids begin at {int(first.max())} and there is no cache: without the tokens before, attention "
            "would not see them. Pass the cache that holds them (cache=..., or past_key_values=...), or let positions "
            "begin at 0"
        )
