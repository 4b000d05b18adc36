import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GlmMoeDsaConfig

from indexcache import SharePattern
from indexcache.configuration.share_pattern import count_to_keep

patterns = st.lists(st.sampled_from("FS"), max_size=80).map(lambda letters: "F" + "".join(letters))


@given(patterns)
def test_every_spelling_reads_back_the_same(letters):
    pattern = SharePattern(letters)
    assert SharePattern.parse(pattern.indexer_types, len(letters)) == pattern
    assert SharePattern.parse(list(letters)) == pattern
    assert SharePattern.parse(pattern.engine_fields()["index_topk_pattern"]) == pattern


@given(patterns)
def test_groups_cover_every_layer_once_and_follow_the_nearest_full_layer(letters):
    pattern = SharePattern(letters)
    served = [layer for layers in pattern.groups.values() for layer in layers]
    assert served == list(range(len(letters)))
    for layer in range(len(letters)):
        source = pattern.source_of(layer)
        assert pattern.is_full(source)
        assert "F" not in letters[source + 1 : layer + 1]
    assert pattern.num_full == len(pattern.full_layers) == len(letters) - len(pattern.shared_layers)


@given(st.integers(1, 90), st.integers(1, 9), st.integers(0, 9))
def test_frequency_means_what_transformers_means(num_layers, freq, offset):
    theirs = GlmMoeDsaConfig(
        num_hidden_layers=num_layers, index_topk_freq=freq, index_skip_topk_offset=offset
    ).indexer_types
    if theirs[0] == "shared":  # offset 0 and freq > 1: transformers finds out at the first forward
        with pytest.raises(ValueError, match="must start with 'F'"):
            SharePattern.from_frequency(num_layers, freq, offset)
    else:
        assert SharePattern.from_frequency(num_layers, freq, offset).indexer_types == theirs


def test_glm_5_2_release_schedule():
    assert SharePattern.from_frequency(78, 4, 3).full_layers == [0, 1, 2, *range(6, 78, 4)]


@given(st.integers(1, 90), st.data())
def test_uniform_keeps_the_count_and_spaces_evenly(num_layers, data):
    keep = data.draw(st.integers(1, num_layers))
    pattern = SharePattern.uniform(num_layers, keep)
    sizes = [len(layers) for layers in pattern.groups.values()]
    assert pattern.num_full == keep
    assert max(sizes) - min(sizes) <= 1


def test_uniform_quarter_is_the_papers():
    assert SharePattern.uniform(16, "1/4").letters == "FSSS" * 4
    assert SharePattern.uniform(47, "1/4").num_full == 12


@pytest.mark.parametrize(
    ("keep", "count"), [("1/4", 12), (0.25, 12), ("12", 12), (12, 12), (1, 1), ("1/1", 47), (1.0, 47), ("1/90", 1)]
)
def test_count_to_keep(keep, count):
    assert count_to_keep(47, keep) == count


@pytest.mark.parametrize("keep", [0, 48, -1, "0/4", "5/4", "a quarter", "1/0", 1.5, float("nan"), None])
def test_count_to_keep_refuses(keep):
    with pytest.raises(ValueError, match="keep"):
        count_to_keep(47, keep)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("SFFF", "must start with 'F': layer 0 has no earlier full layer .*got 'SFFF'"),
        ("FSXS", "layer 2 has 'X'"),
        ("Fsss", "layer 1 has 's'"),
        ("", "is empty"),
        ("FSS", "has 3 characters for num_hidden_layers=4"),
        (["full", "half", "full", "full"], "layer 1 has 'half'"),
        (7, "must be a string such as 'FSSS'"),
    ],
)
def test_a_wrong_pattern_says_what_is_wrong(value, message):
    with pytest.raises(ValueError, match=message):
        SharePattern.parse(value, 4)
