"""What becomes of an actor's process when the service in it ends."""

import asyncio
import threading
from collections.abc import Callable

import pytest

from orchestrator.runtime import actors
from workers.actor import ServiceThread


@pytest.mark.parametrize(
    ("is_first_start", "is_bound", "is_ended"),
    [
        pytest.param(True, False, False, id="a first start tells whoever asked for it"),
        pytest.param(False, False, True, id="a start in the place of one that died"),
        pytest.param(True, True, True, id="it served"),
    ],
)
def test_a_process_without_its_service_ends_so_that_ray_starts_it_again(
    monkeypatch: pytest.MonkeyPatch, is_first_start: bool, is_bound: bool, is_ended: bool
) -> None:
    exits: list[int] = []
    is_decided = threading.Event()
    monkeypatch.setattr(actors, "RESTART_PAUSE_S", 0.0)
    monkeypatch.setattr("os._exit", exits.append)
    may_end = threading.Event()

    async def start(on_bound: Callable[[int], None], _stop: asyncio.Event) -> None:
        if is_bound:
            on_bound(1)
        await asyncio.to_thread(may_end.wait)
        raise OSError("it broke")

    service: ServiceThread[int] = ServiceThread(start)
    actors._end_with(service, is_first_start=is_first_start)
    service.ended.add_done_callback(lambda _: is_decided.set())
    may_end.set()
    assert is_decided.wait(30)
    assert exits == ([1] if is_ended else [])
