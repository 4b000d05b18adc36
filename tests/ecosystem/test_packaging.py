"""What is published: sdist and wheel, checked as a package index does; the command of the wheel in a new venv."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from ecosystem.conftest import ROOT, run
from ecosystem.ways import REMOTE

pytestmark = pytest.mark.skipif(REMOTE, reason="of the package")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with sdist and wheel, the wheel built from the sdist."""
    source, out = tmp_path_factory.mktemp("source") / "indexcache", tmp_path_factory.mktemp("dist")
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(source)], check=True)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source], cwd=out)
    return out


@pytest.mark.row("twine", "`check --strict` of sdist and wheel", package=["twine", "build"])
def test_twine(built, run_tool):
    files = sorted(map(str, built.iterdir()))
    assert [Path(file).suffix for file in files] == [".whl", ".gz"]
    assert run_tool("twine", "check", "--strict", *files).stdout.count("PASSED") == 2


@pytest.mark.row("pip", "the wheel in a new environment: `indexcache env`, its completion", package=["pip", "build"])
def test_the_wheels_command(built, tmp_path):
    run([sys.executable, "-m", "venv", tmp_path / "venv"], cwd=tmp_path)
    bin_folder, (wheel,) = tmp_path / "venv" / "bin", built.glob("*.whl")
    run([bin_folder / "python", "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel], cwd=tmp_path)
    # What it needs is this environment's, found behind what the new one has.
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "needed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n" + _also_here())
    told = run([bin_folder / "indexcache", "env"], cwd=tmp_path).stdout
    assert {"indexcache", "torch", "transformers"} <= {line.split()[0] for line in told.splitlines()}
    where = "import indexcache; print(indexcache.__file__)"
    assert run([bin_folder / "python", "-c", where], cwd=tmp_path).stdout.startswith(str(site))
    completion = run([bin_folder / "indexcache"], cwd=tmp_path, _INDEXCACHE_COMPLETE="source_bash").stdout
    assert "_indexcache_completion" in completion


def _also_here():
    """Folders that this environment takes packages from beside its own."""
    return "".join(f"{path}\n" for path in sys.path if path.endswith("site-packages"))
