"""A Hub repository as the source: headers by range, one shard at a time, the same bytes as from a folder."""

import json

import pytest
from testing.checkpoints import build, hashes

CONVERT = """
import json
from pathlib import Path
from indexcache.configuration.share_pattern import SharePattern
from indexcache.conversion.io.open_checkpoint import open_source
from indexcache.conversion.convert.convert import ConvertOptions, convert

options = json.loads(sys.argv[3])
pattern = SharePattern(options.pop("pattern"))
output, most = Path(sys.argv[2]), 0

def on_shard(shard, how):
    global most
    downloads = list((output / ".indexcache_download").glob("*.safetensors"))
    most = max(most, len(downloads))
    if shard.file == options_stop:
        raise KeyboardInterrupt

options_stop = options.pop("stop", None)
source = open_source(sys.argv[1], revision=options.pop("revision", None))
try:
    done = convert(source, output, ConvertOptions(pattern, **options), on_shard=on_shard)
except KeyboardInterrupt:
    print(json.dumps("stopped"))
else:
    print(json.dumps({"how": done.how, "most": most, "revision": source.revision}))
"""

UPLOAD = """
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("tester/base", exist_ok=True)
api.upload_folder(repo_id="tester/base", folder_path=sys.argv[1])
if len(sys.argv) > 2:
    api.create_tag("tester/base", tag=sys.argv[2])
"""


@pytest.fixture
def base(tmp_path, hub, run_python):
    source = build(tmp_path / "base", fp8=True, shards=4, mtp=1)
    run_python(UPLOAD, source, "v1", installed=True, hub=hub)
    hub.requests.clear()
    return source


def converted(run_python, hub, output, source="tester/base", **options):
    script = run_python(CONVERT, source, output, json.dumps(options), installed=True, hub=hub)
    return json.loads(script.stdout.splitlines()[-1])


def weights(folder):
    return {name: digest for name, digest in hashes(folder).items() if name.endswith((".safetensors", "index.json"))}


def test_shards_come_one_at_a_time_and_equal_a_folder_s(tmp_path, hub, run_python, base):
    done = converted(run_python, hub, tmp_path / "o", pattern="FSFF")
    assert "moved" in done["how"].values() and "written" in done["how"].values() and done["most"] <= 1
    converted(run_python, hub, tmp_path / "local", source=str(base), pattern="FSFF")
    assert weights(tmp_path / "o") == weights(tmp_path / "local")
    recipe = json.loads((tmp_path / "o" / "indexcache_recipe.json").read_text())
    assert recipe["source"]["id"] == "tester/base" and recipe["source"]["revision"] == done["revision"]
    assert not (tmp_path / "o" / ".indexcache_download").exists()
    assert "base_model" in (tmp_path / "o" / "README.md").read_text()


def test_resharding_from_the_hub_fetches_each_shard_once(tmp_path, hub, run_python, base):
    for name, options in (
        ("big", {"max_shard_size": 10**9}),
        ("small", {"max_shard_size": 30_000, "dtype": "bfloat16"}),
    ):
        hub.requests.clear()
        converted(run_python, hub, tmp_path / name, pattern="FSFS", **options)
        converted(run_python, hub, tmp_path / f"local-{name}", source=str(base), pattern="FSFS", **options)
        assert weights(tmp_path / name) == weights(tmp_path / f"local-{name}")
        heads = [
            request for request in hub.requests if request.startswith("HEAD") and request.endswith(".safetensors")
        ]
        assert len(heads) == len(set(heads)) == 4, "every shard is downloaded once"


def test_a_plan_reads_headers_alone(tmp_path, hub, run_python, base):
    script = """
from indexcache.cli import app
options = ["--keep", "1/4", "--dry-run", "--revision", "v1", "--json"]
sys.argv = ["indexcache", "convert", "tester/base", sys.argv[1], *options]
app()
"""
    plan = json.loads(run_python(script, tmp_path / "o", installed=True, hub=hub).stdout)
    assert plan["pattern"] == "FSSS" and plan["dropped"] > 0
    assert not any(request.startswith("HEAD") and ".safetensors" in request for request in hub.requests)
    assert not (tmp_path / "o").exists()


def test_an_interrupted_download_is_resumed(tmp_path, hub, run_python, base):
    stopped = converted(run_python, hub, tmp_path / "o", pattern="FSFF", stop="model-00002-of-00004.safetensors")
    assert stopped == "stopped" and not (tmp_path / "o" / "config.json").exists()
    hub.requests.clear()
    done = converted(run_python, hub, tmp_path / "o", pattern="FSFF", resume=True)
    assert list(done["how"].values())[:2] == ["kept", "kept"]
    assert not any("HEAD" in request and "00001-of" in request for request in hub.requests), "it was fetched again"
    converted(run_python, hub, tmp_path / "whole", pattern="FSFF")
    assert hashes(tmp_path / "o") == hashes(tmp_path / "whole")


def test_a_newer_commit_is_not_mixed_in(tmp_path, hub, run_python, base):
    converted(run_python, hub, tmp_path / "o", pattern="FSFF", stop="model-00001-of-00004.safetensors")
    other = build(tmp_path / "other", fp8=True, shards=4, mtp=1, seed=9)
    run_python(UPLOAD, other, installed=True, hub=hub)
    failed = run_python(
        CONVERT, "tester/base", tmp_path / "o", json.dumps({"pattern": "FSFF", "resume": True}),
        installed=True, hub=hub, check=False,
    )  # fmt: skip
    assert failed.returncode == 1 and "holds another conversion that was interrupted" in failed.stderr
    done = converted(run_python, hub, tmp_path / "o", pattern="FSFF", resume=True, revision="v1")
    assert "kept" in done["how"].values()


@pytest.mark.parametrize("source, revision, message", [
    ("tester/absent", None, "neither a folder here nor a repository on the Hub"),
    ("tester/base", "v9", "has no revision 'v9'"),
])  # fmt: skip
def test_what_is_not_there(tmp_path, hub, run_python, base, source, revision, message):
    script = """
from indexcache.cli import app
sys.argv = ["indexcache", "convert", *sys.argv[1:], "--keep", "1/4"]
app()
"""
    arguments = [source, tmp_path / "o", *(["--revision", revision] if revision else [])]
    failed = run_python(script, *arguments, installed=True, hub=hub, check=False)
    assert failed.returncode == 1 and message in failed.stderr and "Traceback" not in failed.stderr


def test_no_connection_is_a_message(tmp_path, run_python):
    script = "from indexcache.cli import app\nsys.argv = ['indexcache', 'inspect', 'tester/base']\napp()"
    failed = run_python(script, installed=True, check=False, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")
    assert failed.returncode == 1 and "Hub repository tester/base cannot be reached" in failed.stderr


def test_verify_and_inspect_read_the_hub(tmp_path, hub, run_python, base):
    converted(run_python, hub, tmp_path / "o", pattern="FSFS")
    script = "from indexcache.cli import app\nsys.argv = ['indexcache', *sys.argv[1:]]\napp()"
    checked = run_python(script, "verify", "tester/base", tmp_path / "o", "--json", installed=True, hub=hub)
    found = json.loads(checked.stdout)
    assert found["ok"] and found["logits"]["compared"] is False
    shown = run_python(script, "inspect", "tester/base", "--json", installed=True, hub=hub)
    assert json.loads(shown.stdout)["pattern"] == "FFFF"
