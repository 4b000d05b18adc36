"""No forward swallows an option that it does not know, or decodes without the history that it was promised."""

import pytest
import torch
from testing.tiny_models import tiny_model
from transformers import DynamicCache

IDS = torch.arange(2, 22)[None]


@pytest.fixture(scope="module")
def model():
    return tiny_model(index_share_pattern="FSFS")


@pytest.mark.parametrize(
    ("option", "near"),
    [
        ("past_key_value", "past_key_values"),  # what a release before 4.36 called it
        ("caches", "cache"),
        ("attention_masks", "attention_mask"),
        ("label", "labels"),
        ("output_topk_indexes", "output_topk_indices"),
        ("cache_position", "position_ids"),
    ],
)
def test_an_unknown_option_raises_and_names_the_nearest(model, option, near):
    with pytest.raises(TypeError, match=f"unexpected argument '{option}': did you mean '{near}'"):
        model(IDS, **{option: DynamicCache(config=model.config)})


def test_the_decoder_alone_refuses_too_and_a_far_name_lists_the_known_ones(model):
    with pytest.raises(TypeError, match="unexpected argument 'zzz': known are attention_mask, cache,"):
        model.model(IDS, zzz=1)


def test_none_and_what_transformers_passes_to_any_model_are_taken(model):
    mask = torch.ones_like(IDS)
    out = model(IDS, zzz=None, token_type_ids=0 * mask, num_items_in_batch=None, is_causal=True, return_dict=True)
    assert torch.equal(out.logits, model(IDS).logits)


def test_attention_that_is_not_causal_is_refused(model):
    with pytest.raises(ValueError, match="is_causal=False"):
        model(IDS, is_causal=False)


def test_two_caches_under_the_two_names_are_refused_and_one_is_taken(model):
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(IDS, cache=cache, past_key_values=DynamicCache(config=model.config))
    assert model(IDS, cache=cache, past_key_values=cache).cache is cache


def test_a_step_whose_positions_lie_behind_0_needs_its_history(model):
    with pytest.raises(ValueError, match=r"position_ids begin at 20 and there is no cache"):
        model(IDS[:, :1], position_ids=torch.tensor([[20]]))
    with pytest.raises(ValueError, match=r"position_ids begin at 5"):
        model(IDS.repeat(2, 1), position_ids=torch.stack((torch.arange(20), torch.arange(5, 25))))


def test_left_padding_may_have_any_position(model):
    mask = torch.ones_like(IDS)
    mask[:, :3] = 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    padded = model(IDS, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 3:]
    assert torch.allclose(padded, model(IDS[:, 3:]).logits, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_mask_longer_than_cache_and_tokens_together_is_refused(model, tokens):
    with pytest.raises(ValueError, match=rf"covers 20 tokens; the cache holds 0, {tokens} are given: pass the cache"):
        model(IDS[:, :tokens], attention_mask=torch.ones_like(IDS))


def test_a_mask_of_the_new_tokens_alone_is_refused(model):
    cache = model(IDS, use_cache=True).cache
    with pytest.raises(ValueError, match="covers 1 tokens; the cache holds 20, 1 are given: it must cover earlier"):
        model(IDS[:, :1], attention_mask=torch.ones(1, 1), cache=cache)
