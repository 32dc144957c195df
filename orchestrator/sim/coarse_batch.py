"""The sequences that decode on one device of a coarse simulation, and when each of them ends, in steps. Pure."""

import heapq
from dataclasses import dataclass, field

from orchestrator.control.policies.policy import WorkerLoad
from orchestrator.sim.coarse_request import Live


@dataclass(slots=True)
class DecodeBatch:
    """Keeps num_decoding, decode_context, num_decode_steps and kv_tokens of `load`."""

    load: WorkerLoad
    #: In order of joining.
    sequences: dict[Live, None] = field(default_factory=dict)
    #: (step after which it has all its tokens, number, sequence); of those that have left it is out of date.
    _ends: list[tuple[int, int, Live]] = field(default_factory=list)

    def add(self, live: Live) -> None:
        """Its KV is here and counted."""
        load = self.load
        live.last_step = load.num_decode_steps + live.num_to_come
        self.sequences[live] = None
        load.num_decoding += 1
        load.decode_context += live.context
        heapq.heappush(self._ends, (live.last_step, live.number, live))

    def remove(self, live: Live) -> None:
        """It decodes here no more; its KV is still counted."""
        load = self.load
        live.num_produced = live.request.output_tokens - (live.last_step - load.num_decode_steps)
        live.last_step = -1
        del self.sequences[live]
        load.num_decoding -= 1
        load.decode_context -= live.context

    def num_steps(self) -> int:
        """Until the first sequence ends, or memory does; one at least. Of a batch that is not empty."""
        ends, load = self._ends, self.load
        while ends[0][2].last_step != ends[0][0]:
            heapq.heappop(ends)
        num_steps = ends[0][0] - load.num_decode_steps
        if load.num_decoding > 1:
            num_steps = min(num_steps, max(1, (load.kv_capacity - load.kv_tokens) // load.num_decoding))
        return num_steps

    def is_out_of_memory(self) -> bool:
        """There is no room for one token of each. A sequence that is alone always has it."""
        load = self.load
        return load.num_decoding > 1 and load.kv_tokens + load.num_decoding > load.kv_capacity

    def newest(self) -> Live:
        """The last that joined."""
        return next(reversed(self.sequences))

    def advance(self, num_steps: int) -> list[Live]:
        """Every sequence has so many tokens more; returns those that have all, which have left."""
        load, ends, found = self.load, self._ends, []
        grown = num_steps * load.num_decoding
        load.num_decode_steps += num_steps
        load.decode_context += grown
        load.kv_tokens += grown
        while ends and ends[0][0] <= load.num_decode_steps:
            last_step, _, live = heapq.heappop(ends)
            if live.last_step == last_step and live in self.sequences:
                self.remove(live)
                found.append(live)
        return found
