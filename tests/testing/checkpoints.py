"""Small synthetic DSA checkpoints, as DeepSeek and GLM publish theirs: names, dtypes and sharding of a release."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

BLOCK = (16, 16)
INDEXER = ("wq_b.weight", "wk.weight", "weights_proj.weight", "k_norm.weight", "k_norm.bias")
_ARCHITECTURES = {
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
    "axk2": "AXK2ForCausalLM",
}
_KEPT_WIDE = (
    "W_down",
    "W_up",
    "norm",
    "gate.weight",
    "e_score_correction_bias",
    "weights_proj",
    "embed",
    "lm_head",
    "head.weight",
)


def tiny_config(family="deepseek_v32", layers=4, fp8=False, **fields):
    config = {
        "architectures": [_ARCHITECTURES.get(family, "GlmMoeDsaForCausalLM")],
        "model_type": family,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "hidden_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "index_n_heads": 8,
        "index_head_dim": 16,
        "index_topk": 8,
        "vocab_size": 64,
        "max_position_embeddings": 512,
        "rope_theta": 10000,
        "rope_scaling": None,
        "rms_norm_eps": 1e-6,
        "routed_scaling_factor": 2.5,
        "ep_size": 1,
        "torch_dtype": "bfloat16",
        **({"gated_norm_rank": 4} if family == "axk2" else {}),
        **fields,
    }
    if fp8:
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(BLOCK),
        }
        if family == "axk2":
            config["quantization_config"]["modules_to_not_convert"] = ["W_down", "W_up"]
    return config


def stored_shapes(config, *, mtp=0, lacking=()):
    """Shapes by name, in the order of a release; layers for multi-token prediction come behind the last.

    Args:
        config: of the release.
        mtp: layers for multi-token prediction.
        lacking: layers without an indexer.
    """
    c, layers = config, config["num_hidden_layers"]
    hidden, heads, latent, rope = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"], c["qk_rope_head_dim"]
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], hidden)}

    def gated_mlp(prefix, width):
        shapes[f"{prefix}gate_proj.weight"] = shapes[f"{prefix}up_proj.weight"] = (width, hidden)
        shapes[f"{prefix}down_proj.weight"] = (hidden, width)

    for layer in range(layers + mtp):
        p = f"model.layers.{layer}."
        a = f"{p}self_attn."
        rank = c.get("gated_norm_rank")
        for norm, gated in (("input", rank), ("post_attention", rank and layer >= c["first_k_dense_replace"])):
            shapes[f"{p}{norm}_layernorm.{'norm.' if gated else ''}weight"] = (hidden,)
            if gated:
                shapes[f"{p}{norm}_layernorm.W_down.weight"] = (rank, hidden)
                shapes[f"{p}{norm}_layernorm.W_up.weight"] = (hidden, rank)
        shapes[f"{a}q_a_proj.weight"] = (c["q_lora_rank"], hidden)
        shapes[f"{a}q_a_layernorm.weight"] = (c["q_lora_rank"],)
        query, inputs = c["qk_nope_head_dim"] + rope, c["q_lora_rank"]
        if rank:
            query, inputs = query + c["v_head_dim"], 2 * inputs
        shapes[f"{a}q_b_proj.weight"] = (heads * query, inputs)
        shapes[f"{a}kv_a_proj_with_mqa.weight"] = (latent + rope, hidden)
        shapes[f"{a}kv_a_layernorm.weight"] = (latent,)
        shapes[f"{a}kv_b_proj.weight"] = (heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), latent)
        shapes[f"{a}o_proj.weight"] = (hidden, heads * c["v_head_dim"])
        if layer not in lacking:
            width = c["index_head_dim"]
            shapes[f"{a}indexer.wq_b.weight"] = (c["index_n_heads"] * width, c["q_lora_rank"])
            shapes[f"{a}indexer.wk.weight"] = (width, hidden)
            shapes[f"{a}indexer.weights_proj.weight"] = (c["index_n_heads"], hidden)
            shapes[f"{a}indexer.k_norm.weight"] = shapes[f"{a}indexer.k_norm.bias"] = (width,)
        if layer < c["first_k_dense_replace"]:
            gated_mlp(f"{p}mlp.", c["intermediate_size"])
        else:
            shapes[f"{p}mlp.gate.weight"] = (c["n_routed_experts"], hidden)
            shapes[f"{p}mlp.gate.e_score_correction_bias"] = (c["n_routed_experts"],)
            for expert in range(c["n_routed_experts"]):
                gated_mlp(f"{p}mlp.experts.{expert}.", c["moe_intermediate_size"])
            gated_mlp(f"{p}mlp.shared_experts.", c["moe_intermediate_size"] * c["n_shared_experts"])
        if layer >= layers:
            shapes[f"{p}eh_proj.weight"] = (hidden, 2 * hidden)
            shapes[f"{p}enorm.weight"] = shapes[f"{p}hnorm.weight"] = shapes[f"{p}shared_head.norm.weight"] = (hidden,)
            shapes[f"{p}shared_head.head.weight"] = (c["vocab_size"], hidden)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (c["vocab_size"], hidden)

    return shapes


def stored_wide(name):
    """Whether a release keeps a weight out of fp8."""
    return any(mark in name for mark in _KEPT_WIDE)


def tiny_tensors(config, *, fp8=False, mtp=0, lacking=(), seed=0):
    """Random tensors in the order of a release; fp8 weights are followed by their scales."""
    generator = torch.Generator().manual_seed(seed)
    blocks = config["quantization_config"]["weight_block_size"] if fp8 else BLOCK
    shapes = stored_shapes(config, mtp=mtp, lacking=lacking)
    tensors = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator) * 0.1
        if name.endswith("norm.weight"):
            value += 1
        if name.endswith(("e_score_correction_bias", "k_norm.weight", "k_norm.bias")):
            tensors[name] = value
        elif fp8 and not stored_wide(name):
            grid = [-(-side // block) for side, block in zip(shape, blocks)]
            tensors[name] = (value * 20).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.rand(grid, generator=generator) * 0.1 + 0.01
        else:
            tensors[name] = value.to(torch.bfloat16)
    return tensors


def write_checkpoint(folder, config, tensors, *, shards=3, companions=True):
    """Write config, shards of about equal bytes, index, and the files that come along."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if companions:
        (folder / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
        (folder / "LICENSE").write_text("MIT\n")
        (folder / "generation_config.json").write_text("{}")
        (folder / "tokenizer.json").write_text("{}")
        (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
        (folder / "modeling_deepseek.py").write_text("raise SystemExit\n")
        (folder / "encoding").mkdir(exist_ok=True)
        (folder / "encoding" / "encoding_dsv32.py").write_text("FORMAT = 1\n")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    total = sum(tensor.nbytes for tensor in tensors.values())
    parts, filled = [{} for _ in range(shards)], 0
    for name, tensor in tensors.items():
        parts[min(filled * shards // total, shards - 1)][name] = tensor
        filled += tensor.nbytes
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def build(folder, *, family="deepseek_v32", layers=4, fp8=False, shards=3, mtp=0, lacking=(), seed=0, **fields):
    """A whole checkpoint in `folder`."""
    config = tiny_config(family, layers, fp8, **({"num_nextn_predict_layers": mtp} if mtp else {}), **fields)
    tensors = tiny_tensors(config, fp8=fp8, mtp=mtp, lacking=lacking, seed=seed)
    return write_checkpoint(folder, config, tensors, shards=shards)


def hashes(folder):
    """sha256 of every file below a folder, by relative path."""
    folder = Path(folder)
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def edit_json(path, **changes):
    """Change fields of a JSON file; `None` removes one."""
    content = json.loads(Path(path).read_text())
    for name, value in changes.items():
        content.pop(name, None)
        if value is not None:
            content[name] = value
    Path(path).write_text(json.dumps(content))


def edit_shard(path, change):
    """Load a shard, let `change` edit its tensors, save it again."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    change(tensors)
    Path(path).unlink()
    save_file(tensors, path, metadata={"format": "pt"})


def read_all(folder):
    """All tensors of a checkpoint, by the safetensors library."""
    from safetensors.torch import load_file

    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def as_bytes(tensor):
    """A tensor's bytes, whatever its dtype."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
