"""Rotation of queries and keys by their positions, and the write of K and V into the cache."""
