"""What the command line shows while something takes long."""

import asyncio
import io

from rich.console import Console

from orchestrator.cli.progress import shown_progress, shown_wait
from tests.support.waiting import until


def console(*, is_terminal: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=is_terminal, width=80), file


def test_without_a_terminal_each_change_is_a_line_and_a_growing_percentage_is_none() -> None:
    where, file = console(is_terminal=False)
    with shown_progress(where) as progress:
        for text in ("a: reading 1%", "a: reading 50%", "a: reading 100%", "a: ready", "a: ready"):
            progress(text)
    assert file.getvalue() == "a: reading 1%\na: ready\n"


def test_on_a_terminal_progress_is_shown_in_place() -> None:
    where, file = console(is_terminal=True)
    with shown_progress(where) as progress:
        progress("starting Ray")
    assert "starting Ray" in file.getvalue()


def test_a_long_wait_is_shown_until_it_is_over() -> None:
    where, file = console(is_terminal=True)

    async def scenario() -> None:
        with shown_wait("waiting for it", console=where, after_s=0.0) as came:
            await until(lambda: "waiting for it" in file.getvalue(), "the text")
            came()
            length = len(file.getvalue())
            came()
            assert len(file.getvalue()) == length

    asyncio.run(scenario())


def test_a_short_wait_is_not_shown() -> None:
    where, file = console(is_terminal=True)

    async def scenario() -> None:
        with shown_wait("waiting for it", console=where, after_s=1000.0):
            await asyncio.sleep(0)

    asyncio.run(scenario())
    assert file.getvalue() == ""


def test_without_a_terminal_a_wait_is_not_shown() -> None:
    where, file = console(is_terminal=False)

    async def scenario() -> None:
        with shown_wait("waiting for it", console=where, after_s=0.0):
            await asyncio.sleep(0.01)

    asyncio.run(scenario())
    assert file.getvalue() == ""
