"""Makes folders as transformers writes them, with a few thousand random weights, so that tests take the real way in."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

EOS_TOKEN_ID = 2
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"
VOCAB_SIZE = 384
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": [EOS_TOKEN_ID],
    "pad_token_id": None,
}
#: Sharp attention and a strong MLP: with plain random weights greedy output soon repeats one token, and a
#: test that compares tokens would not see a wrong position.
SCALES = {"q_proj.weight": 2.0, "k_proj.weight": 2.0, "q_norm.weight": 2.0, "down_proj.weight": 3.0}


def write_hf_folder(
    folder: Path,
    model_type: str,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    seed: int = 0,
    **options: Any,
) -> Path:
    """Write a model of this type of transformers, with config.json options beyond SHAPE; returns `folder`.

    The same arguments give the same weights.
    """
    config = AutoConfig.for_model(model_type, **{**SHAPE, **options})
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            values *= 0.1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            values += 1.0 if name.endswith("norm.weight") else 0.0
            values *= next((scale for end, scale in SCALES.items() if name.endswith(end)), 1.0)
            parameter.copy_(values)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of VOCAB_SIZE tokens with a chat template, in the files that transformers writes."""
    letters = "etaoinsrhldu"
    pairs = [(left, right) for left in letters for right in letters][: VOCAB_SIZE - len(SPECIAL_TOKENS) - 256]
    tokens = [*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet()), *(left + right for left, right in pairs)]
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    theirs: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL_TOKENS[1], eos_token=SPECIAL_TOKENS[2]
    )
    theirs.chat_template = CHAT_TEMPLATE
    theirs.save_pretrained(folder)


def hf_model(folder: Path) -> PreTrainedModel:
    """The folder's model in transformers, fp32 on the CPU."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model
