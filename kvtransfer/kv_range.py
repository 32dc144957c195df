"""Rectangles of a sequence's KV: some layers of some tokens. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KvRange:
    """Layers [layer_lo, layer_hi) of tokens [token_lo, token_hi), tokens counted within the sequence."""

    layer_lo: int
    layer_hi: int
    token_lo: int
    token_hi: int

    def __str__(self) -> str:
        return f"layers [{self.layer_lo}, {self.layer_hi}) of tokens [{self.token_lo}, {self.token_hi})"

    @property
    def is_empty(self) -> bool:
        """True when it holds nothing, or its ends are the wrong way round."""
        return self.layer_lo >= self.layer_hi or self.token_lo >= self.token_hi

    def overlaps(self, other: "KvRange") -> bool:
        """True when some layer of some token is in both."""
        layers = max(self.layer_lo, other.layer_lo) < min(self.layer_hi, other.layer_hi)
        return layers and max(self.token_lo, other.token_lo) < min(self.token_hi, other.token_hi)

    @property
    def num_layers(self) -> int:
        """Layers in it."""
        return self.layer_hi - self.layer_lo

    @property
    def num_tokens(self) -> int:
        """Tokens in it."""
        return self.token_hi - self.token_lo


def split(kv_range: KvRange, *, token_bytes: int, token_step: int, max_bytes: int) -> Iterator[KvRange]:
    """Parts of at most `max_bytes` each: whole layers if one fits, else a layer's tokens in parts of about one size.

    token_bytes: of one token in one layer. Tokens are divided at multiples of `token_step`, which is never divided,
    however small `max_bytes` is.
    """
    layer_step = max(1, max_bytes // (token_bytes * kv_range.num_tokens))
    # Not as many as fit: a small rest would cost as much as a whole part, and such rests are common.
    num_steps = -(-kv_range.token_hi // token_step) - kv_range.token_lo // token_step
    num_parts = -(-num_steps // max(1, max_bytes // (token_bytes * token_step)))
    steps = -(-num_steps // num_parts)
    for layer in range(kv_range.layer_lo, kv_range.layer_hi, layer_step):
        layer_hi = min(layer + layer_step, kv_range.layer_hi)
        if layer_step > 1:
            yield KvRange(layer, layer_hi, kv_range.token_lo, kv_range.token_hi)
            continue
        token = kv_range.token_lo
        while token < kv_range.token_hi:
            end = min((token // token_step + steps) * token_step, kv_range.token_hi)
            yield KvRange(layer, layer_hi, token, end)
            token = end


class Coverage:
    """Which (layer, token) pairs of a sequence are accounted for: each is to be added exactly once."""

    def __init__(self, num_layers: int, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        # One integer for each layer; bit t stands for token t.
        self._bits = [0] * num_layers
        self._num_missing = num_layers * num_tokens

    @property
    def num_missing(self) -> int:
        """Pairs not yet added."""
        return self._num_missing

    @property
    def is_complete(self) -> bool:
        """True when nothing is missing."""
        return self._num_missing == 0

    def problem(self, kv_range: KvRange) -> str | None:
        """Why this range cannot be added: empty, outside, or there already. None when it can."""
        num_layers = len(self._bits)
        is_inside = (
            kv_range.layer_lo >= 0
            and kv_range.layer_hi <= num_layers
            and kv_range.token_lo >= 0
            and kv_range.token_hi <= self._num_tokens
        )
        if kv_range.is_empty or not is_inside:
            return f"{kv_range} of {num_layers} layers and {self._num_tokens} tokens"
        mask = _mask(kv_range)
        for bits in self._bits[kv_range.layer_lo : kv_range.layer_hi]:
            if bits & mask:
                return f"{kv_range} overlap what came before"
        return None

    def add(self, kv_range: KvRange) -> None:
        """Add a range that has no problem."""
        mask = _mask(kv_range)
        for layer in range(kv_range.layer_lo, kv_range.layer_hi):
            self._bits[layer] |= mask
        self._num_missing -= kv_range.num_layers * kv_range.num_tokens


def _mask(kv_range: KvRange) -> int:
    return ((1 << kv_range.num_tokens) - 1) << kv_range.token_lo
