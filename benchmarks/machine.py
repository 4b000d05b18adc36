"""What numbers were measured on, for the result files."""

from __future__ import annotations

import datetime
import os
import platform

import torch


def machine() -> dict[str, str]:
    """Device, threads, PyTorch, date."""
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores of a shared machine"
    )
    return {
        "device": f"{device}, {platform.machine()}",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
