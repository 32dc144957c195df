"""vLLM under a load: in a process of its own, set up as `vllm serve` sets it up but for what `engine_settings` names.

The process is `python -m benchmarks.serving.capacity_vllm FD`: it is told what to serve, and answers, on the connection FD, until that is closed.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from benchmarks.serving.capacity_rows import Load, Served
from workers.model.config import ModelConfig

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

ROOT = Path(__file__).resolve().parents[2]
#: What a policy's name begins with; the tokens of a step follow.
PREFIX = "vllm@"
MISSING = "policies of vLLM are asked for, and it is not installed here: pip install vllm"
#: For its start, and for a whole load.
ANSWER_PATIENCE_S = 1800.0
#: After the last request was sent, and after there is nothing more to serve.
SERVE_PATIENCE_S, STOP_PATIENCE_S = 300.0, 60.0


def is_installed() -> bool:
    """Whether it can be asked for."""
    return find_spec("vllm") is not None


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """As in a model's config.json. config: of a Llama without biases and without scaled rotation."""
    return {
        "architectures": [config.architecture],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_context_tokens,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "eos_token_id": list(config.eos_token_ids),
        "torch_dtype": "bfloat16",
    }


def fp8_settings(*, is_weights: bool, is_kv: bool) -> dict[str, str]:
    """Arguments of its AsyncEngineArgs for weights that are quantised while they are loaded, and for KV."""
    weights = {"quantization": "fp8"} if is_weights else {}
    return weights | ({"kv_cache_dtype": "fp8"} if is_kv else {})


def engine_settings(folder: Path, config: ModelConfig, batched_tokens: int) -> dict[str, Any]:
    """Arguments of its AsyncEngineArgs: the shape and the memory that our engine has, no prefix cache, and so many tokens in a step."""
    return {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "dtype": "bfloat16",
        "max_model_len": config.max_context_tokens,
        "gpu_memory_utilization": 0.9,
        "enable_prefix_caching": False,
        "max_num_batched_tokens": batched_tokens,
    }


@contextmanager
def vllm_serving(
    config: ModelConfig, batched_tokens: int, more: Mapping[str, str] | None = None
) -> Iterator[tuple[Callable[[Load], list[Served]], dict[str, Any]]]:
    """Start it with random weights; what serves a load, and what it says of itself. more: arguments beside `engine_settings`.

    Its words go to stderr. Ends it with all its processes, so that the GPU is free again. Raises RuntimeError when it dies.
    """
    ours, theirs = Pipe()
    with TemporaryDirectory() as folder, ours:
        Path(folder, "config.json").write_text(json.dumps(hf_config(config)), encoding="utf-8")
        with theirs:
            # A session of its own: it has children, which must end with it.
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.serving.capacity_vllm", str(theirs.fileno())],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        try:
            settings = engine_settings(Path(folder), config, batched_tokens) | dict(more or {})
            about = _answer(process, ours, settings)
            yield lambda load: _answer(process, ours, load), about
        finally:
            ours.close()
            _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """It ends by itself when nothing can be asked any more; its children with it, in any case."""
    try:
        process.wait(STOP_PATIENCE_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answer(process: "subprocess.Popen[bytes]", connection: Connection, question: object) -> Any:
    """What it says to that. Raises RuntimeError when it ends instead, or says nothing for too long."""
    gives_up_s = time.monotonic() + ANSWER_PATIENCE_S
    with suppress(EOFError, OSError):
        connection.send(question)
        # A child of it may hold the connection open after it.
        while process.poll() is None or connection.poll():
            if connection.poll(1.0):
                return connection.recv()
            if time.monotonic() > gives_up_s:
                raise RuntimeError(
                    f"vLLM has said nothing for {ANSWER_PATIENCE_S:g} s; what it said before is on stderr"
                )
    raise RuntimeError(f"vLLM ended with {process.wait()}; what it said is on stderr")


async def answer_loads(connection: Connection) -> None:
    """In vLLM's process: an engine of the settings that come first, then one load after another."""
    import vllm
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    # The context is what its defaults depend on: without it, it runs at most 128 requests at once.
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(**connection.recv()), usage_context=UsageContext.OPENAI_API_SERVER
    )
    try:
        scheduler, cache = engine.vllm_config.scheduler_config, engine.vllm_config.cache_config
        connection.send(
            {
                "version": vllm.__version__,
                "max_num_batched_tokens": scheduler.max_num_batched_tokens,
                "max_num_seqs": scheduler.max_num_seqs,
                "block_size": cache.block_size,
                "num_gpu_blocks": cache.num_gpu_blocks,
            }
        )
        with suppress(EOFError):
            while True:
                connection.send(await serve(engine, await asyncio.to_thread(connection.recv)))
    finally:
        engine.shutdown()


async def serve(engine: "AsyncLLM", load: Load) -> list[Served]:
    """All requests to their end, each sent when it is due. Raises RuntimeError when one gets too few or too many tokens."""
    loop = asyncio.get_running_loop()
    began_s = time.monotonic() + 0.1
    served = [Served(one, began_s + one.arrival_s, []) for one in load.requests]
    async with asyncio.timeout(None) as limit, asyncio.TaskGroup() as group:
        for number, (one, prompt) in enumerate(zip(served, load.prompts, strict=True)):
            await asyncio.sleep(max(0.0, one.due_s - time.monotonic()))
            group.create_task(_follow(engine, f"r{number}", one, prompt))
        limit.reschedule(loop.time() + SERVE_PATIENCE_S)
    wrong = [one.plan for one in served if len(one.times_s) != one.plan.output_tokens]
    if wrong:
        raise RuntimeError(
            f"{len(wrong)} requests got other numbers of tokens than they asked for: {wrong[:3]}"
        )
    return served


async def _follow(engine: "AsyncLLM", name: str, one: Served, prompt: Sequence[int]) -> None:
    """Note when its tokens come; those that come together come at one time."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    sampling = SamplingParams(
        max_tokens=one.plan.output_tokens,
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    async for output in engine.generate(TokensPrompt(prompt_token_ids=list(prompt)), sampling, name):
        one.times_s += [time.monotonic()] * len(output.outputs[0].token_ids)


if __name__ == "__main__":
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    asyncio.run(answer_loads(Connection(int(sys.argv[1]))))
