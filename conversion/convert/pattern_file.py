"""Choose the pattern to convert to: from the command line, or from a file that the pattern search wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...configuration.share_pattern import SharePattern, count_to_keep
from ..io.sources import ConversionError
from ..io.strict_json import parse_json
from .families import has_pattern


def choose_pattern(
    config: dict[str, Any], pattern: str | None = None, pattern_file: Path | None = None, keep: str | None = None
) -> SharePattern | None:
    """The pattern that the options ask for; `None` leaves the source's own.

    Args:
        config: the source's config.json.
        pattern: letters, one a layer.
        pattern_file: see `read_pattern_file`; `keep` then chooses among its patterns.
        keep: alone: evenly spaced full layers, a count (`"4"`) or a share (`"1/4"`).

    Raises:
        ConversionError: none or contradicting options, or a pattern that does not fit the checkpoint.
    """
    num_layers = config.get("num_hidden_layers")
    if type(num_layers) is not int or num_layers < 1:
        raise ConversionError(f"the source's config.json has num_hidden_layers={num_layers!r}: it must be a number")
    if pattern is not None and (pattern_file is not None or keep is not None):
        raise ConversionError("--pattern stands alone: drop --pattern-file and --keep")
    try:
        if pattern is not None:
            return SharePattern.parse(pattern, num_layers)
        if pattern_file is not None:
            return read_pattern_file(pattern_file, num_layers, keep)
        if keep is not None:
            return SharePattern.uniform(num_layers, keep)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    if not has_pattern(config):
        raise ConversionError("the source has no share pattern yet: give --pattern, --pattern-file or --keep")
    return None


def read_pattern_file(path: Path, num_layers: int, keep: str | None = None) -> SharePattern:
    """The pattern that a file holds.

    Args:
        path: JSON, either `{"index_share_pattern": "FSSS..."}` or `{"patterns": {"4": "FSSS...", ...}}`, keyed by
            the number of full layers.
        num_layers: the checkpoint's decoder layers.
        keep: which of several patterns: a count (`"4"`) or a share (`"1/4"`) of full layers.

    Raises:
        ConversionError: unreadable file, no pattern in it, or several and none chosen.
    """
    try:
        content = parse_json(path.read_bytes(), allow_nan=True)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} is no readable JSON pattern file: {error}") from error
    patterns = content.get("patterns") if isinstance(content, dict) else None
    single = content.get("index_share_pattern") if isinstance(content, dict) else None
    try:
        if patterns is not None and not isinstance(patterns, dict):
            raise ValueError(f"its patterns must be an object keyed by the number of full layers (got {patterns!r})")
        if patterns and (keep is not None or single is None):
            return _chosen(patterns, num_layers, keep)
        if single is None:
            raise ValueError('it needs {"index_share_pattern": "FSSS..."} or {"patterns": {"4": "FSSS..."}}')
        pattern = SharePattern.parse(single, num_layers)
        if keep is not None and pattern.num_full != count_to_keep(num_layers, keep):
            raise ValueError(f"its one pattern keeps {pattern.num_full} indexers, and {keep} was asked for")
    except ValueError as error:
        raise ConversionError(f"{path}: {error}") from error
    return pattern


def _chosen(patterns: dict[str, Any], num_layers: int, keep: str | None) -> SharePattern:
    if keep is None:
        if len(patterns) > 1:
            raise ValueError(f"it holds patterns for {', '.join(patterns)} full layers: choose one with --keep")
        (key,) = patterns
    else:
        key = str(count_to_keep(num_layers, keep))
        if key not in patterns:
            raise ValueError(f"it has no pattern for {key} full layers (it has {', '.join(patterns)})")
    pattern = SharePattern.parse(patterns[key], num_layers)
    if str(pattern.num_full) != key:
        raise ValueError(f"its pattern for {key} full layers has {pattern.num_full} ({pattern})")
    return pattern
