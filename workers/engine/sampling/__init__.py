"""Choosing tokens, in parts: `workers.engine.sampler` is the way in.

`philox` gives the random numbers, `adjust` changes logits before they are a distribution, `order` finds the
likeliest tokens, `draw` warps the distribution and draws from it, `logprobs` reports what the model gave.
"""
