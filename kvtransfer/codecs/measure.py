"""How fast codecs are on this machine."""

import logging
import threading
import time
from collections.abc import Mapping, Sequence

import torch

from kvtransfer.codecs.choice import CodecRates
from kvtransfer.codecs.codec import PAGE_TOKENS, CodecId, PageShape
from kvtransfer.codecs.codecs import codec as codec_of
from kvtransfer.layout import KvLayout

logger = logging.getLogger(__name__)

#: KV that is packed to see how long it takes, in bytes: about a chunk.
SAMPLE_BYTES = 2**20


class MeasuredRates:
    """Rates of these codecs, measured once, in a thread, when they are first asked for."""

    def __init__(self, codecs: Sequence[CodecId]) -> None:
        self._codecs = codecs
        self._thread: threading.Thread | None = None
        self._rates: dict[CodecId, CodecRates] = {}

    def known(self, layout: KvLayout) -> Mapping[CodecId, CodecRates]:
        """What has been measured by now, nothing at first. layout: of the KV that is to be packed."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._measure, args=(layout,), name="codec-rates", daemon=True
            )
            self._thread.start()
        return dict(self._rates)

    def _measure(self, layout: KvLayout) -> None:
        for codec in self._codecs:
            try:
                self._rates[codec] = measure(codec, layout)
            except Exception:
                # It is then not chosen.
                logger.exception("codec_not_measured codec=%s", codec.name.lower())


def measure(codec: CodecId, layout: KvLayout) -> CodecRates:
    """Pack and unpack a chunk of random KV, the second time with a clock beside it."""
    num_layers = max(1, SAMPLE_BYTES // (layout.token_bytes * PAGE_TOKENS))
    shape = PageShape(num_layers, PAGE_TOKENS, layout.num_heads, layout.head_dim)
    generator = torch.Generator().manual_seed(0)
    size = (shape.num_layers, 2, shape.num_tokens, shape.num_heads, shape.head_dim)
    kv = torch.randn(size, generator=generator).to(getattr(torch, layout.dtype))
    packer = codec_of(codec)
    packed = bytearray(packer.packed_bytes(shape))
    pack_s = unpack_s = 0.0
    for _ in range(2):
        begin_s = time.perf_counter()
        packer.pack(kv, memoryview(packed))
        packed_s = time.perf_counter()
        packer.unpack(memoryview(packed), shape)
        pack_s, unpack_s = packed_s - begin_s, time.perf_counter() - packed_s
    return CodecRates(len(packed) / kv.nbytes, kv.nbytes / pack_s, kv.nbytes / unpack_s)
