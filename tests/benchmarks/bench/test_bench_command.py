"""`indexcache bench` on a tiny shape and on the demo checkpoint: rows, resume, pictures, bad input."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from indexcache.benchmarks.bench import speed_plan, speed_run
from indexcache.benchmarks.bench.speed_figures import paper_speed_ups, speed_ups
from indexcache.benchmarks.bench.speed_parts import PARTS, part_of_kernel
from indexcache.benchmarks.bench.speed_plan import Row, read_plan
from indexcache.cli import app

DEMO = Path(__file__).parents[3] / "demo" / "dsa_demo"
SMALL = ("--shape", "tiny", "--layers", 4, "--length", 96, "--length", 160, "--decode-steps", 4, "--repeats", 1)


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", "--device", "cpu", *map(str, arguments)])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp("bench")
    ways = ("--cache", "static", "--cache", "dynamic", "--batch-size", 2, "--baseline", "--pattern", "all full")
    command = (*SMALL, *ways, "--pattern", "FSSS", "--output", output, "--json")
    finished = bench(*command)
    assert finished.exit_code == 0, finished.output
    return json.loads(finished.stdout), output, command


def test_every_row_is_measured_and_written(run):
    document, output, _ = run
    assert document == json.loads((output / "bench.json").read_text())
    assert document["patterns"] == {"all full": "FFFF", "FSSS": "FSSS"}
    seen = {(row["kind"], row["model"], row["tokens"], row["pattern"], row["way"]) for row in document["rows"]}
    for pattern in document["patterns"]:
        for tokens in (96, 160):
            assert ("full cache", "indexcache", tokens, pattern, "") in seen
            for way in ("static", "dynamic"):
                assert ("generate", "indexcache", tokens, pattern, way) in seen
        assert ("generate", "transformers", 96, pattern, "dynamic") in seen
    for row in document["rows"]:
        if row["kind"] == "generate":
            assert row["prefill_seconds"] > 0
        if row["kind"] in ("generate", "full cache"):
            assert row["tokens_per_second"] > 0
        if row["kind"] == "overlap":
            assert all(0 < share <= 1 for share in row["layers"])
            assert all(1 <= union <= 4 for union in row["unions_of_4"])
    for name in ("speedup.png", "parts.png", "report.html"):
        assert (output / name).stat().st_size > 1000


def test_memory_of_the_cache_is_latents_and_index_keys_of_full_layers(run):
    document, _, _ = run
    held = {
        (row["pattern"], row["tokens"]): row["cache_gib"] * 2**30
        for row in document["rows"]
        if row["kind"] == "generate" and row["model"] == "indexcache" and row["way"] == "dynamic"
    }
    latent, key = 48 + 16, 32
    for tokens in (96, 160):
        assert round(held["all full", tokens]) == (tokens + 11) * 4 * (4 * latent + 4 * key)
        assert round(held["FSSS", tokens]) == (tokens + 11) * 4 * (4 * latent + 1 * key)


def test_every_part_is_timed(run):
    """How the times compare is for a machine that does nothing else."""
    document, _, _ = run
    parts = {(r["pattern"], r["way"]): r["milliseconds"] for r in document["rows"] if r["kind"] == "parts"}
    assert all(set(found) == set(PARTS) and min(found.values()) >= 0 for found in parts.values())
    for pattern in ("all full", "FSSS"):
        found = parts[pattern, "prefill"]
        assert min(found[part] for part in ("indexer", "attention", "experts", "projections", "rest")) > 0


def test_resume_measures_only_what_is_missing(run, monkeypatch):
    document, output, command = run
    journal = output / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-1]) + lines[-1][:20])
    measured = []
    measure = speed_run._Bench._measure
    monkeypatch.setattr(speed_run._Bench, "_measure", lambda self, row: measured.append(row) or measure(self, row))
    again = bench(*command, "--resume")
    assert again.exit_code == 0, again.output
    assert len(measured) == 1
    assert json.loads(again.stdout)["rows"][:-1] == document["rows"][:-1]
    refused = bench(*command)
    assert refused.exit_code == 2
    assert "go on with --resume" in refused.output
    other = bench(*command, "--resume", "--input", "random")
    assert other.exit_code == 2
    assert "belongs to another benchmark (input: drift there, random now)" in " ".join(other.output.split())


def test_a_plan_is_followed_in_its_order_and_on_disk_after_every_row(tmp_path, monkeypatch):
    entries = [
        {"kind": "generate", "model": "transformers", "tokens": [40], "patterns": ["FSSS", "all full"]},
        {"kind": "generate", "tokens": [96], "patterns": ["all full"], "way": ["dynamic", "static"], "repeats": 2},
        {"kind": "generate", "tokens": [96], "patterns": ["FSSS"], "input": "random"},
        {"kind": "parts", "tokens": [96], "patterns": ["FSSS"]},
        {"kind": "overlap", "tokens": [96], "patterns": ["FSSS"]},
        {"kind": "generate", "tokens": [96], "patterns": ["FSSS"], "indexer": "e4m3"},
        {"kind": "generate", "tokens": [80], "patterns": ["FSSS"]},
    ]
    (tmp_path / "plan.json").write_text(json.dumps({"rows": entries}))
    monkeypatch.setattr(speed_run, "PEER_ONE_SHOT", 16)
    monkeypatch.setattr(speed_run, "PEER_CHUNK", 16)
    inspected, written = [], []
    inspect, measure = speed_run._inspect, speed_run._Bench.measure
    monkeypatch.setattr(speed_run, "_inspect", lambda *a: inspected.append(a) or inspect(*a))

    def noted(self, row):
        measured = measure(self, row)
        written.append(json.loads((tmp_path / "out" / "bench.json").read_text()) if written else None)
        return measured

    calls, generate = [], speed_run.measure_generate

    def called(model, given, way, steps, *rest):
        calls.append((type(model).__name__[:5], given.shape[1], steps, model.config.indexer_fp8))
        return generate(model, given, way, steps, *rest)

    monkeypatch.setattr(speed_run, "measure_generate", called)
    monkeypatch.setattr(speed_run, "WARM_UP_TOKENS", 32)
    monkeypatch.setattr(speed_run._Bench, "measure", noted)
    plan = ("--plan", tmp_path / "plan.json", "--output", tmp_path / "out")
    finished = bench("--shape", "tiny", "--layers", 4, "--decode-steps", 4, "--repeats", 1, *plan, "--json")
    assert finished.exit_code == 0, finished.output
    document = json.loads(finished.stdout)
    rows = document["rows"]
    assert [(row["kind"], row["model"], row["pattern"], row["way"], row["input"]) for row in rows] == [
        ("generate", "transformers", "FSSS", "dynamic", ""),
        ("generate", "transformers", "all full", "dynamic", ""),
        ("generate", "indexcache", "all full", "dynamic", ""),
        ("generate", "indexcache", "all full", "static", ""),
        ("generate", "indexcache", "FSSS", "static", "random"),
        ("parts", "indexcache", "FSSS", "prefill", ""),
        ("parts", "indexcache", "FSSS", "decode", ""),
        ("overlap", "indexcache", "FSSS", "", ""),
        ("generate", "indexcache", "FSSS", "static", ""),
        ("generate", "indexcache", "FSSS", "static", ""),
    ]
    # Every model is warmed up once; the peer anew for every pattern, whose weights are others.
    theirs = [("GlmMo", 32, 8, False), ("GlmMo", 40, 4, False)]
    ours = [
        ("Index", tokens, 4, fp8) for tokens, fp8 in ((96, False), (96, False), (96, False), (96, True), (80, False))
    ]
    assert calls == [*theirs, *theirs, ("Index", 32, 8, False), *ours]
    assert [row["indexer"] for row in rows] == [""] * 8 + ["e4m3", ""]
    assert [len(row["all_prefill_seconds"]) for row in rows[:5]] == [1, 1, 2, 2, 1]
    assert len(inspected) == 1
    assert [len(earlier["rows"]) for earlier in written[1:]] == list(range(1, 10))
    assert document["patterns"] == {"FSSS": "FSSS", "all full": "FFFF"}
    report = (tmp_path / "out" / "report.html").read_text()
    assert "random tokens" in report
    assert "indexer in e4m3" in report


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is not a JSON file of"),
        ('{"rows": [{"kind": "generate", "tokens": [64]}]}', "entry 0"),
        (
            '{"rows": [{"kind": "speed", "tokens": [64], "patterns": ["1/4"]}]}',
            "no such measurement: speed of indexcache",
        ),
        (
            '{"rows": [{"kind": "parts", "tokens": [64], "patterns": ["1/4"], "way": "static"}]}',
            "parts has no way static",
        ),
        (
            '{"rows": [{"kind": "generate", "tokens": [64], "patterns": ["1/4"], "indexer": "int4"}]}',
            "indexer must be e4m3",
        ),
        ('{"rows": [{"kind": "generate", "tokens": [4], "patterns": ["1/4"]}]}', "--plan: length 4 must lie in"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(tmp_path, text, message):
    (tmp_path / "plan.json").write_text(text)
    refused = bench("--shape", "tiny", "--plan", tmp_path / "plan.json", "--output", tmp_path / "out")
    assert refused.exit_code == 2, refused.output
    assert message in " ".join(refused.output.split())


def test_the_plan_of_the_published_figures_can_be_read():
    rows = read_plan(Path(speed_plan.__file__).with_name("long_context_plan.json"))
    assert Row("generate", "transformers", 32768, "all full", "dynamic", repeats=2) in rows
    assert len(rows) == len(set(rows)) > 30


def test_a_checkpoint_runs_its_own_pattern_and_prints_tables(tmp_path):
    finished = bench(DEMO, "--length", 80, "--decode-steps", 4, "--repeats", 1, "--no-breakdown", "--output", tmp_path)
    assert finished.exit_code == 0, finished.output
    assert "Prefill, seconds to the first token" in finished.output
    assert json.loads((tmp_path / "bench.json").read_text())["patterns"] == {"own": "F" * 12}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shape", "tiny", "--length", 4), "--length 4 must lie in 16 .. 1048576"),
        (("--shape", "tiny", "--length", 64, "--pattern", "SFFFFFFF"), "'SFFFFFFF'"),
        (("--shape", "tiny", "--cache", "quick"), "--cache must be static or dynamic (got quick)"),
        ((DEMO, "--shape", "tiny"), "leave out the checkpoint"),
        ((DEMO, "--length", 64, "--baseline"), "--baseline runs transformers' glm_moe_dsa, and"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, message):
    refused = bench(*arguments, "--output", tmp_path / "out")
    assert refused.exit_code == 2, refused.output
    assert message in " ".join(refused.output.split())


def test_speed_ups_compare_with_the_first_pattern_and_take_the_fastest_way():
    rows = [
        {"kind": "generate", "model": "indexcache", "tokens": 10, "pattern": p, "way": w, "tokens_per_second": s}
        for p, w, s in (("all full", "static", 10.0), ("1/4", "static", 15.0), ("1/4", "dynamic", 5.0))
    ]
    document = {"patterns": {"all full": "FF", "1/4": "FS"}, "rows": rows}
    assert speed_ups(document, "decode") == {"1/4": [(10, 1.5)]}
    assert speed_ups(document, "prefill") == {}
    assert [round(ratio, 2) for _, ratio in paper_speed_ups("prefill")["1/4"]] == [1.27, 1.31, 1.51, 1.82]


def test_kernels_are_told_apart_by_name():
    names = {
        "lightning_indexer_prefill_kernel": "indexer",
        "indexer_select_kernel": "selection",
        "finish_rows_kernel": "selection",
        "_sparse_mla_hopper_kernel": "attention",
        "_merge_key_lists_kernel": "attention",
        "experts_up_vector_kernel": "experts",
        "void cutlass::device_kernel<...GroupProblemShape...>": "experts",
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT": "projections",
        "void at::native::elementwise_kernel<128, 4, ...>": "rest",
    }
    assert {name: part_of_kernel(name) for name in names} == names
