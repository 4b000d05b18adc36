"""Passes that go through the layers together are what each is alone, wherever their states wait."""

from pathlib import Path

import pytest
import torch

from indexcache.conversion.io.open_checkpoint import open_checkpoint
from indexcache.runs.loading import Placement, load_model
from indexcache.runs.streaming.layer_source import stream_model
from indexcache.runs.streaming.sweep import Sweeper

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEMO = Path(__file__).parents[3] / "demo" / "dsa_demo"
PATTERNS = ("F" * 12, "FFFFFFSFFFFF", "FSSSFSSSFSSS", "S" * 12)


@pytest.mark.parametrize("keeps_states", [False, True])
@pytest.mark.parametrize("held_on", [None, "cpu"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])])
@torch.inference_mode()
def test_together_as_alone(device, held_on, keeps_states):
    opened, placement = open_checkpoint(DEMO), Placement(device=device)
    batches = torch.randint(2, 256, (3, 1, 300), generator=torch.Generator().manual_seed(2)).unbind()
    passes = [(batch, letters) for letters in PATTERNS for batch in range(3)]
    whole = load_model(opened, placement)
    source = stream_model(opened, placement)
    sweeper = Sweeper(
        source, batches, keeps_states=keeps_states, held_on=None if held_on is None else torch.device(held_on)
    )
    found = dict(sweeper.run(passes))
    assert list(found) == passes and source.reading.sweeps == 1
    for (batch, letters), hidden in found.items():
        if letters[0] == "F":
            whole.set_index_share_pattern(letters)
            expected = whole.model(input_ids=batches[batch].to(device), use_cache=False).last_hidden_state
            assert torch.equal(hidden, expected), letters
        else:
            # Every layer attends to every key: alone in a sweep.
            (alone,) = dict(Sweeper(source, batches, keeps_states=keeps_states).run([(batch, letters)])).values()
            assert torch.equal(hidden, alone)
    # What begins alike is run once.
    assert sweeper.layer_forwards < len(passes) * source.num_layers
    source.close()
