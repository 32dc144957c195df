"""Python's garbage collector beside a simulation."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

#: New objects between two looks at them, and looks between two at older ones.
THRESHOLDS = 20_000, 20, 20


@contextmanager
def collecting_rarely() -> Iterator[None]:
    """It looks at what is made from now on alone, and not often: what is loaded stays, and a simulation makes hardly any cycles."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
