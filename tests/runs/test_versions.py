"""Result files name the code they are of, and never another repository's."""

import subprocess

import pytest
import torch

from indexcache.runs.versions import COMMIT_VARIABLE, commit, stamp


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.delenv(COMMIT_VARIABLE, raising=False)

    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        run = subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], capture_output=True, text=True, check=True
        )
        return run.stdout.strip()

    (tmp_path / "installed").mkdir()
    (tmp_path / "code.py").write_text("a = 1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    return tmp_path, git("rev-parse", "HEAD")


def test_a_checkout_names_its_commit_and_says_when_files_differ(repository):
    root, head = repository
    (root / "notes.txt").write_text("not part of the code\n")
    assert commit(root) == head
    (root / "code.py").write_text("a = 2\n")
    assert commit(root) == f"{head} with changes"


def test_a_copy_inside_another_repository_does_not_take_its_commit(repository, monkeypatch):
    root, head = repository
    assert commit(root / "installed") is None
    monkeypatch.setenv(COMMIT_VARIABLE, "abc123")
    assert commit(root / "installed") == commit(root) == "abc123"


def test_a_broken_checkout_has_no_known_commit(tmp_path, monkeypatch):
    monkeypatch.delenv(COMMIT_VARIABLE, raising=False)
    (tmp_path / ".git").write_text("gitdir: nowhere\n")
    assert commit(tmp_path) is None


def test_every_number_says_what_it_ran_with(monkeypatch):
    monkeypatch.setenv(COMMIT_VARIABLE, "abc123")
    found = stamp()
    assert found["torch"] == torch.__version__ and found["commit"] == "abc123"
    assert {"indexcache", "device", "cpu", "threads", "python", "triton", "transformers", "date"} <= found.keys()
