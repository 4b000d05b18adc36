"""The model's class as an attribute of `transformers`, where `transformers serve` and `chat` look it up.

The server of transformers 5.23 and later takes the class that `config.architectures` names from `transformers` itself,
for models from elsewhere too; it has read their config by then. What it finds here loads by the Auto classes, as
everything else does: the code beside the weights, or the installed package.
"""

from __future__ import annotations

import sys
from typing import Any

import transformers
from packaging.version import Version

ARCHITECTURE = "IndexCacheForCausalLM"
# The releases whose server looks there, up to the next that may not.
_FIRST, _BEFORE = Version("5.23"), Version("6")


class _LoadedByAutoClass:
    """Stands in `transformers` for the model's class."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **options: Any) -> Any:
        """As `AutoModelForCausalLM.from_pretrained`, `trust_remote_code` included."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path, *args, **options)


def offer_architecture() -> None:
    """Make `transformers.IndexCacheForCausalLM` load these checkpoints, unless it exists or nothing looks it up.

    transformers' `processing_utils` puts a second module object of the name `transformers` in place of the first when
    it is imported, and the server holds the one that it found: both are given the attribute, by whoever comes last.
    """
    release = Version(Version(transformers.__version__).base_version)
    server = sys.modules.get("transformers.cli.serving.model_manager")
    for module in (sys.modules["transformers"], getattr(server, "transformers", None)):
        if _FIRST <= release < _BEFORE and module is not None and not hasattr(module, ARCHITECTURE):
            setattr(module, ARCHITECTURE, _LoadedByAutoClass)
