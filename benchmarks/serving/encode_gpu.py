"""Encoding pictures on one GPU, with random weights: batches of tiles, the same on the CPU, and beside decode steps.

    python benchmarks/serving/encode_gpu.py [--quick] [--json FILE]

- batches: from pixels in memory of the host until the embeddings are there, medians, in bf16, by the number of tiles; captured as a
  worker has them, and launched kernel by kernel. host_ms is how long the thread that encodes is busy before it waits. FLOPs are those of
  the matrices and of attention.
- attention: 8 tiles, eager, with each way of torch's to compute it.
- cpu: a batch of one and of four tiles in fp32 with all cores, and how long one core takes to make the pixels of a tile, which a
  worker on a GPU does there too.
- memory: what the largest batch took, and what is counted for it before KV is sized.
- beside decode: 64 sequences with 1,024 tokens of Llama-3-8B's shape, steps replayed one after the other with at most two begun, and batches of
  8 tiles in another thread; each alone, and both. combined is the sum of what each keeps of its rate; above 1 it pays.

Shapes: ViT-L (576 patches a tile), SmolVLM-256M's (1,024), the model in examples/tiny_vlm (256), and Qwen2.5-VL-7B's with pictures of
448 x 448 pixels (1,024), which is not captured. Needs an NVIDIA GPU with 40 GB, and measures nothing
where tests/gpu/test_encode_gpu.py fails on it.
"""

import argparse
import gc
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from benchmarks.gpu import describe_gpu, tests_problem  # noqa: E402
from benchmarks.serving.engine_gpu import BLOCK_SIZE, LLAMA_3_8B, batch_of, random_weights  # noqa: E402
from examples.tiny_vlm.shape import VISION as TINY_VLM  # noqa: E402
from workers.device.buckets import graph_tiles  # noqa: E402
from workers.device.encoder import DeviceEncoder  # noqa: E402
from workers.device.forward import DeviceForward  # noqa: E402
from workers.device.memory import encoder_step_bytes  # noqa: E402
from workers.device.pictures import largest_batch  # noqa: E402
from workers.model.llama import Llama  # noqa: E402
from workers.model.vision.config import VisionConfig  # noqa: E402
from workers.model.vision.idefics3_config import Idefics3Vision  # noqa: E402
from workers.model.vision.make import make_encoder  # noqa: E402
from workers.model.vision.qwen2_5_vl_config import Qwen25Vision  # noqa: E402
from workers.model.vision.shapes import vision_shapes  # noqa: E402

TESTS = "tests/gpu/test_encode_gpu.py"
DEVICE = torch.device("cuda", 0)
DTYPE = torch.bfloat16
PATCH_BUDGET = 8192
NUM_TILES = (1, 2, 4, 8, 16)
CPU_TILES = (1, 4)
ATTENTION_TILES = 8
NUM_SEQUENCES, CONTEXT = 64, 1024
_BOTH = {
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "rescale_factor": 1 / 255,
    "image_token": "<image>",
    "image_token_id": 1,
}
VIT_L = Idefics3Vision(
    num_layers=24, hidden_size=1024, intermediate_size=4096, num_heads=16, patch_size=14, image_size=336, scale_factor=2,
    layer_norm_eps=1e-6, text_hidden_size=4096, around_text="", global_text="", is_tiled=True, longest_edge=1344,
    tile_size=336, resample=1, **_BOTH,
)  # fmt: skip
SMOLVLM = replace(
    VIT_L, num_layers=12, hidden_size=768, intermediate_size=3072, num_heads=12, patch_size=16, image_size=512,
    scale_factor=4, text_hidden_size=576, longest_edge=2048, tile_size=512,
)  # fmt: skip
QWEN_7B = Qwen25Vision(
    num_layers=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14, temporal_patch_size=2,
    merge_size=2, window_size=112, full_attention_layers=(7, 15, 23, 31), text_hidden_size=3584, start_token="",
    end_token="", min_pixels=3136, max_pixels=448 * 448, resample=3, **_BOTH,
)  # fmt: skip
SHAPES: dict[str, VisionConfig] = {
    "vit-l": VIT_L, "smolvlm-256m": SMOLVLM, "tiny_vlm": TINY_VLM, "qwen2.5-vl-7b": QWEN_7B,
}  # fmt: skip
BACKENDS = {
    "chosen by torch": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and 4 s of each rate")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if (problem := tests_problem(TESTS)) is not None:
        print(problem, file=sys.stderr)
        return 1
    num_rounds, seconds = (10, 4.0) if args.quick else (40, 15.0)
    rows = describe_gpu() | {"cpu_threads": torch.get_num_threads(), "is_quick": args.quick}
    rows["shapes"] = {name: measured(config, num_rounds) for name, config in SHAPES.items()}
    rows["beside_decode"] = beside_decode(("vit-l", "smolvlm-256m"), seconds)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def measured(config: VisionConfig, num_rounds: int) -> dict[str, Any]:
    """All but what happens beside decode."""
    encoder, memory = device_encoder(config)
    eager = DeviceEncoder(make_encoder(config, weights_of(config, DEVICE, DTYPE)), DEVICE, DTYPE, max_tiles=8)
    row: dict[str, Any] = {"patches": num_patches(config), "memory": memory, "batches": []}
    print(config.family, row)
    for num in NUM_TILES:
        pixels = pixels_of(config, num)
        captured_s = median_s(lambda pixels=pixels: encoder.encode(pixels), num_rounds)
        eager_s = median_s(lambda pixels=pixels: eager.encode(pixels), num_rounds)
        batch = {
            "tiles": num,
            "ms": captured_s * 1e3,
            "tiles_per_s": num / captured_s,
            "tflops": num * tile_flops(config) / captured_s / 1e12,
            "host_ms": host_s(encoder, pixels) * 1e3,
            "eager_ms": eager_s * 1e3,
            "eager_host_ms": host_s(eager, pixels) * 1e3,
        }
        row["batches"].append(batch)
        print(batch)
    row["attention_ms"] = {
        name: attention_ms(eager, config, backend, num_rounds) for name, backend in BACKENDS.items()
    }
    print(row["attention_ms"])
    row["cpu"] = on_cpu(config)
    print(row["cpu"])
    return row


def device_encoder(config: VisionConfig) -> tuple[DeviceEncoder, dict[str, float]]:
    """As a worker makes it, and MiB that its largest batch took and that are counted for it."""
    encoder = DeviceEncoder(
        make_encoder(config, weights_of(config, DEVICE, DTYPE)),
        DEVICE,
        DTYPE,
        max_tiles=tiles_of_graph(config),
    )
    torch.cuda.synchronize()
    # Graphs of the shape before are in cycles, and their memory would come back while this one takes its own.
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    encoder.warm_up(largest_batch(config, PATCH_BUDGET, tiles_of_graph(config)), lambda _what, _done: None)
    torch.cuda.synchronize()
    taken = torch.cuda.memory_reserved() - before
    counted = encoder_step_bytes(config, PATCH_BUDGET, DTYPE.itemsize)
    return encoder, {"taken_mib": taken / 2**20, "counted_mib": counted / 2**20}


def on_cpu(config: VisionConfig) -> dict[str, Any]:
    """Milliseconds in fp32 with all cores, and of one core for the pixels of a tile."""
    encoder = make_encoder(config, weights_of(config, torch.device("cpu"), torch.float32))
    found: dict[str, Any] = {}
    for num in CPU_TILES:
        pixels = pixels_of(config, num)
        encoder.encode(pixels)
        found[f"{num}_tiles_ms"] = 1e3 * min(
            elapsed_s(lambda pixels=pixels: encoder.encode(pixels)) for _ in range(3)
        )
    plan = config.plan(1024, 768)
    image = np.random.default_rng(0).integers(0, 256, (768, 1024, 3), np.uint8)
    all_tiles = range(len(plan.tiles))
    prepare_s = min(elapsed_s(lambda: encoder.prepare(image, plan, all_tiles)) for _ in range(3))
    return {**found, "pixels_of_a_tile_ms": 1e3 * prepare_s / len(plan.tiles)}


def attention_ms(
    encoder: DeviceEncoder, config: VisionConfig, backend: SDPBackend | None, num_rounds: int
) -> float | str:
    """Of a batch; why not, when this way cannot compute it."""
    way: AbstractContextManager[None] = nullcontext() if backend is None else sdpa_kernel(backend)
    pixels = pixels_of(config, ATTENTION_TILES)
    try:
        with way:
            return 1e3 * median_s(lambda: encoder.encode(pixels), num_rounds)
    except RuntimeError as error:
        return str(error).splitlines()[0]


def beside_decode(names: tuple[str, ...], seconds: float) -> list[dict[str, Any]]:
    """Rates of both alone and together."""
    model = Llama(LLAMA_3_8B, random_weights(LLAMA_3_8B))
    num_blocks = NUM_SEQUENCES * CONTEXT // BLOCK_SIZE
    kv_cache = torch.zeros(model.kv_cache_shape(num_blocks, BLOCK_SIZE), dtype=DTYPE, device=DEVICE)
    forward = DeviceForward(
        model, kv_cache, max_context_tokens=LLAMA_3_8B.max_context_tokens, buckets=(NUM_SEQUENCES,)
    )
    forward.warm_up(NUM_SEQUENCES, lambda _what, _done: None)
    forward.capture(lambda _what, _done: None)
    rows = []
    for name in names:
        config = SHAPES[name]
        encoder, _ = device_encoder(config)
        pixels = pixels_of(config, ATTENTION_TILES)
        encoder.encode(pixels)
        steps_alone, _ = rates(forward, None, pixels, seconds)
        _, batches_alone = rates(None, encoder, pixels, seconds)
        steps, batches = rates(forward, encoder, pixels, seconds)
        row = {
            "encoder": name,
            "tiles": len(pixels),
            "decode_steps_per_s": {"alone": steps_alone, "both": steps},
            "tiles_per_s": {"alone": batches_alone * len(pixels), "both": batches * len(pixels)},
            "combined": steps / steps_alone + batches / batches_alone,
        }
        rows.append(row)
        print(row)
    return rows


def rates(
    forward: DeviceForward | None, encoder: DeviceEncoder | None, pixels: list[torch.Tensor], seconds: float
) -> tuple[float, float]:
    """Decode steps and batches of tiles per second, in two threads, for so long."""
    num = {"steps": 0, "batches": 0}
    has_ended = threading.Event()

    def decode() -> None:
        assert forward is not None
        batch = batch_of([(CONTEXT - 1, 1)] * NUM_SEQUENCES)
        begun: list[torch.cuda.Event] = []
        while not has_ended.is_set():
            forward(batch)
            event = torch.cuda.Event()
            event.record()
            begun.append(event)
            if len(begun) == 2:
                # As the engine does it, which waits for a step when the next one has begun.
                begun.pop(0).synchronize()
                num["steps"] += 1

    def encode() -> None:
        assert encoder is not None
        while not has_ended.is_set():
            encoder.encode(pixels)
            num["batches"] += 1

    wanted = [(forward, decode), (encoder, encode)]
    threads = [threading.Thread(target=run) for there, run in wanted if there is not None]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    before, began_s = dict(num), time.perf_counter()
    time.sleep(seconds)
    found = {name: num[name] - before[name] for name in num}
    lasted_s = time.perf_counter() - began_s
    has_ended.set()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    return found["steps"] / lasted_s, found["batches"] / lasted_s


def tiles_of_graph(config: VisionConfig) -> int:
    """See graph_tiles."""
    return graph_tiles(config.max_tile_patches, PATCH_BUDGET)


def num_patches(config: VisionConfig) -> int:
    """Of a tile, or of the picture that stands for one."""
    return config.max_tile_patches


def pixels_of(config: VisionConfig, num_tiles: int) -> list[torch.Tensor]:
    """Noise: times do not depend on it."""
    side = config.tile_size if isinstance(config, Idefics3Vision) else 448
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, side, side, generator=generator) for _ in range(num_tiles)]


def weights_of(config: VisionConfig, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random."""
    generator = torch.Generator(device).manual_seed(0)
    found = {}
    for name, shape in vision_shapes(config).items():
        values = torch.randn(shape, generator=generator, device=device)
        found[name] = (1 + 0.1 * values if name.endswith("norm") else values * shape[-1] ** -0.5).to(dtype)
    return found


def tile_flops(config: VisionConfig) -> float:
    """Two for each weight of the layers and patch, and those of attention: to all patches, or within a window."""
    shapes = vision_shapes(config)
    matrices = [
        shape for name, shape in shapes.items() if name.startswith("vision.layers.") and len(shape) == 2
    ]
    patches = num_patches(config)
    seen = [patches] * config.num_layers
    if isinstance(config, Qwen25Vision):
        window = (config.window_embeddings * config.merge_size) ** 2
        seen = [patches if i in config.full_attention_layers else window for i in range(config.num_layers)]
    return 2.0 * patches * sum(a * b for a, b in matrices) + sum(
        4.0 * patches * one * config.hidden_size for one in seen
    )


def host_s(encoder: DeviceEncoder, pixels: list[torch.Tensor]) -> float:
    """How long one batch keeps its thread busy before it waits, with the GPU idle before."""
    found = []
    wait = encoder._wait

    def timed(embeddings: Any) -> None:
        found.append(time.perf_counter() - began_s)
        wait(embeddings)

    encoder._wait = timed  # type: ignore[method-assign]
    try:
        for _ in range(5):
            torch.cuda.synchronize()
            began_s = time.perf_counter()
            encoder.encode(pixels)
    finally:
        encoder._wait = wait  # type: ignore[method-assign]
    return statistics.median(found)


def median_s(call: Callable[[], object], num_rounds: int) -> float:
    """Of a call that waits for what it begins."""
    for _ in range(3):
        call()
    return statistics.median(elapsed_s(call) for _ in range(num_rounds))


def elapsed_s(call: Callable[[], object]) -> float:
    """Of one call."""
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


if __name__ == "__main__":
    sys.exit(main())
