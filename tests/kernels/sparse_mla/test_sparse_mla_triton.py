"""The Triton sparse MLA kernels: numbers in Triton's interpreter, resources of the compiled code, no GPU needed."""

import sys
from pathlib import Path

import pytest
from testing.fresh_process import run_worker

pytest.importorskip("triton")


@pytest.mark.skipif(sys.platform != "linux", reason="triton is built for Linux only")
@pytest.mark.parametrize("worker", ["interpret_sparse_mla", "compile_sparse_mla"])
def test_in_a_fresh_process(worker):
    run_worker(Path(__file__).parent, worker)
