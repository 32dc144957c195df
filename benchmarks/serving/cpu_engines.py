"""The engines that engine_cpu.py compares: each can be started, and asked many prompts at once."""

import os
import shlex
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.closed_loop import Stream, closed_loop
from benchmarks.serving.load_records import Record
from benchmarks.serving.vllm_server import vllm_server
from benchmarks.serving.worker_process import open_link, worker_process
from workers.api import EngineConfig, WeightDtype

#: (prompts, clients, new tokens) -> each prompt's answer.
Load = Callable[[list[list[int]], int, int], Awaitable[list[Record]]]
KV_CACHE_GIB = 2
DEFAULTS = EngineConfig()


@dataclass(frozen=True, slots=True)
class Running:
    """An engine that can be asked. pid: of the process that it runs in, with its children."""

    load: Load
    pid: int


@dataclass(frozen=True, slots=True)
class Engine:
    """is_lossy: its weights are rounded, so that its tokens may be others."""

    name: str
    start: Callable[[], AbstractAsyncContextManager[Running]]
    is_lossy: bool = False


def phasewise(
    model: str, logs: Path, *, num_threads: int, token_budget: int, weight_dtype: WeightDtype
) -> Engine:
    """A worker process."""

    @asynccontextmanager
    async def start() -> AsyncIterator[Running]:
        options = {
            "--threads": num_threads,
            "--kv-cache-mib": KV_CACHE_GIB * 1024,
            "--token-budget": token_budget,
            # A budget must hold them all and a block.
            "--max-running-sequences": min(
                DEFAULTS.max_running_sequences, token_budget - DEFAULTS.block_size
            ),
            "--weight-dtype": weight_dtype,
        }
        words = [str(word) for option in options.items() for word in option]
        async with (
            worker_process(model, logs / "phasewise.log", *words) as (address, pid),
            open_link(address) as link,
        ):
            yield Running(_by_clients(link.greedy), pid)

    name = f"phasewise {weight_dtype}, budget {token_budget}"
    return Engine(name, start, is_lossy=weight_dtype is not WeightDtype.FLOAT32)


def vllm(python: Path, folder: Path, logs: Path, *, num_threads: int, options: str) -> Engine:
    """`vllm serve` with these options beside what makes it comparable."""

    @asynccontextmanager
    async def start() -> AsyncIterator[Running]:
        async with vllm_server(
            python,
            folder,
            logs / "vllm.log",
            num_threads=num_threads,
            kv_cache_gib=KV_CACHE_GIB,
            options=shlex.split(options),
        ) as (client, pid):
            yield Running(_by_clients(client.greedy), pid)

    return Engine(f"vllm {options}".strip(), start)


def transformers(folder: Path, *, num_threads: int) -> Engine:
    """In this process."""

    @asynccontextmanager
    async def start() -> AsyncIterator[Running]:
        # Brings torch and seconds of imports, which the others do not need.
        from benchmarks.serving.transformers_batches import load_model, run_batches

        model = load_model(folder, num_threads)

        async def load(prompts: list[list[int]], concurrency: int, num_tokens: int) -> list[Record]:
            return run_batches(model, prompts, batch_size=concurrency, num_tokens=num_tokens)

        yield Running(load, os.getpid())

    return Engine("transformers", start)


def _by_clients(stream: Stream) -> Load:
    async def load(prompts: list[list[int]], concurrency: int, num_tokens: int) -> list[Record]:
        return await closed_loop(stream, prompts, concurrency=concurrency, num_tokens=num_tokens)

    return load
