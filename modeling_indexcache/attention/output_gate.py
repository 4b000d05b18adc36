"""A.X-K2's gate on what attention gives: made by the projection that makes the queries.

`q_b_proj` reads the query latent behind its norm and before it, side by side, and gives each head a query and a gate.

Legend: B batch, S new tokens, H attention heads, N query width of a head, V value width.
"""

from __future__ import annotations

from typing import Any

import torch


def query_inputs(config: Any, q_resid: torch.Tensor, q_a: torch.Tensor) -> torch.Tensor:
    """What `q_b_proj` reads of the query latent `[B, S, q_lora_rank]`: normed, and behind it as it was for a gate."""
    return torch.cat((q_resid, q_a), dim=-1) if config.attention_output_gate else q_resid


def split_gate(config: Any, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Queries `[..., H, N]` and gates `[..., H, V]`, or None without one, of what each head is given."""
    if not config.attention_output_gate:
        return projected, None
    q, gate = projected.split([config.qk_head_dim, config.v_head_dim], dim=-1)
    return q, gate


def gated(values: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """`values * sigmoid(gate)`, both `[..., H, V]`, in fp32 or wider; in place where no gradient is made."""
    if gate is None:
        return values
    factor = torch.sigmoid(gate.to(torch.promote_types(gate.dtype, torch.float32)))
    return (values * factor).to(values.dtype) if torch.is_grad_enabled() else values.mul_(factor)
