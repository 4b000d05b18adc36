"""Fresh windows share no text with published ones, and their marks are the values asked for."""

import random
import re
from pathlib import Path

import pytest
import torch

from indexcache.benchmarks.studies.fresh_windows import (
    GAP,
    LEAST,
    MARGIN,
    RUN,
    recall_mask,
    runs_of,
    untouched,
    windows_of,
)

DEMO = Path(__file__).parents[3] / "demo" / "dsa_demo"


@pytest.fixture(scope="module")
def encoder():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


def test_what_is_left_holds_no_run_of_a_published_window():
    document = random.Random(0).choices(range(4000), k=9 * LEAST)
    published = [
        *document[: 2 * LEAST],
        *document[4 * LEAST : 4 * LEAST + 300],
        *document[7 * LEAST : 7 * LEAST + RUN],
    ]
    known = runs_of([torch.tensor([published])])
    spans = untouched(document, known)
    assert not {tuple(span[i : i + RUN]) for span in spans for i in range(len(span) - RUN + 1)} & known
    expected = [(2 * LEAST, 4 * LEAST), (4 * LEAST + 300, 7 * LEAST), (7 * LEAST + RUN, 9 * LEAST)]
    for span, (first, stop) in zip(spans, expected, strict=True):
        end = stop if stop == len(document) else stop - MARGIN
        assert span == document[first + MARGIN : end]


def test_short_rests_are_left_out():
    document = list(range(1000))
    known = runs_of([torch.tensor([document[:GAP], document[LEAST : LEAST + GAP]])])
    assert untouched(document, known) == [document[LEAST + GAP + MARGIN :]]
    assert untouched(document[: LEAST + GAP], known) == []


def test_every_window_asks_for_eight_records_and_marks_their_values(encoder):
    stream = torch.tensor(encoder.encode("The module reads a file and returns a list of names. " * 600).ids)
    ids, recall = windows_of(stream, 5, 1023, encoder, random.Random(1))
    assert ids.shape == recall.shape == (5, 1024) and ids.dtype == torch.int16 and recall.dtype == torch.uint8
    again, _ = windows_of(stream, 5, 1023, encoder, random.Random(1))
    assert torch.equal(ids, again)
    for row, marks in zip(ids, recall):
        text = encoder.decode(row.tolist())
        notes = dict(re.findall(r"note: (\w{4}) is (\w{4})\.", text))
        asked = re.findall(r"recall: (\w{4}) is (\w{4})\.", text)
        assert len(notes) == 8 and dict(asked) == notes
        marked = encoder.decode(row[marks.bool()].tolist()).split()
        assert marked == [value for _, value in asked]


def test_a_question_cut_off_is_marked_as_far_as_it_goes(encoder):
    tokens = torch.tensor(encoder.encode("read\nrecall: bane is kito").ids)
    assert encoder.decode(tokens[recall_mask(tokens, encoder).bool()].tolist()).strip() == "kito"
    assert not recall_mask(torch.tensor(encoder.encode("read\nrecall: ba").ids), encoder).any()


def test_too_little_text_is_refused(encoder):
    with pytest.raises(SystemExit, match="less than a window"):
        windows_of(torch.zeros(10, dtype=torch.int32), 1, 1023, encoder, random.Random(0))
