"""Documents packed into one sequence do not see each other, however the packing is told."""

import pytest
import torch
from testing.tiny_models import tiny_model

LENGTHS = (23, 1, 31, 9)
DOCUMENTS = [torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(length)) for length in LENGTHS]
PACKED = torch.cat(DOCUMENTS)[None]
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
STARTS = torch.tensor([0, 23, 24, 55, 64], dtype=torch.int32)


def one_by_one(model):
    return torch.cat([model(document[None], use_cache=False).logits for document in DOCUMENTS], dim=1)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("told_by", ["position_ids", "cu_seq_lens"])
def test_packed_documents_are_as_they_are_alone(backend, told_by):
    model = tiny_model(index_share_pattern="FSFS")
    model.config._attn_implementation = backend
    extra = {} if told_by == "position_ids" else {"cu_seq_lens_q": STARTS, "cu_seq_lens_k": STARTS}
    with torch.no_grad():
        found = model(PACKED, position_ids=POSITIONS, **extra).logits
        torch.testing.assert_close(found, one_by_one(model), rtol=1e-4, atol=1e-4)


def test_every_row_of_a_batch_has_its_own_documents():
    model = tiny_model(index_share_pattern="FSFS")
    ids = torch.cat((PACKED, PACKED.flip(1)))
    positions = torch.cat((POSITIONS, torch.arange(64)[None]))
    with torch.no_grad():
        found = model(ids, position_ids=positions).logits
        torch.testing.assert_close(found[:1], one_by_one(model), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[1:], model(ids[1:]).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_divergences_of_packed_documents_are_means_of_their_own(stage):
    model = tiny_model(index_share_pattern="FSFS").train()
    with torch.no_grad():
        found = model(PACKED, position_ids=POSITIONS, indexer_training=stage).indexer_kl
        alone = [model(document[None], indexer_training=stage).indexer_kl for document in DOCUMENTS]
    expected = sum(kl * length for kl, length in zip(alone, LENGTHS)) / sum(LENGTHS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_positions_under_a_mask_or_with_a_cache_pack_nothing():
    model = tiny_model(index_share_pattern="FSFS")
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ids = PACKED[:, :20]
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, position_ids=positions).logits[:, 4:]
        torch.testing.assert_close(padded, model(ids[:, 4:]).logits, rtol=1e-4, atol=1e-4)
        cache = model(ids[:, :12], use_cache=True).past_key_values
        step = model(ids[:, 12:], position_ids=torch.arange(12, 20)[None], past_key_values=cache).logits
        torch.testing.assert_close(step, model(ids).logits[:, 12:], rtol=1e-4, atol=1e-4)


def test_one_row_of_lengths_for_several_rows_is_refused():
    model = tiny_model(index_share_pattern="FSFS")
    with pytest.raises(ValueError, match="this batch has 2"):
        model(PACKED.repeat(2, 1), cu_seq_lens_q=STARTS)
