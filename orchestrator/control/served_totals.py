"""What a gateway has served since it began, for rates that a policy follows. Pure."""

from collections.abc import Sequence

from orchestrator.control.policies.policy import Totals
from orchestrator.control.request_machine import RequestMachine, RequestState
from orchestrator.control.slo import Slo


class ServedTotals:
    """slo: of every request."""

    def __init__(self, slo: Slo) -> None:
        self.totals = Totals()
        self._slo = slo

    def routed(self, machine: RequestMachine, num_tiles: int) -> None:
        """A sample got workers for the first time. num_tiles: of its pictures, that nobody is known to have."""
        assert machine.route is not None
        totals = self.totals
        totals.num_requests += 1
        totals.prompt_tokens += max(0, machine.num_prefill_tokens - machine.route.num_cached_tokens)
        totals.tiles += num_tiles

    def ended(self, machines: Sequence[RequestMachine]) -> None:
        """All samples of a request are over. One that failed, or was given up by its client, has met nothing and counts for nothing."""
        if any(machine.state is not RequestState.FINISHED for machine in machines):
            return
        for machine in machines:
            times, num = machine.times, len(machine.delivered)
            first_s, last_s = times.first_token_at_s, times.last_token_at_s
            if first_s is None or last_s is None:
                continue
            tpot_s = (last_s - first_s) / (num - 1) if num > 1 else None
            self.totals.num_finished += 1
            self.totals.output_tokens += num
            self.totals.num_met += self._slo.is_met(first_s - times.arrived_at_s, tpot_s)
