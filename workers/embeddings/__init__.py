"""Embeddings of pictures: where they lie, who holds them, how they come from encode to prefill."""
