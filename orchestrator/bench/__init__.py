"""Load from a request trace, sent as it would arrive, and what it measured.

Read `trace` (what the files say), `plan` (when which request is sent), `load` (the open loop, the only
part with a clock), `summary` (what the numbers mean) and `report` (how they are shown and saved).
`records` has the data that goes between them; `runner` joins them.
"""
