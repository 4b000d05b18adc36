"""Decoding with and without recorded steps."""

import torch

from indexcache.modeling_indexcache.cache import decode_graph

PATTERN = "FSFS"


def greedy(model, ids, **kwargs):
    return model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=1, **kwargs)


def without_graphs(model, *args, **kwargs):
    model.model.decode_graphs = False
    try:
        return greedy(model, *args, **kwargs)
    finally:
        model.model.decode_graphs = True


def steps(model, cache, tokens):
    with torch.no_grad():
        return [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(tokens.shape[1])]


def is_recorded(cache):
    return isinstance(vars(cache).get("_indexcache_decode_graph"), decode_graph.DecodeGraph)
