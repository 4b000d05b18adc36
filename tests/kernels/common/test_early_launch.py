"""Launching kernels before the one ahead has ended: only where it is asked for, and where the device can."""

import pytest
import torch

from indexcache.kernels.common import early_launch
from indexcache.kernels.common.device_target import DeviceTarget, pretended_target
from indexcache.kernels.common.early_launch import early_launches, launches_in_turn

EARLY = {"EARLY": True, "launch_pdl": True}


def test_kernels_launch_early_inside_alone(monkeypatch):
    monkeypatch.setattr(early_launch, "_can_launch_early", lambda device: device.type == "cuda")
    assert early_launch.early_launch() == {}
    with early_launches(torch.device("cuda")):
        assert early_launch.early_launch() == EARLY
        with early_launches(torch.device("cpu")):
            assert early_launch.early_launch() == {}
        assert early_launch.early_launch() == EARLY
    with launches_in_turn(), early_launches(torch.device("cuda")):
        assert early_launch.early_launch() == {}
    with pytest.raises(RuntimeError, match="stopped"), early_launches(torch.device("cuda")):
        raise RuntimeError("stopped")
    assert early_launch.early_launch() == {}


@pytest.mark.parametrize(
    ("backend", "arch", "can"), [("cuda", 90, True), ("cuda", 89, False), ("hip", "gfx942", False)]
)
def test_cards_before_hopper_and_of_others_do_not(backend, arch, can):
    pytest.importorskip("triton")
    with pretended_target(DeviceTarget(backend, arch, 132)):
        assert early_launch._can_launch_early(torch.device("cuda")) is can
        assert early_launch._can_launch_early(torch.device("cpu")) is False
