"""Tensors read from shards by many threads: every byte where it belongs, in pieces of any size."""

import pytest
import torch
from safetensors.torch import save_file
from testing.checkpoints import as_bytes

from indexcache.conversion.io.checkpoint import read_header
from indexcache.conversion.io.sources import ConversionError, FolderSource
from indexcache.runs.streaming import shard_reader
from indexcache.runs.streaming.shard_reader import ShardReader

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def shards(tmp_path):
    """Two files of tensors in several dtypes, as header entries and values."""
    generator = torch.Generator().manual_seed(3)
    values = {}
    for file in ("a.safetensors", "b.safetensors"):
        part = {
            f"{file}/wide": torch.randn(300, 70, generator=generator),
            f"{file}/half": torch.randn(41, generator=generator).bfloat16(),
            f"{file}/fp8": torch.randn(128, 33, generator=generator).to(torch.float8_e4m3fn),
            f"{file}/one": torch.randn(1, generator=generator),
        }
        save_file(part, tmp_path / file)
        values |= part
    source = FolderSource(tmp_path)
    infos = {}
    for file in ("a.safetensors", "b.safetensors"):
        infos |= read_header(source, file).tensors
    return tmp_path, infos, values


@pytest.mark.parametrize("chunk", [1, 100, 4096, 2**24])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])])
def test_every_byte_is_read_once(shards, chunk, device, monkeypatch):
    folder, infos, values = shards
    if chunk == 1:
        infos = {name: info for name, info in infos.items() if info.nbytes < 100}
    monkeypatch.setattr(shard_reader, "CHUNK_BYTES", chunk)
    stream = torch.cuda.Stream() if device == "cuda" else None
    reader = ShardReader(folder, "here", stream)
    targets = {name: torch.zeros_like(values[name], device=device) for name in infos}
    if device == "cuda":
        torch.cuda.synchronize()
    count = reader.fill((infos[name], target) for name, target in targets.items())
    reader.close()
    assert count == sum(info.nbytes for info in infos.values())
    for name, target in targets.items():
        assert as_bytes(target.cpu()) == as_bytes(values[name]), name


def test_another_dtype_is_cast(shards):
    folder, infos, values = shards
    reader = ShardReader(folder, "here", None)
    name = "a.safetensors/wide"
    narrow, wide = torch.empty(300, 70, dtype=torch.bfloat16), torch.empty(41)
    reader.fill([(infos[name], narrow), (infos["b.safetensors/half"], wide)])
    reader.close()
    assert torch.equal(narrow, values[name].bfloat16())
    assert torch.equal(wide, values["b.safetensors/half"].float())


def test_parts_of_a_stack_are_filled_in_place(shards):
    folder, infos, values = shards
    stack = torch.zeros(2, 300, 70)
    reader = ShardReader(folder, "here", None)
    reader.fill((infos[f"{file}.safetensors/wide"], part) for file, part in zip("ab", stack))
    reader.close()
    assert torch.equal(stack, torch.stack([values[f"{file}.safetensors/wide"] for file in "ab"]))


def test_a_file_that_is_gone_is_named(shards):
    folder, infos, _ = shards
    (folder / "b.safetensors").unlink()
    reader = ShardReader(folder, "here", None)
    with pytest.raises(ConversionError, match=r"here: b\.safetensors cannot be read"):
        reader.fill([(infos["b.safetensors/one"], torch.empty(1))])
    reader.close()
