"""Make windows with records that no published window shares text with: to check a choice on what it has not seen.

    python -m indexcache.benchmarks.studies.fresh_windows CORPUS.txt.xz TOKENIZER PUBLISHED.safetensors OUT.safetensors

Writes `fresh_*`, all that the published windows (every `NAME_ids` of that file) leave of the held-out documents;
`witness_*` and `held1_*`, `held2_*`, ..., the same windows again in parts that have none in common; and `seed1_*`,
`seed2_*`, ... from training documents. Every window has eight records, as the published ones have. `NAME_recall` marks
the tokens to be recalled.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .recall_windows import record, split_documents, tokens_of, with_records, word

RECORDS = 8
# A run of so many tokens that stands in a published window too is taken for the same text. Between such runs, fewer
# than GAP tokens count as covered (records cut the published text), MARGIN tokens at either end are left out, and what
# then is shorter than LEAST is not worth having.
RUN, GAP, MARGIN, LEAST = 16, 96, 48, 400


def runs_of(windows: list[torch.Tensor]) -> set[tuple[int, ...]]:
    """Every run of `RUN` tokens in windows `[N, L]`."""
    rows = [row for part in windows for row in part.tolist()]
    return {tuple(row[i : i + RUN]) for row in rows for i in range(len(row) - RUN + 1)}


def untouched(ids: list[int], known: set[tuple[int, ...]]) -> list[list[int]]:
    """The stretches of a document's tokens that hold none of the known runs."""
    covered = [False] * len(ids)
    for i in range(len(ids) - RUN + 1):
        if tuple(ids[i : i + RUN]) in known:
            covered[i : i + RUN] = [True] * RUN
    found, first = [], 0
    for stop in [i for i, hit in enumerate(covered) if hit] + [len(ids)]:
        begin = first + (MARGIN if first > 0 else 0)
        end = stop - (MARGIN if stop < len(ids) else 0)
        if stop - first >= GAP and end - begin >= LEAST:
            found.append(ids[begin:end])
        first = stop + 1
    return found


def windows_of(
    stream: torch.Tensor, count: int, seqlen: int, encoder: Any, random_: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows int16 `[N, seqlen + 1]` with records, `count` of them at most, and the marks uint8 of the same shape."""
    rows, at = [], 0
    for _ in range(count):
        names: set[str] = set()
        while len(names) < RECORDS:
            names.add(word(random_))
        records = [record(name, word(random_), encoder) for name in sorted(names)]
        length = seqlen + 1 - sum(len(note) + len(question) for note, question in records)
        if at + length > len(stream):
            break
        rows.append(with_records(stream[at : at + length], records, random_))
        at += length
    if not rows:
        raise SystemExit(f"{len(stream):,} tokens are less than a window of {seqlen + 1:,}: give more text")
    return torch.stack(rows).to(torch.int16), torch.stack([recall_mask(row, encoder) for row in rows])


def recall_mask(ids: torch.Tensor, encoder: Any) -> torch.Tensor:
    """1 at the tokens of Y in every "recall: X is Y.", uint8 of the shape of `ids [L]`."""
    mask, tokens = torch.zeros(len(ids), dtype=torch.uint8), ids.tolist()
    opening, verb = encoder.encode("\nrecall:").ids, encoder.encode(" is").ids[0]
    for i in range(len(tokens) - len(opening)):
        if tokens[i : i + len(opening)] != opening:
            continue
        at = i + len(opening)
        # Names and values are a few tokens each; the last question of a window may be cut off.
        while at < min(len(tokens), i + 12) and tokens[at] != verb:
            at += 1
        at += 1
        while at < min(len(tokens), i + 20) and not encoder.decode([tokens[at]]).startswith("."):
            mask[at] = 1
            at += 1
    return mask


def main() -> None:
    """Read, find what is left, cut, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tokenizer", type=Path, help="tokenizer.json, or a folder that holds it")
    parser.add_argument("published", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--draws", type=int, default=3, help="sets of calibration windows of either kind")
    parser.add_argument("--windows", type=int, default=16, help="in each of them")
    options = parser.parse_args()
    from tokenizers import Tokenizer

    path = options.tokenizer
    encoder = Tokenizer.from_file(str(path / "tokenizer.json" if path.is_dir() else path))
    end = encoder.token_to_id("<|endoftext|>") or 0
    published = [tensor for name, tensor in load_file(options.published).items() if name.endswith("ids")]
    seqlen, known = published[0].shape[1] - 1, runs_of(published)
    training, held_out = split_documents(options.corpus)
    encoded = encoder.encode_batch_fast(held_out, add_special_tokens=False)
    spans = [span for document in encoded for span in untouched(document.ids, known)]
    random_ = random.Random(11)
    random_.shuffle(spans)
    stream = torch.cat([torch.tensor([*span, end], dtype=torch.int32) for span in spans])
    tensors: dict[str, torch.Tensor] = {}
    ids, recall = windows_of(stream, len(stream), seqlen, encoder, random_)
    kept = len(ids) - options.draws * options.windows
    if kept < 1:
        raise SystemExit(f"{len(ids)} fresh windows are too few for --draws {options.draws} of {options.windows}")
    parts = {"fresh": slice(None), "witness": slice(0, kept)}
    for draw in range(options.draws):
        parts[f"held{draw + 1}"] = slice(kept + draw * options.windows, kept + (draw + 1) * options.windows)
    for name, part in parts.items():
        tensors |= {f"{name}_ids": ids[part].clone(), f"{name}_recall": recall[part].clone()}
    for seed in range(1, options.draws + 1):
        random_ = random.Random(seed)
        random_.shuffle(training)
        enough = 3 * options.windows * (seqlen + 1)
        # Not always from the beginning of a document.
        stream = tokens_of(training, encoder, end, enough)[random_.randrange(seqlen + 1) :]
        drawn = windows_of(stream, options.windows, seqlen, encoder, random_)
        tensors |= {f"seed{seed}_ids": drawn[0], f"seed{seed}_recall": drawn[1]}
    save_file(tensors, options.output)
    print({name: tuple(tensor.shape) for name, tensor in tensors.items() if name.endswith("ids")})


if __name__ == "__main__":
    main()
