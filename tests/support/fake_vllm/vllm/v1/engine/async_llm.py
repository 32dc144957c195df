"""The engine, with a child that holds what it inherits, as the real one has."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

from vllm import TokensPrompt, mode, note
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import SamplingParams
from vllm.usage.usage_lib import UsageContext

#: Tokens that come together.
NUM_TOGETHER = 3


@dataclass(frozen=True)
class CompletionOutput:
    token_ids: Sequence[int]


@dataclass(frozen=True)
class RequestOutput:
    outputs: Sequence[CompletionOutput]
    finished: bool


class AsyncLLM:
    @classmethod
    def from_engine_args(cls, engine_args: AsyncEngineArgs, usage_context: UsageContext) -> "AsyncLLM":
        print("words of vLLM on stdout")
        return cls(engine_args, usage_context)

    def __init__(self, engine_args: AsyncEngineArgs, usage_context: UsageContext) -> None:
        self.vllm_config = SimpleNamespace(
            scheduler_config=SimpleNamespace(
                max_num_batched_tokens=engine_args.max_num_batched_tokens, max_num_seqs=1024
            ),
            cache_config=SimpleNamespace(block_size=16, num_gpu_blocks=None),
        )
        self._core = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], close_fds=False)
        config = Path(engine_args.model, "config.json").read_text(encoding="utf-8")
        note(
            settings=asdict(engine_args),
            context=usage_context.value,
            config=config,
            pids=[os.getpid(), self._core.pid],
        )

    async def generate(
        self, prompt: TokensPrompt, sampling_params: SamplingParams, request_id: str
    ) -> AsyncIterator[RequestOutput]:
        note(
            request=request_id,
            prompt=prompt["prompt_token_ids"],
            max_tokens=sampling_params.max_tokens,
            is_greedy=sampling_params.temperature == 0 and sampling_params.ignore_eos,
        )
        if mode() == "dies":
            os._exit(7)
        num_left = sampling_params.max_tokens - (mode() == "short")
        while num_left > 0:
            await asyncio.sleep(0)
            num_now = min(num_left, NUM_TOGETHER)
            num_left -= num_now
            yield RequestOutput([CompletionOutput([1] * num_now)], num_left == 0)

    def shutdown(self) -> None:
        self._core.kill()
        self._core.wait()
