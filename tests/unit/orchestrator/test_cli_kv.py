"""`phasewise kv ledger`: every block has a line, every worker too, and a leak fails the command."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.cli import exit_codes
from orchestrator.cli.ledger_text import WorkerLedger, lines
from orchestrator.cli.main import main
from orchestrator.runtime.registry import Registry, RunningDeployment
from protos import control_pb2
from tests.support.fake_gateway import FakeGateway, running
from workers.api import BlockCounts, KvLedger, LedgerEntry, LedgerKind, WorkerId
from workers.kv_wire import ledger_to_pb

RUNNING = RunningDeployment("laptop", "127.0.0.1:8480", "127.0.0.1:8481", "127.0.0.1:6379", None, None)
LEDGER = KvLedger(
    (
        LedgerEntry("r-1", LedgerKind.SEQUENCE, 12, generation=17, age_s=1.25),
        LedgerEntry("r-2", LedgerKind.SEQUENCE, 5, 3, generation=18, age_s=0.5),
        LedgerEntry("r-3/19", LedgerKind.RECEIVING, 16, 0, 4, 1, 0.0421, "127.0.0.1:50001"),
        LedgerEntry("r-4/20", LedgerKind.WAITING, 0, age_s=0.002),
        LedgerEntry("prefix cache", LedgerKind.CACHED, 98),
        LedgerEntry("nobody", LedgerKind.FREE, 600),
    ),
    BlockCounts(free=600, cached=98, in_use=14, leased=16, total=728),
)
LEAKED = replace(
    LEDGER,
    counts=BlockCounts(free=600, cached=98, in_use=16, leased=16, total=730),
    leaked_block_ids=(7, 300),
)
TEXT = """\
decode-0, incarnation 2:
  OWNER         KIND       BLOCKS  SHARED  LEASE  GEN      AGE  PEER
  r-1           sequence       12       0      -   17   1.25 s  -
  r-2           sequence        5       3      -   18   500 ms  -
  r-3/19        receiving      16       0      4    1  42.1 ms  127.0.0.1:50001
  r-4/20        waiting         0       0      -    -   2.0 ms  -
  prefix cache  cached         98       0      -    -        -  -
  nobody        free          600       0      -    -        -  -
  total 728 blocks: 14 in use, 16 leased, 98 cached, 600 free; 728 accounted for, 0 leaked"""
GONE = "decode-1, incarnation 1: NO LEDGER: UNAVAILABLE: Connection refused"


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return Registry()


@pytest.fixture
def gateway(registry: Registry) -> Iterator[FakeGateway]:
    with running(FakeGateway()) as fake:
        registry.save(replace(RUNNING, control_address=fake.address))
        fake.ledgers = answer(LEDGER)
        yield fake


def answer(ledger: KvLedger) -> control_pb2.GetKvLedgerResponse:
    """One worker that tells, and one that does not answer."""
    return control_pb2.GetKvLedgerResponse(
        workers=[
            control_pb2.WorkerLedger(
                worker_id="decode-0", incarnation=2, ledger=ledger_to_pb(ledger, "decode-0", 2)
            ),
            control_pb2.WorkerLedger(
                worker_id="decode-1", incarnation=1, problem="UNAVAILABLE: Connection refused"
            ),
        ]
    )


def test_every_owner_is_shown_and_a_worker_that_is_silent_is_a_line(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kv", "ledger"]) == exit_codes.OK
    assert capsys.readouterr() == (f"{TEXT}\n\n{GONE}\n", "")
    assert gateway.asked_worker_ids == [""]


def test_one_worker_can_be_asked_by_name_at_any_gateway(
    gateway: FakeGateway, registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kv", "ledger", "decode-0", "--name", "laptop"]) == exit_codes.OK
    registry.remove("laptop")
    assert main(["kv", "ledger", "decode-0", "--control-address", gateway.address]) == exit_codes.OK
    assert gateway.asked_worker_ids == ["decode-0"] * 2


def test_a_leak_is_named_and_fails_the_command(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.ledgers = answer(LEAKED)
    assert main(["kv", "ledger"]) == exit_codes.FAILURE
    said = capsys.readouterr()
    assert "728 accounted for, 2 leaked\n  LEAKED: blocks 7, 300: no owner names them\n" in said.out
    assert said.err == "the KV blocks of decode-0 do not add up: a bug, to be reported\n"


def test_blocks_that_are_counted_twice_fail_it_too(gateway: FakeGateway) -> None:
    gateway.ledgers = answer(replace(LEDGER, counts=replace(LEDGER.counts, free=599, total=727)))
    assert main(["kv", "ledger"]) == exit_codes.FAILURE


def test_the_lines_of_a_ledger_without_owners() -> None:
    empty = KvLedger((LedgerEntry("nobody", LedgerKind.FREE, 8),), BlockCounts(8, 0, 0, 0, 8))
    found = lines(WorkerLedger(WorkerId("w"), 1, empty))
    assert found[-1] == "  total 8 blocks: 0 in use, 0 leased, 0 cached, 8 free; 8 accounted for, 0 leaked"


def test_json_has_everything(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.ledgers = answer(LEAKED)
    assert main(["kv", "ledger", "--json"]) == exit_codes.FAILURE
    found = json.loads(capsys.readouterr().out)
    assert found["leaked_blocks"] == 2
    told, silent = found["workers"]
    assert told["ledger"]["leaked_block_ids"] == [7, 300]
    assert told["ledger"]["entries"][2] == {
        "owner": "r-3/19",
        "kind": "receiving",
        "num_blocks": 16,
        "num_shared_blocks": 0,
        "lease_id": 4,
        "generation": 1,
        "age_s": 0.0421,
        "peer": "127.0.0.1:50001",
    }
    assert told["ledger"]["entries"][0]["lease_id"] is None
    assert told["ledger"]["counts"]["total"] == 730
    assert (silent["ledger"], silent["problem"]) == (None, "UNAVAILABLE: Connection refused")


def test_no_deployment_and_no_gateway_are_said(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kv", "ledger"]) == exit_codes.UNREACHABLE
    assert "no deployment runs on this machine" in capsys.readouterr().err
    # Nothing can listen on port 0.
    registry.save(replace(RUNNING, control_address="127.0.0.1:0"))
    assert main(["kv", "ledger"]) == exit_codes.UNREACHABLE
    assert "no gateway answers at 127.0.0.1:0" in capsys.readouterr().err


def test_a_word_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["kv"])
    assert ended.value.code == exit_codes.USAGE
