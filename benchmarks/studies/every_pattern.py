"""Score every share pattern with so many full layers: how near a search comes to the best pattern there is.

    python -m indexcache.benchmarks.studies.every_pattern CHECKPOINT WINDOWS.safetensors --keep 3 --keep 4 --everywhere

Patterns that begin alike share their first layers (a walk through the tree of prefixes, many patterns in one batch),
so that all 455 patterns of 16 layers with four full ones cost five layers each. Where there are too many patterns
(6,435 with eight) they are thinned out on the first calibration windows, generously. Every pattern left is scored on
all calibration windows, the best by any of the scores on the test windows too, or every one with `--everywhere`.

Writes `every_pattern.pt`: by number of full layers and set of windows the patterns and their sums over the tokens of
each window, fp32 `[patterns, windows, len(COLUMNS)]`; and `every_pattern.json`: the report.

Legend: P prefixes, W windows, S tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from ...configuration.share_pattern import FULL, SHARED
from ...conversion.io.load_source import load_source
from ...modeling_indexcache.forward_plan import ForwardPlan
from ...modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM
from ...modeling_indexcache.selection import Selection
from ...runs.versions import stamp
from ...runs.windows.calibration import load_windows
from ...runs.windows.window_sources import Sampling
from ...runs.windows.windows import Windows

# Sums over tokens: loss, KL to the predictions of the source and of dense attention, loss and hits of the tokens to be
# recalled.
COLUMNS = ("loss", "source_kl", "dense_kl", "recall_loss", "recall_hits")
LOSS, SOURCE_KL, DENSE_KL, RECALL_LOSS, RECALL_HITS = range(len(COLUMNS))
# Windows in one call of a layer, such calls whose states are held between two layers, rows of logits at a time.
BATCH, POOL, LOGIT_ROWS = 64, 12, 2**16
# Patterns of a report, the best on the test windows.
SHOWN = 10


class PrefixTree:
    """Runs many patterns over the same windows, each prefix once.

    Args:
        model: all its indexers loaded.
        windows: what is scored.
        batch: windows in one call of a layer.
    """

    def __init__(self, model: IndexCacheForCausalLM, windows: Windows, batch: int = BATCH) -> None:
        self.model, self.windows, self.batch = model.eval(), windows, batch
        self.layer_forwards = 0
        self.fill = model.device.type == "cuda"
        self._decoder = model.model
        self._head = model.get_output_embeddings().weight.float()
        self._ids = windows.ids.to(model.device)
        self._recall = None if windows.recall is None else windows.recall[:, 1:].to(model.device).bool()
        # By window the states behind the last layer, with the source's selections and with dense attention.
        self._reference: dict[int, list[torch.Tensor]] = {}

    @torch.inference_mode()
    def score(self, patterns: list[str], rows: list[int]) -> torch.Tensor:
        """Sums `[patterns, len(rows), COLUMNS]`, fp64 on the CPU, of the windows `rows`."""
        missing = [row for row in rows if row not in self._reference]
        for first in range(0, len(missing), self.batch):
            part = missing[first : first + self.batch]
            # A shared layer that no full layer stands before reads everything.
            for letter in (FULL, SHARED):
                self._run([letter * len(self._decoder.layers)], part, partial(self._add_reference, part))
        found: dict[str, torch.Tensor] = {}
        for first in range(0, len(rows), self.batch):
            part = rows[first : first + self.batch]

            def keep(names: list[str], hidden: torch.Tensor, part: list[int] = part) -> None:
                for name, table in zip(names, self._table(hidden, part)):
                    found[name] = torch.cat((found[name], table)) if name in found else table

            self._run(sorted(set(patterns)), part, keep)
        return torch.stack([found[pattern] for pattern in patterns])

    def _run(self, patterns: list[str], rows: list[int], finish: Any) -> None:
        ids = self._ids[rows, :-1]
        hidden = self._decoder.embed_tokens(ids)
        self._plan = ForwardPlan.of(self._decoder, hidden, keeps_states=True)
        self._descend([""], hidden[None], None, patterns, rows, finish)

    def _descend(self, prefixes, hidden, selection, patterns, rows, finish) -> None:
        """`hidden [P, W, S, E]` and `selection [P, W, S, K]` entering the layer behind `prefixes`."""
        layer = len(prefixes[0])
        if layer == len(self._decoder.layers):
            finish(prefixes, self._decoder.norm(hidden))
            return
        following = {pattern[: layer + 1] for pattern in patterns}
        names: list[str] = []
        states, picks = [], []
        for letter in (FULL, SHARED):
            chosen = [number for number, prefix in enumerate(prefixes) if prefix + letter in following]
            for first in range(0, len(chosen), self._at_once(rows)):
                part = chosen[first : first + self._at_once(rows)]
                reused = selection[part] if letter == SHARED and selection is not None else None
                out, picked = self._layer(layer, hidden[part], reused, letter == FULL)
                names += [prefixes[number] + letter for number in part]
                states.append(out)
                picks.append(picked)
        del hidden, selection
        hidden = torch.cat(states)
        selection = None if picks[0] is None else torch.cat(picks)
        del states, picks
        pool = POOL * self._at_once(rows)
        for first in range(0, len(names), pool):
            part = slice(first, first + pool)
            members = set(names[part])
            wanted = [name for name in patterns if name[: layer + 1] in members]
            self._descend(
                names[part], hidden[part], None if selection is None else selection[part], wanted, rows, finish
            )

    def _at_once(self, rows: list[int]) -> int:
        """Prefixes that one call of a layer takes."""
        return max(1, self.batch // len(rows))

    def _layer(self, layer, hidden, selection, run_indexer):
        """One layer on `hidden [P, W, S, E]`, filled up to the same batch in every call: kernels compile once."""
        prefixes, windows = hidden.shape[:2]
        count = prefixes * windows
        missing = self.batch - count if self.fill else 0
        flat, reused = _fill(hidden.flatten(0, 1), missing), None
        if selection is not None:
            reused = _fill(selection.flatten(0, 1), missing)
        plan = replace(self._plan, letters=(FULL if run_indexer else SHARED) * len(self._decoder.layers))
        out, used, _ = plan.run(self._decoder, flat, Selection(reused), layer, layer + 1)
        picked = used.listed
        self.layer_forwards += count
        out = out[:count].view(prefixes, windows, *out.shape[1:])
        return out, None if picked is None else picked[:count].view(prefixes, windows, *picked.shape[1:])

    # ---- scores -----------------------------------------------------------------------------------------------------

    def _add_reference(self, rows: list[int], names: list[str], hidden: torch.Tensor) -> None:
        for row, states in zip(rows, hidden[0]):
            self._reference.setdefault(row, []).append(states)

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        # In fp32 whatever the model's dtype: rounded to bf16, logits would put a floor under every KL.
        return states.float() @ self._head.T

    def _table(self, hidden: torch.Tensor, rows: list[int]) -> list[torch.Tensor]:
        """`hidden [P, W, S, E]` to `[W, COLUMNS]` of each prefix."""
        out = torch.zeros(len(hidden), len(rows), len(COLUMNS), dtype=torch.float64)
        for column, row in enumerate(rows):
            teachers = [self._logits(states).log_softmax(-1) for states in self._reference[row]]  # [S, V]
            targets = self._ids[row, 1:]
            recalled = None if self._recall is None else self._recall[row]
            step = max(1, LOGIT_ROWS // len(targets))
            for first in range(0, len(hidden), step):
                log_q = self._logits(hidden[first : first + step, column]).log_softmax(-1)  # [P, S, V]
                loss = -log_q.gather(-1, targets.expand(len(log_q), -1)[..., None]).squeeze(-1)  # [P, S]
                sums = [loss]
                for log_p in teachers:
                    p = log_p.exp()
                    sums.append((p * log_p).sum(-1) - (p * log_q).sum(-1))
                if recalled is None:
                    sums += [torch.zeros_like(loss)] * 2
                else:
                    sums += [loss * recalled, ((log_q.argmax(-1) == targets) & recalled).float()]
                out[first : first + step, column] = torch.stack([x.double().sum(-1) for x in sums], -1).cpu()
        return list(out)


def _fill(x: torch.Tensor, missing: int) -> torch.Tensor:
    return torch.cat((x, x[:1].expand(missing, *x.shape[1:]))) if missing > 0 else x


def patterns_with(num_layers: int, full: int) -> list[str]:
    """All patterns of `num_layers` with `full` full layers; layer 0 is one of them."""
    return [
        "".join(FULL if layer == 0 or layer in chosen else SHARED for layer in range(num_layers))
        for chosen in map(set, combinations(range(1, num_layers), full - 1))
    ]


def best(patterns: list[str], table: torch.Tensor, count: int) -> list[str]:
    """The `count` best by each of loss, either KL, hits, and the sum of loss and KL to the source; together."""
    sums = table.sum(1)
    keys = [sums[:, LOSS], sums[:, SOURCE_KL], sums[:, DENSE_KL], sums[:, LOSS] + sums[:, SOURCE_KL]]
    keys.append(1e-9 * sums[:, LOSS] - sums[:, RECALL_HITS])
    chosen = {int(i): None for key in keys for i in key.argsort()[:count]}
    return [patterns[i] for i in chosen]


def every_pattern(
    model: IndexCacheForCausalLM,
    calibration: Windows,
    test: Windows,
    counts: list[int],
    *,
    thin: tuple[tuple[int, int], ...] = ((1, 1200), (4, 400)),
    thin_above: int = 1000,
    tested: int | None = 60,
    also: list[str] | None = None,
    seconds: float = 1e9,
    batch: int = BATCH,
) -> dict[int, dict[str, Any]]:
    """Score the patterns of each number of full layers; stops early, with what it has, after `seconds`.

    Args:
        model: all its indexers loaded.
        calibration: windows that thin out and rank.
        test: windows that judge.
        counts: numbers of full layers.
        thin: windows looked at, and patterns left by each score, one pair a thinning.
        thin_above: more patterns than these are thinned out.
        tested: patterns that go on to the test windows by each score; None for all.
        also: patterns that stay in any case.
        seconds: no further number of layers is begun after these.
        batch: windows in one call of a layer.
    """
    begun = time.monotonic()
    trees = {"calibration": PrefixTree(model, calibration, batch), "test": PrefixTree(model, test, batch)}
    found: dict[int, dict[str, Any]] = {}
    for count in counts:
        if time.monotonic() - begun > seconds:
            print(f"{count}: left out, time is up", flush=True)
            continue
        patterns = patterns_with(int(model.config.num_hidden_layers), count)
        everything = len(patterns)
        if everything > thin_above:
            for windows, kept in thin:
                table = trees["calibration"].score(patterns, list(range(windows)))
                patterns = best(patterns, table, kept)
                print(f"{count}: {len(patterns)} left by {windows} windows, {_spent(begun, trees)}", flush=True)
        wanted = [pattern for pattern in also or [] if pattern.count(FULL) == count]
        patterns += [pattern for pattern in wanted if pattern not in patterns]
        table = trees["calibration"].score(patterns, list(range(len(calibration))))
        print(f"{count}: {len(patterns)} on all calibration windows, {_spent(begun, trees)}", flush=True)
        chosen = patterns if tested is None else best(patterns, table, tested)
        chosen = chosen + [pattern for pattern in wanted if pattern not in chosen]
        tested_table = trees["test"].score(chosen, list(range(len(test))))
        found[count] = {
            "all": everything,
            "calibration": (patterns, table.float()),
            "test": (chosen, tested_table.float()),
        }
        print(f"{count}: {len(chosen)} tested, {_spent(begun, trees)}", flush=True)
    return found


def report(found: dict[str, Any], calibration: Windows, test: Windows, also: list[str]) -> list[dict[str, Any]]:
    """Of one number of full layers: the best on the test windows, the best by each calibration score, and `also`.

    Each with its losses a token and its ranks among the patterns that were tested, 1 for the best.
    """
    (names, table), (chosen, tested) = found["calibration"], found["test"]
    scores = dict(zip(chosen, (means(sums, test) for sums in tested)))
    places = {name: i for i, name in enumerate(names)}
    calibrated = {name: means(table[places[name]], calibration) for name in chosen}
    by_test = sorted(chosen, key=lambda name: scores[name]["loss"])
    by = {key: sorted(chosen, key=lambda name: calibrated[name][key]) for key in COLUMNS[:3]}
    shown = [*by_test[:SHOWN], *(ranking[0] for ranking in by.values())]
    shown += [name for name in also if name in scores]
    return [
        {
            "pattern": name,
            **scores[name],
            "rank": by_test.index(name) + 1,
            "of": len(chosen),
            "calibration": calibrated[name],
            "calibration_ranks": {key: ranking.index(name) + 1 for key, ranking in by.items()},
        }
        for name in sorted(dict.fromkeys(shown), key=by_test.index)
    ]


def means(sums: torch.Tensor, windows: Windows) -> dict[str, float]:
    """Means a token of sums `[W, COLUMNS]`: loss, both KL, loss without the tokens to be recalled; share recalled."""
    total, tokens = sums.double().sum(0).tolist(), len(windows) * windows.seqlen
    means = {key: total[column] / tokens for column, key in enumerate(COLUMNS[:3])}
    recalled = windows.recall_tokens
    means["text_loss"] = (total[LOSS] - total[RECALL_LOSS]) / (tokens - recalled)
    if recalled:
        means["recall"] = total[RECALL_HITS] / recalled
    return means


def draw_every(found: dict[int, dict[str, Any]], seqlen: int, named: dict[str, str], path: Path) -> None:
    """Loss on the test windows against loss on the calibration windows, a panel a number of full layers.

    Args:
        found: of `every_pattern`.
        seqlen: tokens a window.
        named: patterns to be marked, and what to call them.
        path: of the picture.
    """
    import matplotlib.pyplot as plt

    from ...runs.pages.figures import BLUE, GREY, ORANGE, plain, save

    figure, axes = plt.subplots(1, len(found), figsize=(5.0 * len(found), 4.0), squeeze=False)
    for axis, (count, part) in zip(axes[0], sorted(found.items(), reverse=True)):
        (names, table), (chosen, tested) = part["calibration"], part["test"]
        before = dict(zip(names, (table[:, :, LOSS].double().mean(1) / seqlen).tolist()))
        after = dict(zip(chosen, (tested[:, :, LOSS].double().mean(1) / seqlen).tolist()))
        axis.scatter([before[name] for name in chosen], [after[name] for name in chosen], s=7, color=GREY, linewidth=0)
        for name in filter(after.__contains__, named):
            colour = BLUE if after[name] == min(after.values()) else ORANGE
            axis.scatter([before[name]], [after[name]], s=20, color=colour, zorder=3)
            axis.annotate(
                f"{named[name]} {after[name]:.3f}", (before[name], after[name]), xytext=(8, 0), fontsize=8,
                textcoords="offset points", va="center", color=colour,
            )  # fmt: skip
        axis.set_title(f"all {len(chosen)} patterns with {count} full layers", fontsize=9, loc="left")
        axis.set_xlabel("loss on the calibration windows")
        axis.set_ylabel("loss on the test windows (nats per token)")
        plain(axis)
    save(figure, path)


def _line(row: dict[str, Any]) -> str:
    figures = f"{row['loss']:.4f} text {row['text_loss']:.4f} recall {row.get('recall', float('nan')):.3f}"
    before = " ".join(
        f"{key} {row['calibration'][key]:.4f} ({rank})" for key, rank in row["calibration_ranks"].items()
    )
    return f"{row['pattern']} test {figures}, {row['rank']} of {row['of']}; calibration: {before}"


def _spent(begun: float, trees: dict[str, PrefixTree]) -> str:
    done = sum(tree.layer_forwards for tree in trees.values())
    return f"{done:,} layer-forwards, {time.monotonic() - begun:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("windows", help="safetensors with calibration_ids and test_ids")
    parser.add_argument("--keep", type=int, action="append", required=True)
    parser.add_argument("--also", action="append", default=[], help="patterns to test in any case")
    parser.add_argument("--everywhere", action="store_true", help="every pattern on the test windows")
    parser.add_argument("--again-fp32", type=int, default=0, help="so many of the best, and --also, once more in fp32")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further number of layers after this")
    parser.add_argument("--batch-size", type=int, default=BATCH)
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--picture", type=Path, help="both losses of every pattern; --also NAME=LETTERS names one")
    parser.add_argument("--output", type=Path, default=Path("."))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    named = {letters: name or letters for name, _, letters in (text.rpartition("=") for text in arguments.also)}
    arguments.also = list(named)

    def load(dtype: str) -> IndexCacheForCausalLM:
        return load_source(arguments.checkpoint, dtype=getattr(torch, dtype)).to(device)  # type: ignore[arg-type]

    model = load(arguments.dtype)
    calibration, test = load_windows(
        f"{arguments.windows}:calibration", model.config, None, Sampling(), f"{arguments.windows}:test"
    )
    found = every_pattern(
        model, calibration, test, arguments.keep, tested=None if arguments.everywhere else 60, also=arguments.also,
        seconds=arguments.seconds, batch=arguments.batch_size,
    )  # fmt: skip
    torch.save(found, arguments.output / "every_pattern.pt")
    if arguments.picture:
        draw_every(found, test.seqlen, named, arguments.picture)
    result: dict[str, Any] = {}
    for count, part in found.items():
        rows = result[str(count)] = report(part, calibration, test, arguments.also)
        print(f"--- {count} full layers of {len(model.config.share_pattern)}, {part['all']} patterns")
        print("\n".join(map(_line, rows)), flush=True)
    if arguments.again_fp32:
        tree = PrefixTree(load("float32"), test, max(1, arguments.batch_size // 4))
        for count, rows in result.items():
            chosen = [row for row in rows if row["rank"] <= arguments.again_fp32 or row["pattern"] in arguments.also]
            for row, sums in zip(chosen, tree.score([row["pattern"] for row in chosen], list(range(len(test))))):
                row["fp32"] = means(sums, test)
                exact = f"{row['fp32']['loss']:.4f} recall {row['fp32'].get('recall', float('nan')):.3f}"
                print(f"{count}: {row['pattern']} {arguments.dtype} {row['loss']:.4f}, fp32 {exact}", flush=True)
    document = {"machine": stamp(), "dtype": arguments.dtype, "result": result}
    (arguments.output / "every_pattern.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
