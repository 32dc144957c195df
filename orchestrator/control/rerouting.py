"""Which prompts that wait for room go to another worker. Pure.

A worker begins a prompt when it has a place and KV blocks for it. One that has none lets it wait until a sequence ends there, which may take as long as an
answer, while another worker has room: because it came to serve the phase since, or had its own sequences end.
"""

import heapq
from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple

from orchestrator.control.router import LoadLedger, Predicted, Rooms, room_left
from orchestrator.control.view import WorkerView
from workers.api import WorkerId

#: Prompts of which the most urgent are looked for at once, those that were given to workers first. One takes 3 us.
MAX_COMPARED = 1000
#: Prompts that are then looked at. One takes as long as a decision of the router.
MAX_LOOKS = 32
#: A prompt stays so long where it was given, in seconds, and so long it is between two looks at all of them.
REST_S = 0.25


class WaitingPrompt(NamedTuple):
    """One that a worker has and has not begun; a smaller one is more urgent. Times are of one clock, in seconds.

    rank: of its priority, the least first. first_token_by_s: its target. attempt: names it. num_tokens: for which the worker must have room to begin it. since_s: when it was given the prompt.
    """

    rank: int
    first_token_by_s: float
    attempt: int
    worker_id: WorkerId
    num_tokens: int
    since_s: float


def crowded_workers(ledger: LoadLedger, rooms: Rooms) -> frozenset[WorkerId]:
    """Those that may have no room for some prompt that they were given: they have less than they need for all."""
    return frozenset(
        worker_id
        for worker_id, load in ledger.loads.items()
        if worker_id in rooms and rooms[worker_id] < load.coming_tokens
    )


def most_room(workers: Iterable[WorkerView], ledger: LoadLedger, rooms: Rooms) -> int:
    """Tokens of the longest sequence for which one of these workers has room; 0 where nobody has any, or tells."""
    return max((room_left(worker, ledger, rooms) for worker in workers), default=0)


def without_room(prompts: Iterable[WaitingPrompt], rooms: Rooms, now_s: float) -> list[WaitingPrompt]:
    """Of the first MAX_COMPARED for which their workers have no room the MAX_LOOKS most urgent, these first: for the others there may be no room left."""
    given_by_s = now_s - REST_S
    found = (
        one
        for one in prompts
        if one.since_s <= given_by_s and rooms.get(one.worker_id, one.num_tokens) < one.num_tokens
    )
    return heapq.nsmallest(MAX_LOOKS, islice(found, MAX_COMPARED))


def is_worth(waited_s: float, here: Predicted, there: Predicted) -> bool:
    """It has waited for as long as it takes more from now on there than it takes here once it begins.

    What is cached here and what waits there makes that longer. When there will be room here is not known; who moves then has waited no more than twice what it
    had to, whenever that would have been, but for the time between two looks. Each move asks for the same again, so that no prompt goes to and fro.
    Source: the ski rental problem.
    """
    return waited_s >= there.ttft_s - (here.ttft_s - here.wait_s)
