"""Python's garbage collector beside a simulation."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collector() -> Iterator[None]:
    """It does not look for cycles from now on: what serves and is simulated makes none but of processes that end.

    What was there before is looked at once, and what is left behind when the collector looks again.
    """
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
