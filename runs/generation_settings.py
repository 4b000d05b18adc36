"""Check what `indexcache generate` takes from generation_config.json, before transformers takes it as it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.stopping_criteria import StopStringCriteria

from ..conversion.io.checkpoint import CONFIG_FILE, read_json
from ..conversion.io.load_source import GENERATION_FILE
from ..conversion.io.open_checkpoint import OpenedCheckpoint
from ..conversion.io.sources import ConversionError
from ..conversion.io.terminal_text import shown

_Rule = tuple[Callable[[Any], bool], str]
_MOST = 2**31 - 1
_LARGEST_BIAS = 1e30


def _whole(least: int, most: int = _MOST) -> _Rule:
    what = f"a whole number from {least} to {most}"
    return lambda value: type(value) is int and least <= value <= most, what


def _real(least: float, most: float, what: str | None = None) -> _Rule:
    def holds(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value) and least <= value <= most

    return holds, what or f"a number from {least:g} to {most:g}"


def _penalty(value: Any) -> bool:
    """What transformers takes: floats alone; a 1 of either kind it leaves out."""
    return value == 1 if type(value) is int else type(value) is float and 0.01 <= value <= 100.0


def _list_of(rule: _Rule, what: str) -> _Rule:
    holds = rule[0]
    return lambda value: isinstance(value, list) and bool(value) and all(map(holds, value)), what


def _either(*rules: _Rule) -> _Rule:
    return lambda value: any(holds(value) for holds, _ in rules), " or ".join(what for _, what in rules)


def _pair(first: _Rule, second: _Rule, what: str) -> _Rule:
    def holds(value: Any) -> bool:
        return isinstance(value, list) and len(value) == 2 and first[0](value[0]) and second[0](value[1])

    return holds, what


def _only(*values: Any) -> _Rule:
    shown = " or ".join(map(repr, values))
    return (
        lambda value: any(type(value) is type(one) and value == one for one in values),
        f"{shown or 'left out'}: one sequence is decoded and printed as it comes",
    )


def _each(names: str, rule: _Rule) -> dict[str, _Rule]:
    """The rule for every name of a list."""
    return dict.fromkeys(names.split(), rule)


# -1 is "none" in older checkpoints.
_ID = _whole(-1)
_IDS = _list_of(_ID, "a list of such numbers")
_WORD: _Rule = (lambda value: isinstance(value, str) and bool(value), "a text")

_ALWAYS: dict[str, _Rule] = {
    "bos_token_id": _ID,
    "pad_token_id": _ID,
    "decoder_start_token_id": _ID,
    "eos_token_id": _either(_ID, _IDS),
    "suppress_tokens": _IDS,
    "begin_suppress_tokens": _IDS,
    "max_length": _whole(1),
    "max_new_tokens": _whole(1),
    "top_k": _whole(-1),
    **_each("min_length min_new_tokens no_repeat_ngram_size encoder_no_repeat_ngram_size", _whole(0)),
    "max_time": _real(0.0, math.inf, "a number of seconds from 0 on"),
    **_each(
        "repetition_penalty encoder_repetition_penalty", (_penalty, "a number with a decimal point from 0.01 to 100")
    ),
    "stop_strings": _either(_WORD, _list_of(_WORD, "a list of texts")),
    "exponential_decay_length_penalty": _pair(
        _whole(0), _real(0.01, 100.0), "a whole number and a factor from 0.01 to 100"
    ),
    **_each(
        "do_sample use_cache renormalize_logits remove_invalid_values output_attentions output_hidden_states "
        "output_scores output_logits return_dict_in_generate disable_compile",
        (lambda value: isinstance(value, bool), "true or false"),
    ),
    # Other ways to decode than one sequence, token after token, or other caches than this model's.
    **_each("num_beams num_beam_groups num_return_sequences", _only(1)),
    **_each("penalty_alpha diversity_penalty", _only(0, 0.0)),
    **_each("use_mtp is_assistant low_memory token_healing early_stopping", _only(False)),
    "guidance_scale": _only(1, 1.0),
    "cache_implementation": _only("dynamic"),
    **_each(
        "assistant_early_exit assistant_ensemble_weight cache_config compile_config constraints "
        "continuous_batching_config dola_layers force_words_ids max_cache_len prefill_chunk_size "
        "prompt_lookup_num_tokens speculation_type watermarking_config",
        _only(),
    ),
}
# Temperature and top_p are the verb's own options.
_SAMPLING: dict[str, _Rule] = {
    "top_k": _whole(0),
    "min_p": _real(0.0, 1.0),
    "top_h": _real(0.01, 1.0),
    "typical_p": _real(0.01, 1.0),
    "epsilon_cutoff": _real(0.0, 0.99),
    "eta_cutoff": _real(0.0, 0.99),
}


def check_generation_settings(opened: OpenedCheckpoint, sample: bool, tokenizer: Any = None) -> None:
    """Check the settings that text is generated with: generation_config.json's, or token ids of config.json.

    Args:
        opened: the checkpoint.
        sample: whether tokens are drawn, so that settings of that count.
        tokenizer: that stop strings are looked for with.

    Raises:
        ConversionError: naming the file, the field, its value and what belongs there.
    """
    source, file = opened.source, GENERATION_FILE
    if file in source.list_files():
        settings = read_json(source, file)
    else:
        file = CONFIG_FILE
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        settings = {name: getattr(opened.config, name, None) for name in names}
    rules = _ALWAYS | _of_vocabulary(opened.config.vocab_size) | (_SAMPLING if sample else {})
    for name, value in settings.items():
        holds, what = rules.get(name, (_is_free, "left out: it is no setting"))
        if value is not None and not holds(value if name in rules else name):
            raise ConversionError(f"{source.location}: {file} has {name}={shown(value)}: it must be {what}")
    if settings.get("exponential_decay_length_penalty") is not None and settings.get("eos_token_id") is None:
        raise ConversionError(
            f"{source.location}: {file} has exponential_decay_length_penalty and no eos_token_id that it favours: "
            "give both or neither"
        )
    if tokenizer is not None and settings.get("stop_strings") is not None:
        try:
            StopStringCriteria(tokenizer, settings["stop_strings"])
        except (ValueError, LookupError, RuntimeError) as error:
            raise ConversionError(
                f"{source.location}: {file} has stop_strings={shown(settings['stop_strings'])}, which cannot be "
                f"looked for with its tokenizer ({error}): take them out"
            ) from error


def _of_vocabulary(size: int) -> dict[str, _Rule]:
    """Settings whose tokens index the logits."""
    token = _whole(0, size - 1)
    tokens = _list_of(token, f"a list of whole numbers from 0 to {size - 1}")
    return {
        "forced_bos_token_id": token,
        "forced_eos_token_id": _either(token, tokens),
        "bad_words_ids": _list_of(tokens, f"a list of lists of whole numbers from 0 to {size - 1}"),
        "sequence_bias": _list_of(
            _pair(tokens, (lambda value: type(value) is float and abs(value) < _LARGEST_BIAS, ""), ""),
            f"a list of pairs: tokens from 0 to {size - 1}, and a number with a decimal point",
        ),
    }


def _is_free(name: str) -> bool:
    """Whether a name that transformers knows no setting by means nothing to it."""
    return not name.startswith("__") and not hasattr(GenerationConfig, name)
