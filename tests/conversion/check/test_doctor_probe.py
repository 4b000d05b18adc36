"""`inspect --check --probe` finds what headers cannot show, on the trained demo and damaged copies of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from testing.checkpoints import build, edit_json, edit_shard

from indexcache.conversion.check.doctor import diagnose
from indexcache.conversion.io.sources import ConversionError, FolderSource

DEMO = Path(__file__).parents[3] / "demo" / "dsa_demo"
CONFIG = json.loads((DEMO / "config.json").read_text())
ROPE = CONFIG["qk_rope_head_dim"]


def probe(folder):
    return diagnose(FolderSource(folder), ["indexcache"], probe=True)


@pytest.fixture
def damaged(tmp_path):
    """A copy of the demo whose tensors `change(name, tensor)` gives new values."""

    def make(change):
        folder = tmp_path / "demo"
        shutil.copytree(DEMO, folder)
        for shard in folder.glob("*.safetensors"):

            def edit(tensors):
                for name in tensors:
                    tensors[name] = change(name, tensors[name]).contiguous()

            edit_shard(shard, edit)
        return folder

    return make


def reordered(rows, first, to_interleaved):
    """`[heads, width, ...]` with the rope entries from `first` on in the other layout."""
    half = ROPE // 2
    order = torch.arange(ROPE).view(2, half).T if to_interleaved else torch.arange(ROPE).view(half, 2).T
    rows = rows.clone()
    rows[:, first : first + ROPE] = rows[:, first : first + ROPE][:, order.reshape(-1)]
    return rows


def swap_main(name, tensor):
    if name.endswith("q_b_proj.weight"):
        heads = tensor.view(CONFIG["num_attention_heads"], -1, tensor.shape[1])
        return reordered(heads, CONFIG["qk_nope_head_dim"], False).view_as(tensor)
    if name.endswith("kv_a_proj_with_mqa.weight"):
        return reordered(tensor[None], CONFIG["kv_lora_rank"], False)[0]
    return tensor


def swap_indexers(name, tensor):
    if name.endswith("indexer.wq_b.weight"):
        heads = tensor.view(CONFIG["index_n_heads"], -1, tensor.shape[1])
        return reordered(heads, 0, True).view_as(tensor)
    if ".indexer.wk." in name or ".indexer.k_norm." in name:
        return reordered(tensor[None], 0, True)[0]
    return tensor


def shuffle_indexers(name, tensor):
    """Trained by every statistic, and of no use."""
    if ".indexer.w" in name:
        return tensor.view(-1)[torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(1))].view_as(
            tensor
        )
    return tensor


def errors(diagnosis):
    return [found.code for found in diagnosis.findings if found.severity == "error"]


def test_a_sound_model(tmp_path):
    found = probe(DEMO)
    losses = found.probe["losses"]
    assert found.findings == [] and found.probe["index_topk"] == CONFIG["index_topk"]
    assert losses["dense"] < losses["sparse"] < losses["random_selection"]
    assert "index_topk_lowered_from" not in found.probe


def test_halves_of_the_main_attention_swapped(damaged):
    found = probe(damaged(swap_main))
    assert errors(found) == ["main_rope_halves"]
    # The swapped weights are the same model in the other layout.
    assert found.probe["losses"]["dense_other_main_layout"] < found.probe["losses"]["dense"] - 1


def test_halves_of_the_indexers_swapped(damaged):
    assert errors(probe(damaged(swap_indexers))) == ["indexer_rope_halves"]


def test_indexers_that_choose_by_chance(damaged):
    assert "selection_by_chance" in errors(probe(damaged(shuffle_indexers)))


def test_a_layout_flag_that_is_wrong_is_told_by_both(tmp_path):
    folder = tmp_path / "demo"
    shutil.copytree(DEMO, folder)
    edit_json(folder / "config.json", indexer_rope_interleave=True)
    assert errors(probe(folder)) == ["indexer_rope_layout", "indexer_rope_halves"]


def test_top_k_is_lowered_where_the_text_is_shorter_and_said_so(tmp_path):
    folder = tmp_path / "demo"
    shutil.copytree(DEMO, folder)
    edit_json(folder / "config.json", index_topk=2048, max_position_embeddings=256)
    found = probe(folder)
    assert found.probe["index_topk"] == 64 and found.probe["index_topk_lowered_from"] == 2048
    assert found.probe["tokens"] == 2 * (255 - 64)


def test_a_checkpoint_without_a_usable_tokenizer_or_not_whole(tmp_path):
    folder = build(tmp_path, family="deepseek_v32")
    with pytest.raises(ConversionError, match="cannot be read"):
        probe(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConversionError, match="the probe needs it"):
        probe(folder)
    edit_json(folder / "config.json", hidden_size=64)
    found = probe(folder)
    assert "not_whole" in errors(found) and "has shape" in found.probe["not_run"]
