"""Shapes of the weights of vision encoders, by their names in the converted file. Pure."""

from workers.model.vision.config import VisionConfig
from workers.model.vision.idefics3_config import Idefics3Vision
from workers.model.vision.qwen2_5_vl_config import Qwen25Vision

NUM_CHANNELS = 3


def vision_shapes(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """The weights that an encoder of this configuration has; a matrix is [outputs, inputs]."""
    match config:
        case Idefics3Vision():
            return _idefics3(config)
        case Qwen25Vision():
            return _qwen2_5_vl(config)


def _idefics3(config: Idefics3Vision) -> dict[str, tuple[int, ...]]:
    hidden, inner, patch = config.hidden_size, config.intermediate_size, config.patch_size
    layer = {
        "attention_norm": (hidden,),
        "attention_norm_bias": (hidden,),
        "qkv": (3 * hidden, hidden),
        "qkv_bias": (3 * hidden,),
        "attention_out": (hidden, hidden),
        "attention_out_bias": (hidden,),
        "mlp_norm": (hidden,),
        "mlp_norm_bias": (hidden,),
        "up": (inner, hidden),
        "up_bias": (inner,),
        "down": (hidden, inner),
        "down_bias": (hidden,),
    }
    return {
        "vision.patch_embedding": (hidden, NUM_CHANNELS, patch, patch),
        "vision.patch_embedding_bias": (hidden,),
        "vision.position_embedding": (config.position_side**2, hidden),
        **_layers(config.num_layers, layer),
        "vision.norm": (hidden,),
        "vision.norm_bias": (hidden,),
        "vision.projection": (config.text_hidden_size, hidden * config.scale_factor**2),
    }


def _qwen2_5_vl(config: Qwen25Vision) -> dict[str, tuple[int, ...]]:
    hidden, inner, patch = config.hidden_size, config.intermediate_size, config.patch_size
    square = hidden * config.merge_size**2
    layer = {
        "attention_norm": (hidden,),
        "qkv": (3 * hidden, hidden),
        "qkv_bias": (3 * hidden,),
        "attention_out": (hidden, hidden),
        "attention_out_bias": (hidden,),
        "mlp_norm": (hidden,),
        "gate_up": (2 * inner, hidden),
        "gate_up_bias": (2 * inner,),
        "down": (hidden, inner),
        "down_bias": (hidden,),
    }
    return {
        "vision.patch_embedding": (hidden, NUM_CHANNELS, config.temporal_patch_size, patch, patch),
        **_layers(config.num_layers, layer),
        "vision.merger_norm": (hidden,),
        "vision.merger_in": (square, square),
        "vision.merger_in_bias": (square,),
        "vision.merger_out": (config.text_hidden_size, square),
        "vision.merger_out_bias": (config.text_hidden_size,),
    }


def _layers(num_layers: int, layer: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"vision.layers.{i}.{name}": shape for i in range(num_layers) for name, shape in layer.items()}
