"""What a model will launch is known from its config, compiled in threads, and waited for where it is needed."""

import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from testing.tiny_models import tiny_config, tiny_model

from indexcache.kernels.common.device_target import DeviceTarget
from indexcache.kernels.common.kernel_launch import launcher
from indexcache.kernels.common.pretended_tensors import PretendedTensor, pretended_launches

triton = pytest.importorskip("triton")

from indexcache.kernels.compilation import kernel_variants  # noqa: E402
from indexcache.kernels.compilation.compile_process import CLOSED, NotCompiledThere  # noqa: E402
from indexcache.kernels.compilation.kernel_variants import Compilations, Variant, VariantList, variant_key  # noqa: E402
from indexcache.modeling_indexcache import compile_ahead  # noqa: E402
from indexcache.modeling_indexcache.modeling_indexcache import IndexCacheModel  # noqa: E402

HOPPER = DeviceTarget("cuda", 90, 132)


def variants(lengths, pattern="FS", first=None, **fields):
    shape = {"num_hidden_layers": len(pattern), "n_group": 1, "index_topk": 32} | fields
    config = tiny_config(index_share_pattern=pattern, **shape)
    kept = compile_ahead.kinds_of_layers(config, pattern)
    model = compile_ahead.pretended_decoder(IndexCacheModel, config, kept, pattern, torch.bfloat16)
    begun_with = compile_ahead.prefills(lengths, first)
    return [variant for fresh in compile_ahead.variants_of(model, HOPPER, begun_with) for variant in fresh]


def test_prefill_and_decoding_are_known_without_a_gpu():
    names = {variant.name for variant in variants((5, 40))}
    assert {"rms_norm_rope_kernel", "_sparse_mla_fwd_kernel", "indexer_select_kernel"} <= names
    early = {variant.name for variant in variants((5,)) if variant.options.get("EARLY")}
    assert {"rms_norm_rope_kernel", "vector_linear_kernel"} <= early


@pytest.mark.parametrize("lengths", [(700, 701), (700, 911), (9000, 9001), (9000, 20_000), (20_000, 100_003)])
def test_no_variant_is_made_for_a_length(lengths):
    one, two = ({variant.key for variant in variants((length,))} for length in lengths)
    assert one == two


def test_one_layer_of_each_kind_stands_for_all():
    config = tiny_config(num_hidden_layers=6, index_share_pattern="FSFSSF", first_k_dense_replace=2)
    assert compile_ahead.kinds_of_layers(config, "FSFSSF") == [0, 1, 2, 3]
    kept = {variant.key for variant in variants((40,), "FSFSSF", first_k_dense_replace=2)}
    assert kept == {variant.key for variant in variants((40,), "FSFS", first_k_dense_replace=2)}


def test_tensors_have_the_dtypes_of_the_models():
    model = tiny_model(index_share_pattern="FS", num_hidden_layers=2).bfloat16()
    decoder = model.model
    decoder.layers[1].mlp.gate.e_score_correction_bias.data = torch.zeros(decoder.config.n_routed_experts)
    dtypes = {name: x.dtype for name, x in (*decoder.named_parameters(), *decoder.named_buffers())}
    small = compile_ahead.small_model(type(decoder), decoder.config, "FS", dtypes)
    assert {name: x.dtype for name, x in (*small.named_parameters(), *small.named_buffers())} == dtypes
    assert all(isinstance(x, PretendedTensor) for x in small.parameters()) and decoder.config.num_hidden_layers == 2


class Kernel:
    """A kernel that notes its launches and compilations, and may wait in the latter."""

    def __init__(self, gate=None, error=None):
        self.params, self.fn, self.src = [], Kernel, ""
        self.gate, self.error, self.events = gate, error, []

    def warmup(self, *arguments, grid, **options):
        if self.gate is not None:
            self.gate.wait(60)
        self.events.append("compiled")
        if self.error is not None:
            raise self.error

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.events.append("launched")


def variant_of(kernel):
    return Variant(kernel, variant_key(kernel, (), {}), (1,), (), {})


def test_a_launch_waits_for_its_variant_that_is_being_compiled():
    gate, compilations = threading.Event(), Compilations(torch.device("cpu"), 1)
    kernel = Kernel(gate)
    compilations.add([variant_of(kernel)])
    thread = threading.Thread(target=lambda: launcher(kernel, (1,), torch.zeros(1))())
    while not next(iter(compilations._pending.values())).running():
        pass
    thread.start()
    assert kernel.events == []
    gate.set()
    thread.join(60)
    compilations.finish()
    assert kernel.events == ["compiled", "launched"]
    launcher(kernel, (1,), torch.zeros(1))()
    assert kernel.events == ["compiled", "launched", "launched"]


def test_a_launch_does_not_wait_for_what_has_not_begun():
    class Other(Kernel):
        pass

    gate, compilations = threading.Event(), Compilations(torch.device("cpu"), 1)
    first, second = Kernel(gate), Kernel()
    second.fn = Other
    compilations.add([variant_of(first), variant_of(second)])
    launcher(second, (1,), torch.zeros(1))()
    assert second.events == ["launched"]
    gate.set()
    compilations.finish()
    assert second.events == ["launched"] and first.events == ["compiled"]


def test_what_does_not_compile_is_left_to_its_launch():
    compilations, kernel = Compilations(torch.device("cpu"), 2), Kernel(error=ValueError("no such layout"))
    compilations.add([variant_of(kernel)])
    launcher(kernel, (1,), torch.zeros(1))()
    assert "launched" in kernel.events
    assert set(compilations.finish().values()) <= {"ValueError: no such layout"}


class Side:
    """A side process that compiles nothing, gets ready and goes when it is told."""

    def __init__(self, jobs=3, compiles=True):
        self.jobs, self.compiles = jobs, compiles
        self.is_ready = self.is_gone = False
        self.asked, self.closed, self.call = [], [], lambda: None

    def on_change(self, call):
        self.call = call

    def turn(self, **flags):
        self.__dict__.update(flags)
        self.call()

    def compile(self, kernel, grid, arguments, options):
        self.asked.append(kernel)
        if not self.compiles:
            raise NotCompiledThere("gone")
        return "key"

    def close(self, reason=CLOSED):
        self.closed.append(reason)
        self.turn(is_gone=True, is_ready=False)


def other_kernels(number, **arguments):
    kernels = []
    for i in range(number):
        kernel = Kernel(**arguments)
        kernel.fn = type(f"Other{i}", (), {})
        kernels.append(kernel)
    return kernels


def test_threads_compile_until_the_side_process_is_ready():
    side, gate = Side(), threading.Event()
    compilations = Compilations(torch.device("cpu"), 1, side)
    kernels = other_kernels(5, gate=gate)
    compilations.add(map(variant_of, kernels))
    first = compilations._pending[variant_of(kernels[0]).key]
    while not first.running():
        pass
    assert side.asked == []
    side.turn(is_ready=True)
    gate.set()
    assert compilations.finish() == dict.fromkeys(variant_of(kernel).key for kernel in kernels)
    assert {id(kernel) for kernel in side.asked} == {id(kernel) for kernel in kernels[1:]}
    # Each was loaded here, too.
    assert all(kernel.events == ["compiled"] for kernel in kernels) and side.closed == [CLOSED]


@pytest.mark.parametrize("flags", [{"is_gone": True}, {"is_ready": True}])
def test_without_the_side_process_threads_compile_all(flags):
    side = Side(compiles=False)
    compilations, kernels = Compilations(torch.device("cpu"), 1, side), other_kernels(4)
    side.turn(**flags)
    compilations.add(map(variant_of, kernels))
    assert set(compilations.finish().values()) == {None} and all(kernel.events == ["compiled"] for kernel in kernels)


def test_a_side_process_whose_kernels_are_not_found_is_given_up():
    class Compiled:
        hash = "another"

    side, kernels = Side(jobs=1), other_kernels(3)
    for kernel in kernels:
        kernel.warmup = lambda *arguments, grid, **options: Compiled
    compilations = Compilations(torch.device("cpu"), 1, side)
    side.turn(is_ready=True)
    compilations.add(map(variant_of, kernels))
    assert set(compilations.finish().values()) == {None}
    assert side.asked == kernels[:1] and "does not find" in side.closed[0]


def test_padded_batches_have_variants_of_their_own_and_come_first():
    plain = [v.key for v in variants((40,))]
    masked = [v.key for v in variants((40,), first=compile_ahead.Prefill(2, 30, True))]
    assert set(plain) < set(masked)
    own = [dict(key[1:]).get("HAS_MASK") for key in masked if key not in set(plain)]
    assert "True" in own and len(masked) == len(set(masked))
    begun_with = compile_ahead.prefills((16, 1000), compile_ahead.Prefill(3, 300, True))
    assert begun_with[0] == (3, 300, True) and (1, 1000, False) in begun_with and (3, 16, True) in begun_with
    assert (3, 1000, True) not in begun_with and len(begun_with) == 4


def test_a_variant_is_compiled_once():
    compilations, kernel = Compilations(torch.device("cpu"), 3), Kernel()
    for _ in range(5):
        compilations.add([variant_of(kernel)])
    compilations.finish()
    assert kernel.events == ["compiled"]


def test_nothing_begins_on_a_cpu_nor_where_it_is_turned_off(monkeypatch):
    begun = []
    monkeypatch.setattr(compile_ahead.threading, "Thread", lambda **arguments: begun.append(arguments))
    model = tiny_model(index_share_pattern="FS", num_hidden_layers=2)
    with torch.no_grad():
        model(torch.zeros(1, 5, dtype=torch.int64))
    assert not begun
    monkeypatch.setenv(compile_ahead.COMPILE_AHEAD, "0")
    monkeypatch.setattr(compile_ahead, "why_not_compiled_ahead", lambda *_: None)
    compile_ahead.compile_ahead(model.model, torch.zeros(1, 5, 8))
    assert not begun


def test_a_kind_of_model_is_compiled_once_on_each_device(monkeypatch):
    begun = []

    class Thread:
        def __init__(self, **arguments):
            begun.append(arguments["args"][1])

        def start(self):
            pass

    monkeypatch.setattr(compile_ahead.threading, "Thread", Thread)
    monkeypatch.setattr(compile_ahead, "why_not_compiled_ahead", lambda *_: None)
    monkeypatch.setattr(compile_ahead, "_started", set())
    monkeypatch.setattr(compile_ahead, "_mark", lambda *_: None)
    monkeypatch.setenv(compile_ahead.COMPILE_AHEAD, "2")
    model = tiny_model(index_share_pattern="FS", num_hidden_layers=2).model
    for device in ("cpu", "cpu", "meta", "cpu"):
        compile_ahead.compile_ahead(model, torch.zeros(1, 5, 8, device=device))
    assert begun == [torch.device("cpu"), torch.device("meta")]


def test_a_config_is_hashed_only_when_it_changed(monkeypatch):
    model, hashed = tiny_model(index_share_pattern="FS", num_hidden_layers=2).model, []
    whole = type(model.config).to_dict
    monkeypatch.setattr(type(model.config), "to_dict", lambda self: hashed.append(self) or whole(self))
    kind = compile_ahead._kind_of(model)
    assert compile_ahead._kind_of(model) == kind and len(hashed) == 1
    model.config.rope_parameters["rope_theta"] *= 2
    assert compile_ahead._kind_of(model) != kind and len(hashed) == 2
    model.config.rope_parameters["rope_theta"] /= 2
    assert compile_ahead._kind_of(model) == kind


PROGRAM = """
import json, sys, torch
from indexcache.conversion.publish.warm_up import no_driver, _find_variants, _fields, TARGETS
from triton.runtime.driver import driver
import triton
hits = []
triton.knobs.compilation.listener = lambda src, cache_hit, **rest: hits.append(cache_hit)
driver.set_active(no_driver(TARGETS["sm_90"]))
source = sys.argv[1]
variants = _find_variants(_fields(source, None, None), source, "bfloat16", TARGETS["sm_90"], (40,))
small = sorted(variants, key=lambda variant: len(variant.kernel.src))[:4]
for variant in small:
    variant.compile()
print(json.dumps([len(variants), hits]))
"""


@pytest.mark.slow
def test_a_cache_that_one_process_filled_serves_the_next(tmp_path):
    config = tiny_config(index_share_pattern="FS", num_hidden_layers=2, n_group=1)
    config.save_pretrained(tmp_path / "model")
    found = []
    for _ in range(2):
        environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "model")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert found[0] == [found[1][0], [False] * 4] and found[1][1] == [True] * 4


def test_recorded_launches_run_nothing_and_leave_nothing_behind():
    found = VariantList()
    with pretended_launches(HOPPER, found.record):
        x = torch.empty(2, 3, device="cuda", dtype=torch.bfloat16)
        assert x.is_cuda and x.device.type == "cuda" and x.get_device() == 0 and x.T.is_cuda and (x @ x.T).is_cuda
        launcher(Kernel(), (1,), x)(x)
    assert len(found.variants) == 1 and not torch.zeros(1).is_cuda
    assert kernel_variants.variant_key(Kernel(), (), {"N": 16}) != kernel_variants.variant_key(Kernel(), (), {"N": 17})
