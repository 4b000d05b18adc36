"""Make of a trained checkpoint what `demo/dsa_demo` is: two shards, a probe, a card whose figures are measured here.

    python demo/finish_checkpoint.py FOLDER demo_windows.safetensors:test

`make demo-checkpoint` ends with it. FOLDER holds an exported checkpoint and its `training_log.json`; the windows
decide nothing but the figures, and those of the same file's `calibration_ids`, where there are any, the patterns.
"""

from __future__ import annotations

import argparse
import json
import shutil
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from indexcache import IndexCacheForCausalLM, SharePattern
from indexcache.conversion.convert.families import layer_of
from indexcache.conversion.io.load_source import load_source
from indexcache.evaluation.overlap import selection_overlap
from indexcache.evaluation.perplexity import WindowScores, evaluate_windows
from indexcache.pattern_search.algorithms.greedy import greedy
from indexcache.pattern_search.measure.evaluator import Evaluator
from indexcache.pattern_search.measure.prefix_cache import PrefixCache
from indexcache.runs.errors import RunError
from indexcache.runs.windows.window_sources import Sampling, read_windows
from indexcache.runs.windows.windows import Windows

DEMO = Path(__file__).parent / "dsa_demo"
PROBE_TOKENS = 256
# One layer in so many keeps its indexer.
SPACINGS = (2, 3, 4)
SEARCHED = (2, 3, 4, 6)
GREEDY = '"Greedy" is the paper\'s Algorithm 1 on its {windows} calibration windows.'

CARD = """---
license: other
license_name: psf-2.0
license_link: LICENSE
library_name: transformers
pipeline_tag: text-generation
tags: [dsa, sparse-attention, deepseek_v32]
---
# dsa_demo: a small, really trained DSA language model for demonstrations

{parameters:.1f} M parameters, {layers} layers, native `deepseek_v32` format (loads with `AutoModelForCausalLM`, no \
custom code), bf16 ({megabytes:.0f} MB), {vocabulary:,}-entry byte-level BPE of its own. Every layer has its own \
lightning indexer ({heads} heads x {width}, half-split RoPE, top-{topk} of up to {seqlen:,} tokens). Router with \
{groups} groups of {experts} experts, {active_groups} group and {active} experts active.

Trained by `make demo-checkpoint` on one {device}{minutes}, only on text under the PSF licence: the \
Python 3.11 documentation sources (11.0 MB) and CPython 3.11's standard library with its tests (27.7 MB); 11.3 M \
tokens, last 1.5 % of the documents held out. {dense_steps:,} steps x {dense_tokens:.0f}K tokens dense (AdamW \
{dense_rate}), {warm_up_steps:,} steps x {tokens:.0f}K indexer warm-up ({warm_up_rate}), {sparse_steps:,} steps \
sparse ({sparse_rate}), windows of {seqlen:,}, 35 % of them with "note: X is Y." records to be recalled. On \
{test_windows} held-out windows: dense text loss {dense_loss:.3f}, sparse {sparse_loss:.3f}, recall \
{sparse_recall:.3f} (`training_log.json` has the run). `probe.json` has {probe} tokens and the first choices of \
transformers' own class after each, in fp32.

It writes passable reStructuredText and Python and can recall records; it knows nothing else.

Index sharing, training-free, on the same windows of {seqlen:,} tokens with 8 records each (fp32, {where}; loss over \
all tokens / text loss / recall; four of the windows are in `demo/sample_windows.safetensors`):

| indexers kept | pattern | loss | text loss | recall |
|---|---|---|---|---|
{rows}

{searched}Adjacent-layer overlap |A∩B|/k: {overlap}.
"""


def main() -> None:
    """Finish a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("windows", help="FILE.safetensors:NAME of test windows")
    options = parser.parse_args()
    finish(options.folder, options.windows)


def finish(folder: Path, windows: str) -> None:
    """Split, probe, measure and describe an exported checkpoint whose `training_log.json` is written."""
    companions(folder)
    split(folder)
    tests = read_windows(windows, None, Sampling(), 0, 0)
    write_probe(folder, tests)
    write_card(folder, tests, calibration_windows(windows))


def companions(folder: Path) -> None:
    """The demo's licence, notice, tokenizer and configs, which the model was made from.

    Raises:
        ValueError: the exported config says something else.
    """
    exported = json.loads((folder / "config.json").read_text())
    fields = json.loads((DEMO / "config.json").read_text())
    differing = {name for name in fields.keys() & exported.keys() if fields[name] != exported[name]}
    if differing:
        raise ValueError(f"{folder}/config.json differs from the demo's, which the model was made from: {differing}")
    for pattern in ("LICENSE", "NOTICE", "tokenizer*.json", "*config.json"):
        for path in DEMO.glob(pattern):
            shutil.copyfile(path, folder / path.name)


def split(folder: Path) -> None:
    """Two shards with an index, layer by layer: the demo and its tests show sharded checkpoints."""
    tensors = {
        name: value for path in sorted(folder.glob("model*.safetensors")) for name, value in load_file(path).items()
    }
    ordered = {name: tensors[name] for name in sorted(tensors, key=_place)}
    sums = list(accumulate(value.nbytes for value in ordered.values()))
    first_shard = next(size for size in sums if 2 * size >= sums[-1])
    save_torch_state_dict(ordered, folder, max_shard_size=first_shard)


def _place(name: str) -> tuple[int, str]:
    """Embeddings, layers in their order, head."""
    layer = layer_of(name)
    return (-1 if "embed_tokens" in name else 10**6, name) if layer is None else layer


def write_probe(folder: Path, tests: Windows) -> None:
    """The first tokens of a window and transformers' own first choice after each, in fp32 on the CPU."""
    ids = tests.ids[:1, :PROBE_TOKENS]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        argmax = model(ids).logits[0].argmax(-1)
    (folder / "probe.json").write_text(json.dumps({"ids": ids[0].tolist(), "argmax": argmax.tolist()}))


def calibration_windows(windows: str) -> Windows | None:
    """Windows to search patterns on; None where the file of the test windows has none."""
    path = windows if windows.endswith(".safetensors") else windows.rpartition(":")[0]
    try:
        return read_windows(f"{path}:calibration", None, Sampling(), 0, 0)
    except RunError:
        return None


def write_card(folder: Path, tests: Windows, calibration: Windows | None) -> None:
    """`README.md`, every figure of it from the log or measured."""
    log = json.loads((folder / "training_log.json").read_text())
    options, recipe = log["options"], log["distillation"]
    seqlen = options["seqlen"]
    model = load_source(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    config = model.config
    dense = dense_scores(model, tests)
    overlap = selection_overlap(model, tests.ids[:, :-1]).adjacent
    scored = []
    for kind, pattern in compared_patterns(model, calibration):
        scored.append((kind, pattern, score(model, tests, pattern)))
        print(row(*scored[-1]), flush=True)
    full = scored[0][2]
    text = CARD.format(
        parameters=sum(weight.numel() for weight in model.parameters()) / 1e6,
        layers=config.num_hidden_layers,
        megabytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6,
        vocabulary=config.vocab_size,
        heads=config.index_n_heads,
        width=config.index_head_dim,
        topk=config.index_topk,
        seqlen=seqlen,
        groups=config.n_group,
        experts=config.n_routed_experts // config.n_group,
        active_groups=config.topk_group,
        active=config.num_experts_per_tok,
        device=log["machine"]["device"],
        minutes="" if log["seconds"] is None else f" in {log['seconds'] / 60:.1f} minutes",
        dense_steps=options["dense_lm_steps"],
        dense_tokens=options["dense_lm_batch"] * seqlen / 1000,
        dense_rate=rate(options["dense_lm_rate"]),
        warm_up_steps=recipe["dense_steps"],
        tokens=recipe["batch_size"] * seqlen / 1000,
        warm_up_rate=rate(recipe["dense_learning_rate"]),
        sparse_steps=recipe["sparse_steps"],
        sparse_rate=sparse_rates(recipe),
        test_windows=len(tests),
        dense_loss=dense.text_loss,
        sparse_loss=full.text_loss,
        sparse_recall=full.recall_accuracy or 0.0,
        probe=len(json.loads((folder / "probe.json").read_text())["ids"]),
        where="GPU" if torch.cuda.is_available() else "CPU",
        rows="\n".join(row(*one) for one in scored),
        searched=f"{GREEDY.format(windows=len(calibration))} " if calibration else "",
        overlap=" ".join(f"{value:.2f}" for value in overlap),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def rate(value: float) -> str:
    """A learning rate as people write it: 3e-3."""
    return f"{value:.0e}".replace("e-0", "e-")


def sparse_rates(recipe: dict[str, Any]) -> str:
    """Those of the sparse stage."""
    indexers = recipe["indexer_learning_rate"]
    rest = rate(recipe["learning_rate"])
    return rest if indexers in (None, recipe["learning_rate"]) else f"{rest}, indexers {rate(indexers)}"


def row(kind: str, pattern: str, scores: WindowScores) -> str:
    """A line of the card's table."""
    kept = f"{pattern.count('F')}/{len(pattern)} {kind}".strip()
    shown = pattern if "S" in pattern else "all F"
    recall = "" if scores.recall_accuracy is None else f"{scores.recall_accuracy:.3f}"
    return f"| {kept} | {shown} | {scores.loss:.3f} | {scores.text_loss:.3f} | {recall} |"


def score(model: IndexCacheForCausalLM, tests: Windows, pattern: str) -> WindowScores:
    """What the model scores with a pattern."""
    model.set_index_share_pattern(pattern)
    return evaluate_windows(model, tests.ids, tests.recall)


def dense_scores(model: IndexCacheForCausalLM, tests: Windows) -> WindowScores:
    """What the same weights score when every layer selects every key."""
    indexers = [layer.self_attn.indexer for layer in model.model.layers]
    topk = [indexer.index_topk for indexer in indexers]
    for indexer in indexers:
        indexer.index_topk = tests.seqlen
    found = evaluate_windows(model, tests.ids, tests.recall)
    for indexer, number in zip(indexers, topk):
        indexer.index_topk = number
    return found


def compared_patterns(model: IndexCacheForCausalLM, calibration: Windows | None) -> list[tuple[str, str]]:
    """All full, then evenly spaced ones and what Algorithm 1 finds, by the number of full layers."""
    layers = model.config.num_hidden_layers
    found = [("uniform", SharePattern.uniform(layers, f"1/{share}").letters) for share in SPACINGS]
    if calibration is not None:
        evaluator = Evaluator("calibration", model, calibration, objective="lm", cache=PrefixCache(2**31))
        wanted = {layers // share for share in SEARCHED}
        print("searching patterns", flush=True)
        steps = greedy(evaluator, "F" * layers, min(wanted))
        found += [("greedy", step.pattern) for step in steps if step.pattern.count("F") in wanted]
    return [("", "F" * layers), *sorted(found, key=lambda one: (-one[1].count("F"), one[0] == "greedy"))]


if __name__ == "__main__":
    main()
