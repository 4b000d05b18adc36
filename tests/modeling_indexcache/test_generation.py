"""generate() in all its ways gives what a plain forward gives."""

from pathlib import Path

import pytest
import torch
from testing import generation_ways
from testing.generation_ways import NEW, check_every_way, loop_without_cache
from testing.tiny_models import tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig, pipeline

PATTERN = "FSFS"


@pytest.fixture(scope="module")
def model():
    return tiny_model(index_share_pattern=PATTERN, index_n_heads=16)


@pytest.fixture(scope="module")
def ids():
    torch.manual_seed(3)
    return torch.randint(2, 96, (2, 30))


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_every_way_gives_what_a_loop_without_cache_gives(model, ids, backend):
    model.set_attn_implementation(backend)
    try:
        check_every_way(model, ids)
    finally:
        model.set_attn_implementation("sdpa")


REMOTE = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, attn_implementation="sdpa").eval()
assert type(model).__module__.startswith("transformers_modules."), type(model)
print(check_every_way(model, torch.load(sys.argv[2])).tolist())
"""


def test_remote_code_gives_the_same_in_every_way(model, ids, tmp_path, run_python):
    model.save_pretrained(tmp_path / "model")
    torch.save(ids, tmp_path / "ids.pt")
    source = Path(generation_ways.__file__).read_text()
    process = run_python(source + REMOTE, tmp_path / "model", tmp_path / "ids.pt")
    assert process.stdout.splitlines()[-1] == str(loop_without_cache(model, ids).tolist())


def test_compiled_static_decoding_is_the_same_and_one_graph(model, ids):
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    from transformers import StaticCache

    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=30 + NEW)
        logits = model(ids, past_key_values=cache).logits[:, -1]
        tokens = ids
        for position in range(30, 30 + NEW):
            token = logits.argmax(-1, keepdim=True)
            tokens = torch.cat((tokens, token), dim=1)
            positions = torch.full((2, 1), position)
            logits = step(token, past_key_values=cache, position_ids=positions, use_cache=True).logits[:, -1]
    assert torch.equal(tokens, loop_without_cache(model, ids))


def test_pipeline_generates(model, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {f"w{i}": i for i in range(97)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w1", eos_token="w96")
    model.save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    generate = pipeline("text-generation", model=loaded, tokenizer=fast)
    config = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=1)
    text = generate("w5 w6 w7 w8", generation_config=config)[0]["generated_text"]
    assert text.startswith("w5 w6 w7 w8")
    assert text.count("w") == 8


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_early_exit_drafts_with_the_first_layers_and_changes_nothing(model, ids, layers):
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=1)
    expected = model.generate(ids[:1], **options)
    assert torch.equal(model.generate(ids[:1], **options, assistant_early_exit=layers), expected)
    assert model.config.num_hidden_layers == 4
    assert torch.equal(model.generate(ids[:1], **options), expected)


def test_as_many_layers_run_as_the_config_says(model, ids, monkeypatch):
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states[2]
        monkeypatch.setattr(model.config, "num_hidden_layers", 2)
        torch.testing.assert_close(model.model(ids).last_hidden_state, model.model.norm(expected))
