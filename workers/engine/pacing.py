"""After how many layers the KV of a prompt's chunk leaves. Pure.

Few layers at a time: more of the transfer is hidden behind the layers that follow, and what is left after the last one
is small. Many: fewer messages. The best size follows from how fast layers are computed and KV is moved, both as they
were measured.
"""

from functools import lru_cache

from kvtransfer.session import TransferReport

#: What one group costs the engine beside its KV, in seconds: a message to another thread.
GROUP_COST_S = 1e-4
#: `layer_launch_s` on a GPU: 22 ms of a host for 32 layers, which a graph takes nothing of (docs/gpu-engine.md, "A step").
GPU_LAYER_LAUNCH_S = 7e-4
#: Before anything was measured: seconds per token and layer, seconds per message, bytes per second.
FIRST_TOKEN_S, FIRST_MESSAGE_S, FIRST_RATE = 1e-5, 1e-3, 1e9
#: Weight of the last measurement.
GAIN = 0.2
#: What a measurement is taken for at least and at most: a machine that was suspended, or a clock that jumped, must not
#: count for more steps than it takes to forget it.
TOKEN_S = (1e-9, 1.0)
MESSAGE_S = (1e-6, 1.0)
RATE = (1e5, 1e12)
#: A transfer counts as so many times faster or slower than was expected, at most.
MAX_RATIO = 10.0


class LayerPacing:
    """Group sizes for one engine.

    num_layers: of the model. token_bytes: KV of one token in one layer. max_chunk_bytes: of one message. layer_launch_s: what
    a layer of a step in more than one group costs beside, where the whole step would be one CUDA graph: one of up to max_graph_tokens.
    fixed: the answer to all questions, when the manifest gives it.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        token_bytes: int,
        max_chunk_bytes: int,
        layer_launch_s: float = 0.0,
        max_graph_tokens: int = 0,
        fixed: int | None = None,
    ) -> None:
        self.num_layers = num_layers
        self._token_bytes = token_bytes
        self._max_chunk_bytes = max_chunk_bytes
        self._layer_launch_s = layer_launch_s
        self._max_graph_tokens = max_graph_tokens
        self._fixed = fixed
        self._token_s = FIRST_TOKEN_S
        self._message_s = FIRST_MESSAGE_S
        self._bytes_per_s = FIRST_RATE

    def observe_step(self, num_tokens: int, step_s: float) -> None:
        """A step that mostly prefilled took this long."""
        if num_tokens > 0 and step_s > 0:
            measured_s = _clamped(step_s / (num_tokens * self.num_layers), TOKEN_S)
            self._token_s += GAIN * (measured_s - self._token_s)

    def observe_transfer(self, report: TransferReport) -> None:
        """A hand-off has ended. Its time is divided between messages and bytes as was expected of them."""
        num_bytes = max(report.num_bytes, 1)
        expected_s = report.num_chunks * self._message_s + num_bytes / self._bytes_per_s
        if report.busy_s <= 0 or expected_s <= 0:
            return
        ratio = _clamped(report.busy_s / expected_s, (1 / MAX_RATIO, MAX_RATIO))
        self._message_s = _clamped(self._message_s * (1 + GAIN * (ratio - 1)), MESSAGE_S)
        self._bytes_per_s = _clamped(self._bytes_per_s / (1 + GAIN * (ratio - 1)), RATE)

    def group_size(self, num_tokens: int) -> int:
        """Layers between two departures, for `num_tokens` tokens of a step that are handed off: 1 to num_layers."""
        if self._fixed is not None:
            return max(1, min(self._fixed, self.num_layers))
        return best_group_size(
            self.num_layers,
            layer_s=_rounded(self._token_s * num_tokens),
            layer_bytes=self._token_bytes * num_tokens,
            max_chunk_bytes=self._max_chunk_bytes,
            message_s=_rounded(self._message_s),
            bytes_per_s=_rounded(self._bytes_per_s),
            layer_launch_s=self._layer_launch_s if num_tokens <= self._max_graph_tokens else 0.0,
        )


@lru_cache(maxsize=256)
def best_group_size(
    num_layers: int,
    *,
    layer_s: float,
    layer_bytes: int,
    max_chunk_bytes: int,
    message_s: float,
    bytes_per_s: float,
    layer_launch_s: float = 0.0,
) -> int:
    """The group size with the least time after the last layer until all KV has left, and what the groups cost.

    layer_s: to compute one layer. layer_bytes: its KV. message_s: of a message, whatever its size. layer_launch_s: see LayerPacing.
    """

    def message_parts(num: int) -> tuple[float, float]:
        """Of a group of so many layers: its messages, and its bytes, in seconds."""
        num_bytes = num * layer_bytes
        return -(-num_bytes // max_chunk_bytes) * message_s, num_bytes / bytes_per_s

    def cost_s(size: int) -> float:
        left_at_s, num_whole = 0.0, num_layers // size
        messages_s, bytes_s = message_parts(size)
        for layer_hi in range(size, num_whole * size + 1, size):
            computed_s = layer_hi * layer_s
            left_at_s = (left_at_s if left_at_s > computed_s else computed_s) + messages_s + bytes_s
        rest = num_layers - num_whole * size
        if rest > 0:
            messages_s, bytes_s = message_parts(rest)
            left_at_s = max(left_at_s, num_layers * layer_s) + messages_s + bytes_s
        launch_s = num_layers * layer_launch_s if size < num_layers else 0.0
        return left_at_s - num_layers * layer_s + (num_whole + (rest > 0)) * GROUP_COST_S + launch_s

    return min(range(1, num_layers + 1), key=lambda size: (cost_s(size), size))


def _clamped(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])


def _rounded(value: float) -> float:
    """To two digits: what was measured is no surer, and answers can be kept."""
    return float(f"{value:.2g}")
