"""Moves KV blocks between workers: correctly, and without leaking.

Read `session` (the two machines), `wire` (what goes over the stream), then `server` and `client`.
"""
