"""The embedded model as a Hugging Face folder, which is what transformers and vLLM read."""

import os
import shutil
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.hf_reference import hf_llama  # noqa: E402
from workers.model.prepare import default_cache_dir, load_weights, prepare  # noqa: E402


def hf_folder(source: str) -> Path:
    """A folder in the user's cache with fp32 weights, written on the first call.

    source: of a Llama without biases, as `prepare` takes it.
    """
    prepared = prepare(source, lambda _what, _done: None)
    folder = default_cache_dir().parent / "benchmarks" / f"{prepared.folder.name}-hf"
    if folder.exists():
        return folder
    partial = folder.with_suffix(f".partial-{os.getpid()}")
    partial.mkdir(parents=True)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        config = prepared.config
        hf_llama(config, load_weights(prepared)).save_pretrained(partial)
        (partial / "tokenizer.json").write_bytes(prepared.tokenizer_json)
        tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_file=str(partial / "tokenizer.json"),
            bos_token=config.bos_token or None,
            eos_token=config.eos_token or None,
        )
        tokenizer.chat_template = prepared.chat_template
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
