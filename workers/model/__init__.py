"""The language model: from a GGUF file to logits over a paged KV cache.

Read in this order: `config` (shapes), `gguf_file` (the container), `metadata` (the container's keys as a
config), `tokenizer`, `convert` (weights, written once per machine), `prepare` (finds, converts and opens),
`llama` (the forward pass).
"""
