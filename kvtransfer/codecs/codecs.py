"""The codecs by their ids and names."""

from kvtransfer.codecs.codec import Codec, CodecId
from kvtransfer.codecs.fp8 import FP8
from kvtransfer.codecs.gear import GEAR, GEAR_L
from kvtransfer.codecs.int4_hadamard import INT4_HADAMARD


def codec(codec_id: CodecId) -> Codec:
    """The codec with this id. Raises ValueError for NONE: bytes that are not packed need no codec."""
    match codec_id:
        case CodecId.FP8:
            return FP8
        case CodecId.INT4_HADAMARD:
            return INT4_HADAMARD
        case CodecId.GEAR:
            return GEAR
        case CodecId.GEAR_L:
            return GEAR_L
        case CodecId.NONE:
            raise ValueError("codec none packs nothing: send and store the bytes as they are")
