"""Which schedule each engine reads from a config, and whether the indexers that the weights hold fit it.

Sources: transformers' own classes are asked; what the others read is said in `publish/export_engines.py`, with files
and versions: vLLM and TensorRT-LLM `index_topk_pattern`, else `index_topk_freq` with `index_skip_topk_offset` (2 where
absent); SGLang the same behind `indexer_types`; Megatron-Bridge only the frequency and the offset (0 where absent).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from ..convert.families import CONFIG_FAULTS, INDEXCACHE, source_pattern
from ..io.sources import ConversionError
from ..io.terminal_text import shown
from ..publish.export_engines import UNREAD_FAMILIES
from .doctor_findings import ERROR, NOTE, Finding, Reading, layers_text

_LETTERS = {"F": "F", "S": "S", "full": "F", "shared": "S"}
DEFAULT_OFFSET = 2

# What becomes of an indexer that a layer runs and the weights lack.
_WITHOUT_WEIGHTS = {
    "vllm": "vLLM refuses the weights, or runs indexers that it never filled",
    "sglang": "SGLang runs indexers that it never filled",
    "trtllm": "TensorRT-LLM refuses the weights",
    "transformers": "transformers fills them with random numbers and only logs it: garbage beyond top-k tokens",
    "megatron": "Megatron-LM has nothing to convert into these layers' indexers",
    "indexcache": "IndexCache refuses to load it",
}


# ---- what a config spells -------------------------------------------------------------------------------------------


def frequency_letters(layers: int, freq: int, offset: int) -> str:
    """`SharePattern.from_frequency` without its checks: an engine runs a schedule that begins with `S`, too."""
    return "".join("F" if max(layer - offset + 1, 0) % freq == 0 else "S" for layer in range(layers))


def _list_letters(name: str, value: Any) -> str:
    if not isinstance(value, str | list) or not all(isinstance(item, str) and item in _LETTERS for item in value):
        raise ValueError(f"{name}={shown(value)} is no list of full and shared layers")
    return "".join(_LETTERS[item] for item in value)


def _count(name: str, value: Any, least: int) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{name}={shown(value)} is no number of at least {least}")
    return value


def _frequency(config: dict[str, Any], layers: int) -> str:
    freq = _count("index_topk_freq", config["index_topk_freq"], 1)
    offset = config.get("index_skip_topk_offset")
    offset = DEFAULT_OFFSET if offset is None else _count("index_skip_topk_offset", offset, 0)
    return frequency_letters(layers, freq, offset)


_SPELLINGS: dict[str, Callable[[dict[str, Any], int], str]] = {
    "index_share_pattern": lambda config, layers: _list_letters("index_share_pattern", config["index_share_pattern"]),
    "indexer_types": lambda config, layers: _list_letters("indexer_types", config["indexer_types"]),
    "index_topk_pattern": lambda config, layers: _list_letters("index_topk_pattern", config["index_topk_pattern"]),
    "index_topk_freq": _frequency,
}


def spelled_schedules(config: dict[str, Any], layers: int) -> tuple[dict[str, str], list[Finding]]:
    """Every schedule that the config spells, by field; and what is wrong with them, whoever reads them.

    Args:
        config: config.json.
        layers: decoder layers.
    """
    found, problems = {}, []
    for name, read in _SPELLINGS.items():
        if config.get(name) is None:
            continue
        try:
            found[name] = read(config, layers)
        except ValueError as error:
            problems.append(
                Finding(
                    "schedule_unreadable", ERROR, name, str(error), "engines refuse it, or take every layer for full",
                    "spell one 'full' or 'shared' a layer in indexer_types, or F and S in index_topk_pattern",
                )
            )  # fmt: skip
    for name, letters in found.items():
        if letters[:1] == "S":
            problems.append(
                Finding(
                    "first_layer_shared", ERROR, name, f"the schedule {letters} does not begin with a full layer",
                    "layer 0 has no earlier selection: engines stop, read an uninitialised buffer (vLLM), or run it "
                    "full (TensorRT-LLM)",
                    "make layer 0 full" + ("; an offset of at least 1 does" if "freq" in name else ""),
                )
            )  # fmt: skip
    return found, problems + _lengths(config, found, layers) + _disagreements(found, layers)


def _lengths(config: dict[str, Any], found: dict[str, str], layers: int) -> list[Finding]:
    mtp, problems = config.get("num_nextn_predict_layers"), []
    for name, letters in found.items():
        if len(letters) == layers:
            continue
        what = f"it has {len(letters)} layers, and num_hidden_layers is {layers}"
        if type(mtp) is int and mtp > 0 and abs(len(letters) - layers) == mtp:
            counted = "counts" if len(letters) > layers else "lacks"
            what += f": it {counted} the MTP layer{'s' * (mtp > 1)}, or num_hidden_layers is off by that"
        problems.append(
            Finding(
                "schedule_length", ERROR, name, what,
                "vLLM and SGLang run layers beyond a short schedule full; transformers and IndexCache refuse it",
                f"give one entry for each of the {layers} decoder layers, MTP layers left out",
            )
        )  # fmt: skip
    return problems


def _disagreements(found: dict[str, str], layers: int) -> list[Finding]:
    whole = {name: letters for name, letters in found.items() if len(letters) == layers}
    if len(set(whole.values())) < 2:
        return []
    (first, letters), *others = whole.items()
    name, other = next((name, other) for name, other in others if other != letters)
    layer = next(layer for layer in range(layers) if other[layer] != letters[layer])
    return [
        Finding(
            "spellings_disagree", ERROR, ", ".join(whole),
            f"{first} ({letters}) and {name} ({other}) disagree from layer {layer} on",
            "transformers and SGLang take indexer_types; vLLM and TensorRT-LLM index_topk_pattern, else "
            "index_topk_freq; Megatron-Bridge index_topk_freq alone: the same checkpoint is several models",
            "keep the spelling that the weights were trained with, and write the others from it (`indexcache export`)",
        )
    ]  # fmt: skip


# ---- what an engine reads -------------------------------------------------------------------------------------------


def _sglang(engine: str, config: dict[str, Any], layers: int) -> Reading:
    if config.get("indexer_types") is None:
        return _serving(engine, config, layers)
    try:
        letters = _list_letters("indexer_types", config["indexer_types"])
    except ValueError as error:
        return Reading(engine, None, "indexer_types", str(error))
    return Reading(engine, letters[:layers].ljust(layers, "F"), "indexer_types")


def _serving(engine: str, config: dict[str, Any], layers: int) -> Reading:
    pattern = config.get("index_topk_pattern")
    if pattern is not None:
        if not isinstance(pattern, str | list):
            return Reading(engine, None, "index_topk_pattern", f"index_topk_pattern={shown(pattern)} is no pattern")
        shares = {"S", "s"} if engine == "trtllm" else {"S"}
        # Beyond a short pattern, and for letters it does not know, an engine runs a layer full.
        items = ["S" if isinstance(item, str) and item in shares else "F" for item in pattern][:layers]
        letters = "".join(items).ljust(layers, "F")
        return Reading(engine, "F" + letters[1:] if engine == "trtllm" else letters, "index_topk_pattern")
    if config.get("index_topk_freq") is None:
        return Reading(engine, "F" * layers, None)
    try:
        letters = _frequency(config, layers)
    except ValueError as error:
        return Reading(engine, None, "index_topk_freq", str(error))
    if engine == "trtllm":
        letters = "F" + letters[1:]
    if engine == "sglang" and letters[0] == "S":
        return Reading(engine, None, "index_topk_freq", "index_skip_topk_offset=0 makes layer 0 shared")
    return Reading(engine, letters, _frequency_field(config))


def _frequency_field(config: dict[str, Any]) -> str:
    offset = config.get("index_skip_topk_offset")
    spelled = f"index_skip_topk_offset {offset}" if offset is not None else f"no offset: {DEFAULT_OFFSET}"
    return f"index_topk_freq {config['index_topk_freq']} ({spelled})"


def _transformers(engine: str, config: dict[str, Any], layers: int) -> Reading:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        native = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
        types = getattr(native, "indexer_types", None) if config["model_type"] == "glm_moe_dsa" else None
        if types is None:
            return Reading(engine, "F" * layers, None)
        letters = _list_letters("indexer_types", types)
    except CONFIG_FAULTS as error:
        return Reading(engine, None, None, f"transformers refuses the config: {type(error).__name__}: {error}")
    names = [name for name in ("indexer_types", "index_topk_pattern") if config.get(name) is not None]
    field = names[0] if names else None
    if field is None and config.get("index_topk_freq") is not None:
        field = _frequency_field(config)
    if len(letters) != layers or letters[0] == "S":
        return Reading(engine, None, field, f"{field} gives {letters} for {layers} layers")
    return Reading(engine, letters, field)


def _megatron(engine: str, config: dict[str, Any], layers: int) -> Reading:
    """Layer n, counted from 1, is full iff `max(n - max(offset, 1), 0) % freq == 0`."""
    if config.get("index_topk_freq") is None:
        return Reading(engine, "F" * layers, None)
    try:
        letters = _frequency(
            {**config, "index_skip_topk_offset": max(config.get("index_skip_topk_offset") or 0, 1)}, layers
        )
    except (ValueError, TypeError) as error:
        return Reading(engine, None, "index_topk_freq", str(error))
    return Reading(engine, letters, "index_topk_freq")


def _indexcache(engine: str, config: dict[str, Any], layers: int) -> Reading:
    names = [name for name in _SPELLINGS if config.get(name) is not None]
    field = names[0] if names else None
    try:
        letters = source_pattern(config, "config.json").letters
        return Reading(engine, letters, _frequency_field(config) if field == "index_topk_freq" else field)
    except ConversionError as error:
        return Reading(engine, None, None, str(error))


READERS: dict[str, Callable[[str, dict[str, Any], int], Reading]] = {
    "indexcache": _indexcache,
    "vllm": _serving,
    "sglang": _sglang,
    "trtllm": _serving,
    "transformers": _transformers,
    "megatron": _megatron,
}


def read_schedule(engine: str, config: dict[str, Any], layers: int) -> Reading:
    """The schedule that `engine` takes from `config` for so many decoder layers."""
    if config["model_type"] == INDEXCACHE and engine != INDEXCACHE:
        problem = f"{engine} does not know model_type {INDEXCACHE!r}"
        return Reading(engine, None, None, problem, knows_family=False)
    if config["model_type"] in UNREAD_FAMILIES and engine not in (INDEXCACHE, "transformers"):
        problem = f"what {engine} reads of {config['model_type']} has not been checked"
        return Reading(engine, None, None, problem, knows_family=False)
    return READERS[engine](engine, config, layers)


# ---- against the weights --------------------------------------------------------------------------------------------


def schedule_findings(readings: list[Reading], held: set[int], shares: bool, asked: bool) -> list[Finding]:
    """Where an engine runs an indexer that the weights lack, or leaves one unused.

    Args:
        readings: of the engines that are looked at.
        held: layers whose indexer the weights hold.
        shares: whether the config spells sharing in any field, or the weights lack indexers.
        asked: the engines were named by the user, so what they cannot run is an error.
    """
    known = [reading for reading in readings if reading.knows_family and reading.letters is not None]
    # A config may be written for one engine; what that one reads is judged, and the others are told.
    is_read = any(reading.field is not None for reading in known)
    found = [_refused(reading) for reading in readings if reading.letters is None and (asked or reading.knows_family)]
    groups: dict[tuple[str, bool], list[Reading]] = {}
    for reading in known:
        groups.setdefault((str(reading.letters), reading.field is not None), []).append(reading)
    for (letters, has_field), group in groups.items():
        engines = [reading.engine for reading in group]
        lacking = [layer for layer, letter in enumerate(letters) if letter == "F" and layer not in held]
        if not has_field and shares and (is_read or asked or not lacking):
            found.append(_no_field(engines, lacking, ERROR if asked and lacking else NOTE))
        elif lacking:
            found.append(_missing(group, letters, held, lacking))
        elif surplus := sorted(held - {layer for layer, letter in enumerate(letters) if letter == "F"}):
            found.append(_surplus(engines, surplus))
    return found


def _refused(reading: Reading) -> Finding:
    return Finding(
        "engine_refuses", ERROR, reading.field or "config.json", reading.problem or "",
        f"{reading.engine} does not load the checkpoint",
        "write the config for it: `indexcache export`" if not reading.knows_family else "fix the field",
        (reading.engine,),
    )  # fmt: skip


def _no_field(engines: list[str], lacking: list[int], severity: str) -> Finding:
    if lacking:
        effect = f"every layer runs full, and layers {layers_text(lacking)} have no indexer weights: " + "; ".join(
            dict.fromkeys(_WITHOUT_WEIGHTS[engine] for engine in engines)
        )
    else:
        effect = "every layer runs its own indexer: nothing is saved, and selections are not those of the schedule"
    return Finding(
        "no_sharing_field", severity, "config.json",
        "the config has no field that says to these engines which layers share", effect,
        f"do not run it there, or write the config for it: `indexcache export --to {engines[0]}`",
        tuple(engines),
    )  # fmt: skip


def _missing(group: list[Reading], letters: str, held: set[int], lacking: list[int]) -> Finding:
    layers = len(letters)
    weights = "".join("F" if layer in held else "S" for layer in range(layers))
    code, fix = "indexer_missing", f"make these layers shared, or take the weights from where they are: {weights}"
    what = f"layers {layers_text(lacking)} are full in {letters} and have no indexer weights"
    fields = list(dict.fromkeys(reading.field for reading in group if reading.field is not None))
    engines = tuple(reading.engine for reading in group)
    periods = [int(field.split()[1]) for field in fields if field.startswith("index_topk_freq ")]
    for freq in periods[:1]:
        offsets = [offset for offset in range(1, layers + 1) if frequency_letters(layers, freq, offset) == weights]
        if offsets:
            code, fix = "wrong_offset", f"set index_skip_topk_offset to {offsets[0]}, and spell indexer_types out"
            what += f"; the weights are of offset {offsets[0]}"
    if code == "indexer_missing" and (step := _shift(letters, held)):
        code, fix = "schedule_off_by_one", f"spell the schedule of the weights: {weights}"
        what += f"; the weights are of the schedule {abs(step)} layer {'later' if step > 0 else 'earlier'}, {weights}"
    effect = "; ".join(dict.fromkeys(_WITHOUT_WEIGHTS[engine] for engine in engines))
    return Finding(code, ERROR, ", ".join(fields) or "config.json", what, effect, fix, engines)


def _shift(letters: str, held: set[int]) -> int | None:
    """1 or -1 where the weights' full layers are the schedule's, so far later or earlier; layer 0 is always full."""
    full, layers = {layer for layer, letter in enumerate(letters) if letter == "F"}, len(letters)
    for step, inside in ((1, range(2, layers)), (-1, range(1, layers - 1))):
        moved = {layer + step for layer in full} & set(inside)
        if moved and moved == held & set(inside):
            return step
    return None


def _surplus(engines: list[str], surplus: Iterable[int]) -> Finding:
    return Finding(
        "surplus_indexer", NOTE, f"layers {layers_text(surplus)}",
        "these layers are shared and hold indexer weights",
        "the weights are not used; vLLM before PR 46600 (June 2026) refuses them. If the model was trained with them, "
        "its loss is another now",
        "drop them (`indexcache convert`, which does unless --keep-shared-indexers), or make the layers full",
        tuple(engines),
    )  # fmt: skip
