"""What was decided about phases, and what it was made from: kept, told, read again and replayed."""

import argparse
import json
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
from google.protobuf.json_format import MessageToJson
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.cli import decisions, exit_codes, main, replay_decisions
from orchestrator.cli.decisions import EPISODE_S, _episodes, text_lines
from orchestrator.cli.replay_decisions import POLICIES, allowed_of, read_looks, replay
from orchestrator.control.admission import MAX_REMEMBERED, RefusalLog
from orchestrator.control.auto_switch import ALLOWED
from orchestrator.control.look import Look
from orchestrator.control.look_wire import look_from_pb, look_to_pb
from orchestrator.control.policies.policy import ClusterLoad, Switch, Totals, WorkerLoad
from orchestrator.control.scaling_config import ScalingConfig
from orchestrator.control.slo import Slo
from orchestrator.control.view import ClusterView, ScaleState, ScaleView, SwitchState, SwitchView
from orchestrator.control.view_wire import scale_from_pb, scale_to_pb
from orchestrator.errors import LooksError, TooLate
from orchestrator.gateway.decision_log import MAX_DECISIONS, MAX_LOOKS, DecisionLog
from protos import control_pb2 as pb
from workers.api import Phase, PhaseSet, WorkerId
from workers.step_cost import StepCost

P, D = frozenset({Phase.PREFILL}), frozenset({Phase.DECODE})
CONFIG = ScalingConfig((WorkerId("w2"), WorkerId("w3")), hold_s=10.0, release_s=20.0)
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
    waiting = WorkerLoad(WorkerId("d2"), D, 100_000, num_promised=3, promised_context=9000)
    for one in (*LOOKS, replace(LOOKS[0], load=ClusterLoad((waiting,), Totals()))):
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
    assert text_lines(pb.GetDecisionsResponse()) == ["nothing has been decided yet"]


def test_policies_are_asked_what_was_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    looks = list(read_looks(file_of(tmp_path, LOOKS)))
    assert looks == LOOKS
    for make in POLICIES.values():
        found = list(replay(looks, make(looks)))
        assert found
        first = found[0][1]
        assert isinstance(first, Switch)
        assert Phase.PREFILL in first.phases
        assert first.worker_id in ("d0", "d1")
    arguments = argparse.Namespace(file=tmp_path / "looks.jsonl", policy="epd_queue")
    assert replay_decisions.run(arguments) == 0
    out, err = capsys.readouterr()
    assert "-> prefill: " in out
    assert "decisions of epd_queue from 30 looks in 29.0 s" in err


def both(at_s: float, num: int, num_requests: int, more: tuple[str, ...] = ()) -> Look:
    """So many workers of both phases, which all have more prompts than they can do."""
    names = [*(f"w{i}" for i in range(num)), *more]
    workers = tuple(
        WorkerLoad(WorkerId(one), P | D, 100_000, prefill_tokens=40_000, num_prefills=10) for one in names
    )
    totals = Totals(num_requests, 40_000 * num_requests, 0, num_requests, 10 * num_requests, num_requests)
    return Look(at_s, ClusterLoad(workers, totals), COST, Slo(1.0, 0.05), scaling=CONFIG, allowed=ALLOWED)


def test_decisions_about_the_number_of_workers_are_asked_for_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = [both(100.0 + i, 2, 12 * i) for i in range(15)]
    looks += [
        replace(both(115.0 + i, 2, 180 + 12 * i), waiting=(WorkerId("w2"), WorkerId("w3"))) for i in range(20)
    ]
    looks += [replace(both(135.0 + i, 2, 420, ("w2", "w3"))) for i in range(3)]
    path = file_of(tmp_path, looks)
    read = list(read_looks(path))
    # Those that may be added have no names in a file until they are there.
    assert read[0].scaling == replace(CONFIG, extra=(WorkerId("more-0"), WorkerId("more-1")))
    assert [one.scaling for one in read[15:]] == [CONFIG] * 23
    assert [one.digest for one in read] == [one.digest for one in looks]
    assert replay_decisions.run(argparse.Namespace(file=path, policy="phasewise")) == 0
    out, _ = capsys.readouterr()
    [line] = out.splitlines()
    # While they are waited for no more are asked for.
    assert "s  2 -> 4 workers: load " in line
    assert " for 8 s, and no move of phases helps (seen " in line


def test_what_a_worker_may_serve_does_not_depend_on_who_was_there_first() -> None:
    mixed = frozenset({Phase.ENCODE, Phase.PREFILL})

    def seen(at_s: float, *workers: tuple[str, PhaseSet]) -> Look:
        found = tuple(WorkerLoad(WorkerId(name), phases, 1000) for name, phases in workers)
        return Look(at_s, ClusterLoad(found, Totals()), COST, Slo(1.0, 0.05))

    looks = [seen(0.0, ("d0", D)), seen(1.0, ("d0", D), ("ep0", mixed))]
    assert mixed in allowed_of(looks)
    told = [replace(one, allowed=ALLOWED) for one in looks]
    assert allowed_of(told) == ALLOWED


def test_the_table_tells_of_the_number_of_workers_too() -> None:
    scale = ScaleView(
        "scale-1", 1.0, 1, 3, ScaleState.DONE, "all of them have a node", "load 1.20", "c0ffee", 1.2, 0.5, 1.0
    )
    assert scale_from_pb(scale_to_pb(scale)) == scale
    log = DecisionLog()
    log.came(replace(view(), scales=(scale,)), None, 10.0)
    _, row = text_lines(log.answer(12.0, with_looks=False))
    assert row.split()[2:] == [
        *("(all)", "1", "worker", "3", "workers", "done", "1.20x", "50%", "->", "100%", "c0ffee"),
        *("load", "1.20;", "all", "of", "them", "have", "a", "node"),
    ]


def refused(*at_s: float) -> RefusalLog:
    log = RefusalLog()
    for i, now_s in enumerate(at_s):
        log.add(now_s, TooLate(2.5 + i, 2.0, 0.5 + i))
    return log


def test_the_table_tells_of_refusals_between_the_other_decisions() -> None:
    log = DecisionLog()
    log.came(view(switch(1)), None, 10.0)
    log.came(view(switch(2)), None, 30.0)
    answer = log.answer(40.0, refused(12.0, 13.5, 31.0), with_looks=False)
    _, first, several, last, one = text_lines(answer)
    assert [line.split()[2] for line in (first, several, last, one)] == ["d0", "(new)", "d0", "(new)"]
    assert several.endswith(
        "2 requests in 1.50 s: predicted TTFT 2.50 s to 3.50 s, target 2.00 s (slo.ttftMs); "
        "one like them would be taken in about 500 ms to 1.50 s (gateway.admission)"
    )
    assert one.endswith(
        "1 request: predicted TTFT 4.50 s, target 2.00 s (slo.ttftMs); "
        "one like it would be taken in about 2.50 s (gateway.admission)"
    )


def test_refusals_that_go_on_are_one_row_and_make_no_room_for_themselves() -> None:
    log = DecisionLog()
    for number in range(MAX_DECISIONS):
        log.came(view(switch(number)), None, float(number))
    # One a second for a day and a half, then nothing for a minute, and a last one.
    refusals = refused(*(MAX_DECISIONS + float(i) for i in range(130_000)), MAX_DECISIONS + 130_059.0)
    answer = log.answer(MAX_DECISIONS + 140_000.0, refusals, with_looks=False)
    assert sum(one.HasField("switch") for one in answer.decisions) == MAX_DECISIONS
    _, *rows = text_lines(answer)
    assert [row.split()[2] for row in rows[MAX_DECISIONS - 1 :]] == ["d0", "(new)", "(new)"]
    # Programs get the last thousand times 10 s.
    assert len(answer.decisions) == MAX_DECISIONS + MAX_REMEMBERED
    assert " 9990 requests in 9989 s: predicted TTFT " in rows[-2]
    assert " 1 request: " in rows[-1]


@given(st.lists(st.floats(0.0, 100.0), max_size=40), st.integers(0, 39))
def test_a_row_of_refusals_counts_all_of_its_episode(waits_s: list[float], decided: int) -> None:
    times_s = list(accumulate(waits_s))
    refusals = refused(*times_s)
    log = DecisionLog()
    if decided < len(times_s):
        log.came(view(switch(1)), None, times_s[decided])
    answer = log.answer(5000.0, refusals, with_looks=False)
    told = list(_episodes(answer.decisions))
    rows = [one.refusals for one in told if one.HasField("refusals")]
    assert sum(row.num for row in rows) == len(times_s)
    if times_s:
        assert min(row.least_ttft_s for row in rows) == 2.5
        assert max(row.most_ttft_s for row in rows) == pytest.approx(2.5 + len(times_s) - 1)
    for one, later in pairwise(told):
        assert one.age_s >= later.age_s
        if one.HasField("refusals") and later.HasField("refusals"):
            assert one.age_s - one.refusals.lasted_s - later.age_s >= EPISODE_S


def test_refusals_are_told_to_programs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask(_address: str, *, with_looks: bool) -> pb.GetDecisionsResponse:
        return DecisionLog().answer(15.0, refused(12.0, 13.5), with_looks=with_looks)

    monkeypatch.setattr(decisions, "ask", ask)
    assert main.main(["decisions", "--control-address", "127.0.0.1:1", "--json"]) == exit_codes.OK
    assert json.loads(capsys.readouterr().out) == {
        "age_s": 3.0,
        "num_refused": 2,
        "lasted_s": 1.5,
        "target_s": 2.0,
        "least_ttft_s": 2.5,
        "most_ttft_s": 3.5,
        "least_retry_after_s": 0.5,
        "most_retry_after_s": 1.5,
    }


def test_looks_that_cannot_be_written_are_refused_before_anybody_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Nobody answers there, which would be said else.
    arguments = ["decisions", "--control-address", "127.0.0.1:1", "--looks", str(tmp_path)]
    assert main.main(arguments) == exit_codes.FAILURE
    assert capsys.readouterr() == ("", f"{tmp_path} cannot be written: Is a directory\n")


def test_looks_whose_place_is_lost_meanwhile_are_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask(_address: str, *, with_looks: bool) -> pb.GetDecisionsResponse:
        assert with_looks
        (tmp_path / "looks").mkdir()
        return pb.GetDecisionsResponse(looks=map(look_to_pb, LOOKS))

    monkeypatch.setattr(decisions, "ask", ask)
    path = tmp_path / "looks"
    arguments = ["decisions", "--control-address", "127.0.0.1:1", "--looks", str(path)]
    assert main.main(arguments) == exit_codes.FAILURE
    assert capsys.readouterr() == ("", f"{path} cannot be written: Is a directory\n")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "it is empty; the controller looks while controller.roleSwitch is on or dryRun"),
        ("# Phasewise\n", ":1: is no record of looks: Failed to load JSON"),
        ("{", ":1: is no record of looks: Failed to load JSON"),
        (
            '{"a": 1}',
            ':1: is no record of looks: Message type "phasewise.control.v1.Look" has no field named "a"',
        ),
        ("[" * 100_000, ":1: is no record of looks: Failed to load JSON"),
        ('{"cost": [1]}', ":1: is no record of looks: cost: has 1 numbers; a look has 6"),
        ('{"at_s": "x"}', ":1: is no record of looks: Failed to parse at_s field"),
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


def problem_of(path: Path) -> str:
    try:
        list(read_looks(path))
    except LooksError as error:
        return str(error)
    return ""


@given(
    st.text()
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("at_s"),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.sampled_from(["at_s", "cost", "workers", "a"]), inner)
        ),
    ).map(json.dumps)
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_other_file_is_told_of_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other"
    path.write_text(text)
    problem = problem_of(path)
    if problem:
        assert problem.startswith(str(path))
        assert len(problem.splitlines()) == 1


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"# Phasewise\n", b'{"a": 1}'])
def test_what_is_no_file_of_looks_is_told_of_with_the_command_that_writes_one(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other"
    if content is not None:
        path.write_bytes(content)
    assert main.main(["replay-decisions", str(path)]) == exit_codes.FAILURE
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(str(path))
    assert line.endswith("; `phasewise decisions --looks FILE` writes one")
    assert ("cannot be read: No such file" if content is None else "is no record of looks: ") in line
