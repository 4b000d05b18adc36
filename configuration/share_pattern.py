"""The share pattern: which layers run their lightning indexer and which reuse an earlier layer's selection.

One character a decoder layer, `F` (Full: runs its indexer) or `S` (Shared: reuses the nearest `F` before it), as in
IndexCache (Bai et al. 2026, arXiv 2603.12201, section 3). This file is the one place that parses, checks and spells
patterns; it needs only the standard library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

FULL, SHARED = "F", "S"
_TYPE_OF = {FULL: "full", SHARED: "shared"}
_LETTER_OF = {name: letter for letter, name in _TYPE_OF.items()}


@dataclass(frozen=True)
class SharePattern:
    """A checked share pattern.

    Args:
        letters: one `F` or `S` a layer, the first `F`.

    Raises:
        ValueError: naming the layer, the value and the mend.
    """

    letters: str

    def __post_init__(self) -> None:
        if not isinstance(self.letters, str):
            raise ValueError(
                f"index_share_pattern must be a string of 'F' and 'S', one character a layer (got {self.letters!r})"
            )
        if not self.letters:
            raise ValueError("index_share_pattern is empty: give one character a layer, the first 'F'")
        for layer, letter in enumerate(self.letters):
            if letter not in _TYPE_OF:
                raise ValueError(
                    f"index_share_pattern may hold only 'F' (full) and 'S' (shared): layer {layer} has {letter!r} "
                    f"(got {self.letters!r})"
                )
        if self.letters[0] != FULL:
            raise ValueError(
                "index_share_pattern must start with 'F': layer 0 has no earlier full layer to share from "
                f"(got {self.letters!r})"
            )

    # ---- construction -------------------------------------------------------------------------------------------

    @classmethod
    def parse(cls, value: str | Sequence[str] | SharePattern, num_layers: int | None = None) -> SharePattern:
        """Read a pattern from a string (`"FSSS"`), or a list of `full`/`shared` or of letters.

        Args:
            value: the pattern in any of those spellings.
            num_layers: the number of decoder layers, checked when given.
        """
        if isinstance(value, SharePattern):
            pattern = value
        elif isinstance(value, str):
            pattern = cls(value)
        elif isinstance(value, Sequence):
            pattern = cls("".join(cls._letter(layer, item) for layer, item in enumerate(value)))
        else:
            raise ValueError(
                f"index_share_pattern must be a string such as 'FSSS' or a list of 'full' and 'shared' (got {value!r})"
            )
        if num_layers is not None and len(pattern) != num_layers:
            raise ValueError(
                f"index_share_pattern has {len(pattern)} characters for num_hidden_layers={num_layers}: "
                f"give exactly one letter per layer (got {pattern.letters!r})"
            )
        return pattern

    @staticmethod
    def _letter(layer: int, item: object) -> str:
        if isinstance(item, str) and item in _LETTER_OF:
            return _LETTER_OF[item]
        if isinstance(item, str) and item in _TYPE_OF:
            return item
        raise ValueError(f"indexer_types may hold only 'full' and 'shared': layer {layer} has {item!r}")

    @classmethod
    def all_full(cls, num_layers: int) -> SharePattern:
        """Every layer runs its own indexer: plain DSA."""
        return cls(FULL * _positive("num_hidden_layers", num_layers))

    @classmethod
    def from_frequency(cls, num_layers: int, freq: int, offset: int = 2) -> SharePattern:
        """The schedule of vLLM and transformers: layer i is full iff `max(i - offset + 1, 0) % freq == 0`.

        Args:
            num_layers: number of decoder layers.
            freq: `index_topk_freq`, one full layer in so many.
            offset: `index_skip_topk_offset`, the number of leading layers that stay full (2 unless told).
        """
        _positive("index_topk_freq", freq)
        if not isinstance(offset, int) or isinstance(offset, bool) or offset < 0:
            raise ValueError(f"index_skip_topk_offset must be an integer of at least 0 (got {offset!r})")
        letters = (FULL if max(i - offset + 1, 0) % freq == 0 else SHARED for i in range(num_layers))
        return cls("".join(letters))

    @classmethod
    def uniform(cls, num_layers: int, keep: int | float | str | Fraction) -> SharePattern:
        """Evenly spaced full layers, layer 0 first: the paper's `FSSS FSSS ...`.

        Args:
            num_layers: number of decoder layers.
            keep: a share of the layers (`"1/4"`, `0.25`) or a count (`4`, `"4"`) of full layers.
        """
        count = count_to_keep(num_layers, keep)
        full = {-(-i * num_layers // count) for i in range(count)}
        return cls("".join(FULL if layer in full else SHARED for layer in range(num_layers)))

    # ---- what it says -------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.letters)

    def __str__(self) -> str:
        return self.letters

    def is_full(self, layer: int) -> bool:
        """Whether `layer` runs its own indexer."""
        return self.letters[layer] == FULL

    @property
    def full_layers(self) -> list[int]:
        """The layers that run their indexer, ascending."""
        return [layer for layer, letter in enumerate(self.letters) if letter == FULL]

    @property
    def shared_layers(self) -> list[int]:
        """The layers that reuse an earlier selection, ascending."""
        return [layer for layer, letter in enumerate(self.letters) if letter == SHARED]

    @property
    def num_full(self) -> int:
        """How many indexers run."""
        return self.letters.count(FULL)

    def source_of(self, layer: int) -> int:
        """The full layer whose selection `layer` reads (itself when full)."""
        return self.letters.rindex(FULL, 0, layer + 1)

    @property
    def groups(self) -> dict[int, list[int]]:
        """Each full layer with all the layers it serves, itself first."""
        served: dict[int, list[int]] = {}
        for layer in range(len(self)):
            served.setdefault(self.source_of(layer), []).append(layer)
        return served

    # ---- how engines spell it -----------------------------------------------------------------------------------

    @property
    def indexer_types(self) -> list[str]:
        """The list spelling of transformers, ATOM and prime-rl: `full` or `shared` a layer."""
        return [_TYPE_OF[letter] for letter in self.letters]

    def engine_fields(self) -> dict[str, object]:
        """The config.json fields that spell this pattern out for vLLM, SGLang, TensorRT-LLM and transformers.

        Always the whole list, never `index_topk_freq`: the same frequency and offset mean different schedules in
        different engines.
        """
        return {"indexer_types": self.indexer_types, "index_topk_pattern": self.letters, "use_index_cache": True}


def count_to_keep(num_layers: int, keep: int | float | str | Fraction) -> int:
    """The number of full layers that `keep` asks for.

    Args:
        num_layers: number of decoder layers.
        keep: a count (`4`, `"4"`) or a share in (0, 1] (`"1/4"`, `0.25`); shares are rounded to the nearest count,
            at least 1. `1` and `"1"` are the count one; `"1/1"` and `1.0` are all layers.

    Raises:
        ValueError: when it is no number, or outside 1 .. `num_layers`.
    """
    _positive("num_hidden_layers", num_layers)
    is_share = isinstance(keep, (float, Fraction)) or (isinstance(keep, str) and any(c in keep for c in "/."))
    try:
        # An exponent may ask for a number that fills memory.
        if isinstance(keep, str) and (len(keep) > 32 or not set(keep.strip()) <= set("0123456789+-./_")):
            raise ValueError("no count and no share")
        value = Fraction(keep)
    except (ValueError, ZeroDivisionError, TypeError, OverflowError) as error:
        raise ValueError(f"keep must be a count such as 4 or a share such as 1/4 (got {keep!r})") from error
    if is_share:
        if not 0 < value <= 1:
            raise ValueError(f"keep as a share must lie in (0, 1], such as 1/4 (got {keep!r})")
        return max(1, round(num_layers * value))
    if value.denominator != 1 or not 1 <= value <= num_layers:
        raise ValueError(f"keep as a count must lie in 1 .. {num_layers}, the number of layers (got {keep!r})")
    return int(value)


def _positive(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1 (got {value!r})")
    return value
