"""Evaluation by others: lm-evaluation-harness with a task of this folder's, lighteval, evaluate."""

import json

import pytest
from ecosystem.ways import REMOTE

TASK = """
task: local_continuation
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{target}}}}"
{choices}
metric_list:
  - metric: {metric}
"""
QUESTIONS = [
    {"text": "Return the number of", "target": 0, "choices": [" items", " zzqx"]},
    {"text": "If the list is", "target": 0, "choices": [" empty", " qqqq"]},
    {"text": "Raise a", "target": 0, "choices": [" ValueError", " ,,,,"]},
]


def _task(folder, kind, metric, choices=""):
    (folder / "tasks").mkdir()
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (folder / "tasks" / "local.yaml").write_text(
        TASK.format(data=data, kind=kind, metric=metric, choices=choices).strip() + "\n"
    )
    return str(folder / "tasks")


@pytest.mark.row("lm-evaluation-harness", "a local task of multiple choice, from Python", package="lm_eval")
def test_lm_eval(load, tokenizer, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = _task(tmp_path, "multiple_choice", "acc", 'doc_to_choice: "{{choices}}"')
    found = simple_evaluate(
        model=HFLM(pretrained=load(), tokenizer=tokenizer, batch_size=2, device="cpu"),
        tasks=["local_continuation"],
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
        bootstrap_iters=0,
    )
    assert found["results"]["local_continuation"]["acc,none"] == 1.0


@pytest.mark.row("lm-evaluation-harness", "the command line, by path", package="lm_eval")
def test_lm_eval_command(checkpoint, run_tool, tmp_path):
    tasks = _task(tmp_path, "multiple_choice", "acc", 'doc_to_choice: "{{choices}}"')
    arguments = f"pretrained={checkpoint},dtype=float32" + (",trust_remote_code=True" if REMOTE else "")
    command = ["--model", "hf", "--model_args", arguments, "--tasks", "local_continuation", "--include_path", tasks]
    finished = run_tool("lm_eval", *command, "--device", "cpu", "--output_path", tmp_path / "out")
    (result,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(result.read_text())["results"]["local_continuation"]["acc,none"] == 1.0, finished.stdout


@pytest.mark.row("evaluate", "accuracy of next tokens by a metric of one's own", package="evaluate")
def test_evaluate(load, ids, tmp_path):
    import evaluate
    import torch

    (tmp_path / "next_token.py").write_text(
        "import datasets\nimport evaluate\n"
        "class NextToken(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        features = datasets.Features({'predictions': datasets.Value('int64'),"
        " 'references': datasets.Value('int64')})\n"
        "        return evaluate.MetricInfo(description='', citation='', features=features)\n"
        "    def _compute(self, predictions, references):\n"
        "        return {'accuracy': sum(p == r for p, r in zip(predictions, references)) / len(references)}\n"
    )
    metric = evaluate.load(str(tmp_path / "next_token.py"), cache_dir=str(tmp_path / "cache"))
    with torch.no_grad():
        guesses = load()(input_ids=ids).logits.argmax(-1)
    accuracy = metric.compute(predictions=guesses[0, :-1].tolist(), references=ids[0, 1:].tolist())["accuracy"]
    # The text repeats itself and the model can copy.
    assert accuracy > 0.5
