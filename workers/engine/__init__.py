"""The engine: sequences, blocks and steps.

`sequence`, `block_pool`, `scheduler` and `engine` decide and are pure; `runner` and `sampler` compute
with torch; `step_loop` is the main loop that joins the two.
"""
