"""`indexcache --config run.toml VERB`: a file's values stand where the command line gives none."""

import json

import pytest
from typer.testing import CliRunner

from indexcache.cli import app


def invoke(tmp_path, text, *arguments):
    (tmp_path / "run.toml").write_text(text)
    return CliRunner().invoke(app, ["--config", str(tmp_path / "run.toml"), *map(str, arguments)])


def test_options_and_arguments_come_from_the_file(tmp_path):
    text = '[env]\nkernels = true\ntarget = "sm_90"\njson = true\n[search]\nnsamples = 3\n'
    found = json.loads(invoke(tmp_path, text, "env").stdout)
    assert found["kernels"]


def test_what_the_command_line_gives_wins(tmp_path):
    text = '[env]\nkernels = true\ntarget = "sm_1"\njson = true\n'
    assert "'sm_1' is none of" in invoke(tmp_path, text, "env").output
    assert json.loads(invoke(tmp_path, text, "env", "--target", "sm_90").stdout)["kernels"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[env]\nkernel = true\n", "did you mean 'kernels'?"),
        ("[envy]\nkernels = true\n", "'envy' is no verb's table"),
        ("kernels = true\n", "'kernels' is no verb's table"),
        ("[env.kernels]\nx = 1\n", "env has no option 'kernels'"),
        ("[env\n", "cannot be read as TOML"),
        ('[generate]\npath = "x"\nprompt = "y"\nmax-new-tokens = "many"\n', "--max-new-tokens"),
        ('[generate]\npath = "x"\nprompt = "y"\nmax-new-tokens = 0\n', "greater than or equal to 1"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(tmp_path, text, complaint):
    result = invoke(tmp_path, text, "generate" if "generate" in text else "env")
    assert result.exit_code == 2
    assert complaint in " ".join(result.output.replace("│", " ").split())


def test_a_file_that_is_not_there(tmp_path):
    result = CliRunner().invoke(app, ["--config", str(tmp_path / "none.toml"), "env"])
    assert result.exit_code == 2 and "cannot be read as TOML" in " ".join(result.output.replace("│", " ").split())
