"""KV of some tokens from one block pool of a GPU to another, with a checksum of what was read, in one pass."""
