"""What `indexcache bench` measures: shapes with random weights ("30B", tiny, slices of releases), or a checkpoint.

The 30B shape is the paper's 30B model: GLM-4.7-Flash with an indexer, here of 32 heads x 128 (the paper does not say).
"""

from __future__ import annotations

from typing import Any

import torch

from ...configuration.configuration_indexcache import IndexCacheConfig
from ...configuration.share_pattern import SharePattern
from ...conversion.convert.families import CONFIG_FAULTS
from ...conversion.io.open_checkpoint import OpenedCheckpoint
from ...kernels.block_fp8.block_fp8_format import E4M3
from ...modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM
from ...runs.errors import RunError
from .speed_slices import NARROW, SLICES, block_fp8_model

# The paper's searched patterns of its 30B model (appendix B).
PAPER_PATTERNS = {
    "all full": "F" * 47,
    "1/2": "FSFSFSSSSFSFFFFSFFSSFFSFFFSSFFSSFSSSSFSFFFSFSSF",
    "1/4": "FSFSFSSSSFSSSFSSFFSSFSSFSSSSFSSSFSSSSFSSSSSSSSS",
    "1/8": "FSSSFSSSSSSSSFSSSFSSSSSFSSSSFSSSSSSSSFSSSSSSSSS",
}
SHAPE_30B: dict[str, Any] = dict(
    vocab_size=154880,
    hidden_size=2048,
    intermediate_size=10240,
    moe_intermediate_size=1536,
    num_hidden_layers=47,
    num_attention_heads=20,
    num_key_value_heads=20,
    n_shared_experts=1,
    n_routed_experts=64,
    num_experts_per_tok=4,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=1.8,
    kv_lora_rank=512,
    q_lora_rank=768,
    qk_rope_head_dim=64,
    qk_nope_head_dim=192,
    v_head_dim=256,
    first_k_dense_replace=1,
    index_topk=2048,
    index_n_heads=32,
    index_head_dim=128,
    indexer_rope_interleave=True,
    max_position_embeddings=1048576,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 8000000.0},
)
# Everything of the 30B shape, small enough for a minute on two cores.
SHAPE_TINY: dict[str, Any] = {
    **SHAPE_30B,
    **dict(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=8,
        num_experts_per_tok=2,
        kv_lora_rank=48,
        q_lora_rank=64,
        qk_rope_head_dim=16,
        qk_nope_head_dim=32,
        v_head_dim=32,
        index_topk=64,
        index_n_heads=8,
        index_head_dim=32,
    ),
}
SHAPES = {"30b": SHAPE_30B, "tiny": SHAPE_TINY, **SLICES}
# Drifting input: the relative size of a token's step from the one before, and the embeddings' standard deviation.
DRIFT_STEP, DRIFT_SPREAD = 0.005, 1.0


def random_config(shape: str, experts: int | None, layers: int | None, narrow: bool = False) -> IndexCacheConfig:
    """The config of a shape with every indexer.

    Args:
        shape: a key of `SHAPES`.
        experts: routed experts in place of the shape's; the work per token stays the same.
        layers: decoder layers in place of the shape's.
        narrow: small widths in place of a slice's.

    Raises:
        RunError: experts that the shape's groups of them cannot be made of.
    """
    fields = {**SHAPES[shape], **(NARROW if narrow else {})}
    if experts is not None:
        fields["n_routed_experts"] = experts
    if layers is not None:
        fields["num_hidden_layers"] = layers
    try:
        return IndexCacheConfig(**fields)
    except CONFIG_FAULTS as error:
        raise RunError(f"--shape {shape}: {str(error.__cause__ or error).strip()}") from error


def random_model(
    shape: str,
    experts: int | None,
    layers: int | None,
    device: torch.device,
    dtype: torch.dtype,
    narrow: bool = False,
    block_fp8: bool = False,
) -> IndexCacheForCausalLM:
    """`random_config`'s model with random weights, made on the device, in `block_fp8` if asked for.

    See `let_neighbours_agree`.
    """
    config = random_config(shape, experts, layers, narrow)
    torch.manual_seed(0)
    if block_fp8:
        model = block_fp8_model(config, device, dtype)
    else:
        with torch.device(device):
            model = IndexCacheForCausalLM._from_config(config, dtype=dtype).eval()
    let_neighbours_agree(model)
    return model


def checkpoint_model(
    opened: OpenedCheckpoint, device: torch.device, dtype: torch.dtype, token: str | None
) -> IndexCacheForCausalLM:
    """A DSA or IndexCache checkpoint."""
    from ...conversion.io.load_source import load_source

    model = load_source(opened, dtype=dtype, token=token)
    return model.to(device).eval()  # type: ignore[arg-type]


def peer_model(config: IndexCacheConfig, dtype: torch.dtype, pattern: str, device: torch.device) -> Any:
    """Transformers' own `glm_moe_dsa` of our config's shape, with random weights.

    Its experts, attention and cache are transformers' defaults.
    """
    from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM

    fields = config.to_dict()
    for name in ("model_type", "architectures", "layer_types", "indexer_types", "transformers_version"):
        fields.pop(name, None)
    types = SharePattern(pattern).indexer_types
    torch.manual_seed(0)
    with torch.device(device):
        theirs = GlmMoeDsaConfig(**{**fields, "indexer_types": types})
        peer = GlmMoeDsaForCausalLM._from_config(theirs, dtype=dtype).eval()
    let_neighbours_agree(peer)
    return peer


def patterns_of(config: IndexCacheConfig, wanted: list[str]) -> dict[str, str]:
    """Patterns by name: the paper's for 47 layers, evenly spaced ones for others, or patterns spelled out.

    Args:
        config: of the model whose layers they cover; they may ask for no indexer that it lacks.
        wanted: `all full`, `own` (the checkpoint's), a share such as `1/4`, or letters.

    Raises:
        RunError: a name or pattern that does not fit the model.
    """
    layers, own = config.num_hidden_layers, str(config.share_pattern)
    found: dict[str, str] = {}
    for name in wanted:
        try:
            if name == "own":
                pattern = own
            elif name == "all full":
                pattern = "F" * layers
            elif set(name) <= {"F", "S"}:
                pattern = str(SharePattern.parse(name, layers))
            elif layers == 47 and name in PAPER_PATTERNS:
                pattern = PAPER_PATTERNS[name]
            else:
                pattern = str(SharePattern.uniform(layers, name))
        except ValueError as error:
            raise RunError(f"--pattern {name!r}: {error}") from error
        if lacking := [i for i, (a, b) in enumerate(zip(pattern, own)) if a == "F" and b == "S"]:
            raise RunError(f"--pattern {name!r} makes layers {lacking} full, and this checkpoint has no indexer there")
        found[name] = pattern
    return found


@torch.no_grad()
def let_neighbours_agree(model: Any, step: float | None = None, position_weight: float = 0.02) -> None:
    """Let consecutive token ids select nearly the same keys, as neighbours in trained models do.

    What layers add to the residual is scaled by `1 / sqrt(2 layers)`, as GPT-2 initialises: with the weights as they
    are drawn, deep hidden states say little about the token.

    Args:
        model: with random weights; ours or transformers' glm_moe_dsa.
        step: the token embeddings become a slow walk, token i + 1 a random step of this relative size from token i;
            None: `DRIFT_STEP`. Its standard deviation is `DRIFT_SPREAD`: the larger, the more a token itself, and not
            what random layers make of it, decides what deep layers select.
        position_weight: weight of the index keys' RoPE entries against the others; random weights give position half
            of the say, and every step of a query then reorders its keys.
    """
    residual = (2 * model.config.num_hidden_layers) ** -0.5
    for layer in model.model.layers:
        indexer = getattr(layer.self_attn, "indexer", None)
        if indexer is not None:
            indexer.k_norm.weight[: model.config.qk_rope_head_dim] = position_weight
        for name, weight in layer.named_parameters():
            # Of block fp8 weights the scales.
            module = name.removesuffix("_scale_inv").removesuffix(".weight")
            if module.endswith(("o_proj", "down_proj")) and weight.dtype != E4M3:
                weight.mul_(residual)
    table = model.get_input_embeddings().weight
    rows, width = table.shape
    table.copy_(drifting_walk(rows, width, table.device, DRIFT_STEP if step is None else step) * DRIFT_SPREAD)


def drifting_walk(rows: int, width: int, device: torch.device, step: float) -> torch.Tensor:
    """fp32 `[rows, width]` of unit variance, each row a random step of relative size `step` from the one before."""
    generator = torch.Generator(device=device).manual_seed(1)
    walk = torch.randn(rows, width, device=device, generator=generator)
    keep = (1 - step**2) ** 0.5
    block = 64
    state = walk[0]
    powers = keep ** torch.arange(1, block + 1, device=device, dtype=torch.float32)
    decay = (powers[:, None] / powers[None, :]).tril() * step
    for part in walk.split(block):
        n = part.shape[0]
        part[:] = powers[:n, None] * state + decay[:n, :n] @ part
        state = part[n - 1].clone()
    return walk


def prompt(model: Any, length: int, kind: str) -> torch.Tensor:
    """Token ids `[1, length]`: consecutive ones (`drift`) or random ones."""
    vocabulary = model.config.vocab_size
    if kind == "drift":
        return (torch.arange(length, device=model.device) % vocabulary).unsqueeze(0)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, vocabulary, (1, length), generator=generator).to(model.device)
