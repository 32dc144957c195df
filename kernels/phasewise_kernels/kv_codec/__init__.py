"""KV of a block pool as packed pages, and back, where it lies."""
