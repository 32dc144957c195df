"""Pictures on workers of device cuda, whose GPU is this CPU, beside workers of a CPU: the same answers in every shape."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from protos import inference_pb2 as pb
from tests.support.device_worker import cpu_as_gpu
from tests.support.gateway import collect, tokens_of
from tests.support.image_shapes import SHAPES, image_request, served
from tests.support.pictures import picture
from tests.support.tiny_qwen_vl import write_qwen_vl_folder
from tests.support.tiny_vision_models import LAYOUTS, write_vision_folder
from workers.api import Device

pytestmark = pytest.mark.usefixtures("cache_home", "nothing_escapes")

CPU, GPU = Device.CPU, Device.CUDA
PROMPTS = [
    ("<image>what is it?", [1]),
    ("look at <image> and then at <image>: which one is it", [1, 2]),
    ("<image><image><image>", [3, 4, 3]),
    ("no picture at all", []),
]


@pytest.fixture(autouse=True)
def _cpu_as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_as_gpu(monkeypatch)


def write_idefics3(folder: Path) -> str:
    write_vision_folder(folder)
    return "<image>"


def write_qwen(folder: Path) -> str:
    write_qwen_vl_folder(folder)
    return "<|vision_start|><|image_pad|><|vision_end|>"


def answers(folder: Path, placeholder: str, shape: str, devices: tuple[Device, ...]) -> list[list[int]]:
    """Of all prompts at once, and, with everything cached, of all of them again."""
    requests = [
        image_request(text.replace("<image>", placeholder), *map(picture, seeds)) for text, seeds in PROMPTS
    ]

    async def main() -> list[list[int]]:
        # Prompts take several steps.
        async with served(folder, SHAPES[shape], devices, token_budget=40) as it:
            found = await asyncio.gather(*map(it.tokens, requests))
            assert await asyncio.gather(*map(it.tokens, requests)) == found
            await it.check_invariants()
            return list(found)

    return asyncio.run(main())


@pytest.mark.parametrize("write", [write_idefics3, write_qwen])
def test_the_answer_is_the_same_on_every_device(write: object, tmp_path: Path) -> None:
    placeholder = write(tmp_path)
    expected = answers(tmp_path, placeholder, "EPD", (CPU,))
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    assert answers(tmp_path, placeholder, "EPD", (GPU,)) == expected
    assert answers(tmp_path, placeholder, "E+PD", (GPU, CPU)) == expected
    assert answers(tmp_path, placeholder, "E+PD", (CPU, GPU)) == expected
    assert answers(tmp_path, placeholder, "E+P+D", (GPU, GPU, GPU)) == expected


def test_embeddings_that_leave_do_so_on_every_device(tmp_path: Path) -> None:
    """Merged in the encoder, and left out between the layers of the text model."""
    layout = replace(LAYOUTS["tiles"], tile_size=64, image_size=64, longest_edge=100)
    write_vision_folder(tmp_path, layout)
    reduction = pb.ImageReduction(merge_threshold=0.05, global_threshold=0.02, individual_threshold=0.08)
    requests = [
        image_request(text, *map(picture, seeds), image_reduction=reduction) for text, seeds in PROMPTS[:2]
    ]

    async def main(devices: tuple[Device, ...]) -> list[list[int]]:
        async with served(tmp_path, SHAPES["E+PD"], devices) as it:
            found = [await collect(it.gateway.client.Generate(one)) for one in requests]
            for messages in found:
                report = messages[-1].usage.image_reduction
                assert messages[-1].usage.image_tokens > report.encoded_tokens > report.kept_tokens > 0
            return [tokens_of(messages) for messages in found]

    expected = asyncio.run(main((CPU, CPU)))
    assert asyncio.run(main((GPU, GPU))) == expected
