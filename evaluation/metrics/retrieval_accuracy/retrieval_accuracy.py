"""Share of facts that generated answers give, by context length and depth, as a metric of Hugging Face's `evaluate`.

evaluate.load("PATH/TO/indexcache/evaluation/metrics/retrieval_accuracy")
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import datasets
import evaluate

_DESCRIPTION = """
Retrieval accuracy: a generated answer is right when it begins with the expected one, case and surrounding white space
aside, and does not run on in the same word or number. Accuracies by context length and by depth are given where these
are known.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: generated answers.
    references: expected answers.
    lengths: tokens of context of each, optional.
    depths: how far into the context each fact stood, 0 to 1, optional.

Returns:
    accuracy, standard_error; by_length and by_depth where lengths and depths are given.

Examples:
    >>> metric = evaluate.load("evaluation/metrics/retrieval_accuracy")
    >>> metric.compute(predictions=["jeqe.", "tegis"], references=["jeqe", "tegi"], lengths=[2048, 4096])
    {'accuracy': 0.5, 'standard_error': 0.353..., 'by_length': {2048: 1.0, 4096: 0.0}}
"""


class RetrievalAccuracy(evaluate.Metric):
    """Accuracy of answers that had to be retrieved from a long context."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str],
        lengths: Sequence[int] | None = None,
        depths: Sequence[float] | None = None,
    ) -> dict[str, object]:
        hits = [_gives(prediction, reference) for prediction, reference in zip(predictions, references, strict=True)]
        if not hits:
            raise ValueError("no answers: give at least one prediction and its reference")
        accuracy = sum(hits) / len(hits)
        found: dict[str, object] = {
            "accuracy": accuracy,
            "standard_error": math.sqrt(accuracy * (1 - accuracy) / len(hits)),
        }
        for name, keys in (("by_length", lengths), ("by_depth", depths)):
            if keys is None:
                continue
            if len(keys) != len(hits):
                raise ValueError(f"{name.removeprefix('by_')}s must be one an answer, {len(hits)} (got {len(keys)})")
            groups: dict[float, list[bool]] = {}
            for key, hit in zip(keys, hits):
                groups.setdefault(key, []).append(hit)
            found[name] = {key: sum(group) / len(group) for key, group in sorted(groups.items())}
        return found


def _gives(prediction: str, reference: str) -> bool:
    said, wanted = prediction.strip().casefold(), reference.strip().casefold()
    rest = said[len(wanted) : len(wanted) + 1]
    return bool(wanted) and said.startswith(wanted) and not (rest.isalnum() and wanted[-1].isalnum())
