"""Recording is replaced by running the recorded function at each replay: all but CUDA itself runs on a CPU."""

import pytest
import torch
from testing.recorded_steps import PATTERN
from testing.tiny_models import tiny_model

from indexcache.modeling_indexcache import eligibility
from indexcache.modeling_indexcache.cache import decode_graph


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The questions about device and kernels answered as a GPU would."""
    monkeypatch.setattr(eligibility, "device_takes_graphs", lambda hidden_states: True)
    monkeypatch.setattr(eligibility, "why_not_expert_kernels", lambda mlp, tokens: None)
    monkeypatch.setattr(eligibility, "TRITON_ATTENTION", "sdpa")


@pytest.fixture
def model(as_on_a_gpu):
    return tiny_model(index_share_pattern=PATTERN)


@pytest.fixture
def replays(monkeypatch):
    """Every recording made, and the number of its replays."""
    made = []

    def record(run, rewind, device):
        out, count = run().clone(), [0]
        rewind()

        def replay():
            count[0] += 1
            out.copy_(run())

        made.append(count)
        return out, replay

    monkeypatch.setattr(decode_graph, "record", record)
    return made


@pytest.fixture(scope="module")
def ids():
    torch.manual_seed(3)
    return torch.randint(2, 96, (2, 30))
