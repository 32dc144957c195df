"""Vision models with random weights, for any device, and pixels for them."""

from dataclasses import replace

import numpy as np
import torch

from tests.support.picture_models import IDEFICS3, QWEN
from workers.device.encoder import DeviceEncoder
from workers.device.pictures import largest_batch
from workers.model.vision.config import VisionConfig
from workers.model.vision.encoder import VisionEncoder
from workers.model.vision.make import make_encoder
from workers.model.vision.shapes import vision_shapes

CPU = torch.device("cpu")
#: Large enough for kernels of a GPU: heads of 16, and pictures of both families.
ENCODERS: dict[str, VisionConfig] = {
    "idefics3": replace(IDEFICS3, hidden_size=64, intermediate_size=96, num_heads=4),
    "qwen": replace(QWEN, hidden_size=64, intermediate_size=96, num_heads=4),
}
#: Widths and heights: several tiles each, or windows of all kinds.
SIZES = ((30, 20), (9, 40), (16, 16))


def weights_of(
    config: VisionConfig, device: torch.device = CPU, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """The same on every device."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in vision_shapes(config).items():
        values = torch.randn(shape, generator=generator)
        is_norm = name.endswith("norm")
        values = 1 + 0.1 * values if is_norm else values * max(1, values[0].numel()) ** -0.5
        found[name] = values.to(device, dtype)
    return found


def device_encoder(
    config: VisionConfig,
    max_tiles: int,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> DeviceEncoder:
    """Captured, as a worker has it."""
    encoder = make_encoder(config, weights_of(config, device, dtype))
    made = DeviceEncoder(encoder, device, dtype, max_tiles=max_tiles)
    made.warm_up(largest_batch(config, 64, max_tiles), lambda _what, _done: None)
    return made


def tiles(config: VisionConfig, encoder: VisionEncoder, *sizes: tuple[int, int]) -> list[torch.Tensor]:
    """Pixels of pictures of these widths and heights."""
    found = []
    for width, height in sizes:
        plan = config.plan(width, height)
        image = np.random.default_rng(width + height).integers(0, 256, (height, width, 3), np.uint8)
        found += encoder.prepare(image, plan, range(len(plan.tiles)))
    return found
