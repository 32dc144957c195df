"""Dtypes of pools whose numbers torch has."""

from kvtransfer.layout import DTYPE_BITS, INT4

PLAIN_DTYPES = tuple(name for name in DTYPE_BITS if name != INT4)
