"""Who holds the KV blocks of real workers, while requests run, while KV is on its way, and when a block is leaked."""

import asyncio
import json
from pathlib import Path

import pytest

from orchestrator.cli import explain, ledger_text
from orchestrator.cli.ledger_text import WorkerLedger
from protos import control_pb2 as pb
from tests.support.both_shapes import Served, apart, random_prompt, request_of, together
from tests.support.gateway import collect
from tests.support.waiting import until
from tests.support.worker_client import SMALL_BUDGET, RunningWorker, StepGate, at_start, eventually
from workers.api import KvLedger, LedgerKind, RequestId, WorkerId
from workers.kv_wire import ledger_from_pb

pytestmark = pytest.mark.usefixtures("cache_home", "nothing_escapes")

NOBODYS = {LedgerKind.CACHED, LedgerKind.FREE}


async def ledger_of(served: Served, worker: RunningWorker) -> KvLedger:
    """As the gateway gets it; checks that all blocks are accounted for, and agree with the pool's counts."""
    asked = pb.GetKvLedgerRequest(worker_id=worker.worker.spec.worker_id)
    (answer,) = (await served.gateway.control.GetKvLedger(asked)).workers
    assert answer.problem == ""
    ledger = ledger_from_pb(answer.ledger)
    assert ledger.num_accounted_blocks + ledger.leaked_blocks == ledger.counts.total > 0
    return ledger


def kinds(ledger: KvLedger) -> set[LedgerKind]:
    """Why blocks are held."""
    return {entry.kind for entry in ledger.entries} - NOBODYS


def test_running_requests_are_named_and_leave_nothing(model_path: Path) -> None:
    async def scenario() -> None:
        async with together(model_path) as served:
            request = request_of(random_prompt(40), max_tokens=400)
            request.request_id = "long"
            call = served.gateway.client.Generate(request)
            await until(lambda: bool(served.gateway.dispatcher._requests), "the request")
            (live,) = served.gateway.dispatcher._requests.values()
            await until(lambda: len(live.samples[0].machine.delivered) > 3, "some tokens")
            ledger = await ledger_of(served, served.decode)
            (entry,) = [one for one in ledger.entries if one.kind not in NOBODYS]
            assert (entry.owner, entry.kind) == ("long", LedgerKind.SEQUENCE)
            assert entry.generation == live.samples[0].machine.attempt
            assert entry.num_blocks >= 3
            assert entry.age_s is not None
            assert entry.age_s > 0
            call.cancel()
            await served.decode.assert_nothing_leaks()
            assert kinds(await ledger_of(served, served.decode)) == set()

    asyncio.run(scenario())


def test_kv_on_its_way_has_a_lease(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with apart(model_path, token_budget=SMALL_BUDGET) as served:
            # Prefill stands before its second chunk: the transfer has its blocks, and not yet its KV.
            gate = StepGate(monkeypatch, at_start(SMALL_BUDGET))
            call = asyncio.create_task(served.ask(request_of(random_prompt(80), max_tokens=4)))
            try:
                await gate.reached()

                async def receiving() -> bool:
                    found = await ledger_of(served, served.decode)
                    # The lease is opened for blocks that are there.
                    leases = [one.lease_id for one in found.entries if one.kind is LedgerKind.RECEIVING]
                    return kinds(found) == {LedgerKind.RECEIVING} and None not in leases

                await eventually(receiving, "the transfer to have its blocks, and their lease")
                ledger = await ledger_of(served, served.decode)
                (entry,) = [one for one in ledger.entries if one.kind is LedgerKind.RECEIVING]
                (live,) = served.gateway.dispatcher._requests.values()
                machine = live.samples[0].machine
                assert entry.owner == f"{machine.request_id}/{machine.attempt}"
                assert entry.lease_id is not None
                assert entry.num_blocks == 6
            finally:
                gate.open()
            request_id = (await call)[-1].request_id
            for worker in served.workers:
                await worker.assert_nothing_leaks()
                assert kinds(await ledger_of(served, worker)) == set()
            # Its worker tells of the transfer after the last token, which may come from the other one.
            record = served.gateway.dispatcher.records.get(RequestId(request_id))
            assert record is not None
            await until(lambda: record.samples[0].attempts[0].transfer is not None, "the transfer's report")
            answer = await served.gateway.control.Explain(pb.ExplainRequest(request_id=request_id))
            (sample,) = explain.as_json(answer.record)["samples"]
            (attempt,) = sample["attempts"]
            assert attempt["transfer"]["num_bytes"] > 0
            assert attempt["transfer"]["transport"]
            assert [state["state"] for state in sample["states"]][-1] == "finished"
            json.dumps(sample)

    asyncio.run(scenario())


def test_a_leaked_block_is_named_and_seen_in_the_status(model_path: Path) -> None:
    async def scenario() -> None:
        async with together(model_path) as served:
            worker = served.decode.worker
            loop = worker.text.step_loop
            assert loop is not None
            pool = loop.engine.pool
            (leaked,) = await asyncio.wrap_future(loop.call(lambda: pool.allocate(1)))
            ledger = await ledger_of(served, served.decode)
            assert ledger.leaked_block_ids == (leaked,)
            shown = WorkerLedger(WorkerId("both-0"), 1, ledger)
            assert not shown.is_right
            assert f"  LEAKED: blocks {leaked}: no owner names them" in ledger_text.lines(shown)
            await served.decode.wait_for_status(lambda status: status.leaked_blocks == 1, "the leak")
            # It goes on serving.
            assert await served.tokens(request_of(random_prompt(20), max_tokens=4))
            await asyncio.wrap_future(loop.call(lambda: pool.free([leaked])))
            assert (await ledger_of(served, served.decode)).leaked_block_ids == ()

    asyncio.run(scenario())


def test_a_worker_that_has_gone_is_a_line(model_path: Path) -> None:
    async def scenario() -> None:
        async with together(model_path) as served:
            await collect(served.gateway.client.Generate(request_of(random_prompt(5), max_tokens=2)))
            it = served.gateway
            view = it.dispatcher.view
            assert view is not None
            (known,) = view.workers
            gone = type(known)(WorkerId("gone-0"), 1, known.phases, known.state, "127.0.0.1:1")
            await it.publish(known, gone)
            here, away = (await it.control.GetKvLedger(pb.GetKvLedgerRequest())).workers
            assert here.HasField("ledger")
            assert away.problem.startswith("UNAVAILABLE")

    asyncio.run(scenario())
