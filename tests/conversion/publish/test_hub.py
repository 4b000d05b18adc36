"""Push and pull through a Hub double: what is sent, what arrives, and what a failure says."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from testing.tiny_models import tiny_model

import indexcache
from indexcache import SharePattern
from indexcache.conversion.io.sources import ConversionError
from indexcache.conversion.publish.card import write_card
from indexcache.conversion.publish.hub import check_complete, push_folder

DEMO = Path(indexcache.__file__).parent / "demo" / "dsa_demo"
PATTERN = SharePattern("FSFS")

PUSH = """
from indexcache.conversion.publish.hub import push_folder
print(push_folder(sys.argv[1], "tester/small", private=True, commit_message="First"))
"""

PULL_AND_GENERATE = """
import json, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
repo, options = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True, **options)
tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=True, **options)
inputs = tokenizer("The class", return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
save_file({name: value.contiguous() for name, value in model.state_dict().items()}, sys.argv[3])
print(json.dumps(tokens[0].tolist()))
"""

PULL_AND_PUSH = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
model.push_to_hub(sys.argv[2], private=True, max_shard_size="40KB")
"""

PUSH_BY_TRANSFORMERS = """
from indexcache import IndexCacheForCausalLM
model = IndexCacheForCausalLM.from_pretrained(sys.argv[1])
model.push_to_hub("tester/small")
model.save_pretrained("saved", push_to_hub=True, repo_id="tester/saved")
"""


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=4096, index_share_pattern=str(PATTERN), eos_token_id=0)


@pytest.fixture
def checkpoint(model, tmp_path):
    """A sharded checkpoint with tokenizer and card, as a conversion leaves it."""
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder, max_shard_size="200KB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / file, folder)
    source_card = (DEMO / "README.md").read_text()
    write_card(folder, source_card=source_card, source_id="lab/base", pattern=PATTERN, recipe={"made": "by hand"})
    return folder


@pytest.fixture
def push(hub_here):
    """`push_folder`, to the double."""
    return push_folder


def tree(hub, name="tester/small", revision="main"):
    repo = hub.repos["model", name]
    return repo.commits[repo.refs[revision]]


def test_pushed_checkpoint_is_complete_tagged_and_private(checkpoint, run_python, hub):
    commit = run_python(PUSH, checkpoint, installed=True, hub=hub).stdout.strip()
    repo = hub.repos["model", "tester/small"]
    assert repo.private
    assert commit == f"{hub.url}/tester/small/commit/{repo.refs['main']}"
    assert repo.log[-1]["title"] == "First"
    assert "Bearer any" in hub.tokens

    files = tree(hub)
    shards = sorted(checkpoint.glob("*.safetensors"))
    assert len(shards) > 1
    for path in checkpoint.iterdir():
        assert files[path.name].data == path.read_bytes(), path.name
    assert all(files[path.name].lfs for path in shards)
    card = files["README.md"].data.decode()
    assert "- index-cache" in card
    assert "base_model: lab/base" in card


def test_pulled_model_is_bit_equal_and_generates_without_the_package(
    checkpoint, push, hub, model, run_python, tmp_path
):
    push(checkpoint, "tester/small")
    here = model.generate(torch.tensor([_ids("The class")]), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    process = run_python(PULL_AND_GENERATE, "tester/small", "{}", tmp_path / "pulled.safetensors", hub=hub)
    assert json.loads(process.stdout.splitlines()[-1]) == here[0].tolist()
    pulled, own = load_file(tmp_path / "pulled.safetensors"), model.state_dict()
    assert pulled.keys() == own.keys()
    assert all(torch.equal(pulled[name], own[name]) for name in own)

    # From there it is pushed again, code and all, and the second repository stands on its own.
    run_python(PULL_AND_PUSH, "tester/small", "tester/again", hub=hub)
    repo = hub.repos["model", "tester/again"]
    assert repo.private
    code = {name: file.data for name, file in tree(hub).items() if name.endswith(".py")}
    files = repo.commits[repo.refs["main"]]
    assert {name: file.data for name, file in files.items() if name.endswith(".py")} == code
    assert "--" not in str(json.loads(files["config.json"].data)["auto_map"])


def _ids(text):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO)(text)["input_ids"]


def test_a_revision_is_a_branch_of_its_own(checkpoint, push, hub, run_python, tmp_path):
    push(checkpoint, "tester/small", revision="quarter")
    assert "config.json" not in tree(hub)
    assert "config.json" in tree(hub, revision="quarter")
    options = json.dumps({"revision": "quarter"})
    run_python(PULL_AND_GENERATE, "tester/small", options, tmp_path / "pulled.safetensors", hub=hub)


def test_a_pull_request_changes_no_branch(checkpoint, push, hub):
    push(checkpoint, "tester/small")
    before = hub.tree("tester/small")
    (checkpoint / "LICENSE").write_text("MIT\n")
    url = push(checkpoint, "tester/small", create_pr=True)
    assert url == f"{hub.url}/tester/small/discussions/1"
    assert hub.tree("tester/small") == before
    assert hub.tree("tester/small", "refs/pr/1")["LICENSE"] == b"MIT\n"


def test_a_pull_request_makes_no_repository(checkpoint, push, hub):
    with pytest.raises(ConversionError, match="tester/absent"):
        push(checkpoint, "tester/absent", create_pr=True)
    assert not hub.repos


def test_a_failed_upload_is_taken_up_where_it_stopped(checkpoint, push, hub):
    hub.fail("PUT", r"/_lfs/", skip=1)
    with pytest.raises(ConversionError, match="push again; what has arrived is not sent twice"):
        push(checkpoint, "tester/small")
    assert hub.stored
    assert "config.json" not in tree(hub), "a half-sent checkpoint must not be loadable"

    push(checkpoint, "tester/small")
    assert len(hub.stored) == len(set(hub.stored)) == len(list(checkpoint.glob("*.safetensors")))
    assert set(tree(hub)) >= {path.name for path in checkpoint.iterdir()}


def test_pushing_twice_sends_no_weights_again(checkpoint, push, hub):
    push(checkpoint, "tester/small")
    sent = list(hub.stored)
    push(checkpoint, "tester/small")
    assert hub.stored == sent


def test_transformers_own_ways_of_pushing_send_the_code(checkpoint, hub, run_python):
    run_python(PUSH_BY_TRANSFORMERS, checkpoint, installed=True, hub=hub)
    code = {path.name: path.read_bytes() for path in checkpoint.glob("*.py")}
    assert code
    for name in ("tester/small", "tester/saved"):
        assert {file: entry.data for file, entry in tree(hub, name).items() if file.endswith(".py")} == code


class TestRefusals:
    """Each names its mend."""

    def test_no_token(self, checkpoint, push, hub, monkeypatch):
        monkeypatch.setattr("indexcache.conversion.publish.hub.get_token", lambda: None)
        with pytest.raises(ConversionError, match=r"no Hub token .* `hf auth login`, set HF_TOKEN"):
            push(checkpoint, "tester/small")
        assert hub.requests == []

    def test_token_that_the_hub_does_not_know(self, checkpoint, push, hub):
        hub.fail("POST", "/api/repos/create", status=401)
        with pytest.raises(ConversionError, match="does not accept the token for tester/small: log in again"):
            push(checkpoint, "tester/small")

    def test_namespace_of_others(self, checkpoint, push, hub):
        hub.members_only.add("closed")
        with pytest.raises(ConversionError, match="may not write to closed/small: use one with write access"):
            push(checkpoint, "closed/small")

    def test_card_that_the_hub_refuses(self, checkpoint, push, hub):
        hub.answer("POST", "/api/validate-yaml", status=400, body={"errors": [{"message": '"license" is wrong'}]})
        with pytest.raises(ConversionError, match=r'README\.md: fix the metadata(.|\n)*"license" is wrong'):
            push(checkpoint, "tester/small")
        assert "config.json" not in tree(hub)

    def test_a_card_that_is_no_text(self, checkpoint, push, hub):
        with open(checkpoint / "README.md", "ab") as card:
            card.write(b"\x80")
        with pytest.raises(ConversionError, match=r"README\.md is no UTF-8 text"):
            push(checkpoint, "tester/small")
        assert hub.requests == []

    @pytest.mark.parametrize("path", ["/api/repos/create", "/api/validate-yaml", "/preupload/", "/commit/"])
    def test_a_proxy_that_answers_in_the_hub_s_place(self, checkpoint, push, hub, path):
        page = b"<!doctype html><title>Sign in</title>"
        hub.answer("POST", path, status=200, body=page, content_type="text/html", times=99)
        with pytest.raises(ConversionError, match="answers as no Hub does"):
            push(checkpoint, "tester/small")

    def test_no_network(self, checkpoint, push, monkeypatch):
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(ConversionError, match=r"127\.0\.0\.1:9 cannot be reached: check the network, HF_ENDPOINT"):
            push(checkpoint, "tester/small")

    def test_no_id(self, checkpoint, push):
        with pytest.raises(ConversionError, match="'a/b/c' is no Hub id"):
            push(checkpoint, "a/b/c")

    def test_private_into_a_public_repository(self, checkpoint, push, hub):
        push(checkpoint, "tester/small", private=False)
        commits = len(hub.repos["model", "tester/small"].commits)
        with pytest.raises(ConversionError, match="exists and is public: make it private"):
            push(checkpoint, "tester/small", private=True)
        assert len(hub.repos["model", "tester/small"].commits) == commits


class TestCompleteness:
    """Nothing half-written leaves the machine."""

    def test_a_finished_checkpoint_passes(self, checkpoint):
        check_complete(checkpoint)

    @pytest.mark.parametrize(
        ("spoil", "complaint"),
        [
            (lambda folder: (folder / "model-00009.safetensors.partial").touch(), r"unfinished(.|\n)*00009.*partial"),
            (lambda folder: (folder / ".indexcache_convert.json").touch(), "unfinished: finish it with"),
            (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
            (lambda folder: _first_shard(folder).unlink(), "shards that are not there"),
            (lambda folder: _truncate(_first_shard(folder)), "truncated"),
            (lambda folder: (folder / "model.safetensors.index.json").unlink(), "no model.safetensors.index.json"),
            (lambda folder: (folder / "modeling_indexcache.py").unlink(), r"lacks code(.|\n)*modeling_indexcache\.py"),
            (lambda folder: (folder / "share_pattern.py").unlink(), r"lacks code(.|\n)*share_pattern\.py"),
        ],
    )
    def test_what_is_missing_is_named(self, checkpoint, spoil, complaint):
        spoil(checkpoint)
        with pytest.raises(ConversionError, match=complaint):
            check_complete(checkpoint)

    @pytest.mark.parametrize(
        ("field", "value"), [("hidden_size", 96), ("num_attention_heads", "4"), ("num_hidden_layers", 9)]
    )
    def test_a_config_that_the_weights_contradict_is_not_sent(self, checkpoint, field, value):
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps({**config, field: value}))
        with pytest.raises(ConversionError, match=f"{field}|layers"):
            check_complete(checkpoint)

    def test_nothing_is_sent_of_it(self, checkpoint, push, hub):
        _truncate(_first_shard(checkpoint))
        with pytest.raises(ConversionError, match="truncated"):
            push(checkpoint, "tester/small")
        assert hub.requests == []


def _first_shard(folder):
    return min(folder.glob("*.safetensors"))


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-1])
