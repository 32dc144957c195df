"""As much of vLLM as the capacity benchmark calls: it streams tokens without computing anything.

FAKE_VLLM names a file that gets a line of JSON for what it was asked, and FAKE_VLLM_MODE what goes wrong: `dies`, `short`, or nothing.
"""

import json
import os
from pathlib import Path
from typing import Any, TypedDict

from vllm.sampling_params import SamplingParams

__all__ = ["SamplingParams", "TokensPrompt", "__version__", "mode", "note"]
__version__ = "0.0-fake"


class TokensPrompt(TypedDict):
    prompt_token_ids: list[int]


def note(**what: Any) -> None:
    with Path(os.environ["FAKE_VLLM"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(what) + "\n")


def mode() -> str:
    return os.environ.get("FAKE_VLLM_MODE", "")
