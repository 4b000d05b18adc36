"""The model card of an IndexCache checkpoint: the base model's licence and tags, the pattern, the recipe."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ...configuration.share_pattern import SharePattern
from ..io.hub_integrity import is_commit_id
from ..io.shard_writer import write_text
from .hub_contents import tokenizer_code

TAGS = ("dsa", "sparse-attention", "index-cache", "custom_code")
# What stays true of a checkpoint whose indexers were shared. Results (`model-index`, `metrics`) do not.
_INHERITED = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag", "thumbnail")
_INHERITED_PREFIX = "extra_gated_"

_BODY = """
# {title}

{origin} with **IndexCache** ([arXiv 2603.12201](https://arxiv.org/abs/2603.12201)): {num_full} of its {num_layers} \
layers run their lightning indexer, the other {num_shared} reuse the selection of the nearest such layer before them.

## What changed

```
{drawing}
```

`F` (full) runs its own indexer{selecting}; `S` (shared) reuses the selection of the `F` before it, and needs neither \
indexer weights nor an index-key cache.{saved} {others}

| full layer | serves layers |
|---|---|
{groups}

## Load and generate

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{tokenizer_trust})
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True, dtype="auto")
inputs = tokenizer("Sparse attention reads", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))
```

The model's code is in this repository: read it before you pass `trust_remote_code=True`, and add \
`revision="<commit>"`, the id of the commit that you read, so that no later one runs unread. It needs torch and \
transformers 5.23 or newer, and uses triton on a GPU where it is installed.
{licence_note}{measured}
## Recipe

```json
{recipe}
```

## Limits

- Up to {topk_words} the indexers select everything, so sharing changes nothing there: measure the pattern on \
long inputs.
- {choice}
- What the base model's card says of its behaviour, data and risks holds here too.

## Citation

```bibtex
@article{{bai2026indexcache,
  title   = {{IndexCache: Accelerating Sparse Attention via Cross-Layer Index Reuse}},
  author  = {{Bai, Yushi and others}},
  journal = {{arXiv preprint arXiv:2603.12201}},
  year    = {{2026}}
}}
```

{base_citation}
"""

_CHOSEN = (
    "A pattern chosen without training fits the model and the texts it was chosen on. The fewer full layers, the "
    "sooner retrieval from far back suffers; at the same count, a searched pattern loses less than an evenly spaced "
    "one."
)
_TRAINED = (
    "The weights were trained on the data that the recipe names: what the base model could do beyond them may have "
    "changed, so evaluate it again for your use."
)

_EXPORT_BODY = """
# IndexCache checkpoint for {engine}

```
{drawing}
```

`F` layers run their lightning indexer, `S` layers reuse the selection of the `F` before them (IndexCache, \
[arXiv 2603.12201](https://arxiv.org/abs/2603.12201)). The weights are those of the IndexCache checkpoint it was \
exported from; `config.json` spells the pattern for {engine}.
"""


def write_card(
    output: str | os.PathLike[str],
    *,
    source_card: str | None,
    source_id: str | None,
    pattern: SharePattern,
    recipe: Mapping[str, Any],
    repo_id: str | None = None,
    topk: int | None = None,
    bytes_saved: int | None = None,
    measured: Sequence[Mapping[str, Any]] | None = None,
    trained: str | None = None,
    scores: Mapping[str, float] | None = None,
) -> Path:
    """Write `README.md` into an IndexCache checkpoint's folder.

    The same arguments give the same bytes.

    Args:
        output: the checkpoint's folder; whether its tokenizer has code of its own is looked up there.
        source_card: text of the base model's `README.md`; licence, language and tags are taken from its metadata.
        source_id: the base model's Hub id; `None` for a folder.
        pattern: which layers run their indexer.
        recipe: what made this checkpoint, as JSON values; printed whole. Its `dtype`, when not `auto`, is named.
        repo_id: Hub id under which the checkpoint will be found, for the loading example.
        topk: `index_topk`, the keys that an indexer selects.
        bytes_saved: bytes of indexer weights left out.
        measured: rows of a table of measurements, each column name -> value; rows share their columns.
        trained: how the weights were trained for the pattern, to follow "All weights were trained for this pattern";
            `None` when they are the base model's.
        scores: of this checkpoint on its held-out windows, metric -> value, for the card's `model-index`: `loss`, in
            nats a token, and `recall`, a share.

    Returns:
        The card's path.

    Raises:
        ValueError: the rows of `measured` differ in their columns.

    Warns:
        UserWarning: the base model's licence is not known, or its metadata cannot be read.
    """
    inherited = _metadata(source_card)
    data = _card_data(inherited, source_id)
    if scores:
        data.model_name = repo_id or f"{source_id or 'DSA model'} with IndexCache"
        data.eval_results = [_result(metric, value) for metric, value in scores.items()]
    licence_note = ""
    if "license" not in inherited:
        licence_note = (
            "\n## Licence\n\nlicense: unknown. The base model's card names none. Its licence binds this checkpoint: "
            "find it, and name it in this card's metadata, before you share these weights.\n"
        )
        warnings.warn(
            f"the licence of {source_id or 'the base model'} is not known: the card says `license: other`; "
            f"name the right one in {Path(output) / 'README.md'} before you share the checkpoint",
            stacklevel=2,
        )
    commit = (recipe.get("source") or {}).get("revision") if isinstance(recipe.get("source"), Mapping) else None
    at = f"/tree/{commit}" if is_commit_id(commit) else ""
    base = f"[{source_id}](https://huggingface.co/{source_id}{at})" if source_id else ""
    text = _BODY.format(
        title=f"{repo_id or source_id or 'DSA model'}{'' if repo_id else ' with IndexCache'}",
        origin=base or "A DeepSeek Sparse Attention model",
        num_full=pattern.num_full,
        num_layers=len(pattern),
        num_shared=len(pattern.shared_layers),
        drawing=draw_pattern(pattern),
        selecting=f", which selects {topk:,} keys for each token" if topk else "",
        saved=f" {bytes_saved:,} bytes of indexer weights are left out." if bytes_saved else "",
        others=_others(recipe, trained),
        choice=_CHOSEN if trained is None else _TRAINED,
        groups="\n".join(
            f"| {full} | {', '.join(map(str, served[1:])) or 'itself alone'} |"
            for full, served in pattern.groups.items()
        ),
        name=repo_id or "this/checkpoint",
        tokenizer_trust=f", trust_remote_code={bool(tokenizer_code(output))}",
        licence_note=licence_note,
        measured=f"\n## Measured\n\n{_table(measured)}\n" if measured else "",
        recipe=json.dumps(recipe, indent=2, ensure_ascii=False),
        topk_words=f"{topk:,} tokens" if topk else "`index_topk` tokens",
        base_citation=f"Please cite the base model{f', {base},' if base else ''} as its card asks.",
    )
    return _write(output, data, text)


def write_export_card(
    output: str | os.PathLike[str], *, source_card: str | None, pattern: SharePattern, engine: str
) -> Path:
    """Write `README.md` into a checkpoint exported for another engine.

    Args:
        output: the exported checkpoint's folder.
        source_card: text of the IndexCache checkpoint's card; its metadata are kept, `custom_code` apart.
        pattern: which layers run their indexer.
        engine: the engine it was exported for.

    Returns:
        The card's path.
    """
    inherited = _metadata(source_card)
    data = _card_data(inherited, inherited.get("base_model"))
    data.tags = [tag for tag in data.tags or [] if tag != "custom_code"]
    text = _EXPORT_BODY.format(engine=engine, drawing=draw_pattern(pattern))
    return _write(output, data, text)


def draw_pattern(pattern: SharePattern) -> str:
    """The pattern under a ruler that counts its layers."""
    ruler = "".join(f"{layer:<10}" for layer in range(0, len(pattern), 10)).rstrip()
    return f"layer    {ruler}\npattern  {pattern}"


def _write(output: str | os.PathLike[str], data: ModelCardData, text: str) -> Path:
    path = Path(output) / "README.md"
    write_text(path, f"---\n{data.to_yaml(line_break=chr(10))}\n---\n{text}")
    return path


def _others(recipe: Mapping[str, Any], trained: str | None) -> str:
    """What happened to the other tensors, as a sentence."""
    if trained is not None:
        return f"All weights were trained for this pattern {trained}."
    cast = "" if recipe.get("dtype", "auto") == "auto" else f", cast to {recipe['dtype']}"
    return f"Every other tensor is the base model's{cast}."


def _metadata(source_card: str | None) -> dict[str, Any]:
    """The base card's metadata; empty, with a warning, where it cannot be read."""
    if source_card is None:
        return {}
    try:
        return dict(ModelCard(source_card, ignore_metadata_errors=True).data.to_dict())
    except (ValueError, TypeError, yaml.YAMLError) as error:
        warnings.warn(
            f"the base model's card has metadata that cannot be read, so none is kept: {error}", stacklevel=3
        )
        return {}


def _card_data(inherited: Mapping[str, Any], source_id: str | None) -> ModelCardData:
    kept = {
        name: value for name, value in inherited.items() if name in _INHERITED or name.startswith(_INHERITED_PREFIX)
    }
    licence = {} if "license" in kept else {"license": "other", "license_name": "unknown"}
    tags = inherited.get("tags") or []
    tags = [tags] if isinstance(tags, str) else [str(tag) for tag in tags]
    return ModelCardData(
        **{
            "pipeline_tag": "text-generation",
            **licence,
            **kept,
            "library_name": "transformers",
            "base_model": source_id or inherited.get("base_model"),
            "tags": list(dict.fromkeys([*tags, *TAGS])),
        }
    )


def _result(metric: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type="held-out-windows",
        dataset_name="held-out windows, named in the recipe",
        metric_type=metric,
        metric_value=round(value, 4),
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(rows[0])
    for row in rows:
        if list(row) != columns:
            raise ValueError(f"measured rows must share their columns {columns}: got {list(row)}")
    lines = [columns, ["---"] * len(columns), *([str(row[column]) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
