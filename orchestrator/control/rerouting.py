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

#: Prompts of which the most urgent are looked for at once. One takes 3 us.
MAX_COMPARED = 1000
#: Prompts that are then looked at, half of them in turn. One takes as long as a decision of the router.
MAX_LOOKS = 32
#: A prompt stays so long where it was given, in seconds, and so long it is between two looks at all of them.
REST_S = 0.25


class WaitingPrompt(NamedTuple):
    """One that a worker has and has not begun; a smaller one is more urgent. Times are of one clock, in seconds.

    rank: of its priority, the least first. first_token_by_s: its target. attempt: names it. num_tokens: for which any worker must have room to begin it.
    room_tokens: for which this one must have room. since_s: when it was given the prompt.
    """

    rank: int
    first_token_by_s: float
    attempt: int
    worker_id: WorkerId
    num_tokens: int
    room_tokens: int
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


class Looks(NamedTuple):
    """Prompts, the most urgent first, and the attempt of that one whose turn came last; 0 where all have theirs."""

    prompts: list[WaitingPrompt]
    last_in_turn: int


def without_room(prompts: Iterable[WaitingPrompt], rooms: Rooms, most: int, now_s: float) -> Looks:
    """At which to look of those for which their workers have no room: of the first MAX_COMPARED the most urgent, and as many from the beginning, MAX_LOOKS in all.

    For the others there may be no room left. prompts: those first whose turn it is, so that urgent ones that can go nowhere do not hide others for ever. most: see most_room; longer prompts can go nowhere.
    """
    given_by_s = now_s - REST_S
    found = (
        one
        for one in prompts
        if one.since_s <= given_by_s
        and one.num_tokens <= most
        and rooms.get(one.worker_id, one.room_tokens) < one.room_tokens
    )
    compared = list(islice(found, MAX_COMPARED))
    if len(compared) <= MAX_LOOKS:
        return Looks(sorted(compared), 0)
    urgent = heapq.nsmallest(MAX_LOOKS // 2, compared)
    in_turn = list(islice((one for one in compared if one > urgent[-1]), MAX_LOOKS - len(urgent)))
    return Looks(sorted(urgent + in_turn), in_turn[-1].attempt)


def is_worth(waited_s: float, here: Predicted, there: Predicted) -> bool:
    """It has waited for as long as it takes more from now on there than it takes here once it begins.

    What is cached here and what waits there makes that longer. When there will be room here is not known; who moves then has waited no more than twice what it
    had to, whenever that would have been, but for the time between two looks. Each move asks for the same again, so that no prompt goes to and fro.
    Source: the ski rental problem.
    """
    return waited_s >= there.ttft_s - (here.ttft_s - here.wait_s)
