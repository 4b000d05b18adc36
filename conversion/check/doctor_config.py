"""What a config says besides its schedule: RoPE layouts and scaling, router, top-k against the context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..convert.families import INDEXCACHE, ROUTER, Family
from ..io.terminal_text import shown
from ..publish.export_engines import ENGINES
from .doctor_findings import ERROR, NOTE, Finding

# Engines that rotate indexer halves as half-split where the config says nothing.
_HALF_SPLIT_BY_DEFAULT = ("vllm", "sglang", "trtllm", INDEXCACHE)
_LAYOUTS = {True: "interleaved", False: "half-split"}
_ROPE_NAMES = ("rope_parameters", "rope_scaling")


def config_findings(
    config: dict[str, Any], family: Family, engines: Sequence[str], asked: bool, has_indexers: bool
) -> list[Finding]:
    """Disagreements that the config shows by itself.

    Args:
        config: config.json.
        family: that the weights are of.
        engines: that are looked at.
        asked: they were named by the user, so that what is left to a wrong default of theirs is an error.
        has_indexers: whether the weights hold any.
    """
    return [
        *_layouts(config, family, engines, asked),
        *_router(config, engines, asked),
        *_topk(config, has_indexers),
        *_rope(config),
    ]


def _readers(engines: Sequence[str], *fields: str) -> tuple[str, ...]:
    """Those of `engines` that read all of these fields, exports' targets only."""
    return tuple(name for name in engines if name in ENGINES and ENGINES[name].reads.issuperset(fields))


# ---- RoPE layouts ---------------------------------------------------------------------------------------------------


def _layouts(config: dict[str, Any], family: Family, engines: Sequence[str], asked: bool) -> list[Finding]:
    found = []
    value, due = config.get("indexer_rope_interleave"), family.indexer_rope_interleave
    is_ours = config["model_type"] == INDEXCACHE
    name = "indexer_rope_interleave"
    served = _readers(engines, name)
    readers = tuple(engine for engine in engines if engine in served or engine == INDEXCACHE)
    effect = (
        "query and key halves of the indexers are rotated in the wrong pairs: selections beyond top-k tokens are "
        "wrong, and shorter prompts look sound"
    )
    if value is not None and value is not due:
        found.append(
            Finding(
                "indexer_rope_layout", ERROR, name,
                f"{name}={shown(value)}, and the indexers of {family.model_type} are {_LAYOUTS[due]}", effect,
                f"set it to {str(due).lower()}; if the weights were made otherwise, --probe tells", readers,
            )
        )  # fmt: skip
    elif value is None and due:
        # A native GLM checkpoint is read with its family's layout by transformers and by IndexCache.
        left = tuple(engine for engine in readers if engine in _HALF_SPLIT_BY_DEFAULT)
        left = left if is_ours else tuple(engine for engine in left if engine != INDEXCACHE)
        if left:
            found.append(
                Finding(
                    "indexer_rope_default", ERROR if asked or is_ours else NOTE, name,
                    f"{name} is not given, and the indexers of {family.model_type} are {_LAYOUTS[due]}",
                    f"these engines take half-split: {effect}", f"set {name} to true", left,
                )
            )  # fmt: skip
    main = config.get("rope_interleave")
    if main is not None and main is not True:
        found.append(
            Finding(
                "main_rope_layout", ERROR, "rope_interleave",
                f"rope_interleave={shown(main)}, and the main attention of {family.model_type} is interleaved",
                "IndexCache rotates as the field says, transformers, vLLM and SGLang interleaved whatever it says: "
                "every token is wrong in one or the other",
                "set it to true; if the weights were made otherwise, --probe tells",
                tuple(engines),
            )
        )  # fmt: skip
    return found


# ---- router ---------------------------------------------------------------------------------------------------------


def _router(config: dict[str, Any], engines: Sequence[str], asked: bool) -> list[Finding]:
    found, readers = [], _readers(engines, *ROUTER)
    wrong = {name: config[name] for name, due in ROUTER.items() if config.get(name) not in (None, due)}
    if wrong:
        spelled = " and ".join(f"{name}={shown(value)}" for name, value in wrong.items())
        found.append(
            Finding(
                "router", ERROR, ", ".join(wrong), f"{spelled}, and these families route by {ROUTER}",
                "vLLM and SGLang route as the config says, transformers and IndexCache as the family does: other "
                "experts answer",
                f"set them to {ROUTER}", tuple(engines),
            )
        )  # fmt: skip
    absent = [name for name in ROUTER if config.get(name) is None]
    if absent and readers and config.get("n_routed_experts"):
        found.append(
            Finding(
                "router_default", ERROR if asked else NOTE, ", ".join(absent),
                f"{' and '.join(absent)} left to the engine's default",
                "vLLM and SGLang route by softmax without the correction bias unless told otherwise: other experts "
                "answer",
                f"set {', '.join(f'{name}: {ROUTER[name]}' for name in absent)}", readers,
            )
        )  # fmt: skip
    return found


# ---- top-k ----------------------------------------------------------------------------------------------------------


def _topk(config: dict[str, Any], has_indexers: bool) -> list[Finding]:
    topk, context = config.get("index_topk", 2048), config.get("max_position_embeddings")
    if topk is None and not has_indexers:
        return []
    if type(topk) is not int or topk < 1:
        return [
            Finding(
                "index_topk", ERROR, "index_topk", f"index_topk={shown(topk)} beside indexer weights",
                "engines refuse it, or run dense attention and leave the indexers unused",
                "give the number of keys that the indexers were trained to select",
            )
        ]  # fmt: skip
    if type(context) is int and topk >= context:
        return [
            Finding(
                "sparse_never_runs", NOTE, "index_topk, max_position_embeddings",
                f"index_topk={topk} is not below max_position_embeddings={context}",
                "every query sees at most top-k keys, so attention is dense and indexers decide nothing",
                "lower index_topk, or leave sparse attention off",
            )
        ]  # fmt: skip
    return []


# ---- RoPE scaling ---------------------------------------------------------------------------------------------------


def _rope(config: dict[str, Any]) -> list[Finding]:
    given = {name: dict(config[name]) for name in _ROPE_NAMES if isinstance(config.get(name), dict)}
    found = [
        _rope_error(name, f"{name}={shown(config[name])} is no object", "engines refuse it", "fix it")
        for name in _ROPE_NAMES
        if config.get(name) is not None and name not in given
    ]
    for name, rope in given.items():
        kinds = {rope[key] for key in ("rope_type", "type") if isinstance(rope.get(key), str)}
        if len(kinds) > 1:
            found.append(
                _rope_error(
                    name, f"its rope_type and type disagree ({', '.join(sorted(kinds))})",
                    "engines take one or the other: positions differ from engine to engine", "keep rope_type alone",
                )
            )  # fmt: skip
        found += _yarn(name, rope, config)
    if len(given) == 2:
        first, second = (_normal(given[name]) for name in _ROPE_NAMES)
        differing = sorted(key for key in first.keys() & second.keys() if first[key] != second[key])
        if differing:
            shown_values = "; ".join(
                f"{key}: {shown(first.get(key))} and {shown(second.get(key))}" for key in differing
            )
            found.append(
                _rope_error(
                    ", ".join(_ROPE_NAMES), f"they disagree: {shown_values}",
                    "older engines read rope_scaling, newer ones rope_parameters: positions differ",
                    "keep rope_parameters alone",
                )
            )  # fmt: skip
    theta = config.get("rope_theta")
    for name, rope in given.items():
        inner = rope.get("rope_theta")
        if theta is not None and inner is not None and theta != inner:
            found.append(
                _rope_error(
                    f"rope_theta, {name}.rope_theta", f"rope_theta={shown(theta)}, and {name} has {shown(inner)}",
                    "engines read one or the other: main attention and indexers rotate at other frequencies",
                    "set both to the value that the weights were trained with",
                )
            )  # fmt: skip
    if theta is None and all(rope.get("rope_theta") is None for rope in given.values()):
        found.append(
            Finding(
                "rope_theta_default", NOTE, "rope_theta", "no rope_theta is given",
                "each engine takes a default of its own (10,000 or 1,000,000)", "spell it out",
            )
        )  # fmt: skip
    return found


def _rope_error(where: str, what: str, effect: str, fix: str) -> Finding:
    return Finding("rope_parameters", ERROR, where, what, effect, fix)


def _normal(rope: dict[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    return {**{key: value for key, value in rope.items() if key != "type"}, "rope_type": kind}


def _yarn(name: str, rope: dict[str, Any], config: dict[str, Any]) -> list[Finding]:
    if rope.get("rope_type", rope.get("type")) != "yarn":
        return []
    found, scales = [], {key: rope.get(key) for key in ("mscale", "mscale_all_dim")}
    absent = [key for key, value in scales.items() if not value]
    if len(absent) == 1:
        found.append(
            _rope_error(
                name, f"yarn has {shown(scales)}: {absent[0]} is missing",
                "transformers scales cosines and sines by 0.1 ln(factor) + 1 unless both are given, vLLM and SGLang "
                "by their ratio: logits differ from engine to engine",
                "give both, as the weights were trained (DeepSeek-V3.2: 1.0 and 1.0)",
            )
        )  # fmt: skip
    elif absent:
        found.append(
            Finding(
                "yarn_without_mscale", NOTE, name, "yarn without mscale and mscale_all_dim",
                "cosines and sines, those of the indexers too, are scaled by 0.1 ln(factor) + 1 and the softmax is "
                "not: right only for weights that were trained so, and DeepSeek's were not",
                "DeepSeek-V3.2: mscale 1.0 and mscale_all_dim 1.0",
            )
        )  # fmt: skip
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    numbers = [value for value in (factor, original) if isinstance(value, int | float) and value > 0]
    if len(numbers) < 2:
        found.append(
            _rope_error(
                name, f"yarn has factor={shown(factor)} and original_max_position_embeddings={shown(original)}",
                "engines refuse it, or take max_position_embeddings for the original length and scale nothing",
                "give both as numbers",
            )
        )  # fmt: skip
    elif type(context := config.get("max_position_embeddings")) is int and numbers[0] * numbers[1] < context:
        found.append(
            Finding(
                "yarn_too_short", NOTE, f"{name}, max_position_embeddings",
                f"yarn stretches {shown(original)} tokens by {shown(factor)}, and the context is {context}",
                "positions beyond the stretched length were never trained", "raise factor, or lower the context",
            )
        )  # fmt: skip
    return found
