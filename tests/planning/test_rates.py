"""Measured rates are those of this repository's results, and what is reckoned from them meets whole models' times."""

import json
from pathlib import Path

import pytest

import indexcache
from indexcache.planning.cache_memory import layer_cache_bytes
from indexcache.planning.known_gpus import GIB, find_gpu, known_gpus
from indexcache.planning.placement import Placement
from indexcache.planning.rates import RATES_FILE, Rates, measured_rates
from indexcache.planning.times import BOUND, MEASURED, RECKONED, decode_rate, described_model, prefill_seconds
from indexcache.planning.workspace import Prefill, workspace_bytes
from indexcache.runs.errors import RunError

ROOT = Path(indexcache.__file__).parent
DOCUMENT = json.loads(RATES_FILE.read_text())
WHOLE = DOCUMENT["whole"]
DEVICES = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}
here = pytest.mark.skipif(not (ROOT / "benchmarks/results").is_dir(), reason="results are not installed")


def result_of(key):
    document = json.loads((ROOT / DOCUMENT["sources"][key]["file"]).read_text())
    return document.get("new", document)


def named(entry):
    return f"{entry['source']}, {entry['tokens']}, {entry['pattern'].count('F')} of {len(entry['pattern'])}"


each_whole = pytest.mark.parametrize("entry", WHOLE, ids=named)
# Those that no rate was taken from.
each_other = pytest.mark.parametrize("entry", [entry for entry in WHOLE if not entry["sets_decode_rate"]], ids=named)


@here
@pytest.mark.parametrize("key", DOCUMENT["sources"])
def test_sources_say_where_and_when(key):
    source, document = DOCUMENT["sources"][key], result_of(key)
    machine = document.get("machine", document)
    assert source["machine"] == machine["device"] == DEVICES[source["gpu"]]
    assert (source["date"], source["commit"]) == (machine["date"], machine.get("commit"))


@here
@pytest.mark.parametrize("kind", ["indexer_prefill", "indexer_decode", "sparse_mla_prefill", "sparse_mla_decode"])
def test_kernels_rates_are_those_of_the_results(kind):
    assert len(DOCUMENT[kind]) >= 5
    for entry in DOCUMENT[kind]:
        group = kind.rpartition("_")[0].replace("indexer", "lightning_indexer")
        found = [c for c in result_of(entry["source"])["cases"] if (c["group"], c["name"]) == (group, entry["case"])]
        (case,) = found
        value = "tflops" if "tflops" in entry else "ms"
        assert entry[value] == pytest.approx(case[value], rel=1e-3) and entry["heads"] == case["H"]
        if "tokens" in entry:
            assert (entry["tokens"], entry["tokens"], entry["e4m3"]) == (case["S"], case["L"], case["dtype"] == "e4m3")
        if "keys" in entry:
            assert entry["keys"] == case["L"] * int(entry["case"].split("B=")[1].split()[0])


@here
def test_ceilings_are_those_of_the_results():
    for entry in DOCUMENT["ceilings"]:
        assert entry["value"] == pytest.approx(result_of(entry["source"])["ceilings"][entry["what"]], rel=1e-4)


@here
@each_whole
def test_whole_models_are_those_of_the_results(entry):
    document = result_of(entry["source"])
    row = document["rows"][entry["row"]]
    assert row.get("tokens", row.get("length")) == entry["tokens"]
    for name in ("prefill_seconds", "tokens_per_second", "above_gib"):
        assert entry[name] == pytest.approx(row[name], rel=1e-3)
    if "patterns" in document:
        assert document["patterns"][row["pattern"]] == entry["pattern"]
        assert document["routed_experts"] == DOCUMENT["models"][entry["model"]]["n_routed_experts"]
    assert len(entry["pattern"]) == DOCUMENT["models"][entry["model"]]["num_hidden_layers"]


def of(entry):
    """Its model and GPU, and rates that know no whole models but those that rates are taken from."""
    model = described_model(DOCUMENT["models"][entry["model"]], entry["pattern"])
    gpu = find_gpu(DOCUMENT["sources"][entry["source"]]["gpu"])
    known = [other for other in WHOLE if other["sets_decode_rate"]]
    return model, gpu, Rates({**DOCUMENT, "whole": known})


ONE = Placement("one GPU", 1)


@each_other
def test_reckoned_prefill_is_what_was_measured_or_a_little_less(entry):
    """Short prompts have parts that no rate is of."""
    model, gpu, rates = of(entry)
    found = prefill_seconds(model, ONE, gpu, rates, 1, entry["tokens"])
    assert found.label == RECKONED and found.value == pytest.approx(sum(found.parts.values()))
    least = 0.9 if entry["tokens"] >= 60000 else 0.82
    assert least < found.value / entry["prefill_seconds"] < 1.0


@each_other
def test_reckoned_decoding_is_what_was_measured(entry):
    model, gpu, rates = of(entry)
    found = decode_rate(model, ONE, gpu, rates, 1, entry["tokens"])
    assert found.label == RECKONED
    assert 0.95 < found.value / entry["tokens_per_second"] < 1.12


@each_whole
def test_workspace_is_what_was_measured(entry):
    """Static caches had as many rows as the longest prompt of their run until then."""
    model, _, _ = of(entry)
    before = WHOLE[: WHOLE.index(entry) + 1]
    rows = max(other["tokens"] for other in before if other["source"] == entry["source"])
    caches = [sum(layer_cache_bytes(model.config, layer, 1, rows, "BF16")) for layer in range(len(entry["pattern"]))]
    found = workspace_bytes(Prefill(model.config, 1, entry["tokens"]), caches) / GIB
    assert found > 0.98 * entry["above_gib"]
    assert found < max(1.07 * entry["above_gib"], entry["above_gib"] + 0.15)


@each_whole
def test_what_was_measured_is_shown_as_it_was(entry):
    model, gpu, _ = of(entry)
    prefill = prefill_seconds(model, ONE, gpu, measured_rates(), 1, entry["tokens"])
    decode = decode_rate(model, ONE, gpu, measured_rates(), 1, entry["tokens"])
    assert (prefill.label, decode.label) == (MEASURED, MEASURED)
    assert DOCUMENT["sources"][entry["source"]]["file"] in prefill.source
    assert (prefill.value, decode.value) == (entry["prefill_seconds"], entry["tokens_per_second"])
    # Two of them, one token more, or another pattern were not.
    for batch, tokens in ((2, entry["tokens"]), (1, entry["tokens"] + 1)):
        assert prefill_seconds(model, ONE, gpu, measured_rates(), batch, tokens).label != MEASURED


def test_bounds_are_no_estimates():
    """Nothing was measured of fp8 products, of several processes, of other GPUs, and of models so narrow."""
    entry = next(other for other in WHOLE if "DeepSeek" in other["model"])
    model, gpu, rates = of(entry)
    wide = prefill_seconds(model, ONE, gpu, rates, 1, 50000), decode_rate(model, ONE, gpu, rates, 1, 50000)
    assert [figure.label for figure in wide] == [RECKONED, RECKONED]
    model.narrow = True
    narrow = prefill_seconds(model, ONE, gpu, rates, 1, 50000)
    assert narrow.label == BOUND and narrow.value < wide[0].value
    model.narrow = False
    for placement, kind in ((Placement("tensor parallel", 8), "h200"), (ONE, "b200"), (ONE, "a100-80")):
        other = find_gpu(kind)
        assert prefill_seconds(model, placement, other, rates, 1, 50000).label == BOUND
        assert decode_rate(model, placement, other, rates, 1, 50000).label == BOUND
    # A bound on decoding that no measured run beats.
    for other in WHOLE:
        model, gpu, _ = of(other)
        model.narrow = True
        assert decode_rate(model, ONE, gpu, rates, 1, other["tokens"]).value > other["tokens_per_second"]


def test_what_sharing_saves_is_an_indexer_per_layer():
    entry = next(other for other in WHOLE if other["pattern"] == "F" * 47 and other["tokens"] == 120000)
    every, gpu, rates = of(entry)
    half = described_model(DOCUMENT["models"][entry["model"]], "FS" * 23 + "F")
    parts = [prefill_seconds(model, ONE, gpu, rates, 1, 120000).parts for model in (every, half)]
    assert parts[1]["indexers"] == pytest.approx(parts[0]["indexers"] * 24 / 47)
    assert parts[1]["attention"] == parts[0]["attention"]


def test_below_top_k_no_indexer_scores():
    entry = WHOLE[0]
    model, gpu, rates = of(entry)
    short = prefill_seconds(model, ONE, gpu, rates, 1, 2048).parts["indexers"]
    long = prefill_seconds(model, ONE, gpu, rates, 1, 2049).parts["indexers"]
    assert long > 3 * short > 0


def test_batches_read_more_experts_but_no_weights_twice():
    entry = next(other for other in WHOLE if "30B" in other["model"])
    model, gpu, rates = of(entry)
    speeds = [decode_rate(model, ONE, gpu, rates, batch, 4096).value for batch in (1, 4, 16)]
    assert speeds[0] < speeds[1] < 4 * speeds[0] and speeds[1] < speeds[2] < 16 * speeds[0]


def test_known_gpus_have_a_source_and_plausible_figures():
    gpus = known_gpus()
    assert {"h100", "h200", "a100-80", "b200", "l40s", "rtx-pro-6000"} <= set(gpus)
    for gpu in gpus.values():
        assert "data sheet" in gpu.source and 20e9 < gpu.memory < 300e9 and 5e11 < gpu.bandwidth < 1e13
        assert gpu.fp8 is None or gpu.fp8 == pytest.approx(2 * gpu.bf16, rel=0.02)
        assert gpu.rates_of in (None, "h100")


def test_a_memory_of_one_s_own():
    assert find_gpu("H200", 100).memory == 100 * GIB
    assert find_gpu("rtx_pro_6000").key == "rtx-pro-6000"
    with pytest.raises(RunError, match="'h20' is not known: did you mean h200"):
        find_gpu("h20")
    with pytest.raises(RunError, match="must be a positive number of GiB"):
        find_gpu("h200", 0.0)
