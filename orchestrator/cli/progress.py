"""What is going on, while it takes longer than a moment: a spinner on a terminal, else a line per change."""

import asyncio
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

#: A wait shorter than this is not shown, in seconds.
SHOWN_AFTER_S = 1.0


@contextmanager
def shown_progress(console: Console | None = None) -> Iterator[Callable[[str], None]]:
    """A function to be told what is being done now; what it shows is gone after the block, on a terminal."""
    console = console if console is not None else Console(stderr=True)
    if console.is_terminal:
        with console.status("...") as status:
            yield lambda text: status.update(text, spinner="dots")
        return
    last = ""

    def show(text: str) -> None:
        nonlocal last
        # A percentage that grows is no news in a log.
        changed = re.sub(r"[0-9.]+ ?%", "", text)
        if changed != last:
            console.print(text, highlight=False, markup=False, soft_wrap=True)
        last = changed

    yield show


@contextmanager
def shown_wait(
    text: str, *, console: Console | None = None, after_s: float = SHOWN_AFTER_S
) -> Iterator[Callable[[], None]]:
    """In an event loop: `text` with a spinner from `after_s` on, on a terminal only.

    It goes when the block is left, or before, when the function that this gives is called.
    """
    console = console if console is not None else Console(stderr=True)
    if not console.is_terminal:
        yield lambda: None
        return
    status = console.status(text)
    timer = asyncio.get_running_loop().call_later(after_s, status.start)

    def end() -> None:
        timer.cancel()
        status.stop()

    try:
        yield end
    finally:
        end()
