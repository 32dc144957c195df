"""A gateway that refuses what would come too late."""

from dataclasses import replace

import pytest

from orchestrator.control.admission import Admission
from orchestrator.control.slo import Slo
from protos import control_pb2
from tests.support.fake_worker import BOTH, FakeWorker, says_first
from tests.support.gateway import CONFIG, collect, error_of, gateway, generate_request, run, tokens_of
from tests.support.sim import by_token
from tests.support.waiting import until
from workers.api import WorkerState, WorkerStatus
from workers.step_shape import FactorSource

#: Nothing that waits for anything is in time.
CONFIG_THAT_REFUSES = replace(CONFIG, slo=Slo(1e-9, 1.0), admission=Admission.PREDICTED)
PROMPT = [7] * 200
COSTS = by_token(1e-3).costs()


def test_one_that_would_be_late_is_refused_with_the_time_to_come_back() -> None:
    async def scenario() -> None:
        both = FakeWorker("both-0", BOTH)
        says_first(0, both)
        async with gateway(both, config=CONFIG_THAT_REFUSES) as it:
            # Nothing is known yet, and everything is taken.
            first = it.client.Generate(generate_request(*PROMPT, max_tokens=2))
            await until(lambda: it.dispatcher.num_running == 1, "the first to run")
            status = WorkerStatus(
                both.worker_id,
                1,
                BOTH,
                WorkerState.READY,
                step_costs=replace(COSTS, num_steps=100, source=FactorSource.FITTED),
            )
            await it.publish(replace(both.view(), status=status))
            call = it.client.Generate(generate_request(*PROMPT, max_tokens=2))
            code, message = await error_of(call)
            assert code == "RESOURCE_EXHAUSTED"
            assert message.startswith("predicted TTFT ")
            (seconds,) = [value for key, value in await call.trailing_metadata() if key == "retry-after-s"]
            assert 0.0 < float(seconds) < 0.25
            answer = await it.control.GetView(control_pb2.GetViewRequest())
            assert (answer.num_refused_requests, answer.num_failed_requests) == (1, 0)
            (decided,) = (await it.control.GetDecisions(control_pb2.GetDecisionsRequest())).decisions
            assert decided.refusals.num == 1
            assert decided.refusals.least_ttft_s > decided.refusals.target_s
            assert decided.refusals.least_retry_after_s == pytest.approx(float(seconds), abs=1e-3)
            # The first one was taken, and is answered.
            both.answer = both.script
            both.say(*both.script(both.submits[0]))
            assert len(tokens_of(await collect(first))) == 2

    run(scenario)
