"""IndexCache for Transformers: DeepSeek Sparse Attention with the indexer's selection shared across layers.

After `import indexcache`, transformers' Auto classes load `model_type = "indexcache"` checkpoints without
`trust_remote_code`. torch and transformers themselves are imported only when something that needs them is asked for.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "SharePattern": "configuration.share_pattern",
    "IndexCacheConfig": "configuration.configuration_indexcache",
    "IndexCacheModel": "modeling_indexcache.modeling_indexcache",
    "IndexCacheForCausalLM": "modeling_indexcache.modeling_indexcache",
}
__all__ = ["__version__", "register_auto_classes", *_EXPORTS]

_AUTO_MODULE = "transformers.models.auto.modeling_auto"


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def register_auto_classes() -> None:
    """Make AutoConfig, AutoModel and AutoModelForCausalLM know `indexcache` checkpoints. Safe to call twice."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from .configuration.configuration_indexcache import IndexCacheConfig
    from .modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM, IndexCacheModel

    AutoConfig.register(IndexCacheConfig.model_type, IndexCacheConfig, exist_ok=True)
    AutoModel.register(IndexCacheConfig, IndexCacheModel, exist_ok=True)
    AutoModelForCausalLM.register(IndexCacheConfig, IndexCacheForCausalLM, exist_ok=True)


class _RegisterAfterAutoModels(importlib.abc.MetaPathFinder):
    """Calls `register_auto_classes` when transformers' Auto models are first imported, and then steps aside."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _AUTO_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run_module = spec.loader.exec_module

        def run_and_register(module: Any) -> None:
            run_module(module)
            register_auto_classes()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


if _AUTO_MODULE in sys.modules:
    register_auto_classes()
else:
    sys.meta_path.insert(0, _RegisterAfterAutoModels())
