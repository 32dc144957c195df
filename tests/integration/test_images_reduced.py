"""Pictures that get fewer embeddings, through gateways and real workers."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.gateway.live_request import LiveRequest
from protos import inference_pb2 as pb
from tests.support.both_shapes import view
from tests.support.gateway import collect, error_of, tokens_of
from tests.support.image_shapes import SHAPES, D, E, P, ServedImages, image_request, served
from tests.support.pictures import picture
from tests.support.tiny_qwen_vl import write_qwen_vl_folder
from tests.support.tiny_vision_models import LAYOUTS, write_vision_folder
from tests.support.waiting import until
from tests.support.worker_client import standing_still
from workers.api import Phase

#: Tiles of 8 x 8 embeddings: enough to have windows, and more than one tile.
LAYOUT = replace(LAYOUTS["tiles"], tile_size=64, image_size=64, longest_edge=100)
PROMPTS = [
    ("<image>what is it?", (1,)),
    ("look at <image> and then at <image>: which one is it", (1, 2)),
    ("text before the only picture <image>", (2,)),
]
#: So that both stages take some of what these random weights make of noise, and leave some.
REDUCTION = pb.ImageReduction(merge_threshold=0.05, global_threshold=0.02, individual_threshold=0.08)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reduced")
    write_vision_folder(folder, LAYOUT)
    return folder


def run(model: Path, shape: str, scenario: Callable[[ServedImages], Awaitable[None]], **engine: int) -> None:
    async def main() -> None:
        async with served(model, SHAPES[shape], **engine) as it:
            await scenario(it)
            await it.check_invariants()

    asyncio.run(main())


def request(text: str, seeds: tuple[int, ...], reduction: pb.ImageReduction | None) -> pb.GenerateRequest:
    asked = image_request(text, *map(picture, seeds))
    if reduction is not None:
        asked.image_reduction.CopyFrom(reduction)
    return asked


async def answer(it: ServedImages, asked: pb.GenerateRequest) -> tuple[list[int], pb.GenerateResponse]:
    messages = await collect(it.gateway.client.Generate(asked))
    return tokens_of(messages), messages[-1]


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """Of each prompt reduced, by one worker that does all."""
    found: list[list[int]] = []

    async def scenario(it: ServedImages) -> None:
        for text, seeds in PROMPTS:
            whole, last = await answer(it, request(text, seeds, None))
            assert not last.usage.HasField("image_reduction")
            # All thresholds 0: nothing of it is taken.
            off, last = await answer(it, request(text, seeds, pb.ImageReduction()))
            assert off == whole
            assert not last.usage.HasField("image_reduction")
            tokens, last = await answer(it, request(text, seeds, REDUCTION))
            usage, report = last.usage, last.usage.image_reduction
            assert usage.image_tokens > report.encoded_tokens > report.kept_tokens > 0
            assert 0 < report.prefill_share < 1
            assert not report.is_too_long
            found.append(tokens)

    run(model, "EPD", scenario)
    assert len({tuple(tokens) for tokens in found}) == len(found)
    return found


@pytest.mark.parametrize("shape", ["E+P+D", "2E+2P+D", "EP+D"])
def test_the_answer_is_the_same_in_every_shape(model: Path, shape: str, expected: list[list[int]]) -> None:
    async def scenario(it: ServedImages) -> None:
        requests = [request(text, seeds, REDUCTION) for text, seeds in PROMPTS]
        # All at once, and again with everything cached.
        for _ in range(2):
            answers = await asyncio.gather(*(answer(it, one) for one in requests))
            assert [tokens for tokens, _ in answers] == expected

    run(model, shape, scenario)


def test_fewer_embeddings_and_less_kv_travel(model: Path, expected: list[list[int]]) -> None:
    async def told(it: ServedImages, asked: pb.GenerateRequest) -> tuple[list[int], pb.GenerateResponse]:
        """The encoder's report may come after the last token, and is not waited for then."""
        live = it.gateway.dispatcher._requests
        async with standing_still(*it.with_phase(Phase.DECODE)):
            answering = asyncio.create_task(answer(it, asked))
            await until(lambda: any(is_encoded(one) for one in live.values()), "the encoder's report")
        return await answering

    def is_encoded(one: LiveRequest) -> bool:
        records = one.samples[0].machine.encodes.records
        return bool(records) and all(record.report is not None for record in records)

    async def scenario(it: ServedImages) -> None:
        text, seeds = PROMPTS[1]
        _, whole = await told(it, request(text, seeds, None))
        tokens, reduced = await told(it, request(text, seeds, REDUCTION))
        assert tokens == expected[1]
        report, num_text = reduced.usage.image_reduction, whole.usage.prompt_tokens - whole.usage.image_tokens
        num_bytes = [sum(one.num_bytes for one in last.timings.encodes) for last in (whole, reduced)]
        assert num_bytes[1] * whole.usage.image_tokens == num_bytes[0] * report.encoded_tokens
        kv_bytes = [(await it.gateway.kv_transfer(last.request_id)).num_bytes for last in (whole, reduced)]
        assert kv_bytes[1] * whole.usage.prompt_tokens == kv_bytes[0] * (num_text + report.kept_tokens)

    run(model, "E+P+D", scenario)


def test_a_request_whose_worker_is_lost_goes_on_as_if_it_were_not(model: Path) -> None:
    async def main() -> None:
        async with served(model, (E, P | D, P | D)) as it:
            text, seeds = PROMPTS[1]
            asked = request(text, seeds, REDUCTION)
            asked.sampling.max_tokens = 400
            whole, _ = await answer(it, asked)
            tokens: list[int] = []
            is_lost = False
            async for message in it.gateway.client.Generate(asked):
                tokens += message.token_ids
                if not is_lost:
                    is_lost = True
                    (used,) = [one for one in it.workers if one.worker.status().num_running]
                    await it.gateway.publish(*(view(one) for one in it.workers if one is not used))
            assert message.timings.attempts == 2
            assert tokens == whole
            await it.check_invariants()

    asyncio.run(main())


def test_qwen_is_refused_in_words(tmp_path: Path) -> None:
    write_qwen_vl_folder(tmp_path)

    async def scenario(it: ServedImages) -> None:
        text = "<|vision_start|><|image_pad|><|vision_end|> what is it?"
        status, message = await error_of(it.gateway.client.Generate(request(text, (1,), REDUCTION)))
        assert (status, "Idefics3" in message) == ("INVALID_ARGUMENT", True)

    run(tmp_path, "EPD", scenario)
