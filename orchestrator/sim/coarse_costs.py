"""What the devices of a coarse simulation cost: steps, shares of SMs, pictures, hand-offs, switches. Pure.

Shares: measured on one H100 80GB HBM3 (132 SMs, 2026-11-23), a Llama-3-8B shape in bf16; each figure is the rate beside that of the
whole device alone. Alone: GEMMs in a green context of so many SMs; reading memory grows until 0.69 of them. Together: prefill of
2,048 tokens beside decode, means of three batches (64 x 2,048; 16 x 16,384; 256 x 768) on disjoint sets.
"""

from bisect import bisect_right
from dataclasses import dataclass

from orchestrator.control.stage_cost import Device, full, transformer
from workers.latency_model import LatencyModel
from workers.step_cost import StepCost

Curve = tuple[tuple[float, float], ...]

PREFILL_ALONE: Curve = (
    (0.0, 0.0),
    (0.061, 0.074),
    (0.121, 0.150),
    (0.242, 0.295),
    (0.364, 0.447),
    (0.485, 0.576),
    (0.545, 0.645),
    (0.727, 0.823),
    (0.848, 0.890),
    (1.0, 1.0),
)
PREFILL_BESIDE: Curve = (
    (0.0, 0.0),
    (0.455, 0.330),
    (0.576, 0.485),
    (0.697, 0.573),
    (0.818, 0.652),
    (1.0, 0.75),
)
DECODE_ALONE: Curve = ((0.0, 0.0), (0.69, 1.0), (1.0, 1.0))
DECODE_BESIDE: Curve = (
    (0.0, 0.0),
    (0.182, 0.290),
    (0.303, 0.427),
    (0.424, 0.556),
    (0.545, 0.686),
    (1.0, 0.9),
)
#: Two streams that nobody divides, the decodes first: 23.5, 31.1 and 30.7 ms a step, 1.04 combined.
SHARED_PREFILL, SHARED_DECODE = 0.503, 0.541


def at(curve: Curve, share: float) -> float:
    """Between two points it is a line."""
    index = min(max(bisect_right(curve, (share, float("inf"))), 1), len(curve) - 1)
    (x0, y0), (x1, y1) = curve[index - 1], curve[index]
    return y0 + (y1 - y0) * (share - x0) / (x1 - x0)


def rates(prefill_share: float, decode_share: float) -> tuple[float, float]:
    """Of prefill and of decode while both run, each beside alone on the whole device."""
    if prefill_share + decode_share > 1.0 + 1e-9:
        # Where they overlap the device arbitrates; a side that is capped below its part of that keeps to its cap.
        return (
            min(SHARED_PREFILL, at(PREFILL_ALONE, prefill_share)),
            min(SHARED_DECODE, at(DECODE_ALONE, decode_share)),
        )
    return at(PREFILL_BESIDE, prefill_share), at(DECODE_BESIDE, decode_share)


#: SigLIP-So400m, 27 layers of 1152, by which models of the MiniCPM-V 2.6 kind encode tiles of 448 pixels in patches of 14.
SIGLIP = transformer(num_weights=413_000_000, weight_bytes=2.0, num_layers=27, hidden_size=1152)
SIGLIP_TILE = full(1024)
#: What an H100 reached on a ViT-L of one picture: 1.8 ms for 0.384 TFLOP.
ENCODING_H100 = Device(213e12, 2.92e12)


def why_not_encoding(device: str) -> str:
    """Why pictures are not simulated on a device, by its name; empty when they are."""
    return "" if "h100" in device.lower() else "how fast it encodes is not known; only h100 is"


@dataclass(frozen=True, slots=True)
class CoarseCosts:
    """Of every worker of a simulation; they are alike.

    kv_token_s: to move one token's KV to another worker. tile_s: to encode one tile of a picture; encode_overhead_s: of one batch of
    them. flip_s: from the end of a worker's work to its new phases, where it has their weights; load_s: where encode comes or goes.
    """

    step: StepCost
    attention_tokens: float
    kv_token_s: float
    tile_s: float = 0.0
    encode_overhead_s: float = 1e-3
    message_s: float = 0.2e-3
    flip_s: float = 0.05
    load_s: float = 0.7

    @classmethod
    def of(cls, latency: LatencyModel) -> "CoarseCosts":
        """Of a device that encodes as an H100 does, with SigLIP."""
        model, device = latency.model, latency.device
        return cls(
            StepCost.of(latency),
            model.attention_tokens,
            model.kv_token_bytes / device.transfer_bytes_per_s,
            SIGLIP.seconds(ENCODING_H100, (SIGLIP_TILE,)),
        )
