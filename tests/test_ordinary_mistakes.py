"""Ordinary mistakes end in a message with exit code 1 or 2, before the work; strange names are printed as they are."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from indexcache import cli
from indexcache.cli import app
from indexcache.runs.loading import load_model
from indexcache.runs.pages.terminal import terminal, text_streamer

DEMO = Path(__file__).parents[1] / "demo" / "dsa_demo"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(Path(json.decoder.__file__).read_text())
    return path


def run(*arguments, **options):
    return CliRunner().invoke(app, list(map(str, arguments)), **options)


def refused(*arguments, codes=(2,), **options):
    """The message with which a verb ends; a traceback would be an exception of another kind."""
    finished = run(*arguments, **options)
    assert finished.exit_code in codes and isinstance(finished.exception, SystemExit), (arguments, finished.exception)
    assert finished.stderr.strip()
    return " ".join(finished.stderr.split())


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model fails the test: mistakes are found before."""
    for module in ("evaluation.run", "pattern_search.run", "evaluation.measure_overlap"):
        monkeypatch.setattr(f"indexcache.{module}.load_model", lambda *_: pytest.fail("a model was loaded"))
    return load_model


def long_verbs(text):
    return {
        "eval": [DEMO, "--data", text, "--seqlen", 80, "--nsamples", 1, "--task", "perplexity"],
        "search": [DEMO, "--data", text, "--seqlen", 80, "--nsamples", 2],
    }


def test_an_output_that_cannot_be_one_is_found_before_the_work(no_model, text, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "busy" / "journal.jsonl").mkdir(parents=True)
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "journal.jsonl").write_text("{}\n")
    for verb, arguments in long_verbs(text).items():
        for output, message in (
            ("file", "is a file, and a folder is written"),
            ("file/below", "cannot be written to"),
            ("busy", "is a folder, and the journal belongs there"),
            ("earlier", "go on with --resume"),
        ):
            assert message in refused(verb, *arguments, "--output", tmp_path / output)
    assert "is a file" in refused("bench", "--shape", "tiny", "--output", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_takes_no_file(no_model, text, tmp_path, monkeypatch):
    """As the system says it; the tests may run as root, whom nothing is forbidden."""

    def forbidden(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", forbidden)
    for verb, arguments in long_verbs(text).items():
        assert "cannot be written to: Permission denied" in refused(verb, *arguments, "--output", tmp_path / "out")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions bind neither Windows nor root")
def test_no_permission_is_a_message(no_model, text, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    for verb, arguments in long_verbs(text).items():
        assert "cannot be written to: Permission denied" in refused(verb, *arguments, "--output", closed / "out")
    text.chmod(0)
    assert "Permission denied" in refused("eval", DEMO, "--data", text, "--output", tmp_path / "out")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 100_000, "\ud800", None], ids=list("abcdef"))
def test_a_source_s_json_that_is_none(text, tmp_path, name, content):
    source = Path(shutil.copytree(DEMO, tmp_path / "source"))
    (source / name).unlink()
    if content is None:
        (source / name).mkdir()
    else:
        (source / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    for verb, arguments in (
        ("eval", [source, "--data", text, "--seqlen", 80, "--nsamples", 1, "--output", tmp_path / "e"]),
        ("generate", [source, "import", "--max-new-tokens", 1]),
        ("distill", [source, tmp_path / "d", "--data", text, "--keep", "1/3", "--seqlen", 80]),
    ):
        if name == "tokenizer_config.json" and content in ("[1]", None):
            continue  # transformers can do without it
        message = refused(verb, *arguments, codes=(1, 2))
        assert name in message or f"tokenizer of {source}" in message
    assert not (tmp_path / "d").exists()


def test_folders_where_files_are_meant_and_files_that_are_none(no_model, text, tmp_path):
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "rows.json").write_text('{"rows": 5}')
    (tmp_path / "row.json").write_text('{"rows": [null]}')
    for name in ("list.json", "rows.json", "row.json", "", "absent"):
        assert "--plan" in refused("bench", "--plan", tmp_path / name, "--output", tmp_path / "bench")
    for data in (tmp_path / "list.safetensors", tmp_path / "absent.txt"):
        refused("search", DEMO, "--data", data, "--output", tmp_path / "search")
    (tmp_path / "windows.safetensors").mkdir()
    assert "is no file" in refused("search", DEMO, "--data", tmp_path / "windows.safetensors")
    refused("eval", text, codes=(1,))
    refused("eval", tmp_path / "absent", codes=(1,))


@pytest.mark.parametrize("keep", ["1e999999999", "nan", "inf", "1/0", "0x4", "9" * 5000, "٤"])
def test_numbers_of_layers_that_are_none(no_model, text, tmp_path, keep):
    assert "keep" in refused("search", DEMO, "--data", text, "--keep", keep, "--output", tmp_path / "out")


def test_packages_that_are_missing_are_missed_at_the_start(no_model, text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    arguments = [DEMO, tmp_path / "out", "--data", text, "--keep", "1/3", "--seqlen", 80, "--lora-rank", 4]
    assert "--lora-rank needs peft" in refused("distill", *arguments)
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.endswith("pages.figures")]:
        monkeypatch.delitem(sys.modules, name)
    picture = ["--overlap", text, "--overlap-picture", tmp_path / "picture.png"]
    assert "--overlap-picture needs matplotlib" in refused("inspect", DEMO, *picture)


def test_prompts_that_are_none():
    assert "the prompt is empty" in refused("generate", DEMO, "")
    assert "no UTF-8" in refused("generate", DEMO, "ol\udce9")
    assert "no UTF-8" in refused("generate", DEMO, "-", input=b"ol\xe9")


def test_no_memory_is_a_message(text, tmp_path, monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr("indexcache.evaluation.run.load_model", out_of_memory)
    arguments = long_verbs(text)["eval"]
    assert "memory is too small: CUDA out of memory" in refused("eval", *arguments, "--output", tmp_path, codes=(1,))


def test_strange_names_are_printed_as_they_are(text, tmp_path):
    """`[/x]` is an error in rich's markup, `[red]` would vanish, `:smile:` become a face, `$` start a formula."""
    strange = tmp_path / "a [red]b [/x] :smile: $c$ $x"
    strange.mkdir(parents=True)
    source = Path(shutil.copytree(DEMO, strange / "model [bold] [/y] $z"))
    given = ["--data", text, "--seqlen", 80]
    verbs = {
        "eval": [source, *given, "--nsamples", 1, "--output", strange / "eval", "--length", 200, "--samples", 1],
        "search": [source, *given, "--nsamples", 2, "--output", strange / "search", "--keep", 11, "--no-curve"],
        "convert": [source, strange / "out", "--keep", "1/3"],
        "inspect": [source],
        "verify": [source, strange / "out", "--no-logits"],
    }
    for verb, arguments in verbs.items():
        finished = run(verb, *arguments)
        assert finished.exit_code == 0, (verb, finished.output, finished.exception)
        if verb in ("eval", "search", "convert"):
            assert str(strange) in finished.stdout, finished.stdout
    assert source.name in run("inspect", strange / "search" / "patterns.json").stdout
    absent = strange / "absent"
    assert str(absent) in " ".join(run("eval", absent).stderr.split())


def test_nothing_prints_but_on_the_one_terminal():
    """A console of rich's own takes what stands in brackets for markup."""
    root = Path(cli.__file__).parent
    folders = ("evaluation", "pattern_search", "distillation", "conversion", "benchmarks")
    for path in [root / "cli.py", *(path for folder in folders for path in (root / folder).rglob("*.py"))]:
        if path.name != "terminal.py":
            assert not re.search(r"\bConsole\(|rich import print", path.read_text()), path
    assert terminal().render_str("[red]a[/x] :smile:").plain == "[red]a[/x] :smile:"


def test_what_nobody_foresaw_is_one_line_and_a_file(monkeypatch, tmp_path, capsys):
    def break_down(*_, **__):
        raise KeyError("unforeseen\nwith more")

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("indexcache.conversion.io.open_checkpoint.open_source", break_down)
    monkeypatch.setattr(sys, "argv", ["indexcache", "inspect", str(DEMO)])
    monkeypatch.setattr("indexcache.conversion.io.open_checkpoint.open_source", break_down)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.count("\n") == 1 and "unexpected KeyError" in said
    trace = next(tmp_path.glob("indexcache_*.txt"))
    assert str(trace) in said and "in break_down" in trace.read_text()
    monkeypatch.setenv("INDEXCACHE_TRACEBACK", "1")
    with pytest.raises(KeyError):
        cli.main()


def test_a_long_value_is_shown_by_its_ends(tmp_path):
    pattern = tmp_path / "pattern.json"
    pattern.write_text(json.dumps({"index_share_pattern": "x" * 100_000 + "y"}))
    said = refused("convert", DEMO, tmp_path / "out", "--pattern-file", pattern)
    assert str(pattern) in said.replace(" ", "") and "characters)" in said and len(said) < 6_000


NUL = "a\0b"


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert", DEMO, NUL, "--keep", "1/2"),
        ("convert", NUL, "out", "--keep", "1/2"),
        ("verify", NUL, DEMO),
        ("inspect", NUL),
        ("search", DEMO, "--data", NUL),
        ("eval", DEMO, "--output", NUL),
        ("distill", DEMO, NUL, "--data", "text.txt", "--keep", "1/2"),
        ("bench", "--output", NUL),
        ("generate", DEMO, NUL),
        ("push", NUL, "tester/pushed"),
        ("refresh", NUL),
        ("export", DEMO, NUL, "--to", "vllm"),
        ("warm-up", NUL),
    ],
    ids=lambda arguments: arguments[0],
)
def test_no_verb_takes_a_nul(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert r"'a\x00b' holds a NUL character" in refused(*arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [("export", "", "out", "--to", "vllm"), ("push", "", "tester/pushed"), ("convert", DEMO, "", "--keep", "1/2")],
    ids=lambda arguments: arguments[0],
)
def test_no_empty_path_is_the_current_folder(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "'' gives an empty value" in refused(*arguments)
    assert "'--output=' gives an empty value" in refused("search", DEMO, "--data", "text.txt", "--output=")
    assert not list(tmp_path.iterdir())


def test_no_escape_sequence_of_a_setting_reaches_the_terminal(tmp_path):
    """The tokenizers library prints names that it does not know, itself."""
    source = Path(shutil.copytree(DEMO, tmp_path / "model"))
    name = "\x1b[2J"
    token = {"content": "<unk>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    (source / "special_tokens_map.json").write_text(json.dumps({"unk_token": {**token, name: True}}))
    assert r"special_tokens_map.json has a setting called '\x1b[2J'" in refused("generate", source, "w1", codes=(1,))


def test_no_escape_sequence_of_a_name_reaches_the_terminal(text, tmp_path):
    source = Path(shutil.copytree(DEMO, tmp_path / "a\x1b[2Jb"))
    given = ["--data", text, "--seqlen", 80, "--nsamples", 2]
    verbs = {
        "search": [source, *given, "--keep", 11, "--no-curve", "--no-pictures", "--output", tmp_path / "s\x1b[2J"],
        "eval": [source, *given, "--task", "perplexity", "--no-pictures", "--output", tmp_path / "e\x1b[2J"],
        "convert": [source, tmp_path / "o\x1b[2J", "--keep", "1/3"],
        "inspect": [source],
        "push": [tmp_path / "o\x1b[2J", "tester/pushed", "--dry-run"],
        "export": [tmp_path / "o\x1b[2J", tmp_path / "x\x1b[2J", "--to", "vllm"],
    }
    for verb, arguments in verbs.items():
        finished = run(verb, *arguments)
        assert finished.exit_code == 0, (verb, finished.output, finished.exception)
        assert "\x1b" not in finished.output, verb
        assert r"\x1b[2J" in finished.output or verb == "push", verb


def test_libraries_carry_no_escape_sequence_and_no_letter_fails(run_python):
    """Warnings and log records quote what they found; stdout may know fewer letters than a name has."""
    script = """
import logging, warnings
sys.stdout.reconfigure(encoding="ascii", errors="strict")
from indexcache.conversion.io.terminal_text import guard_terminal, tell
guard_terminal()
tell("name \\udcff \\u4e2d \\x1b[2J")
logging.getLogger("a.library").warning("model type %s", "\\x1b[2J")
warnings.warn("config \\x1b[2J")
print("as it is \\udcff \\u4e2d")
"""
    said = run_python(script, installed=True)
    assert said.stdout == "name \\udcff \\u4e2d \\x1b[2J\nas it is \\udcff \\u4e2d\n"
    assert "\x1b" not in said.stderr and r"model type \x1b[2J" in said.stderr and r"config \x1b[2J" in said.stderr


@pytest.mark.parametrize("is_terminal", [True, False])
def test_generated_text_is_escaped_on_a_terminal_alone(monkeypatch, capsys, is_terminal):
    class Tokens:
        def decode(self, ids, **_):
            return "".join(map(chr, ids))

    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)
    streamer = text_streamer(Tokens())
    streamer.put(torch.tensor([[97, 27, 91, 50, 74, 10]]))
    streamer.end()
    assert capsys.readouterr().out.rstrip("\n") == (r"a\x1b[2J" if is_terminal else "a\x1b[2J")
