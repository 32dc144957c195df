"""Copies of pieces of memory, with the CRC32C of what was copied."""
