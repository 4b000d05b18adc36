"""generate() in all its ways gives what a plain forward gives."""

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig, pipeline

PATTERN = "FSFS"


@pytest.fixture(scope="module")
def model():
    return tiny_model(index_share_pattern=PATTERN, index_n_heads=16)


@pytest.fixture(scope="module")
def ids():
    torch.manual_seed(3)
    return torch.randint(2, 96, (2, 30))


def greedy(model, ids, **kwargs):
    return model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=1, **kwargs)


@pytest.fixture(scope="module")
def by_hand(model, ids):
    """Greedy decoding without any cache."""
    tokens = ids
    with torch.no_grad():
        for _ in range(12):
            logits = model(tokens, use_cache=False).logits[:, -1]
            tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), dim=1)
    return tokens


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 7},
        {"prefill_chunk_size": 7, "cache_implementation": "static"},
        {"use_cache": False},
        {"num_beams": 1, "num_return_sequences": 1},
    ],
    ids=str,
)
def test_greedy_is_the_same_in_every_way(model, ids, by_hand, options):
    assert torch.equal(greedy(model, ids, **options), by_hand)


def test_prompt_lookup_decoding_is_the_same(model, ids):
    prompt = ids[:1, :10].repeat(1, 3)
    assert torch.equal(greedy(model, prompt, prompt_lookup_num_tokens=3), greedy(model, prompt))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_left_padding_changes_nothing(model, ids, cache):
    alone = greedy(model, ids[:1, 8:], cache_implementation=cache)[:, 22:]
    padded = torch.cat((ids[:1], torch.cat((torch.ones(1, 8, dtype=torch.long), ids[:1, 8:]), dim=1)))
    mask = torch.ones_like(padded)
    mask[1, :8] = 0
    together = greedy(model, padded, attention_mask=mask, cache_implementation=cache)[1:, 30:]
    assert torch.equal(together, alone)


def test_beam_search_and_sampling_run_and_beams_beat_greedy(model, ids):
    def log_likelihood(sequences):
        logits = model(sequences).logits[:, 29:-1].log_softmax(-1)
        return logits.gather(-1, sequences[:, 30:, None]).sum()

    with torch.no_grad():
        one = greedy(model, ids[:1])
        beams = greedy(model, ids[:1], num_beams=4)
        assert log_likelihood(beams) >= log_likelihood(one)
    torch.manual_seed(0)
    first = model.generate(ids, max_new_tokens=8, do_sample=True, top_p=0.9, eos_token_id=None)
    torch.manual_seed(0)
    assert torch.equal(first, model.generate(ids, max_new_tokens=8, do_sample=True, top_p=0.9, eos_token_id=None))


def test_compiled_static_decoding_is_the_same_and_one_graph(model, ids, by_hand):
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    from transformers import StaticCache

    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=42)
        logits = model(ids, past_key_values=cache).logits[:, -1]
        tokens = ids
        for position in range(30, 42):
            token = logits.argmax(-1, keepdim=True)
            tokens = torch.cat((tokens, token), dim=1)
            positions = torch.full((2, 1), position)
            logits = step(token, past_key_values=cache, position_ids=positions, use_cache=True).logits[:, -1]
    assert torch.equal(tokens, by_hand)


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
    expected = greedy(model, ids[:1])
    assert torch.equal(greedy(model, ids[:1], assistant_early_exit=layers), expected)
    assert model.config.num_hidden_layers == 4
    assert torch.equal(greedy(model, ids[:1]), expected)


def test_as_many_layers_run_as_the_config_says(model, ids, monkeypatch):
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states[2]
        monkeypatch.setattr(model.config, "num_hidden_layers", 2)
        torch.testing.assert_close(model.model(ids).last_hidden_state, model.model.norm(expected))
