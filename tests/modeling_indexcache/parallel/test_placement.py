"""Models placed by accelerate: hooks that move tensors change nothing, offloaded weights give the same numbers.

On a CPU accelerate's hooks are the same; the meta device stands in for a second one where only placement matters.
"""

import copy

import pytest
import torch
from testing.tiny_models import tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from indexcache.kernels.experts import routed_experts
from indexcache.kernels.sparse_mla.merged_selection import MergedSelection
from indexcache.modeling_indexcache.attention import query_chunks
from indexcache.modeling_indexcache.eligibility import is_plain_linear, why_not_as_written
from indexcache.modeling_indexcache.layers import feed_forward, indexer
from indexcache.modeling_indexcache.parallel.layer_placement import device_ranges, onloaded
from indexcache.modeling_indexcache.parallel.module_hooks import placement_of
from indexcache.modeling_indexcache.selection import IndexerTrace, Selection

accelerate = pytest.importorskip("accelerate")
hooks = pytest.importorskip("accelerate.hooks")

PATTERN = "FSFS"
LAYERS = len(PATTERN)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return tiny_model(index_share_pattern=PATTERN)


@pytest.fixture(scope="module")
def ids():
    torch.manual_seed(5)
    return torch.randint(2, 96, (2, 40))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(query_chunks, "ATTENTION_BLOCK_BYTES", 2**14)
    monkeypatch.setattr(indexer, "QUERY_BLOCK_BYTES", 2**13)
    monkeypatch.setattr(feed_forward, "FEED_FORWARD_BLOCK_BYTES", 2**11)
    monkeypatch.setattr(routed_experts, "BLOCK_BYTES", 2**12)


def dispatched(model, places, folder=None):
    """A copy of the model as `device_map` leaves it."""
    names = ("embed_tokens", "norm", "rotary_emb")
    whole = {**{f"model.{name}": "cpu" for name in names}, "lm_head": "cpu"}
    whole |= {f"model.layers.{layer}": place for layer, place in enumerate(places)}
    twin, skip = copy.deepcopy(model), model._skip_keys_device_placement
    return accelerate.dispatch_model(twin, whole, offload_dir=folder, skip_keys=skip, force_hooks=True)


def hooked(model, folder):
    return dispatched(model, ["cpu"] * LAYERS)


def hooked_twice(model, folder):
    """Every hook a sequence of two."""
    twin = hooked(model, folder)
    for module in list(twin.modules()):
        if hasattr(module, "_hf_hook"):
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu"), append=True)
    return twin


def on_disk(model, folder):
    return dispatched(model, ["cpu", "disk", "disk", "cpu"], folder)


def offloaded(model, folder):
    return accelerate.cpu_offload(copy.deepcopy(model), execution_device=CPU)


RESIDENT = [hooked, hooked_twice]
EVERY_WAY = [*RESIDENT, on_disk, offloaded]


@torch.no_grad()
def prefill_and_steps(model, ids, cache=None):
    """Logits of a padded prefill and of ten decoding steps."""
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    cache = DynamicCache(config=model.config) if cache is None else cache
    logits = [model(ids[:, :30], attention_mask=mask[:, :30], past_key_values=cache).logits]
    for end in range(31, 41):
        logits.append(model(ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("way", EVERY_WAY)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_numbers_are_those_of_the_model_without_hooks_bit_for_bit(model, ids, tmp_path, small_blocks, way, kind):
    def cache():
        return StaticCache(config=model.config, max_cache_len=44) if kind == "static" else None

    placed = way(model, tmp_path)
    assert torch.equal(prefill_and_steps(placed, ids, cache()), prefill_and_steps(model, ids, cache()))
    with torch.no_grad():
        assert torch.equal(placed(ids).logits, model(ids).logits)


class Operations(TorchDispatchMode):
    """Every operation with the sizes of what it makes."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        tensors = out if isinstance(out, (tuple, list)) else [out]
        sizes = [t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor) and t.device == CPU]
        self.made.append((str(operation), sizes))
        return out

    @property
    def largest(self):
        return max(size for _, sizes in self.made for size in sizes)


def operations(model, ids):
    with torch.no_grad(), Operations() as seen:
        model(ids, logits_to_keep=1)
    return seen


@pytest.mark.parametrize("way", RESIDENT)
def test_hooks_that_only_move_tensors_leave_every_operation_as_it_is(model, ids, tmp_path, small_blocks, way):
    # In place, in blocks, with the same memory: the very same operations on the very same sizes.
    assert operations(way(model, tmp_path), ids).made == operations(model, ids).made


@pytest.mark.parametrize("way", [on_disk, offloaded])
def test_offloaded_layers_keep_the_bounds_of_memory(model, tmp_path, small_blocks, way):
    torch.manual_seed(6)
    ids = torch.randint(2, 96, (1, 250))
    width = model.config.num_attention_heads * (model.config.kv_lora_rank + model.config.qk_rope_head_dim)
    largest = operations(model, ids).largest
    assert largest < 4 * 250 * width  # else the bound would not bind
    assert operations(way(model, tmp_path), ids).largest == largest


@pytest.mark.parametrize("way", [on_disk, offloaded])
def test_an_offloaded_weight_is_fetched_once_a_forward_and_gone_after_it(model, ids, tmp_path, small_blocks, way):
    placed = way(model, tmp_path)
    layer, fetched, kept = placed.model.layers[1], [], {}
    paths = (
        "self_attn.q_b_proj",
        "self_attn.kv_b_proj",
        "self_attn.o_proj",
        "mlp.experts",
        "mlp.shared_experts.up_proj",
    )

    def counted(path, hook):
        original = hook.pre_forward
        hook.pre_forward = lambda *args, **kwargs: fetched.append(path) or original(*args, **kwargs)
        return hook

    for path in paths:
        kept[path] = counted(path, layer.get_submodule(path)._hf_hook)
    with torch.no_grad():
        placed(ids)
    assert sorted(fetched) == sorted(paths)
    assert all(p.device.type == "meta" for p in layer.parameters())
    assert all(layer.get_submodule(path)._hf_hook is hook for path, hook in kept.items())


def test_weights_go_back_after_an_error(model, tmp_path):
    attention = offloaded(model, tmp_path).model.layers[0].self_attn
    kept = {name: module._hf_hook for name, module in attention.named_modules() if hasattr(module, "_hf_hook")}
    with pytest.raises(ZeroDivisionError), onloaded(attention):
        assert is_plain_linear(attention.kv_b_proj)
        assert attention.kv_b_proj.weight.device == CPU
        raise ZeroDivisionError
    assert all(p.device.type == "meta" for p in attention.parameters())
    assert all(attention.get_submodule(name)._hf_hook is hook for name, hook in kept.items())


def test_attention_called_by_itself_fetches_what_it_reads(model, ids, tmp_path):
    placed = offloaded(model, tmp_path)
    with torch.no_grad():
        for ours in (placed, model):
            ours.seen = []
            handle = ours.model.layers[0].self_attn.register_forward_hook(
                lambda m, a, out, ours=ours: ours.seen.append(out)
            )
            ours(ids)
            handle.remove()
    assert torch.equal(placed.seen[0][0], model.seen[0][0])


def test_whoever_hooks_a_placed_module_still_sees_everything(model, ids, tmp_path):
    placed, seen = hooked(model, tmp_path), []
    for name in ("self_attn", "mlp", "self_attn.q_a_layernorm", ""):
        part = placed.model.layers[1].get_submodule(name)
        part.register_forward_hook(lambda module, args, out, name=name: seen.append(name))
    with torch.no_grad():
        got, expected = placed(ids).logits, model(ids).logits
    assert sorted(seen) == sorted(["self_attn", "mlp", "self_attn.q_a_layernorm", ""])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


class Noise(hooks.ModelHook):
    def post_forward(self, module, output):
        return output + 1


class Sneaky(hooks.AlignDevicesHook):
    def post_forward(self, module, output):
        return output + 1


def test_only_what_accelerate_itself_does_is_recognised():
    linear = hooks.add_hook_to_module(nn.Linear(3, 3), hooks.AlignDevicesHook("cpu"))
    assert placement_of(linear) == (CPU, False, False)
    assert why_not_as_written(linear) is None and is_plain_linear(linear)
    away = hooks.add_hook_to_module(nn.Linear(3, 3), hooks.AlignDevicesHook("cpu", offload=True, io_same_device=True))
    assert placement_of(away) == (CPU, True, True)
    assert why_not_as_written(away) == "accelerate keeps its weights elsewhere between calls"
    strange = [hooks.add_hook_to_module(nn.Linear(3, 3), hook) for hook in (Noise(), Sneaky("cpu"))]
    both = hooks.SequentialHook(hooks.AlignDevicesHook("cpu"), Noise())
    strange.append(hooks.add_hook_to_module(nn.Linear(3, 3), both))
    apart = hooks.SequentialHook(hooks.AlignDevicesHook("cpu"), hooks.AlignDevicesHook("meta"))
    strange.append(hooks.add_hook_to_module(nn.Linear(3, 3), apart))
    patched = nn.Linear(3, 3)
    patched.forward = lambda x: x  # before accelerate came
    strange.append(hooks.add_hook_to_module(patched, hooks.AlignDevicesHook("cpu")))
    wrapped = hooks.add_hook_to_module(nn.Linear(3, 3), hooks.AlignDevicesHook("cpu"))
    inner = wrapped.forward
    wrapped.forward = lambda x: inner(x) + 1  # after it
    strange.append(wrapped)
    for module in strange:
        assert placement_of(module) is None
        assert why_not_as_written(module) == "its forward was replaced" and not is_plain_linear(module)


@pytest.mark.parametrize("hook", [Noise, lambda: Sneaky("cpu")])
@pytest.mark.parametrize("path", ["self_attn.o_proj", "self_attn.kv_a_layernorm", "mlp.shared_experts", "mlp"])
def test_a_hook_that_does_more_than_move_is_honoured(model, ids, hook, path):
    changed = copy.deepcopy(model)
    hooks.add_hook_to_module(changed.model.layers[2].get_submodule(path), hook())
    expected = changed(ids).logits  # with gradient: nothing is streamed
    with torch.no_grad():
        got = changed(ids).logits
        assert not torch.allclose(got, model(ids).logits, atol=1e-3)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


class Recorder(nn.Module):
    """In place of a layer: keeps what it is given, and passes it on."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward(self, hidden_states, **kwargs):
        self.seen.append((hidden_states, kwargs))
        return hidden_states, kwargs["selection"], None


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def places_of(hidden_states, kwargs):
    plan, selection = kwargs["plan"], kwargs["selection"]
    seen = plan.visibility
    tensors = (hidden_states, *plan.angles, selection.indices(), seen.query_start, seen.key_mask)
    return {t.device.type for t in tensors}


@pytest.mark.parametrize("wrap", [lambda layer: layer, Wrapper], ids=["placed", "inside a wrapper"])
def test_everything_a_layer_reads_is_on_its_device(model, ids, wrap):
    """A shared layer on another device than its full layer gets the selection there, too."""
    apart = copy.deepcopy(model)
    recorders = [Recorder(), Recorder()]
    for index, recorder in enumerate(recorders):
        hooks.add_hook_to_module(recorder, hooks.AlignDevicesHook("meta"))
        apart.model.layers[index + 1] = wrap(recorder)
    apart.model.layers[3] = apart.model.layers[2]
    apart.set_index_share_pattern("FSSS")
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    for last in (apart.model.norm, apart.lm_head):
        hooks.add_hook_to_module(last, hooks.AlignDevicesHook("meta"))
    with torch.no_grad():
        assert apart(ids, attention_mask=mask).logits.device.type == "meta"
    for recorder in recorders:
        for seen in recorder.seen:
            assert places_of(*seen) == {"meta"}
    if wrap is not Wrapper:
        # Moved once, where the device changes.
        first, second = recorders[0].seen[0][1], recorders[1].seen[0][1]
        assert first["plan"] is second["plan"]
        assert device_ranges(apart.model.layers, CPU) == [(0, 1, CPU), (1, 4, torch.device("meta"))]


def test_angles_made_on_another_device_come_to_the_layers(model, ids):
    apart, recorder = copy.deepcopy(model), Recorder()
    apart.model.layers[0] = recorder
    rotary = apart.model.rotary_emb
    original = rotary.forward
    rotary.forward = lambda x, position_ids: tuple(angle.to("meta") for angle in original(x, position_ids))
    hooks.add_hook_to_module(recorder, hooks.AlignDevicesHook("cpu"))
    with torch.no_grad(), pytest.raises(NotImplementedError, match="meta"):
        apart(ids)  # the numbers are lost; that they were sent for is what counts


def test_selections_move_whole():
    trace = IndexerTrace(torch.zeros(1), torch.zeros(1), torch.zeros(1), None)
    moved = Selection(MergedSelection.empty(1, 8, 4, 2, CPU), trace).to(torch.device("meta"))
    assert type(moved) is Selection and type(moved.listed) is MergedSelection and type(moved.trace) is IndexerTrace
    assert moved.listed.keys.device.type == moved.listed.counts.device.type == "meta"
    assert (moved.listed.group, moved.listed.queries) == (2, 8)
    assert moved.trace.q.device.type == moved.trace.weights.device.type == "meta" and moved.trace.indices is None


WRAPPED = ["mlp", "mlp.gate", "mlp.experts", "mlp.shared_experts", "self_attn", "self_attn.indexer", "input_layernorm"]
WRAPPED += ["self_attn.q_a_layernorm", "self_attn.kv_a_layernorm", "post_attention_layernorm", "self_attn.indexer.wk"]
WRAPPED += ["self_attn.indexer.weights_proj", "self_attn.indexer.k_norm", "self_attn.q_b_proj", "self_attn.o_proj"]
WRAPPED += ["self_attn.kv_b_proj", "self_attn.indexer.wq_b", ""]


class Watching(Wrapper):
    """Keeps the shapes of what it is given; knows of no argument that transformers' own modules do not take."""

    def forward(self, *args, **kwargs):
        self.seen = [*getattr(self, "seen", []), args[0].shape]
        return self.inner(*args, **kwargs)


class Delegating(Watching):
    """Answers as what it wraps, like the wrappers of torch.compile and peft."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


@pytest.mark.parametrize("wrapper", [Watching, Delegating])
@pytest.mark.parametrize("path", WRAPPED)
def test_wrapped_parts_run_as_they_are(model, ids, small_blocks, path, wrapper):
    wrapped, layer = copy.deepcopy(model), f"model.layers.2.{path}".rstrip(".")
    stand_in = wrapper(wrapped.get_submodule(layer))
    wrapped.set_submodule(layer, stand_in)
    with torch.no_grad():
        got = wrapped(ids).logits
    torch.testing.assert_close(got, model(ids).logits, atol=1e-5, rtol=1e-5)
    whole = "proj" not in path and "wq_b" not in path
    tokens = (80, 48) if path in ("mlp.gate", "mlp.experts") else (2, 40)
    assert not whole or [shape[: len(tokens) if len(tokens) == 2 else 1] for shape in stand_in.seen] == [tokens]
    got = prefill_and_steps(wrapped, ids)
    torch.testing.assert_close(got, prefill_and_steps(model, ids), atol=1e-5, rtol=1e-5)


class Strict(Wrapper):
    def forward(self, hidden_states):
        return self.inner(hidden_states)


@pytest.mark.parametrize("path", ["mlp", "mlp.shared_experts", "post_attention_layernorm"])
def test_a_wrapper_that_takes_hidden_states_alone_is_given_no_more(model, ids, path):
    wrapped, name = copy.deepcopy(model), f"model.layers.2.{path}"
    wrapped.set_submodule(name, Strict(wrapped.get_submodule(name)))
    with torch.no_grad():
        torch.testing.assert_close(wrapped(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


class Stop(Exception):
    pass


@pytest.mark.parametrize("grad", [False, True])
def test_a_recorder_in_place_of_the_first_layer_gets_its_inputs(model, ids, grad):
    """As every calibration-based quantiser does it: catch the inputs, stop, and run layers with them later."""

    class Catcher(Wrapper):
        def forward(self, hidden_states, **kwargs):
            self.caught = hidden_states, kwargs
            raise Stop

    caught = copy.deepcopy(model)
    first = caught.model.layers[0]
    catcher = caught.model.layers[0] = Catcher(first)
    with torch.set_grad_enabled(grad), pytest.raises(Stop):
        caught(ids, use_cache=False)
    hidden_states, kwargs = catcher.caught
    assert torch.equal(hidden_states, caught.model.embed_tokens(ids))
    assert kwargs.keys() == {"selection", "plan"}
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states[1]
        kept = hidden_states.clone()
        torch.testing.assert_close(first(hidden_states, **kwargs)[0], expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(hidden_states, kept)
