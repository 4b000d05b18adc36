"""torch.export and AOTInductor: a prefill of a fixed length, and what is said of lengths that vary."""

import shutil

import pytest


@pytest.mark.row("torch.export", "prefill of a fixed length, beyond top-k", package="torch")
def test_export(load, ids, tmp_path):
    import torch

    model = load(attn_implementation="eager")
    with torch.no_grad():
        program = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
        torch.export.save(program, tmp_path / "model.pt2")
        again = torch.export.load(tmp_path / "model.pt2").module()
        found, expected = again(ids, use_cache=False), model(ids, use_cache=False)
    torch.testing.assert_close(found["logits"], expected.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.row("torch.export", "lengths that vary", package="torch")
def test_export_of_any_length(load, ids):
    import torch

    model, length = load(attn_implementation="eager"), torch.export.Dim("length", min=65, max=4096)
    with torch.no_grad():
        program = torch.export.export(
            model,
            (ids,),
            {"use_cache": False},
            dynamic_shapes={"input_ids": {1: length}, "use_cache": None},
            strict=False,
        )
        other = ids[:, :80]
        found, expected = program.module()(other, use_cache=False), model(other, use_cache=False)
    torch.testing.assert_close(found["logits"], expected.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.row("torch.compile", "prefill, beyond top-k", package="torch")
def test_compile(load, ids):
    import torch

    model = load()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        found, expected = compiled(ids, use_cache=False), model(ids, use_cache=False)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.row("AOTInductor", "prefill compiled with the C++ compiler here, run from its package", package="torch")
def test_aot_inductor(load, ids, tmp_path):
    import torch

    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    model = load(attn_implementation="eager")
    with torch.no_grad():
        program = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        found, expected = torch._inductor.aoti_load_package(package)(ids, use_cache=False), model(ids, use_cache=False)
    torch.testing.assert_close(found["logits"], expected.logits, rtol=1e-3, atol=1e-3)
