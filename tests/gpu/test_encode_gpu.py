"""Pictures on a GPU: embeddings are those of a CPU, beside decode steps too, and so are the tokens that follow."""

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvtransfer.pool_tensor import pool_shape
from kvtransfer.transports.cuda_ipc import CudaPool
from protos import inference_pb2 as pb
from tests.support.both_shapes import ROOMY, use
from tests.support.device_engine import PROMPTS, TINY, DeviceEngine, greedy, random_weights
from tests.support.gateway import collect, gateway, tokens_of
from tests.support.image_shapes import SHAPES, D, E, P, image_request, served
from tests.support.pictures import picture
from tests.support.tiny_encoders import ENCODERS, SIZES, device_encoder, tiles, weights_of
from tests.support.tiny_qwen_vl import write_qwen_vl_folder
from tests.support.tiny_vision_models import LAYOUTS, write_vision_folder
from tests.support.worker_process import worker_processes
from workers.api import Device, ImageReduction
from workers.embeddings.memory import BLOCK_SIZE, EmbeddingMemory, embedding_layout
from workers.model.llama import Llama
from workers.model.vision.config import VisionConfig
from workers.model.vision.make import make_encoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

GPU = torch.device("cuda", 0)
#: Of embeddings against those of a CPU in fp32, relative to the norm of the latter.
FP32_ERROR, BF16_ERROR = 1e-5, 0.03
BOTH_FAMILIES = pytest.mark.parametrize("config", ENCODERS.values(), ids=ENCODERS)
PROMPTS_WITH_PICTURES = [
    ("<image>what is it?", [1]),
    ("look at <image> and then at <image>: which one is it", [1, 2]),
    ("<image><image><image>", [3, 4, 3]),
    ("no picture at all", []),
]
#: A process on a GPU, in float32.
ON_GPU = ("--device", "cuda", "--weight-dtype", "float32")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models are not converted into the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    torch.backends.cuda.matmul.allow_tf32 = False


def error_of(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    assert [one.shape for one in found] == [one.shape for one in wanted]
    one, other = torch.cat(found).float().cpu(), torch.cat(wanted)
    return float((one - other).norm() / other.norm())


@BOTH_FAMILIES
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, FP32_ERROR), (torch.bfloat16, BF16_ERROR)])
def test_embeddings_are_those_of_a_cpu(config: VisionConfig, dtype: torch.dtype, most: float) -> None:
    on_cpu, on_gpu = make_encoder(config, weights_of(config)), device_encoder(config, 3, GPU, dtype)
    pixels = tiles(config, on_cpu, *SIZES)
    errors = [
        error_of(on_gpu.encode(pixels[:num]), on_cpu.encode(pixels[:num])) for num in range(1, len(pixels))
    ]
    print(f"embeddings of {config.family} in {dtype}: relative error {max(errors):.2e}")
    assert max(errors) < most


def test_merged_embeddings_are_those_of_a_cpu() -> None:
    config = ENCODERS["idefics3"]
    on_cpu, on_gpu = make_encoder(config, weights_of(config)), device_encoder(config, 3, GPU)
    for tile in tiles(config, on_cpu, *SIZES):
        wanted, wanted_kept = on_cpu.encode_reduced(tile, ImageReduction(merge_threshold=0.1))
        found, kept = on_gpu.encode_reduced(tile, ImageReduction(merge_threshold=0.1))
        assert kept == wanted_kept
        assert error_of([found], [wanted]) < FP32_ERROR


@BOTH_FAMILIES
def test_encoding_and_decoding_at_a_time_change_nothing(config: VisionConfig) -> None:
    model = Llama(TINY, random_weights(TINY, device="cuda"))
    buckets, mixed = (1, 2, 4, 8), (16, 32, 64)
    made = DeviceEngine(model, buckets=buckets, mixed_buckets=mixed, is_overlapping=True)
    expected = made.serve(PROMPTS, greedy())
    encoder = device_encoder(config, 3, GPU)
    pixels = tiles(config, encoder, *SIZES)
    layout = embedding_layout(config.text_hidden_size, model_digest="m", processor_digest="p")
    values = torch.zeros(pool_shape(layout, 64), device=GPU)
    memory = EmbeddingMemory(values, CudaPool(values, layout))
    wanted = torch.cat(encoder.encode(pixels))
    has_ended, num_wrong = threading.Event(), []

    def encode() -> None:
        while not has_ended.is_set():
            found = encoder.encode(pixels)
            sizes = [len(one) for one in found]
            blocks = [-(-size // BLOCK_SIZE) for size in sizes]
            starts = [sum(blocks[:i]) for i in range(len(blocks))]
            memory.write(range(sum(blocks)), found)
            spans = [
                (range(start, start + num), 0, size)
                for start, num, size in zip(starts, blocks, sizes, strict=True)
            ]
            num_wrong.append(not torch.equal(memory.read(spans), wanted))

    thread = threading.Thread(target=encode)
    thread.start()
    try:
        for _ in range(5):
            assert made.serve(PROMPTS, greedy(), steps_between=1) == expected
    finally:
        has_ended.set()
        thread.join()
    assert num_wrong
    assert not any(num_wrong)


def write_idefics3(folder: Path) -> str:
    write_vision_folder(folder)
    return "<image>"


def write_qwen(folder: Path) -> str:
    write_qwen_vl_folder(folder)
    return "<|vision_start|><|image_pad|><|vision_end|>"


def requests_with(placeholder: str) -> list[object]:
    return [
        image_request(text.replace("<image>", placeholder), *map(picture, seeds))
        for text, seeds in PROMPTS_WITH_PICTURES
    ]


def answers(folder: Path, placeholder: str, shape: str, *devices: Device) -> list[list[int]]:
    """Of all prompts at once, and, with everything cached, of all of them again."""

    async def main() -> list[list[int]]:
        async with served(folder, SHAPES[shape], devices) as it:
            requests = requests_with(placeholder)
            found = await asyncio.gather(*map(it.tokens, requests))
            assert await asyncio.gather(*map(it.tokens, requests)) == found
            await it.check_invariants()
            return list(found)

    return asyncio.run(main())


@pytest.mark.parametrize("write", [write_idefics3, write_qwen])
def test_greedy_tokens_after_pictures_are_those_of_a_cpu(write: object, tmp_path: Path) -> None:
    placeholder = write(tmp_path)
    cpu, cuda = Device.CPU, Device.CUDA
    expected = answers(tmp_path, placeholder, "EPD", cpu)
    assert answers(tmp_path, placeholder, "EPD", cuda) == expected
    assert answers(tmp_path, placeholder, "E+PD", cuda, cpu) == expected
    assert answers(tmp_path, placeholder, "E+PD", cpu, cuda) == expected


def test_embeddings_that_leave_do_so_as_on_a_cpu(tmp_path: Path) -> None:
    """Merged in the encoder, and left out between the layers of the text model."""
    write_vision_folder(tmp_path, replace(LAYOUTS["tiles"], tile_size=64, image_size=64, longest_edge=100))
    reduction = pb.ImageReduction(merge_threshold=0.05, global_threshold=0.02, individual_threshold=0.08)
    requests = [
        image_request(text, *map(picture, seeds), image_reduction=reduction)
        for text, seeds in PROMPTS_WITH_PICTURES[:2]
    ]

    async def main(*devices: Device) -> list[list[int]]:
        async with served(tmp_path, SHAPES["E+PD"], devices) as it:
            found = [await collect(it.gateway.client.Generate(one)) for one in requests]
            assert all(one[-1].usage.image_reduction.kept_tokens > 0 for one in found)
            return [tokens_of(messages) for messages in found]

    expected = asyncio.run(main(Device.CPU, Device.CPU))
    assert asyncio.run(main(Device.CUDA, Device.CUDA)) == expected


@pytest.mark.parametrize("prefill", [(), ON_GPU], ids=["cpu", "cuda"])
def test_a_process_encodes_on_a_gpu_for_another_one(prefill: tuple[str, ...], tmp_path: Path) -> None:
    """By page-locked memory and gRPC to a CPU, and by CUDA IPC to another process on the GPU."""
    placeholder = write_idefics3(tmp_path)
    expected = answers(tmp_path, placeholder, "EPD", Device.CPU)
    started = ("e-0", E), ("pd-0", P | D)
    with worker_processes(*started, model=tmp_path, arguments=[ON_GPU, prefill]) as workers:

        async def main() -> list[list[int]]:
            async with gateway(config=ROOMY) as it:
                await use(it, *(one.view() for one in workers))
                requests = requests_with(placeholder)
                return [tokens_of(await collect(it.client.Generate(one))) for one in requests]

        assert asyncio.run(main()) == expected
