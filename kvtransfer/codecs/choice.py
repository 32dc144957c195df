"""Whether a transfer gains from a codec, and from which. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvtransfer.codecs.codec import CodecId
from kvtransfer.codecs.names import CODEC_NAMES

#: A codec changes the KV a little, and costs both sides processor time: it must save this share of the time.
MIN_SAVING = 0.2
#: Of one chunk before it is packed, as `KvTransferConfig.max_chunk_bytes` has it.
CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class CodecRates:
    """ratio: packed bytes for each byte of KV. The rates count bytes of KV, not packed ones; all > 0."""

    ratio: float
    pack_bytes_per_s: float
    unpack_bytes_per_s: float


def transfer_s(
    num_bytes: int, link_bytes_per_s: float, rates: CodecRates | None, chunk_bytes: int = CHUNK_BYTES
) -> float:
    """Predicted duration in seconds. num_bytes: of KV, >= 0; rates: None for no codec.

    Packing, sending and unpacking of different chunks overlap: the slowest stage sets the pace, after the first chunk
    has gone through all of them.
    """
    if rates is None:
        return num_bytes / link_bytes_per_s
    stages = (
        1 / rates.pack_bytes_per_s,
        rates.ratio / link_bytes_per_s,
        1 / rates.unpack_bytes_per_s,
    )
    first = min(chunk_bytes, num_bytes)
    return first * sum(stages) + (num_bytes - first) * max(stages)


def choose_codec(
    candidates: Sequence[CodecId],
    *,
    num_bytes: int,
    link_bytes_per_s: float | None,
    rates: Mapping[CodecId, CodecRates],
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[CodecId, str]:
    """The fastest of `candidates` if it saves MIN_SAVING, else NONE; and why.

    num_bytes: of KV. link_bytes_per_s: what the link has carried; None or 0 is not known yet. Candidates without rates are left
    out; of equally fast ones the first is taken.
    """
    if not link_bytes_per_s:
        return CodecId.NONE, "the rate of the link is not known yet"
    plain_s = transfer_s(num_bytes, link_bytes_per_s, None)
    found = [
        (transfer_s(num_bytes, link_bytes_per_s, rates[codec], chunk_bytes), number, codec)
        for number, codec in enumerate(candidates)
        if codec is not CodecId.NONE and codec in rates
    ]
    if not found:
        return CodecId.NONE, "no codec's rates are known yet"
    packed_s, _, codec = min(found)
    where = f"{num_bytes / 1e6:.1f} MB over {link_bytes_per_s / 1e6:.0f} MB/s"
    times = f"{packed_s * 1e3:.1f} ms with {CODEC_NAMES[codec]}, {plain_s * 1e3:.1f} ms without"
    if packed_s <= plain_s * (1 - MIN_SAVING) and num_bytes > 0:
        return codec, f"{where}: {times}"
    return CodecId.NONE, f"{where}: {times}, which is not {MIN_SAVING:.0%} less"
