"""With too old a transformers, the error names both versions and the mend, in Python and on the command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "demo" / "dsa_demo"
MESSAGE = "IndexCache needs transformers 5.23.0 or newer and found 5.17.0: run `pip install -U transformers`"


@pytest.fixture
def run_with_old_transformers(tmp_path):
    """Run Python where `import transformers` finds a 5.17.0 that has little in it."""
    package = tmp_path / "transformers"
    package.mkdir()
    lines = ["__version__ = '5.17.0'", *(f"{name} = object" for name in ("AutoConfig", "AutoModel"))]
    (package / "__init__.py").write_text("\n".join([*lines, "AutoModelForCausalLM = object", ""]))

    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    return run


def test_import_says_what_to_install(run_with_old_transformers):
    finished = run_with_old_transformers("-c", "import indexcache")
    assert finished.returncode != 0
    assert MESSAGE in finished.stderr


def test_command_line_says_what_to_install_without_a_traceback(run_with_old_transformers):
    script = "import sys; sys.argv[0] = 'indexcache'\nfrom indexcache.cli import main\nmain()"
    finished = run_with_old_transformers("-c", script, "inspect", DEMO)
    assert finished.returncode == 1
    assert MESSAGE in finished.stderr
    assert "Traceback" not in finished.stderr
