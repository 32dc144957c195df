"""The encoder of a configuration."""

from collections.abc import Mapping

import torch

from workers.model.vision.config import VisionConfig
from workers.model.vision.encoder import VisionEncoder
from workers.model.vision.idefics3 import Idefics3Encoder
from workers.model.vision.idefics3_config import Idefics3Vision
from workers.model.vision.qwen2_5_vl import Qwen25Encoder


def make_encoder(config: VisionConfig, weights: Mapping[str, torch.Tensor]) -> VisionEncoder:
    """weights: as `prepare.load_weights` gives those of the vision encoder, fp32 on a CPU, or all of one dtype on a GPU."""
    if isinstance(config, Idefics3Vision):
        return Idefics3Encoder(config, weights)
    return Qwen25Encoder(config, weights)
