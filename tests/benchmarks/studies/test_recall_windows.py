"""Windows with records: every question follows its note, and held-out documents stay out."""

import lzma
import re
from pathlib import Path

from indexcache.benchmarks.studies.recall_windows import recall_windows, training_documents

DEMO = Path(__file__).parents[3] / "demo" / "dsa_demo"


def test_questions_repeat_earlier_notes_and_held_out_documents_stay_out(tmp_path):
    from tokenizers import Tokenizer

    documents = [
        f"Document number {i}. " + "The module reads a file and returns a list of names. " * 12 for i in range(200)
    ]
    corpus = tmp_path / "corpus.txt.xz"
    corpus.write_bytes(lzma.compress("\0".join(documents).encode()))
    assert len(training_documents(corpus)) == 197
    ids = recall_windows(corpus, DEMO, 40, 511, seed=3)
    assert ids.shape == (40, 512)
    assert (recall_windows(corpus, DEMO, 40, 511, seed=3) == ids).all()
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    texts = [tokenizer.decode(row.tolist(), skip_special_tokens=False) for row in ids]
    with_records = 0
    for text in texts:
        assert not re.search(r"Document number 19[789]\.", text)
        notes = {match.group(1): match.start() for match in re.finditer(r"note: (\w{4} is \w{4})\.", text)}
        questions = {match.group(1): match.start() for match in re.finditer(r"recall: (\w{4} is \w{4})\.", text)}
        with_records += bool(questions)
        assert all(notes[record] < at for record, at in questions.items())
    assert 5 <= with_records <= 25
