"""The built wheel, without the repository, converts, loads and generates from any folder."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from testing.time_limits import PROCESS_SECONDS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel's contents."""
    built = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(built)]
    source = tmp_path_factory.mktemp("source") / "indexcache"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(source)], check=True)
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (wheel,) = built.glob("*.whl")
    target = built / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def run(installed, folder, *arguments, **variables):
    environment = {
        **os.environ,
        **variables,
        "PYTHONPATH": str(installed),
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
    }
    finished = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PROCESS_SECONDS,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_wheel_holds_the_package_and_nothing_else(installed):
    tops = {path.name for path in installed.iterdir()}
    assert tops == {"indexcache", next(name for name in tops if name.endswith(".dist-info"))}
    folders = {path.name for path in (installed / "indexcache").iterdir() if path.is_dir()}
    assert {"configuration", "kernels", "modeling_indexcache", "conversion", "evaluation"} <= folders
    assert not folders & {"tests", "demo", ".git", "docs"}
    assert not list((installed / "indexcache").glob("*/__init__.py"))
    assert {path.name for path in (installed / "indexcache" / "benchmarks").iterdir()} == {"bench", "kernels"}
    assert {path.name for path in installed.rglob("*.json")} == {"gpus.json", "measured_rates.json"}


def test_wheel_benchmarks(installed, tmp_path):
    command = ["-c", "from indexcache.cli import main; main()", "bench", "--shape", "tiny", "--length", "64"]
    options = ["--decode-steps", "4", "--repeats", "1", "--device", "cpu", "--no-parts", "--no-pictures", "--json"]
    document = json.loads(run(installed, tmp_path, *command, *options, INDEXCACHE_COMMIT="abc123"))
    assert document["versions"]["commit"] == "abc123"
    assert all(row["prefill_seconds"] > 0 for row in document["rows"] if row["kind"] == "generate")
    assert (tmp_path / "indexcache_bench" / "bench.json").exists()


def test_wheel_plans(installed, tmp_path):
    """With the measured rates that come along."""
    command = ["-c", "from indexcache.cli import main; main()", "plan", str(ROOT / "demo" / "dsa_demo"), "--json"]
    document = json.loads(run(installed, tmp_path, *command))
    assert document["fits"] and any("kernels_h100.json" in source for source in document["sources"])


def test_wheel_converts_loads_and_generates(installed, tmp_path):
    where = run(installed, tmp_path, "-c", "import indexcache; print(indexcache.__file__)")
    assert where.startswith(str(installed))
    command = ["-c", "from indexcache.cli import main; main()", "convert", str(ROOT / "demo" / "dsa_demo"), "out"]
    run(installed, tmp_path, *command, "--pattern", "FFSSSSFFSSSS")
    script = (
        "import sys; sys.modules['indexcache'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained('out', trust_remote_code=True)\n"
        "tokens = AutoTokenizer.from_pretrained('out', trust_remote_code=True)('Return the', return_tensors='pt')\n"
        "out = model.generate(tokens.input_ids, max_new_tokens=5, do_sample=False, eos_token_id=None)\n"
        "print(model.config.index_share_pattern, out.shape[1] - tokens.input_ids.shape[1])"
    )
    assert "FFSSSSFFSSSS 5" in run(installed, tmp_path, "-c", script)
