"""What holds for the arguments of every verb of the command line."""

import inspect
import subprocess
import sys
import typing

import pytest
import typer
from testing.time_limits import PROCESS_SECONDS
from typer.testing import CliRunner

from indexcache.benchmarks.bench.command import RENAMED as RENAMED_IN_BENCH
from indexcache.cli import app
from indexcache.distillation.command import RENAMED as RENAMED_IN_DISTILL
from indexcache.pattern_search.run import _bytes
from indexcache.runs.arguments import takes_old_names
from indexcache.runs.errors import RunError

VERBS = {command.name or command.callback.__name__: command.callback for command in app.registered_commands}


def parameters(verb):
    """Name, type without None and list, whether it is an argument, whether it is required."""
    function = inspect.unwrap(VERBS[verb])
    hints = typing.get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        kind, info = typing.get_args(hints[name])[:2]
        kinds = {part for part in (typing.get_args(kind) or (kind,)) if part is not type(None)}
        while any(typing.get_origin(part) is list for part in kinds):
            kinds = {inner for part in kinds for inner in typing.get_args(part) or (part,)}
        is_argument = isinstance(info, typer.models.ArgumentInfo)
        yield "--" + name.replace("_", "-"), kinds, is_argument, parameter.default is inspect.Parameter.empty


def options(kind):
    return [
        (verb, flag)
        for verb in VERBS
        for flag, kinds, is_argument, _ in parameters(verb)
        if kinds == {kind} and not is_argument
    ]


def refusal(verb, flag, value):
    """The message of a verb that refuses one option's value as bad usage."""
    given = []
    for other, _, is_argument, is_required in parameters(verb):
        if is_required and other != flag:
            given += ["nowhere"] if is_argument else [other, "nowhere"]
    finished = CliRunner().invoke(app, [verb, *given, f"{flag}={value}"])
    assert finished.exit_code == 2, (verb, flag, value, finished.output, finished.exception)
    return " ".join(finished.stderr.split())


@pytest.mark.parametrize(("verb", "flag"), options(float))
def test_no_number_may_be_nan_or_infinite_or_negative(verb, flag):
    for value in ("nan", "inf", "-inf", "-1", "many"):
        assert "--" in refusal(verb, flag, value)


@pytest.mark.parametrize(("verb", "flag"), options(int))
def test_no_count_may_be_a_fraction_and_none_but_a_seed_is_negative(verb, flag):
    for value in ("1.5", "nan", *(() if flag == "--seed" else ("-1",))):
        assert flag in refusal(verb, flag, value)


def test_there_are_such_options():
    assert len(options(float)) >= 9 and len(options(int)) >= 30


@pytest.mark.parametrize("size", ["1.2.3GB", ".", "-1GB", "inf", "nan", "1e9", "9" * 400])
def test_sizes_of_memory_that_are_none(size):
    with pytest.raises(RunError, match="no size"):
        _bytes(size)
    assert _bytes("1.5 GB") == 1_500_000_000 and _bytes("0") == 0


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["search", "--help"], ["bench", "--length", "x"]])
def test_answers_that_need_no_model_import_none(arguments):
    """`python -m indexcache.cli` answers as fast as `indexcache` does: without torch, transformers and NumPy."""
    command = [sys.executable, "-X", "importtime", "-m", "indexcache.cli", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=PROCESS_SECONDS)
    assert finished.returncode == (2 if arguments[0] == "bench" else 0), finished.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip() for line in finished.stderr.splitlines() if "import time:" in line}
    assert "indexcache.cli" in imported or "indexcache.runs.arguments" in imported
    assert not imported & {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "datasets"}


RENAMED = [
    (verb, old, new)
    for verb, names in (("bench", RENAMED_IN_BENCH), ("distill", RENAMED_IN_DISTILL))
    for old, new in names.items()
]


@pytest.mark.parametrize(("verb", "old", "new"), RENAMED)
def test_renamed_options_are_taken_with_a_note_and_not_shown(verb, old, new):
    flags = {flag for flag, *_ in parameters(verb)}
    assert new.replace("--no-", "--") in flags and old.replace("--no-", "--") not in flags
    required = ["nowhere", "nowhere", "--data", "nowhere"] if verb == "distill" else []
    for given in ([old, "many"], [f"{old}=many"]):
        refused = CliRunner().invoke(
            app, [verb, *required, "--seed" if verb == "distill" else "--length", "x", *given]
        )
        assert f"note: {old} is called {new} now" in refused.stderr
        assert refused.exit_code == 2 and f"No such option: {old}" not in refused.stderr
    assert old not in CliRunner().invoke(app, [verb, "--help"], terminal_width=200).stdout.split()


def test_a_value_given_under_an_old_name_is_the_new_option_s():
    small, given = typer.Typer(), []

    @small.command(cls=takes_old_names({"--rise": "--warmup-ratio", "--no-parts": "--no-breakdown"}))
    def verb(words: list[str] | None = None, warmup_ratio: float = 0.5, breakdown: bool = True):
        given.append((words, warmup_ratio, breakdown))

    def run(*arguments):
        finished = CliRunner().invoke(small, arguments)
        assert finished.exit_code == 0, finished.output
        return given.pop(), finished.stderr.count("note: ")

    assert run("--warmup-ratio", "0.25", "--no-breakdown") == ((None, 0.25, False), 0)
    assert run("--rise", "0.25", "--no-parts") == ((None, 0.25, False), 2)
    assert run("--rise=0.25") == ((None, 0.25, True), 1)
    assert run("--words", "risen") == ((["risen"], 0.5, True), 0)


def test_what_stands_behind_two_dashes_is_no_option():
    small, given = typer.Typer(), []

    @small.command(cls=takes_old_names({"--rise": "--warmup-ratio"}))
    def verb(text: typing.Annotated[str, typer.Argument()], warmup_ratio: float = 0.5):
        given.append((text, warmup_ratio))

    finished = CliRunner().invoke(small, ["--", "--rise"])
    assert finished.exit_code == 0 and given == [("--rise", 0.5)] and "note: " not in finished.stderr
