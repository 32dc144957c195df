"""Choosing tokens, in parts: `workers.engine.sampler` is the way in.

`philox` gives the random numbers, `adjust` changes logits before they are a distribution, `order` finds the
likeliest tokens, `softmax` sums, `draw` warps the distribution and draws from it, `logprobs` reports what the model gave;
`rows` is what is asked and answered.
"""
