"""What scores were measured with, and on what."""

from __future__ import annotations

import os
import platform

import torch

from ..conversion.convert.installed_versions import installed_versions


def environment() -> dict[str, str | None]:
    """Versions, and the device's name."""
    return {
        **installed_versions("indexcache", "torch", "transformers"),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
    }
