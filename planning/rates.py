"""Measured rates, from `measured_rates.json`: every entry names the result in this repository that it was taken from.

A test compares the file with `benchmarks/results/`. Between measured sizes rates are interpolated over the size's
logarithm, beyond them the nearest counts.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

RATES_FILE = Path(__file__).with_name("measured_rates.json")


class Rates:
    """What was measured of kernels and whole models.

    Args:
        document: of `measured_rates.json`.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document

    def matmul(self, gpu: str | None, fp8: bool = False) -> float | None:
        """What cuBLAS reached with large products, FLOP/s; None where it was not measured."""
        what = "fp8_tflops" if fp8 else "bf16_tflops"
        return next((entry["value"] * 1e12 for entry in self._of(gpu, "ceilings") if entry["what"] == what), None)

    def indexer_prefill(self, gpu: str | None, heads: int, tokens: int, e4m3: bool) -> float | None:
        """Seconds that an indexer's scores and selection of one prompt take; None where nothing like it was measured.

        Args:
            gpu: whose rates.
            heads: of the indexer; the nearest measured number is scaled by its products.
            tokens: of the prompt.
            e4m3: queries and keys are quantised.
        """
        entries = [entry for entry in self._of(gpu, "indexer_prefill") if entry["e4m3"] == e4m3]
        if not entries:
            return None
        near = _nearest([entry["heads"] for entry in entries], heads)
        # Products of pairs of a query and a key per second, times heads.
        points = [
            (entry["tokens"], near * entry["tokens"] ** 2 / entry["ms"] * 1e3)
            for entry in entries
            if entry["heads"] == near
        ]
        return heads * tokens**2 / _between(points, tokens)

    def indexer_decode(self, gpu: str | None, keys: int) -> float | None:
        """Seconds of an indexer in a decoding step, by the keys of all sequences together; measured with 32 heads."""
        points = [(entry["keys"], entry["ms"] / 1e3) for entry in self._of(gpu, "indexer_decode")]
        return _scaled(points, keys) if points else None

    def attention_prefill(self, gpu: str | None, heads: int) -> float | None:
        """Useful FLOP/s of sparse attention by heads; with fewer than were measured it falls with them."""
        points = [(entry["heads"], entry["tflops"] * 1e12) for entry in self._of(gpu, "sparse_mla_prefill")]
        if not points:
            return None
        least = min(points)
        return least[1] * heads / least[0] if heads < least[0] else _between(points, heads)

    def attention_decode(self, gpu: str | None, heads: int, batch: int) -> float | None:
        """Seconds of a layer's sparse attention in a decoding step."""
        entries = self._of(gpu, "sparse_mla_decode")
        if not entries:
            return None
        near = _nearest([entry["heads"] for entry in entries], heads)
        return _scaled([(entry["batch"], entry["ms"] / 1e3) for entry in entries if entry["heads"] == near], batch)

    def whole(self, gpu: str | None) -> list[dict[str, Any]]:
        """Measured prefills and decodings of whole models on a GPU, each with its `model`'s config fields."""
        models = self.document["models"]
        return [{**entry, "config": models[entry["model"]]} for entry in self._of(gpu, "whole")]

    def source(self, entry: dict[str, Any]) -> str:
        """Where an entry was taken from, in words."""
        source = self.document["sources"][entry["source"]]
        commit = f", commit {source['commit'][:7]}" if source["commit"] else ""
        return f"{source['file']} ({source['machine']}, {source['date']}{commit})"

    def sources_of(self, gpu: str | None) -> list[str]:
        """All results that a GPU's rates come from."""
        return [self.source({"source": key}) for key, value in self.document["sources"].items() if value["gpu"] == gpu]

    def _of(self, gpu: str | None, kind: str) -> list[dict[str, Any]]:
        sources = self.document["sources"]
        return [entry for entry in self.document[kind] if sources[entry["source"]]["gpu"] == gpu]


@cache
def measured_rates() -> Rates:
    """The rates that come with the package."""
    return Rates(json.loads(RATES_FILE.read_text(encoding="utf-8")))


def _nearest(known: Sequence[int], wanted: int) -> int:
    return min(known, key=lambda number: abs(math.log(number / max(wanted, 1))))


def _between(points: Sequence[tuple[float, float]], at: float) -> float:
    """Interpolated on the logarithm of the size; the ends' values beyond them."""
    ordered = sorted(points)
    if at <= ordered[0][0]:
        return ordered[0][1]
    for (low, below), (high, above) in itertools.pairwise(ordered):
        if at <= high:
            share = math.log(at / low) / math.log(high / low)
            return below + share * (above - below)
    return ordered[-1][1]


def _scaled(points: Sequence[tuple[float, float]], at: float) -> float:
    """A time, interpolated between sizes; in proportion above the largest, and never less than the smallest's."""
    largest, time = max(points)
    return time * at / largest if at > largest else _between(points, at)
