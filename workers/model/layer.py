"""The weights of one layer, as what they do to its rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from phasewise_kernels.fp8_linear.op import Fp8Linear
from phasewise_kernels.linear.op import projection
from phasewise_kernels.swiglu.op import swiglu
from workers.api import WeightDtype
from workers.model.config import ModelConfig
from workers.model.fp8 import scales_of

if TYPE_CHECKING:
    from workers.tensor_parallel.ranks import Ranks

#: [num_rows, in_size] to [num_rows, out_size].
Projection = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer, from the weights that `workers.model.convert` names."""

    attention_norm: torch.Tensor
    qkv: Projection
    #: Weight of the norm of each Q and K head, [num_heads + num_kv_heads, head_dim]; None without one.
    qk_norm: torch.Tensor | None
    attention_out: Projection
    mlp_norm: torch.Tensor
    gate_up: Projection
    #: Of silu(gate) * up: it takes what gate_up gives.
    down: Projection
    #: Tokens that a token sees, itself included; 0 is all.
    window: int
    is_rotated: bool


def make_layer(
    config: ModelConfig,
    weights: Mapping[str, torch.Tensor],
    dtype: WeightDtype,
    i: int,
    ranks: "Ranks | None",
) -> Layer:
    """Layer `i`. weights, dtype, ranks: see `llama.Llama`."""

    def linear(name: str) -> Projection:
        name = f"layers.{i}.{name}"
        weight, bias = weights[name], weights.get(f"{name}_bias")
        scales = weights.get(scales_of(name))
        return projection(weight, bias, dtype.value) if scales is None else Fp8Linear(weight, scales, bias)

    def gated(name: str) -> Projection:
        project = linear(name)
        return project.gated if isinstance(project, Fp8Linear) else lambda rows: project(swiglu(rows))

    def summed(project: Projection) -> Projection:
        return project if ranks is None else ranks.summed(project)

    qk_norm = None
    if config.has_qk_norm:
        query_norm, key_norm = weights[f"layers.{i}.q_norm"], weights[f"layers.{i}.k_norm"]
        qk_norm = torch.cat(
            (query_norm.expand(config.num_heads, -1), key_norm.expand(config.num_kv_heads, -1))
        )
    return Layer(
        attention_norm=weights[f"layers.{i}.attention_norm"],
        qkv=linear("qkv"),
        qk_norm=qk_norm,
        attention_out=summed(linear("attention_out")),
        mlp_norm=weights[f"layers.{i}.mlp_norm"],
        gate_up=linear("gate_up"),
        down=summed(gated("down")),
        window=config.window(i),
        is_rotated=i not in config.nope_layers,
    )
