"""The Hub's own client against a Hub on loopback: `hf upload`, `hf download`, loading by id."""

import pytest
from ecosystem.ways import BEGIN, REMOTE

LOAD = f"""
{BEGIN}
from transformers import AutoModelForCausalLM, AutoTokenizer
options = dict(revision=sys.argv[1], trust_remote_code={REMOTE})
model = AutoModelForCausalLM.from_pretrained("tester/dsa", **options)
tokenizer = AutoTokenizer.from_pretrained("tester/dsa", revision=sys.argv[1], trust_remote_code=False)
ids = tokenizer("Return the", return_tensors="pt").input_ids
print(type(model).__module__.partition(".")[0], model.generate(ids, max_new_tokens=3, min_new_tokens=3).shape[1])
"""


@pytest.mark.row("hf", "`hf upload`, `hf download`", package="huggingface_hub")
def test_upload_and_download(checkpoint, run_tool, hub, tmp_path):
    run_tool("huggingface_hub.cli.hf", "upload", "tester/dsa", checkpoint, ".", hub=hub)
    names = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert names <= set(hub.tree("tester/dsa"))
    run_tool("huggingface_hub.cli.hf", "download", "tester/dsa", "--local-dir", tmp_path / "here", hub=hub)
    for name in names:
        assert (tmp_path / "here" / name).read_bytes() == (checkpoint / name).read_bytes()


@pytest.mark.row("transformers", "loaded by a Hub id and a pinned commit", package="transformers")
def test_load_by_id(checkpoint, hub, tmp_path):
    import sys

    from ecosystem.conftest import run

    commit = hub.put(checkpoint, "tester/dsa")
    finished = run(
        [sys.executable, "-c", LOAD, commit],
        tmp_path,
        HF_ENDPOINT=hub.url,
        HF_HUB_OFFLINE="0",
        HF_HOME=str(tmp_path / "hf_home"),
        HF_HUB_DISABLE_XET="1",
    )
    package, length = finished.stdout.split()
    assert package == ("transformers_modules" if REMOTE else "indexcache") and int(length) > 3


@pytest.mark.row("transformers", "`push_to_hub` of a loaded model", package="transformers")
def test_push_to_hub(load, hub_here):
    load().push_to_hub("tester/pushed", token="any")
    files = set(hub_here.tree("tester/pushed"))
    assert {"config.json", "modeling_indexcache.py", "configuration_indexcache.py"} <= files
    assert any(name.endswith(".safetensors") for name in files)
