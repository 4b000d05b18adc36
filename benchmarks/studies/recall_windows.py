"""Make windows of tokens in which records are to be recalled: what the small checkpoints learn to reach back for.

    python -m indexcache.benchmarks.studies.recall_windows CORPUS.txt.xz TOKENIZER OUT.safetensors --windows 4608

The corpus is UTF-8 text, documents separated by NUL, compressed by xz or not. In a share of the windows lines
"note: X is Y." stand in the first part and "recall: X is Y." later, X and Y of two syllables each. The last documents
are held out: they never enter these windows.
"""

from __future__ import annotations

import argparse
import lzma
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# Of the documents, at the end.
HELD_OUT = 0.015
RECORD_SHARE = 0.35
MAX_RECORDS = 8
# Notes lie before this share of the window, questions behind it.
TURN = 0.62
CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"


def main() -> None:
    """Read, tokenise, cut, write `train_ids` int16 `[N, L + 1]`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tokenizer", type=Path, help="tokenizer.json, or a folder that holds it")
    parser.add_argument("output", type=Path)
    parser.add_argument("--windows", type=int, default=4608)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record-share", type=float, default=RECORD_SHARE, help="of the windows, with records")
    options = parser.parse_args()
    ids = recall_windows(
        options.corpus, options.tokenizer, options.windows, options.seqlen, options.seed, options.record_share
    )
    save_file({"train_ids": ids.to(torch.int16) if int(ids.max()) < 2**15 else ids}, options.output)
    print(f"{options.output}: {tuple(ids.shape)}")


def recall_windows(
    corpus: Path, tokenizer: Path, count: int, seqlen: int, seed: int, record_share: float = RECORD_SHARE
) -> torch.Tensor:
    """`count` windows int32 `[count, seqlen + 1]` from randomly drawn training documents."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer))
    end = encoder.token_to_id("<|endoftext|>") or 0
    random_ = random.Random(seed)
    documents = training_documents(corpus)
    random_.shuffle(documents)
    needed = count * (seqlen + 1)
    stream = tokens_of(documents, encoder, end, needed)
    rows, at = [], 0
    for _ in range(count):
        records = _records(random_, encoder) if random_.random() < record_share else []
        spare = sum(len(note) + len(question) for note, question in records)
        length = seqlen + 1 - spare
        if at + length > len(stream):
            # Once more from the start, cut elsewhere.
            at = random_.randrange(min(seqlen, max(1, len(stream) - length)))
        if at + length > len(stream):
            raise SystemExit(f"{corpus} gives {len(stream):,} tokens, less than a window: give more text")
        text = stream[at : at + length]
        at += length
        rows.append(with_records(text, records, random_))
    return torch.stack(rows)


def training_documents(corpus: Path) -> list[str]:
    """The documents of a corpus without those held out."""
    return split_documents(corpus)[0]


def split_documents(corpus: Path) -> tuple[list[str], list[str]]:
    """The documents of a corpus to train on, and those held out."""
    raw = corpus.read_bytes()
    documents = (lzma.decompress(raw) if corpus.suffix == ".xz" else raw).decode().split("\0")
    first = len(documents) - round(HELD_OUT * len(documents))
    return documents[:first], documents[first:]


def tokens_of(documents: list[str], encoder: Any, end: int, enough: int) -> torch.Tensor:
    """The tokens of documents, int32, each followed by the end-of-text token; reading stops when there are enough."""
    pieces, total = [], 0
    for first in range(0, len(documents), 256):
        for encoding in encoder.encode_batch_fast(documents[first : first + 256], add_special_tokens=False):
            pieces.append(torch.tensor([*encoding.ids, end], dtype=torch.int32))
            total += len(pieces[-1])
        if total >= enough:
            break
    return torch.cat(pieces)


def _records(random_: random.Random, encoder: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens of notes and of their questions, names all different."""
    names: set[str] = set()
    wanted = random_.randint(1, MAX_RECORDS)
    while len(names) < wanted:
        names.add(word(random_))
    return [record(name, word(random_), encoder) for name in sorted(names)]


def record(name: str, value: str, encoder: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of a note and of its question, int32."""
    texts = (f"\n{kind}: {name} is {value}.\n" for kind in ("note", "recall"))
    ids = (encoder.encode(text, add_special_tokens=False).ids for text in texts)
    note, question = (torch.tensor(tokens, dtype=torch.int32) for tokens in ids)
    return note, question


def word(random_: random.Random) -> str:
    """Two syllables."""
    return "".join(random_.choice(CONSONANTS) + random_.choice(VOWELS) for _ in range(2))


def with_records(
    text: torch.Tensor, records: list[tuple[torch.Tensor, torch.Tensor]], random_: random.Random
) -> torch.Tensor:
    """The tokens of a text with notes put into its first part and questions behind it."""
    turn = int(TURN * len(text))
    places = [(random_.randrange(turn), note) for note, _ in records]
    places += [(random_.randrange(turn, len(text)), question) for _, question in records]
    pieces, last = [], 0
    for place, tokens in sorted(places, key=lambda item: item[0]):
        pieces += [text[last:place], tokens]
        last = place
    return torch.cat([*pieces, text[last:]])


if __name__ == "__main__":
    main()
