"""A worker that may split its steps, and one that may not, at the same requests."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.worker_client import (
    SMALL_BUDGET,
    WorkerClient,
    prompt,
    running_worker,
    submit,
    worker_spec,
)
from workers.api import Device, PhaseSharing, StepBudget, WorkerSpec
from workers.device import placing
from workers.step_cost import StepCost
from workers.step_shape import ENOUGH_STEPS, Contention, DeviceShape

PROMPT_LENGTHS = (1, 16, 17, 50, 131)
NUM_TOKENS = 16
#: A hundredth of the SMs is as fast as all of them.
FLAT = ((0.01, 1.0),)


def splitting_spec(model: Path) -> WorkerSpec:
    """In float32, with 2 MiB of KV; prompts take several steps."""
    spec = worker_spec(
        model,
        token_budget=SMALL_BUDGET,
        max_running_sequences=8,
        step_budget=StepBudget.PREDICTED,
        phase_sharing=PhaseSharing.PREDICTED,
    )
    return replace(spec, device=Device.CUDA)


def split_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that begin then have a device on which neither phase slows the other down."""
    gpu_shape = placing.gpu_shape

    def flat(*arguments: object) -> DeviceShape:
        found = gpu_shape(*arguments)
        return replace(found, compute_curve=FLAT, memory_curve=FLAT, contention=Contention())

    monkeypatch.setattr(placing, "gpu_shape", flat)


async def tokens_and_layouts(
    spec: WorkerSpec, num_steps: float = 4.0
) -> tuple[list[list[int]], dict[str, float]]:
    """Of prompts that come together, and what the worker says of its layouts afterwards. By then it has learnt how long its steps take.

    num_steps: so many of them the target for TPOT is long. Where both phases are as fast beside the other, a split pays with few.
    """
    async with running_worker(spec) as worker:
        tokens = await burst(worker, await target_s(worker, num_steps))
        return tokens, dict((await worker.status()).layout_s)


async def target_s(worker: WorkerClient, num_steps: float) -> float:
    """For TPOT, as long as so many steps; the worker has learnt by then how long they take."""
    await worker.generate(submit(prompt(9, seed=1), max_new_tokens=ENOUGH_STEPS + 8))
    costs = (await worker.status()).step_costs
    assert costs is not None
    return num_steps * StepCost.learnt(costs).step_s(len(PROMPT_LENGTHS), sum(PROMPT_LENGTHS))


async def burst(worker: WorkerClient, tpot_target_s: float, seed: int = 0) -> list[list[int]]:
    """Tokens of prompts that come together. seed: another one for prompts that are not cached."""
    asked = [
        submit(prompt(length, seed=seed), request_id=f"p{length}-{seed}", max_new_tokens=NUM_TOKENS)
        for length in PROMPT_LENGTHS
    ]
    await worker.send(*(replace(one, tpot_target_s=tpot_target_s) for one in asked))
    return [await worker.wait_for_tokens(one.key.request_id, NUM_TOKENS) for one in asked]


def check_split_worker(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokens are those of a worker that computes both phases in one step, and it says how long it had which layout."""
    split_wins(monkeypatch)
    spec = splitting_spec(model)
    mixed = replace(spec, engine=replace(spec.engine, phase_sharing=PhaseSharing.MIXED))
    found, layout_s = asyncio.run(tokens_and_layouts(spec))
    wanted, none = asyncio.run(tokens_and_layouts(mixed))
    assert found == wanted
    assert none == {}
    assert layout_s["together"] > 0
    assert sum(seconds for name, seconds in layout_s.items() if name.startswith("split: ")) > 0
