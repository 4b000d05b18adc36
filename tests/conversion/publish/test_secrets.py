"""A Hub token, given by --token or HF_TOKEN, stands in no output, JSON, card, recipe, log or error."""

import logging
import shutil

import pytest
from testing.checkpoints import build
from typer.testing import CliRunner

from indexcache import SharePattern
from indexcache.cli import app
from indexcache.conversion.convert.convert import ConvertOptions, convert
from indexcache.conversion.io import hub_requests
from indexcache.conversion.io.hub_requests import redact
from indexcache.conversion.io.open_checkpoint import open_source

TOKEN = "hf_" + "Zq9Xw7Rt" * 4
PLAIN = "api_org_0123456789abcdef"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A source and its conversion."""
    folder = tmp_path_factory.mktemp("made")
    source = build(folder / "source", shards=2)
    convert(open_source(source), folder / "converted", ConvertOptions(SharePattern("FSFS")))
    return source, folder / "converted"


@pytest.fixture(params=[("--token", TOKEN), ("HF_TOKEN", TOKEN), ("--token", PLAIN), ("HF_TOKEN", PLAIN)])
def token(request, monkeypatch):
    """How the token is given, and the token."""
    how, value = request.param
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if how == "HF_TOKEN":
        monkeypatch.setenv("HF_TOKEN", value)
    return how, value


@pytest.fixture
def run(hub_here, token, caplog, monkeypatch):
    """Runs a verb with the token and returns the result, having looked for the token in all that it said."""
    how, value = token
    if how == "--token":
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", value)
    monkeypatch.setattr(hub_requests.time, "sleep", lambda seconds: None)

    def work(*arguments):
        given = ["--token", value] if how == "--token" else []
        # At DEBUG the HTTP library prints whatever a server sends.
        with caplog.at_level(logging.INFO):
            result = CliRunner().invoke(app, [*map(str, arguments), *given])
        said = result.stdout + result.stderr + caplog.text
        assert value not in said
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result

    return work


def assert_not_in_files(folder, value):
    for path in folder.rglob("*"):
        assert not path.is_file() or value.encode() not in path.read_bytes(), path


def test_verbs_that_succeed_tell_it_nowhere(made, run, hub_here, tmp_path, token):
    source, converted = made
    hub_here.put(source)
    assert run("convert", "tester/base", tmp_path / "o", "--pattern", "FSFS", "--json").exit_code == 0
    assert_not_in_files(tmp_path / "o", token[1])
    assert run("inspect", "tester/base", "--json").exit_code == 0
    assert run("push", tmp_path / "o", "tester/small", "--json").exit_code == 0
    assert run("refresh", "tester/small", "--dry-run", "--json").exit_code == 0
    assert all(token[1].encode() not in data for data in hub_here.tree("tester/small").values())
    assert f"Bearer {token[1]}" in hub_here.tokens, "it was sent to the Hub, and to the Hub alone"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 500])
def test_a_failing_hub_that_repeats_what_it_was_sent_is_not_quoted(made, run, hub_here, tmp_path, token, status):
    """Debugging proxies answer with the request's own headers."""
    source, converted = made
    hub_here.put(source)
    told = f"you sent Authorization: Bearer {token[1]}"
    folder = shutil.copytree(converted, tmp_path / "checkpoint")
    for method, path, arguments in (
        ("GET", "/api/models/tester/base", ["inspect", "tester/base"]),
        ("GET", "/resolve/.*/config.json", ["convert", "tester/base", tmp_path / "o", "--pattern", "FSFS"]),
        ("GET", "/resolve/.*/model-", ["convert", "tester/base", tmp_path / "o", "--pattern", "FSFS"]),
        ("POST", "/api/repos/create", ["push", folder, "tester/small"]),
        ("POST", "/commit/", ["push", folder, "tester/small"]),
    ):
        hub_here.failures.clear()
        hub_here.answer(
            method, path, status=status, body={"error": told, "errors": [{"message": told}]}, times=99,
            X_Error_Message=told, X_Error_Code="Test",
        )  # fmt: skip
        result = run(*arguments)
        assert result.exit_code == 1, (arguments, result.output)
        if (tmp_path / "o").exists():
            assert_not_in_files(tmp_path / "o", token[1])


def test_a_body_that_repeats_it_in_a_file_s_place_is_not_quoted(made, run, hub_here, tmp_path, token):
    hub_here.put(made[0])
    hub_here.served["config.json"] = lambda data: token[1].encode().ljust(len(data))
    result = run("convert", "tester/base", tmp_path / "o", "--pattern", "FSFS")
    assert "config.json did not arrive" in result.stderr


def test_redacting_leaves_words_alone(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "any")
    text = "any file of many in hf_hub_download and hf_short"
    assert redact(text, "file") == text
    assert redact(f"Bearer {TOKEN}, {PLAIN}.", PLAIN) == "Bearer <token>, <token>."
