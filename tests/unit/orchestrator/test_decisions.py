"""What was decided about phases, and what it was made from: kept, told, read again and replayed."""

import argparse
from pathlib import Path

import pytest
from google.protobuf.json_format import MessageToJson

from orchestrator.cli import replay_decisions
from orchestrator.cli.decisions import text_lines
from orchestrator.cli.replay_decisions import POLICIES, read_looks, replay
from orchestrator.control.look import Look
from orchestrator.control.look_wire import look_from_pb, look_to_pb
from orchestrator.control.policies.policy import ClusterLoad, Totals, WorkerLoad
from orchestrator.control.slo import Slo
from orchestrator.control.view import ClusterView, SwitchState, SwitchView
from orchestrator.errors import LooksError
from orchestrator.gateway.decision_log import MAX_DECISIONS, MAX_LOOKS, DecisionLog
from protos import control_pb2 as pb
from workers.api import Phase, PhaseSet, WorkerId
from workers.step_cost import StepCost

P, D = frozenset({Phase.PREFILL}), frozenset({Phase.DECODE})
COST = StepCost(0.002, 2.5e-5, 2.6e-5, 0.005, 5e-8, 1e-9)


def look(at_s: float, waiting_tokens: int, num_requests: int) -> Look:
    def worker(name: str, phases: PhaseSet, tokens: int = 0) -> WorkerLoad:
        return WorkerLoad(WorkerId(name), phases, 100_000, prefill_tokens=tokens, num_prefills=tokens // 1000)

    workers = (worker("p0", P, waiting_tokens), worker("d0", D), worker("d1", D))
    totals = Totals(num_requests, 4000 * num_requests, 0, num_requests, 10 * num_requests, num_requests)
    return Look(at_s, ClusterLoad(workers, totals), COST, Slo(1.0, 0.05))


#: More and more prompts wait at the only worker that takes them.
LOOKS = [look(100.0 + i, 20_000 * i, 12 * i) for i in range(30)]


def switch(number: int, state: SwitchState = SwitchState.CHANGED, digest: str = "") -> SwitchView:
    return SwitchView(
        f"s{number}",
        WorkerId("d0"),
        D,
        P,
        state,
        "load 1.20 would be 0.60",
        predicted=2.0,
        digest=digest,
        met_before=0.5,
    )


def view(*switches: SwitchView) -> ClusterView:
    return ClusterView("test", 1, 1, "tiny", switches=switches)


def file_of(folder: Path, looks: list[Look]) -> Path:
    path = folder / "looks.jsonl"
    lines = [MessageToJson(look_to_pb(one), preserving_proto_field_name=True, indent=None) for one in looks]
    path.write_text("\n".join(lines))
    return path


def test_a_look_is_the_same_after_its_way() -> None:
    for one in LOOKS:
        assert look_from_pb(look_to_pb(one)) == one
    assert len({one.digest for one in LOOKS}) == len(LOOKS)


def test_a_look_of_the_version_before_has_every_process_able_and_the_first_costs() -> None:
    for one in LOOKS:
        message = look_to_pb(one)
        for field in ("tile_s", "change_s", "replace_s"):
            message.ClearField(field)
        for worker in message.workers:
            worker.ClearField("encode_tiles")
            worker.ClearField("loaded")
        assert look_from_pb(message) == one


def test_a_decision_is_told_as_it_was_seen_last_and_since_when() -> None:
    log = DecisionLog()
    log.came(view(switch(1, SwitchState.LEAVING)), None, 10.0)
    log.came(view(switch(1), switch(2)), None, 12.0)
    told = log.answer(15.0, with_looks=False).decisions
    assert [(one.switch.switch_id, one.switch.state, one.age_s) for one in told] == [
        ("s1", pb.SWITCH_STATE_CHANGED, 5.0),
        ("s2", pb.SWITCH_STATE_CHANGED, 3.0),
    ]


def test_what_is_remembered_is_bounded() -> None:
    log = DecisionLog()
    for i in range(MAX_LOOKS + 10):
        log.came(view(switch(i % (MAX_DECISIONS + 5))), pb.Look(at_s=i), float(i))
    answer = log.answer(0.0, with_looks=True)
    assert (len(answer.decisions), len(answer.looks)) == (MAX_DECISIONS, MAX_LOOKS)


def test_the_table_says_what_was_expected_and_what_came() -> None:
    log = DecisionLog()
    log.came(view(switch(1, digest="c0ffee")), None, 10.0)
    header, row = text_lines(log.answer(12.0, with_looks=False))
    assert header.split() == ["AGO", "WORKER", "FROM", "TO", "STATE", "PREDICTED", "MET", "SEEN", "WHY"]
    assert row.split()[2:] == [
        *("d0", "decode", "prefill", "changed", "2.00x", "50%", "->", "-", "c0ffee"),
        *("load", "1.20", "would", "be", "0.60"),
    ]
    assert text_lines(pb.GetDecisionsResponse()) == ["the controller has decided nothing yet"]


def test_policies_are_asked_what_was_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    looks = list(read_looks(file_of(tmp_path, LOOKS)))
    assert looks == LOOKS
    for make in POLICIES.values():
        found = list(replay(looks, make(looks[0])))
        assert found
        assert Phase.PREFILL in found[0][1].phases
        assert found[0][1].worker_id in ("d0", "d1")
    arguments = argparse.Namespace(file=tmp_path / "looks.jsonl", policy="epd_queue")
    assert replay_decisions.run(arguments) == 0
    out, err = capsys.readouterr()
    assert "-> prefill: " in out
    assert "decisions of epd_queue from 30 looks in 29.0 s" in err


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "it is empty; the controller looks while controller.roleSwitch is on or dryRun"),
        ("{", ":1: Failed to load JSON"),
        ('{"cost": [1]}', ":1: cost: has 1 numbers; a look has 6"),
        ('{"at_s": "x"}', ":1: Failed to parse at_s field"),
        (
            '{"at_s": 2, "cost": [1,1,1,1,1,1]}\n{"at_s": 1, "cost": [1,1,1,1,1,1]}',
            ":2: at_s: 1 is before that of the line above",
        ),
    ],
)
def test_a_file_that_is_none_of_looks_says_where_and_why(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "looks.jsonl"
    path.write_text(text)
    with pytest.raises(LooksError) as caught:
        list(read_looks(path))
    assert problem in str(caught.value)


def test_a_file_that_is_not_there_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay_decisions.run(argparse.Namespace(file=tmp_path / "no", policy="phasewise")) == 1
    assert "No such file" in capsys.readouterr().err
