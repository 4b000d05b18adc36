"""`inspect --check --probe`: what headers cannot show, RoPE halves above all, from the losses of a few runs.

A prompt longer than top-k is run as the config says; with dense attention; with the other RoPE layout in the main
attention, and in the indexers; and with a random selection. A wrong layout loses to the other one, and indexers that
choose no better than chance are not the model's. Losses are compared token by token on the same text.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..convert.families import load_config
from ..io.load_source import load_source
from ..io.open_checkpoint import OpenedCheckpoint, open_checkpoint
from ..io.sources import ConversionError, Source
from .doctor_findings import ERROR, NOTE, Finding
from .logits_comparison import bytes_to_run, free_memory, quiet_transformers

_TOKENIZER = "tokenizer.json"
# Windows of the text, and the most tokens of each. Top-k is lowered to a quarter of them where it is larger.
_WINDOWS, _MOST_TOKENS = 2, 1024
# A loss is better than another when the mean difference over tokens is so many of its standard errors.
_STANDARD_ERRORS = 5


def probe(source: Source) -> tuple[dict[str, Any], list[Finding]]:
    """Run the model on text that every Python has (its help topics), with the checkpoint's own tokenizer.

    Args:
        source: a checkpoint that is whole.

    Returns:
        `tokens` (that a loss is a mean of), `window` (tokens), `index_topk` (and `index_topk_lowered_from`) and
        `losses` by run (nats a token), and the findings.

    Raises:
        ConversionError: no tokenizer.json, too little memory, or a checkpoint that does not load.
    """
    opened = open_checkpoint(source)
    config = opened.config
    needed, free = bytes_to_run(opened.checkpoint), free_memory()
    if free is not None and needed > free:
        raise ConversionError(
            f"{source.location}: the probe runs the model in fp32, which needs {needed:,} bytes, and {free:,} of "
            "memory are free: run it on a larger machine, or leave --probe out"
        )
    if config.index_topk is None:
        raise ConversionError(f"{source.location}: index_topk=null makes every layer dense: there is nothing to probe")
    window = min(_MOST_TOKENS, config.max_position_embeddings)
    topk = min(config.index_topk, window // 4)
    if topk < 1:
        raise ConversionError(f"{source.location}: max_position_embeddings={window} is too short for a probe")
    windows = _windows(source, window, config.vocab_size)
    measured: dict[str, Any] = {"tokens": _WINDOWS * (window - 1 - topk), "window": window, "index_topk": topk}
    if topk != config.index_topk:
        measured["index_topk_lowered_from"] = config.index_topk
    runs = _run(opened, windows, topk)
    measured["losses"] = {name: losses.mean().item() for name, losses in runs.items()}
    return measured, _judge(runs)


def _windows(source: Source, window: int, vocab_size: int) -> torch.Tensor:
    """`[windows, tokens]` of the text."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer

    if _TOKENIZER not in source.list_files():
        raise ConversionError(f"{source.location} has no {_TOKENIZER}: the probe needs it to read text")
    raw = source.read_range(_TOKENIZER, 0, source.size(_TOKENIZER))
    try:
        tokenizer = Tokenizer.from_str(raw.decode("utf-8"))
    # The library raises bare exceptions.
    except Exception as error:
        raise ConversionError(f"{source.location}: {_TOKENIZER} cannot be read ({error}): fetch it again") from error
    text = "\n\n".join(topics[name] for name in sorted(topics))
    # Far more characters than the tokens need.
    ids = tokenizer.encode(text[: 32 * _WINDOWS * window], add_special_tokens=False).ids
    if len(ids) < _WINDOWS * window or max(ids) >= vocab_size:
        raise ConversionError(
            f"{source.location}: {_TOKENIZER} gives {len(ids)} tokens up to {max(ids, default=-1)}, and the probe "
            f"needs {_WINDOWS * window} below vocab_size={vocab_size}: it is not this model's tokenizer"
        )
    return torch.tensor(ids[: _WINDOWS * window]).view(_WINDOWS, window)


def _run(opened: OpenedCheckpoint, windows: torch.Tensor, topk: int) -> dict[str, torch.Tensor]:
    """Losses of every token beyond top-k, fp64 `[tokens]`, by run."""
    config, window = opened.config, windows.shape[1]
    dense = {"index_topk": window}
    runs = {"dense": _losses(opened, windows, topk, dense)}
    other_main = {"rope_interleave": not config.rope_interleave}
    runs["dense_other_main_layout"] = _losses(opened, windows, topk, {**dense, **other_main})
    # The indexers are judged in the model that works.
    main = other_main if _is_better(runs["dense_other_main_layout"], runs["dense"]) else {}
    sparse = {"index_topk": topk, **main}
    runs["sparse"] = _losses(opened, windows, topk, sparse)
    other = {"indexer_rope_interleave": not config.indexer_rope_interleave}
    runs["sparse_other_indexer_layout"] = _losses(opened, windows, topk, {**sparse, **other})
    runs["random_selection"] = _losses(opened, windows, topk, sparse, at_random=True)
    return runs


@torch.inference_mode()
def _losses(
    opened: OpenedCheckpoint, windows: torch.Tensor, topk: int, changes: dict[str, Any], at_random: bool = False
) -> torch.Tensor:
    fields = {**opened.fields, **changes}
    changed = dataclasses.replace(opened, fields=fields, config=load_config(fields, opened.source.location))
    with quiet_transformers():
        model = load_source(changed, dtype=torch.float32)
    found = []
    with _random_selections(model, topk) if at_random else _as_it_is():
        for ids in windows:
            logits = model(ids[None].to(model.device), use_cache=False).logits[0, topk:-1].double()
            targets = ids[topk + 1 :, None].to(logits.device)
            found.append(-logits.log_softmax(-1).gather(1, targets)[:, 0].cpu())
    return torch.cat(found)


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


@contextmanager
def _random_selections(model: Any, topk: int) -> Iterator[None]:
    """Every indexer selects earlier keys at random, as many as it would."""
    generator = torch.Generator().manual_seed(0)

    def choose(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        num_tokens = output.shape[1]
        scores = torch.rand(num_tokens, num_tokens, generator=generator)
        scores.masked_fill_(torch.ones(num_tokens, num_tokens).triu(1).bool(), -1.0)
        best = scores.topk(topk, dim=-1)
        slots = best.indices.masked_fill(best.values < 0, num_tokens).sort(-1).values
        return slots.masked_fill(slots == num_tokens, -1).to(output)[None].expand_as(output)

    layers = model.base_model.layers
    full = model.config.share_pattern.full_layers
    hooks = [layers[layer].self_attn.indexer.register_forward_hook(choose) for layer in full]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_better(losses: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether the first losses are lower than the second, token by token, by more than sampling explains."""
    gain = others - losses
    return gain.mean().item() > _STANDARD_ERRORS * gain.std().item() / math.sqrt(len(gain))


def _judge(runs: dict[str, torch.Tensor]) -> list[Finding]:
    found = []
    means = {name: losses.mean().item() for name, losses in runs.items()}
    if not all(math.isfinite(mean) for mean in means.values()):
        return [
            Finding(
                "probe_not_finite", ERROR, "logits", "losses of the probe are not finite",
                "the model computes nothing usable", "fetch the weights again",
            )
        ]  # fmt: skip
    if _is_better(runs["dense_other_main_layout"], runs["dense"]):
        found.append(
            Finding(
                "main_rope_halves", ERROR, "rope halves of q_b_proj and kv_a_proj_with_mqa",
                f"dense attention has a loss of {means['dense']:.3f} in the config's RoPE layout and "
                f"{means['dense_other_main_layout']:.3f} in the other",
                "every engine rotates the main attention in the wrong pairs: worse the longer the prompt",
                "convert the weights again without permuting the rope halves (or set rope_interleave, which "
                "IndexCache alone reads)",
            )
        )  # fmt: skip
    if _is_better(runs["sparse_other_indexer_layout"], runs["sparse"]):
        found.append(
            Finding(
                "indexer_rope_halves", ERROR, "rope halves of indexer.wq_b and indexer.wk",
                f"beyond top-k the loss is {means['sparse']:.3f} in the config's RoPE layout of the indexers and "
                f"{means['sparse_other_indexer_layout']:.3f} in the other",
                "engines rotate the indexers in the wrong pairs: wrong selections beyond top-k tokens",
                "convert the indexers again without permuting the rope halves, or set indexer_rope_interleave, which "
                "transformers does not read",
            )
        )  # fmt: skip
    if not _is_better(runs["sparse"], runs["random_selection"]):
        matters = _is_better(runs["dense"], runs["random_selection"])
        found.append(
            Finding(
                "selection_by_chance" if matters else "probe_inconclusive", ERROR if matters else NOTE, "selections",
                f"beyond top-k the loss is {means['sparse']:.3f}, {means['random_selection']:.3f} with random "
                f"selections and {means['dense']:.3f} with dense attention",
                "the indexers select no better than chance: garbage beyond top-k tokens" if matters
                else "this text is read as well with any keys, so it says nothing about the indexers",
                "take the indexers from the checkpoint that this one was made of, or train them (`indexcache distill`)"
                if matters else "measure with your own text: `indexcache eval`",
            )
        )  # fmt: skip
    return found
