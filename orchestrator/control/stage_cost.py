"""How long a stage of any model takes on a device: encoding, prefill, decode, or the steps of a diffusion model. Pure.

A stage runs its weights over a schedule of passes. A pass costs something by itself (weights are read once), something for
each token, and something for each pair of tokens of which one attends to the other. That is enough for stages whose
sequences change length during a run, as those of text-to-image and text-to-video models do.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Device:
    """A roofline: what it computes, and what it reads and writes, each at best."""

    flops_per_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be computed, and moved to and from memory for it."""

    flops: float = 0.0
    num_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Pass:
    """The weights once over `num_tokens` tokens, of all sequences of the batch, `repeats` times one after the other.

    num_pairs: of a token and one that it attends to.
    """

    num_tokens: int
    num_pairs: int
    repeats: int = 1


@dataclass(frozen=True, slots=True)
class StageCost:
    """What one pass costs: by itself, for each token, and for each pair."""

    per_pass: Work
    per_token: Work
    per_pair: Work

    def work(self, schedule: Iterable[Pass]) -> Work:
        """Of all passes together."""
        flops = num_bytes = 0.0
        for one in schedule:
            each = self._each(one)
            flops += one.repeats * each.flops
            num_bytes += one.repeats * each.num_bytes
        return Work(flops, num_bytes)

    def seconds(self, device: Device, schedule: Iterable[Pass]) -> float:
        """At best: in each pass the slower of computing and moving hides the other one; passes hide nothing of each other.

        Source: roofline model (Williams, Waterman, Patterson, CACM 2009).
        """
        total_s = 0.0
        for one in schedule:
            each = self._each(one)
            total_s += one.repeats * max(each.flops / device.flops_per_s, each.num_bytes / device.bytes_per_s)
        return total_s

    def _each(self, one: Pass) -> Work:
        """Of one of the repeats."""
        parts = ((self.per_pass, 1), (self.per_token, one.num_tokens), (self.per_pair, one.num_pairs))
        return Work(
            sum(work.flops * num for work, num in parts), sum(work.num_bytes * num for work, num in parts)
        )


def transformer(
    *, num_weights: int, weight_bytes: float, num_layers: int, hidden_size: int, pair_bytes: float = 0.0
) -> StageCost:
    """A transformer whose matrices have `num_weights` weights of `weight_bytes` bytes each.

    hidden_size: of all heads of a layer. pair_bytes: read for each pair: KV of a token where single tokens attend to a cache,
    as in decode; 0 where tokens share what they read, as in prefill and encoding. Activations are left out.
    """
    return StageCost(
        per_pass=Work(num_bytes=num_weights * weight_bytes),
        per_token=Work(flops=2.0 * num_weights),
        per_pair=Work(flops=4.0 * num_layers * hidden_size, num_bytes=pair_bytes),
    )


def full(num_tokens: int, *, num_sequences: int = 1, repeats: int = 1) -> Pass:
    """Every token of a sequence attends to all of it: a picture that is encoded, or a step of a diffusion model."""
    return Pass(num_sequences * num_tokens, num_sequences * num_tokens**2, repeats)


def causal(num_new: int, num_before: int = 0) -> Pass:
    """New tokens attend to those before and to themselves: prefill, a chunk of it, or with one new token decode."""
    return Pass(num_new, num_new * num_before + num_new * (num_new + 1) // 2)


def decode(num_before: int, num_tokens: int) -> tuple[Pass, ...]:
    """One token after the other."""
    return tuple(causal(1, num_before + i) for i in range(num_tokens))


def spatial(num_frames: int, frame_tokens: int, *, repeats: int = 1) -> Pass:
    """Of a video: each token attends to its frame."""
    return full(frame_tokens, num_sequences=num_frames, repeats=repeats)


def temporal(num_frames: int, frame_tokens: int, *, repeats: int = 1) -> Pass:
    """Of a video: each token attends to its place in all frames."""
    return full(num_frames, num_sequences=frame_tokens, repeats=repeats)
