"""The same model in transformers, which is what correct means for the forward pass."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from workers.model.config import ModelConfig


def hf_llama(config: ModelConfig, weights: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    """LlamaForCausalLM with our converted weights, taken apart again. fp32 on the CPU.

    config: of a Llama without biases and without scaled rotation.
    """
    hf_config = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_context_tokens,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=None,
        eos_token_id=list(config.eos_token_ids),
    )
    state = {"model.embed_tokens.weight": weights["embedding"], "model.norm.weight": weights["norm"]}
    state["lm_head.weight"] = weights["embedding" if config.tie_embeddings else "lm_head"]
    query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        query, key, value = weights[f"{ours}.qkv"].split([query_size, kv_size, kv_size])
        gate, up = weights[f"{ours}.gate_up"].chunk(2)
        state |= {
            f"{theirs}.self_attn.q_proj.weight": query,
            f"{theirs}.self_attn.k_proj.weight": key,
            f"{theirs}.self_attn.v_proj.weight": value,
            f"{theirs}.self_attn.o_proj.weight": weights[f"{ours}.attention_out"],
            f"{theirs}.mlp.gate_proj.weight": gate,
            f"{theirs}.mlp.up_proj.weight": up,
            f"{theirs}.mlp.down_proj.weight": weights[f"{ours}.down"],
            f"{theirs}.input_layernorm.weight": weights[f"{ours}.attention_norm"],
            f"{theirs}.post_attention_layernorm.weight": weights[f"{ours}.mlp_norm"],
        }
    with torch.device("meta"):
        model = LlamaForCausalLM(hf_config)
    model.load_state_dict(state, assign=True)
    # Buffers made on the meta device hold nothing; this one is not part of the state.
    model.model.rotary_emb = type(model.model.rotary_emb)(hf_config)
    return model.eval()


@torch.inference_mode()
def hf_logits(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """[len(token_ids), vocab_size]."""
    logits: torch.Tensor = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    return logits


@torch.inference_mode()
def hf_greedy(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """The next tokens, at most this many; ends with an end token if it comes."""
    inputs, cache, generated = torch.tensor([prompt]), None, []
    while len(generated) < num_tokens:
        result = model(inputs, past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        generated.append(int(result.logits[0, -1].argmax()))
        if generated[-1] in model.config.eos_token_id:
            break
        inputs = torch.tensor([[generated[-1]]])
    return generated
