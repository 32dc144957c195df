"""Decode attention over packed pages of KV, which are never unpacked in memory."""
