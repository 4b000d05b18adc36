"""Score every share pattern with so many full layers: how near a search comes to the best pattern there is.

    python -m indexcache.benchmarks.every_pattern CHECKPOINT WINDOWS.safetensors --keep 3 --keep 4 --output FOLDER

Patterns that begin alike share their first layers (a walk through the tree of prefixes, many patterns in one batch),
so that all 455 patterns of 16 layers with four full ones cost five layers each. Where there are too many patterns
(6,435 with eight) they are thinned out on the first calibration windows, generously. Every pattern left is scored on
all calibration windows, the best by any of the scores on the test windows too.

Writes `every_pattern.pt`: by number of full layers and set of windows the patterns and their sums over the tokens of
each window, fp32 `[patterns, windows, len(COLUMNS)]`.

Legend: P prefixes, W windows, S tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from ..configuration.share_pattern import FULL, SHARED
from ..conversion.load_source import load_source
from ..evaluation.window_sources import Sampling
from ..evaluation.windows import Windows
from ..modeling_indexcache.key_visibility import KeyVisibility
from ..modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM
from ..pattern_search.calibration import load_windows

# Sums over tokens: loss, KL to the source's predictions and from them, rises of the loss cut off at 2 and at half a
# nat either way, squared rises, loss and hits of the tokens to be recalled.
COLUMNS = ("loss", "kl", "reverse_kl", "rise_2", "rise_half", "rise_squared", "recall_loss", "recall_hits")
# Windows in one call of a layer, such calls whose states are held between two layers, rows of logits at a time.
BATCH, POOL, LOGIT_ROWS = 48, 12, 2**16


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
        self._reference: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.inference_mode()
    def score(self, patterns: list[str], rows: list[int]) -> torch.Tensor:
        """Sums `[patterns, len(rows), COLUMNS]`, fp64 on the CPU, of the windows `rows`."""
        missing = [row for row in rows if row not in self._reference]
        for first in range(0, len(missing), self.batch):
            part = missing[first : first + self.batch]
            self._run([FULL * len(self._decoder.layers)], part, self._set_reference)
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
        slots = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        self._positions = self._decoder.rotary_emb(hidden, slots)
        self._visibility = KeyVisibility.of(None, None, ids.shape[1], ids.device)
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
        out, picked = self._decoder.layers[layer](
            flat,
            position_embeddings=self._positions,
            visibility=self._visibility,
            past_key_values=None,
            topk_indices=reused,
            run_indexer=run_indexer,
        )
        self.layer_forwards += count
        out = out[:count].view(prefixes, windows, *out.shape[1:])
        return out, None if picked is None else picked[:count].view(prefixes, windows, *picked.shape[1:])

    # ---- scores -----------------------------------------------------------------------------------------------------

    def _set_reference(self, names: list[str], hidden: torch.Tensor) -> None:
        missing = [row for row in range(len(self._ids)) if row not in self._reference]
        for row, states in zip(missing, hidden[0]):
            self._reference[row] = (states, self._losses(states, row))

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        # In fp32 whatever the model's dtype: rounded to bf16, logits would put a floor under every KL.
        return states.float() @ self._head.T

    def _losses(self, states: torch.Tensor, row: int) -> torch.Tensor:
        logits, targets = self._logits(states), self._ids[row, 1:]
        return logits.logsumexp(-1) - logits.gather(-1, targets[:, None]).squeeze(-1)

    def _table(self, hidden: torch.Tensor, rows: list[int]) -> list[torch.Tensor]:
        """`hidden [P, W, S, E]` to `[W, COLUMNS]` of each prefix."""
        out = torch.zeros(len(hidden), len(rows), len(COLUMNS), dtype=torch.float64)
        for column, row in enumerate(rows):
            reference, reference_loss = self._reference[row]
            log_p = self._logits(reference).log_softmax(-1)  # [S, V]
            p, targets = log_p.exp(), self._ids[row, 1:]
            recalled = None if self._recall is None else self._recall[row]
            step = max(1, LOGIT_ROWS // len(log_p))
            for first in range(0, len(hidden), step):
                log_q = self._logits(hidden[first : first + step, column]).log_softmax(-1)  # [P, S, V]
                loss = -log_q.gather(-1, targets.expand(len(log_q), -1)[..., None]).squeeze(-1)  # [P, S]
                rise = loss - reference_loss
                q = log_q.exp()
                cross, reverse = (p * log_q).sum(-1), (q * (log_q - log_p)).sum(-1)
                kl = (p * log_p).sum(-1) - cross
                sums = [loss, kl, reverse, rise.clamp(-2, 2), rise.clamp(-0.5, 0.5), rise.square()]
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
    """The `count` best by each of loss, KL, reverse KL, cut-off rises and hits, the sum of loss and KL; together."""
    sums = table.sum(1)
    keys = [sums[:, 0], sums[:, 1], sums[:, 2], sums[:, 3], sums[:, 0] + sums[:, 1], -sums[:, 7] + 1e-9 * sums[:, 0]]
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
    tested: int = 60,
    also: list[str] | None = None,
    seconds: float = 1e9,
    batch: int = BATCH,
) -> dict[int, dict[str, Any]]:
    """Score the patterns of each number of full layers; stops early, with what it has, after `seconds`."""
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
        wanted = [pattern for pattern in also or [] if pattern.count(FULL) == count and pattern not in patterns]
        patterns += wanted
        table = trees["calibration"].score(patterns, list(range(len(calibration))))
        print(f"{count}: {len(patterns)} on all calibration windows, {_spent(begun, trees)}", flush=True)
        chosen = best(patterns, table, tested) + wanted
        chosen += [p for p in also or [] if p.count(FULL) == count and p not in chosen]
        tested_table = trees["test"].score(chosen, list(range(len(test))))
        found[count] = {
            "all": everything,
            "calibration": (patterns, table.float()),
            "test": (chosen, tested_table.float()),
        }
        print(f"{count}: {len(chosen)} tested, {_spent(begun, trees)}", flush=True)
        report(count, found[count], calibration.seqlen, test)
    return found


def report(count: int, found: dict[str, Any], seqlen: int, test: Windows) -> None:
    """The best few on the test windows and by each calibration score."""
    (names, table), (chosen, tested) = found["calibration"], found["test"]
    place = {name: i for i, name in enumerate(names)}
    on_test = {
        name: (float(t[:, 0].mean()) / seqlen, float(t[:, 7].sum()) / max(1, test.recall_tokens))
        for name, t in zip(chosen, tested)
    }
    ranked = sorted(chosen, key=lambda name: on_test[name][0])
    by = {key: sorted(chosen, key=lambda name: float(table[place[name], :, i].sum())) for i, key in enumerate(COLUMNS)}
    print(f"--- {count} full layers: the best of {len(chosen)} on the test windows, with their ranks on calibration")
    for name in dict.fromkeys([*ranked[:8], by["loss"][0], by["kl"][0], by["reverse_kl"][0], by["rise_2"][0]]):
        ranks = " ".join(f"{key} {by[key].index(name) + 1}" for key in ("loss", "kl", "reverse_kl", "rise_2"))
        calibration = [float(x) / len(table[0]) / seqlen for x in table[place[name]].sum(0)]
        print(
            f"{name} test {on_test[name][0]:.4f} recall {on_test[name][1]:.3f} rank {ranked.index(name) + 1}; "
            f"calibration loss {calibration[0]:.4f} kl {calibration[1]:.4f}; ranks: {ranks}",
            flush=True,
        )


def _spent(begun: float, trees: dict[str, PrefixTree]) -> str:
    done = sum(tree.layer_forwards for tree in trees.values())
    return f"{done:,} layer-forwards, {time.monotonic() - begun:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("windows", help="safetensors with calibration_ids and test_ids")
    parser.add_argument("--keep", type=int, action="append", required=True)
    parser.add_argument("--also", action="append", help="patterns to test in any case")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further number of layers after this")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--output", type=Path, default=Path("."))
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_source(arguments.checkpoint, dtype=getattr(torch, arguments.dtype)).to(device)  # type: ignore[arg-type]
    calibration, test = load_windows(
        f"{arguments.windows}:calibration", model.config, None, Sampling(), f"{arguments.windows}:test"
    )
    found = every_pattern(model, calibration, test, arguments.keep, also=arguments.also, seconds=arguments.seconds)
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.save(found, arguments.output / "every_pattern.pt")
    print(json.dumps({count: len(part["calibration"][0]) for count, part in found.items()}))


if __name__ == "__main__":
    main()
