"""What the models' forward refuses: options that nobody knows, and steps that lack the history they count on.

A forward that swallows a renamed argument decodes every token without the ones before it, and raises no error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache

from .transformers_compat import TRANSFORMERS_OPTIONS

_OUTPUTS = ("hidden_states", "attentions", "router_logits", "topk_indices")
STAGES = ("dense", "sparse")
# token_type_ids: many tokenizers make them, and a decoder has no use for them.
_OPTIONS = TRANSFORMERS_OPTIONS | {
    "ignore_index",
    "indexer_training",
    "output_topk_indices",
    "shift_labels",
    "token_type_ids",
}


@dataclass(frozen=True)
class IndexerTraining:
    """What to compute.

    Args:
        stage: `dense`: attention sees every key and the divergence is over all of them (warm-up); `sparse`: over the
            selected keys, both distributions renormalised.
        cross_layer: compare the layers that a full layer serves with its indexer too; without, only itself.
        recall_queries: measure, for so many last queries, which share of attention's mass the selection holds.

    Raises:
        ValueError: unknown stage.
    """

    stage: str
    cross_layer: bool = True
    recall_queries: int = 0

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"indexer_training must be {' or '.join(map(repr, STAGES))} (got {self.stage!r})")

    @classmethod
    def of(cls, value: str | IndexerTraining | None, config: Any, cache: Any) -> IndexerTraining | None:
        """What `forward` was given, a stage's name or all of it, checked against the model and its cache.

        Raises:
            ValueError: unknown stage, a model without indexers, or a cache.
        """
        if value is None:
            return None
        if config.index_topk is None:
            raise ValueError("indexer_training needs indexers, and index_topk=None makes every layer dense")
        if cache is not None:
            raise ValueError("indexer_training runs whole sequences: drop past_key_values")
        return cls(value) if isinstance(value, str) else value


class ForwardOptions(NamedTuple):
    """What a forward is asked for by name.

    Attributes:
        outputs: wanted besides the last hidden states: any of `hidden_states`, `attentions`, `router_logits` and
            `topk_indices`.
        cu_seq_lens: `cu_seq_lens_q` of packed documents, see `packed_key_start`, or None.
        training: what to measure of the indexers, or None.
    """

    outputs: frozenset[str] = frozenset()
    cu_seq_lens: torch.Tensor | None = None
    training: IndexerTraining | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any], forward: Callable, config: Any, cache: Cache | None) -> ForwardOptions:
        """Read the `**kwargs` of `forward`; outputs that it does not name are wanted if the config says so.

        Raises:
            TypeError: see `refuse_unknown_options`.
            ValueError: see `refuse_unknown_options` and `IndexerTraining.of`.
        """
        refuse_unknown_options(options, forward)
        wanted = {name: getattr(config, f"output_{name}", False) for name in _OUTPUTS}
        wanted |= {name: options[f"output_{name}"] for name in _OUTPUTS if f"output_{name}" in options}
        training = IndexerTraining.of(options.get("indexer_training"), config, cache)
        return cls(frozenset(filter(wanted.get, wanted)), options.get("cu_seq_lens_q"), training)


NO_OPTIONS = ForwardOptions()


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

    Looks at positions `[B or 1, S]` only without a cache, where they must begin at 0; S is `num_queries`, and the rest
    as `forward` was given it. `is_packed`: `cu_seq_lens_q` describes the input, whose positions are then left alone,
    and nothing waits for the device.

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


def refuse_pipeline(distributed_config: Any = None, **_: Any) -> None:
    """Transformers' pipeline stages hand on hidden states alone, and layers that share need a selection.

    Raises:
        ValueError: for `pp_size` above 1.
    """
    if (getattr(distributed_config, "pp_size", None) or 1) > 1:
        raise ValueError(
            f"pp_size={distributed_config.pp_size}: a stage of a pipeline would not get the selection that the layers "
            "before it made. Spread the model with tp_size and ep_size, or over the GPUs of one process with "
            'device_map="auto"'
        )
