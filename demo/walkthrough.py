"""The whole story on a small model, in about a minute: `make demo`.

Every step but the last two is a command of `indexcache`: what is typed stands above what it prints. Everything is
written to demo/output/, anew at each run.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers.utils import logging

from indexcache import IndexCacheForCausalLM
from indexcache.cli import app
from indexcache.conversion.io.checkpoint import read_checkpoint
from indexcache.conversion.io.sources import FolderSource
from indexcache.evaluation.perplexity import evaluate_windows

HERE = Path(__file__).resolve().parent
SOURCE, OUTPUT = HERE / "dsa_demo", HERE / "output"
# Which 4 of the 12 layers keep their indexer: chosen by the paper's greedy search on this model, and evenly spaced.
PATTERNS = {"all F": "F" * 12, "searched": "FFSSSSFFSSSS", "uniform": "FSSFSSFSSFSS"}
PROMPT = ".. function:: read_text(path, encoding=None)\n\n   Return the"

# What anyone runs who got the folder from the Hub: no indexcache here.
LOAD_ANYWHERE = """
import sys
sys.modules["indexcache"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer

checkpoint, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype="auto")
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
tokens = model.generate(**inputs, max_new_tokens=60)
print(f"# {type(model).__name__}, pattern {model.config.index_share_pattern}\\n")
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
"""

console = Console()


def main() -> None:
    """Run the steps in order; the first that fails ends it."""
    logging.disable_progress_bar()
    shutil.rmtree(OUTPUT, ignore_errors=True)

    console.rule("[bold]1. A DSA checkpoint: every layer has a lightning indexer")
    indexcache("inspect", SOURCE)

    console.rule("[bold]2. Convert: 4 of 12 layers keep theirs, the others share")
    for name, pattern in PATTERNS.items():
        indexcache("convert", SOURCE, OUTPUT / name.replace(" ", "_"), "--pattern", pattern)
    console.print("A shard that loses nothing is passed through; the others lose the indexers of shared layers.")

    console.rule("[bold]3. Verify: what was kept is byte for byte what it was")
    indexcache("verify", SOURCE, OUTPUT / "searched")

    console.rule("[bold]4. Load and generate where indexcache is not installed")
    generate_elsewhere(OUTPUT / "searched")

    console.rule("[bold]5. What sharing costs, and what the choice of layers is worth")
    compare()


def indexcache(*arguments: str | Path) -> None:
    """Show a command line and run it in this process."""
    shown = [os.path.relpath(item) if isinstance(item, Path) else item for item in arguments]
    console.print(f"[bold green]$[/] indexcache {shlex.join(shown)}")
    typer.main.get_command(app).main([str(item) for item in arguments], standalone_mode=False)


def generate_elsewhere(checkpoint: Path) -> None:
    """Load and generate in a process that cannot import this package, from an empty folder."""
    with TemporaryDirectory() as empty:
        subprocess.run(
            [sys.executable, "-I", "-c", LOAD_ANYWHERE, checkpoint, PROMPT],
            cwd=empty,
            env={**os.environ, "HF_MODULES_CACHE": empty, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            check=True,
        )


def compare() -> None:
    """Loss and recall on four held-out windows, side by side."""
    windows = load_file(HERE / "sample_windows.safetensors")
    full_size = read_checkpoint(FolderSource(SOURCE)).nbytes
    table = Table("", "pattern", "indexers kept", "bytes saved", "loss", "recall")
    for name, pattern in PATTERNS.items():
        folder = OUTPUT / name.replace(" ", "_")
        model = IndexCacheForCausalLM.from_pretrained(folder, dtype="float32")
        scores = evaluate_windows(model, windows["ids"], windows["recall"])
        saved = full_size - read_checkpoint(FolderSource(folder)).nbytes
        table.add_row(
            name,
            pattern,
            f"{pattern.count('F')} of {len(pattern)}",
            f"{saved:,}",
            f"{scores.loss:.3f}",
            f"{scores.recall_accuracy:.0%}",
        )
    console.print(table)
    console.print(
        f"Loss: mean over {scores.tokens:,} tokens, in nats. Recall: of {scores.recall_tokens} tokens that were noted "
        "far back and are asked for again. The same number of indexers, in the right layers, keeps what evenly "
        "spaced ones lose."
    )


if __name__ == "__main__":
    main()
