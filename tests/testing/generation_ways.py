"""Every way of generate() against loops without a cache; needs transformers alone, so remote code runs it, too."""

import torch
from transformers import DynamicCache, StaticCache

NEW = 10


def greedy(model, ids, **options):
    return model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=1, **options)


@torch.no_grad()
def loop_without_cache(model, ids):
    for _ in range(NEW):
        logits = model(ids, use_cache=False).logits[:, -1]
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
    return ids


@torch.no_grad()
def loop_with_cache(model, ids, cache, name):
    """Greedy by hand, the cache passed under `name` and taken from the output under both names."""
    given = ids
    for _ in range(NEW):
        out = model(given, use_cache=True, logits_to_keep=1, **{name: cache})
        assert out.cache is out.past_key_values is out[name] is cache
        given = out.logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat((ids, given), dim=1)
    return ids


def sampled(model, ids, **options):
    torch.manual_seed(5)
    options = {"top_p": 0.9, "eos_token_id": None, "pad_token_id": 1, **options}
    return model.generate(ids, max_new_tokens=NEW, do_sample=True, **options)


def check_every_way(model, ids):
    """`ids [2, S]` beyond top-k. Raises AssertionError naming the way that gives other tokens."""
    plain = loop_without_cache(model, ids)
    length = ids.shape[1] + NEW
    ways = {
        "dynamic": {},
        "static": {"cache_implementation": "static"},
        "offloaded": {"cache_implementation": "offloaded"},
        "offloaded static": {"cache_implementation": "offloaded_static"},
        "chunked prefill": {"prefill_chunk_size": 7},
        "chunked prefill, static": {"prefill_chunk_size": 7, "cache_implementation": "static"},
        "no cache": {"use_cache": False},
        "past_key_values": {"past_key_values": DynamicCache(config=model.config)},
    }
    if not torch.cuda.is_available():
        # transformers' offloaded caches move layers on CUDA streams.
        ways = {name: way for name, way in ways.items() if "offloaded" not in name}
    for name, options in ways.items():
        assert torch.equal(greedy(model, ids, **options), plain), name
    for name in ("cache", "past_key_values"):
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=length)):
            assert torch.equal(loop_with_cache(model, ids, cache, name), plain), (name, type(cache).__name__)

    for way in (greedy, sampled):
        for options in ({"num_beams": 3}, {"num_beams": 3, "cache_implementation": "static"}, {}):
            reference = way(model, ids, **{**options, "use_cache": False, "cache_implementation": None})
            assert torch.equal(way(model, ids, **options), reference), (way.__name__, options)

    one = ids[:1]
    assert torch.equal(greedy(model, one, assistant_model=model), plain[:1]), "assisted"
    repeating = one[:, :10].repeat(1, 3)
    looked_up = greedy(model, repeating, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up, loop_without_cache(model, repeating)), "prompt lookup"

    short = ids[1:, 6:]
    padded = torch.cat((ids[:1], torch.nn.functional.pad(short, (6, 0), value=1)))
    mask = torch.ones_like(padded)
    mask[1, :6] = 0
    for cache in ("dynamic", "static"):
        together = greedy(model, padded, attention_mask=mask, cache_implementation=cache)
        assert torch.equal(together[:1], plain[:1]), f"padded batch, {cache}: the long row"
        assert torch.equal(together[1:, 6:], loop_without_cache(model, short)), f"padded batch, {cache}"
    return plain
