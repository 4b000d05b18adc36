"""The card carries the base's licence and the recipe, and the Hub can read its metadata."""

import json
import re
import warnings

import pytest
from huggingface_hub import ModelCard

from indexcache.configuration.share_pattern import SharePattern
from indexcache.conversion.publish.card import draw_pattern, write_card

PATTERN = SharePattern("FFSSSSFFSSSS")
RECIPE = {"command": "indexcache convert base out --pattern FFSSSSFFSSSS", "versions": {"indexcache": "0.1.0"}}
BASE_CARD = """---
license: other
license_name: deepseek
license_link: LICENSE
language: [en, zh]
base_model: someone/grandparent
pipeline_tag: text-generation
tags: [dsa, chat]
metrics: [accuracy]
model-index:
- name: base
  results:
  - task: {type: text-generation}
    dataset: {type: ruler, name: RULER}
    metrics: [{type: accuracy, value: 0.9}]
---
# Base
"""


def card_of(tmp_path, **changes):
    arguments = {"source_card": BASE_CARD, "source_id": "lab/base", "pattern": PATTERN, "recipe": RECIPE}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = write_card(tmp_path, **(arguments | changes))
    return ModelCard.load(path)


def test_licence_and_language_are_inherited_and_results_are_not(tmp_path):
    data = card_of(tmp_path).data.to_dict()
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "deepseek", "LICENSE")
    assert data["language"] == ["en", "zh"]
    assert data["base_model"] == "lab/base"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["dsa", "chat", "sparse-attention", "index-cache", "custom_code"]
    assert "model-index" not in data
    assert "metrics" not in data


def test_body_draws_the_pattern_and_embeds_the_recipe_whole(tmp_path):
    text = card_of(tmp_path, topk=64, bytes_saved=123456).text
    assert "layer    0         10\npattern  FFSSSSFFSSSS" in text
    assert "| 1 | 2, 3, 4, 5 |" in text
    assert "| 0 | itself alone |" in text
    assert "123,456 bytes" in text
    assert json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1]) == RECIPE
    assert "trust_remote_code=True" in text
    assert "2603.12201" in text


def test_a_cast_is_told(tmp_path):
    assert "is the base model's." in card_of(tmp_path).text
    assert "is the base model's, cast to bfloat16." in card_of(tmp_path, recipe={"dtype": "bfloat16"}).text


def test_loading_example_is_python_and_names_the_repository(tmp_path):
    code = re.search(r"```python\n(.*?)```", card_of(tmp_path, repo_id="me/mine").text, re.DOTALL)[1]
    compile(code, "card", "exec")
    assert code.count('"me/mine"') == 2


def loading_example(card):
    return re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]


def test_only_a_tokenizer_with_code_of_its_own_is_loaded_with_trust(tmp_path):
    settings = tmp_path / "tokenizer_config.json"
    for auto_map, trusted in (
        (None, False),
        ({"AutoTokenizer": ["other/repo--tokenization_x.X", None]}, False),
        ({"AutoTokenizer": [None, "tokenization_x.X"]}, True),
    ):
        settings.write_text(json.dumps({} if auto_map is None else {"auto_map": auto_map}))
        tokenizer, model = (
            next(line for line in loading_example(card_of(tmp_path)).splitlines() if line.startswith(f"{name} ="))
            for name in ("tokenizer", "model")
        )
        assert ("trust_remote_code=True" in tokenizer) == trusted
        assert "trust_remote_code=True" in model


def test_the_base_is_linked_at_its_commit_where_that_is_known(tmp_path):
    commit = "ab" * 20
    text = card_of(tmp_path, recipe={"source": {"revision": commit}}).text
    assert text.count(f"(https://huggingface.co/lab/base/tree/{commit})") == 2
    for other in (None, "main", "None", commit[:-1]):
        text = card_of(tmp_path, recipe={"source": {"revision": other}}).text
        assert "(https://huggingface.co/lab/base)" in text
        assert "/tree/" not in text
    assert 'revision="<commit>"' in text


def test_same_arguments_same_bytes(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        card_of(tmp_path / folder)
    assert (tmp_path / "a/README.md").read_bytes() == (tmp_path / "b/README.md").read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["README.md"]


@pytest.mark.parametrize("card", [None, "# no metadata", "---\ntags: [dsa]\n---\n# no licence"])
def test_unknown_licence_is_said_and_warned_about(tmp_path, card):
    with pytest.warns(UserWarning, match=r"licence of lab/base is not known.*README\.md"):
        path = write_card(tmp_path, source_card=card, source_id="lab/base", pattern=PATTERN, recipe=RECIPE)
    card = ModelCard.load(path)
    assert (card.data.license, card.data.license_name) == ("other", "unknown")
    assert "license: unknown" in card.text


def test_unreadable_metadata_is_warned_about_and_dropped(tmp_path):
    with pytest.warns(UserWarning, match="licence of"), pytest.warns(UserWarning, match="cannot be read"):
        path = write_card(tmp_path, source_card="---\na: [\n---\n", source_id=None, pattern=PATTERN, recipe=RECIPE)
    data = ModelCard.load(path).data.to_dict()
    assert "base_model" not in data


def test_measurements_stand_in_a_table_only_when_given(tmp_path):
    assert "## Measured" not in card_of(tmp_path).text
    rows = [{"pattern": "all F", "loss": 1.843}, {"pattern": "FFSS", "loss": 1.886}]
    text = card_of(tmp_path, measured=rows).text
    assert "| pattern | loss |\n| --- | --- |\n| all F | 1.843 |\n| FFSS | 1.886 |" in text
    with pytest.raises(ValueError, match="share their columns"):
        card_of(tmp_path, measured=[{"a": 1}, {"b": 2}])


def test_own_scores_are_what_the_hub_lists_as_results(tmp_path):
    data = card_of(tmp_path, scores={"loss": 2.49712, "recall": 0.9979}, repo_id="me/small").data
    assert data.model_name == "me/small"
    found = {result.metric_type: (result.metric_value, result.dataset_type) for result in data.eval_results}
    assert found == {"loss": (2.4971, "held-out-windows"), "recall": (0.9979, "held-out-windows")}
    assert "model-index" not in card_of(tmp_path, scores={}).data.to_dict()


def test_ruler_counts_layers():
    ruler, letters = draw_pattern(SharePattern("F" + "S" * 46)).splitlines()
    for layer in (0, 10, 40):
        column = letters.index("F") + layer
        assert ruler[column : column + len(str(layer))] == str(layer)
