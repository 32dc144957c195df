"""Causal attention of new tokens over a KV cache that is kept in blocks."""
