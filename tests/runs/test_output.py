"""The folder that long work writes to: what would end the work late, or never, is found before it begins."""

import os

import pytest

from indexcache.runs.errors import RunError
from indexcache.runs.output import prepare_output


def prepare(folder, **options):
    prepare_output(folder, folder / "journal.jsonl", **{"resume": False, "overwrite": False, **options}, work="search")


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize("name", ["journal.jsonl", "patterns.json", "perplexity.png", "report.html"])
def test_pipes_and_devices_are_refused_before_they_are_opened(tmp_path, name, options):
    os.mkfifo(tmp_path / name)
    (tmp_path / "null").symlink_to("/dev/null")
    with pytest.raises(RunError, match=f"holds pipes or devices where files belong .*{name}.*remove them"):
        prepare(tmp_path, **options)


def test_a_pipe_behind_a_link_is_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "evaluation.json").symlink_to("../pipe")
    with pytest.raises(RunError, match=r"pipes or devices .*\(evaluation\.json\)"):
        prepare(tmp_path / "output")


def test_other_files_and_folders_of_others_are_let_be(tmp_path):
    (tmp_path / "mine").mkdir()
    os.mkfifo(tmp_path / "mine" / "pipe")
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "gone").symlink_to("nothing")
    prepare(tmp_path)
    prepare(tmp_path / "new")
