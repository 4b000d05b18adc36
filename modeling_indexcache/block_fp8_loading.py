"""Loading block fp8 checkpoints: transformers' quantiser, with this package's modules and kernels in place of its own.

Transformers' fp8 layers fetch their kernels from the Hub when they first run, dequantise where there is no GPU with
fp8 units, and cannot where a block is ragged. Here weights stay fp8 on any device, without a package or the network.
What is quantised is what the checkpoint's files say is: their headers are read and judged before any weight.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import local
from typing import Any, NamedTuple

import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ..kernels.block_fp8.block_fp8_format import dequantise, scale_grid
from .layers.block_fp8_modules import BlockFp8Experts, BlockFp8Linear, put_block_fp8

METHOD = "fp8"
SCALES = "_scale_inv"
# Dtypes as safetensors spells them.
E4M3_NAME, SCALE_NAMES = "F8_E4M3", ("F32", "F8_E8M0")
_HALF_NAMES, _FLOAT_NAMES = ("bf16", "f16", "torch.bfloat16", "torch.float16"), ("f32", "torch.float32")
# Longest list of names in a message.
SHOWN = 3
# A header of a shard is some MB at most.
LONGEST_HEADER = 2**30


class _ThisThread(local):
    loading = False


_thread = _ThisThread()


@contextmanager
def loading_block_fp8() -> Iterator[None]:
    """Let fp8 checkpoints that this thread loads meanwhile be loaded by `BlockFp8Quantizer`."""
    before = _thread.loading
    _thread.loading = True
    try:
        yield
    finally:
        _thread.loading = before


class BlockFp8Quantizer(FineGrainedFP8HfQuantizer):
    """Puts `BlockFp8Linear` and `BlockFp8Experts` in place, on any device; dequantises when asked to, ragged too."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Needs nothing of the machine.

        Raises:
            ValueError: fp8 of another kind than blocks with dynamic activations.
        """
        config: Any = self.quantization_config
        size = config.weight_block_size
        if size is None:
            raise ValueError("this fp8 checkpoint has one scale a tensor (no weight_block_size): only blocks are run")
        if config.activation_scheme != "dynamic":
            raise ValueError(f"activation_scheme is {config.activation_scheme!r}: block fp8 runs with 'dynamic' alone")
        if getattr(config, "expert_dtype", "fp8") != "fp8":
            raise ValueError(f"expert_dtype is {config.expert_dtype!r}: only fp8 experts are run")
        # Transformers' config forgets it; other engines read it.
        config.fmt = "e4m3"
        self.block_size = (int(size[0]), int(size[1]))

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        stored = read_headers(checkpoint_files)
        if stored is not None:
            layers = model.config.num_hidden_layers
            stored = {name: found for name, found in stored.items() if not _is_behind(name, layers)}
            refuse_wrong_scales(stored, self.block_size)
        if self.quantization_config.dequantize:
            return
        self._normalize_modules_to_not_convert(model)
        self.modules_to_not_convert = self.get_modules_to_not_convert(
            model, self.quantization_config.modules_to_not_convert, model._keep_in_fp32_modules
        )

        def scale_dtype(name: str, is_experts: bool) -> torch.dtype | None:
            if stored is None:
                return torch.float32 if should_convert_module(name, self.modules_to_not_convert) else None
            kind = stored_scales(name, stored, model.base_model_prefix, is_experts)
            return None if kind is None else torch.float32 if kind == "F32" else torch.float8_e8m0fnu

        put_block_fp8(model, self.block_size, scale_dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for module in model.modules():
            if isinstance(module, (BlockFp8Linear, BlockFp8Experts)):
                for name, parameter in module.named_parameters(recurse=False):
                    # Loading makes every parameter of floats a trainable one.
                    parameter.requires_grad_(name == "bias" and parameter.requires_grad)
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The model's also of what is not quantised, where fp8 is dequantised beside it."""
        shape = param.get_shape() if hasattr(param, "get_shape") else param.shape
        stored = (param.get_dtype() if hasattr(param, "get_dtype") else str(param.dtype)).lower()
        # Scales are fp32, or bytes, and a matrix.
        is_plain = stored in _HALF_NAMES or (len(shape) == 1 and stored in _FLOAT_NAMES)
        return dtype if is_plain else super().get_new_dtype(converter, param, dtype)

    def get_load_operations(self) -> dict[str, Any]:
        """What dequantises while loading."""
        return {"dequantize": _Dequantise}


class _Dequantise(Fp8Dequantize):
    """Dequantises by the checkpoint's blocks; transformers divides rows by scales, which is wrong for ragged ones."""

    def _dequantize_one(
        self, quantized: torch.Tensor, scales: torch.Tensor, output_dtype: torch.dtype | None = None, **kwargs: Any
    ) -> torch.Tensor:
        return dequantise(quantized, scales, self.hf_quantizer.block_size, output_dtype or torch.bfloat16)


_theirs = AUTO_QUANTIZER_MAPPING[METHOD]


class _ByModel(FineGrainedFP8HfQuantizer):
    """Stands for fp8 in transformers' table: makes this package's quantiser for its models, and theirs for others."""

    def __new__(cls, quantization_config: Any, *, pre_quantized: bool = True, **kwargs: Any) -> Any:
        quantiser = BlockFp8Quantizer if _thread.loading and pre_quantized else _theirs
        return quantiser(quantization_config, pre_quantized=pre_quantized, **kwargs)


AUTO_QUANTIZER_MAPPING[METHOD] = _ByModel


class Stored(NamedTuple):
    """A tensor of a checkpoint, as its file's header has it."""

    dtype: str
    shape: tuple[int, ...]


def read_headers(files: Sequence[str] | None) -> dict[str, Stored] | None:
    """All tensors of safetensors files by name; None where there are other files, or none, or one is not readable."""
    found: dict[str, Stored] = {}
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        return None
    for file in files:
        try:
            with open(file, "rb") as shard:
                size = int.from_bytes(shard.read(8), "little")
                header = json.loads(shard.read(min(size, LONGEST_HEADER)))
            for name, entry in header.items():
                if name != "__metadata__":
                    found[name] = Stored(entry["dtype"], tuple(entry["shape"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # Who loads it says what is wrong.
    return found


def refuse_wrong_scales(stored: dict[str, Stored], block_size: tuple[int, int]) -> None:
    """Every e4m3 weight has scales of its blocks, and nothing else has.

    Raises:
        ValueError: naming what is missing or does not fit.
    """
    missing, wrong, surplus = [], [], []
    for name, found in stored.items():
        if name.endswith(SCALES):
            weight = stored.get(name.removesuffix(SCALES))
            if weight is None or weight.dtype != E4M3_NAME:
                surplus.append(name)
        elif found.dtype == E4M3_NAME:
            scales = stored.get(name + SCALES)
            if scales is None:
                missing.append(name + SCALES)
                continue
            wanted = scale_grid(*found.shape, block_size) if len(found.shape) == 2 else None
            if scales.shape != wanted or scales.dtype not in SCALE_NAMES:
                wrong.append(
                    f"{name + SCALES} is {scales.dtype} {list(scales.shape)}, of a weight {list(found.shape)}"
                )
    blocks = f"{block_size[0]} x {block_size[1]}"
    if missing:
        raise ValueError(
            f"this checkpoint's fp8 weights are not whole: {_some(missing)} missing. Every e4m3 weight needs the "
            f"scales of its {blocks} blocks: download or convert it again"
        )
    if wrong:
        raise ValueError(
            f"scales do not fit their fp8 weights in blocks of {blocks}, fp32 or float8_e8m0fnu: {_some(wrong)}"
        )
    if surplus:
        raise ValueError(f"there are scales of weights that are not fp8, which would be run without: {_some(surplus)}")


def refuse_missing_scales(missing_keys: Iterable[str], source: object) -> None:
    """Loading found no scales of an fp8 weight.

    Raises:
        ValueError: naming them.
    """
    missing = sorted(key for key in missing_keys if key.endswith(SCALES))
    if missing:
        raise ValueError(f"{source} lacks scales of fp8 weights, which mean nothing without: {_some(missing)}")


def stored_scales(name: str, stored: dict[str, Stored], prefix: str, is_experts: bool) -> str | None:
    """The dtype of the scales of a module's weights, or None where they are not fp8.

    Raises:
        ValueError: for experts of a layer that are stored in several ways.
    """
    places = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    if not is_experts:
        weight = next((f"{place}.weight" for place in places if f"{place}.weight" in stored), None)
        is_fp8 = weight is not None and stored[weight].dtype == E4M3_NAME
        return stored[f"{weight}{SCALES}"].dtype if is_fp8 else None
    kinds: dict[str | None, str] = {}
    for place in places:
        number = 0
        while f"{place}.{number}.gate_proj.weight" in stored:
            for part in ("gate_proj", "up_proj", "down_proj"):
                weight = f"{place}.{number}.{part}.weight"
                found = stored.get(weight)
                is_fp8 = found is not None and found.dtype == E4M3_NAME
                kinds.setdefault(stored[weight + SCALES].dtype if is_fp8 else None, weight)
            number += 1
        if kinds:
            break
    if len(kinds) > 1:
        ways = (f"{weight} {f'fp8 with {kind} scales' if kind else 'not fp8'}" for kind, weight in kinds.items())
        raise ValueError(f"experts of one layer are stored in several ways, and are run as one: {', '.join(ways)}")
    return next(iter(kinds), None)


def _is_behind(name: str, layers: int) -> bool:
    """Whether a tensor is of a layer behind the last one, for multi-token prediction, which is not loaded."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return found is not None and int(found[1]) >= layers


def _some(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
