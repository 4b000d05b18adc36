"""IndexCache for Transformers: DeepSeek Sparse Attention with the indexer's selection shared across layers.

After `import indexcache`, transformers' Auto classes load `model_type = "indexcache"` checkpoints without
`trust_remote_code`.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration.configuration_indexcache import IndexCacheConfig
    from .configuration.share_pattern import SharePattern
    from .modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM, IndexCacheModel

__version__ = "0.2.0"

_EXPORTS = {
    "SharePattern": "configuration.share_pattern",
    "IndexCacheConfig": "configuration.configuration_indexcache",
    "IndexCacheModel": "modeling_indexcache.modeling_indexcache",
    "IndexCacheForCausalLM": "modeling_indexcache.modeling_indexcache",
}
__all__ = [
    "IndexCacheConfig",
    "IndexCacheForCausalLM",
    "IndexCacheModel",
    "SharePattern",
    "__version__",
    "register_auto_classes",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def register_auto_classes() -> None:
    """Make AutoConfig, AutoModel and AutoModelForCausalLM know `indexcache` checkpoints, and `transformers serve` too.

    Safe to call twice.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from .configuration.architecture_attribute import offer_architecture
    from .configuration.configuration_indexcache import IndexCacheConfig
    from .modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM, IndexCacheModel

    AutoConfig.register(IndexCacheConfig.model_type, IndexCacheConfig, exist_ok=True)
    AutoModel.register(IndexCacheConfig, IndexCacheModel, exist_ok=True)
    AutoModelForCausalLM.register(IndexCacheConfig, IndexCacheForCausalLM, exist_ok=True)
    # Once more, now that transformers is imported in whole.
    offer_architecture()


def _is_the_command_line() -> bool:
    """Whether this process is `indexcache` or `python -m indexcache.cli`, and the package is imported on the way."""
    first = sys.argv[0] if sys.argv else ""
    # What Python says as long as it looks for the module that it was told to run.
    if first == "-m":
        told = " ".join(sys.orig_argv)
        return "-m indexcache.cli" in told or "-mindexcache.cli" in told
    return Path(first).name == "indexcache"


# The command line answers `--help` without waiting for torch; its verbs load models without the Auto classes.
if not _is_the_command_line():
    register_auto_classes()
