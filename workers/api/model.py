"""The model that a worker has loaded, as a gateway sees it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a gateway needs to know of the model that its workers have loaded."""

    #: tokenizer.json of the tokenizers library, UTF-8.
    tokenizer_json: bytes
    #: Jinja source; empty when the model has none.
    chat_template: str
    architecture: str
    max_context_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    #: SHA-256 of weights and configuration, hexadecimal.
    model_digest: str
    bos_token: str
    eos_token: str
    #: Longest sequence that the block pool can hold.
    max_sequence_tokens: int
    #: How pictures become tiles and stand in a prompt (workers.model.vision.config), as JSON; empty: it takes none.
    vision_json: str = ""
    #: Embeddings that the pictures of one request may have here.
    max_image_embeddings: int = 0
    #: Tokens of a KV block here; 0: no KV is cached here.
    block_size: int = 0
