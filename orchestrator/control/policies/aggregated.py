"""Policies that run all phases on all workers: what engines do without a scheduler above them. Pure."""

from orchestrator.control.policies.policy import WorkerLoad
from workers.api import Phase
from workers.step_choice import Exclusive, Head, Mixed, Step

#: Tiles of pictures in one step where nothing else is said.
TILES = 8


class PrefillFirst:
    """Prompts alone, as soon as there are any, in steps of up to `token_budget` tokens; decodes wait.

    Source: iteration-level batching with prefills first, as vLLM had it before chunked prefill (named so in Sarathi-Serve, OSDI'24, section 2).
    """

    def __init__(self, token_budget: int) -> None:
        self._token_budget = token_budget

    def step(self, _now_s: float, _device: WorkerLoad, head: Head) -> Step:
        """See Stepping."""
        if head.num_tiles:
            return Exclusive(Phase.ENCODE, TILES)
        return Exclusive(Phase.PREFILL, self._token_budget)


class StallFree:
    """All decodes, and prompts for what is left of `token_budget`.

    Source: Sarathi-Serve (OSDI'24), section 4.2. Pictures are not in it: some are encoded before each step, as vLLM does.
    """

    def __init__(self, token_budget: int) -> None:
        self._token_budget = token_budget

    def step(self, _now_s: float, _device: WorkerLoad, _head: Head) -> Step:
        """See Stepping."""
        return Mixed(self._token_budget, TILES)
