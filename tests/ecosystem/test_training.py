"""Trainer and TRL, on the whole model, a few steps each: the loss falls, what is saved loads again."""

import json

import pytest


def _examples(texts, tokenizer):
    from datasets import Dataset

    encoded = tokenizer(texts, truncation=True, max_length=48)
    return Dataset.from_dict({"input_ids": encoded.input_ids, "attention_mask": encoded.attention_mask})


def _collator(tokenizer):
    from transformers import DataCollatorForLanguageModeling

    return DataCollatorForLanguageModeling(tokenizer, mlm=False)


def _arguments(folder, **changes):
    options = dict(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    return {**options, **changes}


def _losses(trainer):
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0], losses
    return losses


def _train(load, texts, tokenizer, folder, **changes):
    from transformers import Trainer, TrainingArguments

    data = _examples(texts, tokenizer)
    trainer = Trainer(
        model=load(),
        args=TrainingArguments(**_arguments(folder, **changes)),
        train_dataset=data,
        eval_dataset=data,
        data_collator=_collator(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


@pytest.mark.row("Trainer", "train, evaluate, save, reload", package=["transformers", "accelerate", "datasets"])
def test_trainer(load, texts, tokenizer, tmp_path):
    import torch

    trainer = _train(load, texts, tokenizer, tmp_path / "run", save_steps=6)
    _losses(trainer)
    assert trainer.evaluate()["eval_loss"] < trainer.state.log_history[0]["loss"]
    again = load(tmp_path / "run" / "checkpoint-6").state_dict()
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)


@pytest.mark.row("Trainer", "gradient checkpointing, resume", package=["transformers", "accelerate", "datasets"])
def test_trainer_resumes(load, texts, tokenizer, tmp_path):
    from transformers import Trainer, TrainingArguments

    folder = tmp_path / "run"
    whole = _train(load, texts, tokenizer, folder, save_steps=3, gradient_checkpointing=True)
    rest = Trainer(
        model=load(),
        args=TrainingArguments(**_arguments(folder, gradient_checkpointing=True)),
        train_dataset=_examples(texts, tokenizer),
        data_collator=_collator(tokenizer),
    )
    rest.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert _losses(rest)[-1] == pytest.approx(_losses(whole)[-1], rel=1e-4)


@pytest.mark.row("TensorBoard", "losses of a Trainer, read back", package=["tensorboard", "transformers"])
def test_tensorboard(load, texts, tokenizer, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "log"))
    trainer = _train(load, texts, tokenizer, tmp_path / "run", report_to=["tensorboard"])
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    read = EventAccumulator(str(events))
    read.Reload()
    logged = [event.value for event in read.Scalars("train/loss")]
    assert logged == pytest.approx(_losses(trainer))


@pytest.mark.row("TRL", "SFT", package="trl")
def test_sft(load, texts, tokenizer, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_dict({"text": texts})
    arguments = SFTConfig(**_arguments(tmp_path / "run"), max_length=48, bf16=False)
    trainer = SFTTrainer(model=load(), args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    _losses(trainer)


@pytest.mark.row("TRL", "SFT of chats, packed", package="trl")
def test_packed_sft(load, texts, tokenizer, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": text}] for text in texts]
    arguments = SFTConfig(
        **_arguments(tmp_path / "run"), max_length=96, packing=True, packing_strategy="wrapped", bf16=False
    )
    data = Dataset.from_dict({"messages": chats})
    trainer = SFTTrainer(model=load(), args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    _losses(trainer)


@pytest.mark.row("TRL", "DPO", package="trl")
def test_dpo(load, texts, tokenizer, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    pairs = {"prompt": ["Return "] * len(texts), "chosen": texts, "rejected": [text[::-1] for text in texts]}
    arguments = DPOConfig(**_arguments(tmp_path / "run", learning_rate=1e-4), max_length=64, bf16=False)
    trainer = DPOTrainer(
        model=load(),
        ref_model=load(),
        args=arguments,
        train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer,
    )
    trainer.train()
    _losses(trainer)


@pytest.mark.row("TRL", "GRPO", package="trl")
def test_grpo(load, texts, tokenizer, tmp_path):
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    seen = []

    def reward(completions, **_):
        seen.extend(completions)
        return [float(len(set(completion))) for completion in completions]

    arguments = GRPOConfig(
        **_arguments(tmp_path / "run", max_steps=2), num_generations=4, max_completion_length=8, bf16=False
    )
    model = load()
    before = model.lm_head.weight.detach().clone()
    data = Dataset.from_dict({"prompt": [text[:24] for text in texts]})
    trainer = GRPOTrainer(model, reward_funcs=reward, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert len(seen) == 8 and not torch.equal(trainer.model.lm_head.weight, before)


@pytest.mark.row("datasets", "parquet, arrow and a saved folder as `--data`", package="datasets")
def test_data_of_datasets(texts, tokenizer, tmp_path, run_tool, limit):
    from datasets import Dataset
    from ecosystem.ways import REMOTE

    if REMOTE:
        pytest.skip("the command line is the installed package's")
    from indexcache.runs.windows.text_sources import documents_of

    data = Dataset.from_dict({"text": texts})
    data.to_parquet(tmp_path / "texts.parquet")
    data.save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    data.to_parquet(tmp_path / "folder" / "texts.parquet")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    for path in (tmp_path / "texts.parquet", arrow, tmp_path / "saved", tmp_path / "folder"):
        read = ["".join(document.parts(2**20)) for document in documents_of(str(path), tokenizer)]
        assert read == texts, path


@pytest.mark.row(
    "datasets", "a model mapped over a dataset; by remote code with `new_fingerprint`", package="datasets"
)
def test_mapped_over_a_dataset(load, texts, tokenizer):
    import torch
    from datasets import Dataset
    from ecosystem.ways import REMOTE

    model = load()
    # To name its cache datasets digests what a function uses, classes of remote code by value: for minutes.
    named = {"new_fingerprint": "scored"} if REMOTE else {}

    def score(batch):
        encoded = tokenizer(batch["text"], return_tensors="pt", padding=True)
        with torch.no_grad():
            logits = model(**encoded).logits
        return {"entropy": torch.distributions.Categorical(logits=logits[:, -1]).entropy().tolist()}

    scored = Dataset.from_dict({"text": texts}).map(score, batched=True, batch_size=8, **named)
    assert len(scored) == len(texts) and all(value > 0 for value in scored["entropy"])
    assert json.dumps(scored[0])
