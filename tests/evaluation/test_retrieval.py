"""Prompts hold what they say where they say, and an answer counts exactly when greedy decoding gives it."""

import pytest
import torch
from testing.tiny_models import tiny_model

from indexcache.evaluation.retrieval import Prompt, PromptMaker, recalled
from indexcache.runs.errors import RunError


class Characters:
    """A tokenizer: one token a character."""

    eos_token_id = 0

    def encode(self, text, **_):
        return [ord(character) for character in text]


def text(ids):
    return "".join(map(chr, ids))


@pytest.mark.parametrize("length", [400, 777])
def test_records_stand_at_every_depth_and_are_all_asked_for(length):
    maker = PromptMaker(Characters(), "records", depths=5, filler=Characters().encode("abcdefgh "))
    (prompt,) = maker.make(length, sample=3)
    written = text(prompt.ids)
    assert len(prompt.ids) == length and prompt.depths == [0, 0.25, 0.5, 0.75, 1]
    questions = written.index("\nrecall:")
    places = []
    for answer in prompt.answers:
        value = written[answer.start : answer.stop]
        name = written[: answer.start].rsplit("recall: ", 1)[1].removesuffix(" is")
        note = f"\nnote: {name} is{value}.\n"
        assert written.count(note) == 1
        places.append(written.index(note))
    assert places == sorted(places) and places[0] == 0
    room = questions - 5 * len(note)
    for number, (place, depth) in enumerate(zip(places, prompt.depths)):
        assert place - number * len(note) == round(depth * room), "filler before it is its share of all filler"
    assert written.endswith(written[prompt.answers[-1].start : prompt.answers[-1].stop]) or any(
        answer.stop == length for answer in prompt.answers
    ), "nothing follows the last answer"


def test_passkeys_are_one_a_depth():
    prompts = PromptMaker(Characters(), "passkey", depths=3).make(900, sample=0)
    assert [prompt.depths for prompt in prompts] == [[0], [0.5], [1]]
    for prompt in prompts:
        written, (answer,) = text(prompt.ids), prompt.answers
        key = written[answer.start : answer.stop]
        assert len(prompt.ids) == answer.stop == 900
        assert f"The pass key is{key}. Remember it:{key}." in written
        assert written[: answer.start].endswith("What is the pass key? The pass key is")


def test_samples_differ_and_seeds_repeat():
    maker = PromptMaker(Characters())
    assert maker.make(500, 1, seed=4) == maker.make(500, 1, seed=4)
    assert maker.make(500, 1, seed=4) != maker.make(500, 2, seed=4)
    assert maker.make(500, 1, seed=4) != maker.make(500, 1, seed=5)


def test_one_depth_is_the_middle():
    assert PromptMaker(Characters(), depths=1).depths == [0.5]


def test_prompts_that_cannot_be_are_refused():
    with pytest.raises(RunError, match=r"give a --length at least \d+ tokens longer, or fewer --depths"):
        PromptMaker(Characters()).make(150, 0)
    with pytest.raises(RunError, match="prompts are records or passkey"):
        PromptMaker(Characters(), "needles")
    with pytest.raises(RunError, match="--depths must be at least 1"):
        PromptMaker(Characters(), depths=0)


def test_an_answer_counts_when_greedy_decoding_gives_it():
    model = tiny_model(num_hidden_layers=3, seed=2)
    generator = torch.Generator().manual_seed(0)
    prompts, expected = [], []
    for number in range(6):
        start = torch.randint(2, 97, (1, 30), generator=generator)
        written = model.generate(start, max_new_tokens=3, do_sample=False, eos_token_id=None)[0].tolist()
        if number % 3:
            # A wrong first or last token.
            place = 29 + (1 if number % 3 == 1 else 3)
            written[place] = (written[place] + 1) % 97
        prompts.append(Prompt(written, [range(30, 33)], [0.5]))
        expected.append([number % 3 == 0])
    for batch_size in (1, 4):
        assert recalled(model, prompts, batch_size) == expected


def test_prompts_of_different_lengths_and_several_answers():
    model = tiny_model(num_hidden_layers=2, seed=3)
    model.train()
    ids = torch.randint(2, 97, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        first = model.eval()(ids, use_cache=False).logits.argmax(-1)[0].tolist()
    model.train()
    hits = [first[i] == int(ids[0, i + 1]) for i in range(39)]
    right = next((i + 1 for i, hit in enumerate(hits) if hit), None)
    wrong = next(i + 1 for i, hit in enumerate(hits) if not hit)
    answers = [range(wrong, wrong + 1)] + ([] if right is None else [range(right, right + 1)])
    prompts = [
        Prompt(ids[0].tolist(), answers, [0.0] * len(answers)),
        Prompt(ids[0, :20].tolist(), [range(3, 4)], [0]),
    ]
    found = recalled(model, prompts, 2)
    assert found[0] == [False, True][: len(answers)]
    assert found[1] == [hits[2]]
    assert model.training, "left in the mode it was in"
