"""Perplexity of a DSA or IndexCache checkpoint on windows of tokens, as a metric of Hugging Face's `evaluate`.

evaluate.load("PATH/TO/indexcache/evaluation/metrics/window_perplexity")
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import torch

from indexcache.evaluation.perplexity import evaluate_windows
from indexcache.runs.loading import Placement, load_model

_DESCRIPTION = """
Language-model loss and perplexity on fixed windows of tokens: token i+1 is predicted from tokens 0 .. i. Tokens that
must be recalled from far back can be marked; their loss and accuracy are given apart. Any share pattern whose full
layers have an indexer can be run.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: windows of token ids, a list each, all of one length.
    references: marks of the same shape, 1 where a token is to be recalled, 0 elsewhere. All 0: nothing is marked.
    model_id: a DSA or IndexCache checkpoint, a folder or a Hub id; or `model`, a loaded model.
    pattern: share pattern to run it with; its own when not given.
    batch_size: windows in one forward pass.
    dtype, device: as for `indexcache eval`.

Returns:
    loss, perplexity, text_loss, recall_loss and recall (None where nothing is marked), tokens.

Examples:
    >>> metric = evaluate.load("evaluation/metrics/window_perplexity")
    >>> metric.compute(predictions=windows, references=marks, model_id="demo/dsa_demo", pattern="FFSSSSFFSSSS")
"""

_CITATION = """
@article{bai2026indexcache, title={IndexCache: Accelerating Sparse Attention via Cross-Layer Index Reuse},
author={Bai, Yushi and others}, journal={arXiv preprint arXiv:2603.12201}, year={2026}}
"""


class WindowPerplexity(evaluate.Metric):
    """Loss, perplexity and recall on windows of tokens."""

    def _info(self) -> evaluate.MetricInfo:
        windows = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": windows, "references": windows}),
        )

    def _compute(
        self,
        predictions: Any,
        references: Any,
        model_id: str | None = None,
        model: Any = None,
        pattern: str | None = None,
        batch_size: int = 1,
        dtype: str = "auto",
        device: str | None = None,
    ) -> dict[str, float | int | None]:
        if (model_id is None) == (model is None):
            raise ValueError("give exactly one of model_id and model")
        if model is None:
            assert model_id is not None
            model = load_model(model_id, Placement(dtype, device))
        ids, marks = torch.tensor(predictions), torch.tensor(references)
        own = model.config.share_pattern
        model.set_index_share_pattern(pattern or own)
        try:
            scores = evaluate_windows(model, ids, marks, batch_size)
        finally:
            model.set_index_share_pattern(own)
        return {
            "loss": scores.loss,
            "perplexity": scores.perplexity,
            "text_loss": scores.text_loss,
            "recall_loss": scores.recall_loss,
            "recall": scores.recall_accuracy,
            "tokens": scores.tokens,
        }
