"""Codecs as the manifest and people call them. Pure."""

from kvtransfer.codecs.codec import CodecId

#: "none", "fp8", "int4_hadamard", "gear", "gear_l".
CODEC_NAMES: dict[CodecId, str] = {codec_id: codec_id.name.lower() for codec_id in CodecId}
