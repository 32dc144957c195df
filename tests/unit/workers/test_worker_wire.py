"""What crosses the wire comes back as it was; what a newer version sends does no harm."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import worker_pb2 as pb
from workers.api import (
    Abort,
    BlockCounts,
    Command,
    Event,
    FailureCode,
    FinishReason,
    Handoff,
    KvTransferred,
    ModelInfo,
    Phase,
    PrefillStarted,
    RequestFailed,
    RequestId,
    RequestKey,
    SamplingParams,
    Submit,
    TokensGenerated,
    WorkerId,
    WorkerState,
    WorkerStatus,
)
from workers.wire import (
    command_from_pb,
    command_to_pb,
    event_from_pb,
    event_to_pb,
    model_from_pb,
    model_to_pb,
    phases_from_pb,
    phases_to_pb,
    status_from_pb,
    status_to_pb,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
UINT32 = st.integers(0, 2**32 - 1)
UINT64 = st.integers(0, 2**64 - 1)
INT32 = st.integers(0, 2**31 - 1)
SECONDS = st.floats(allow_nan=False)
TOKEN_IDS = st.lists(INT32, max_size=5).map(tuple)
KEYS = st.builds(RequestKey, TEXT.map(RequestId), INT32)
PHASES = st.frozensets(st.sampled_from(Phase))
SAMPLING = st.builds(
    SamplingParams,
    max_new_tokens=INT32,
    temperature=SECONDS,
    top_p=SECONDS,
    seed=UINT64,
    stop_token_ids=st.frozensets(INT32, max_size=4),
)
HANDOFFS = st.builds(Handoff, TEXT, TEXT, INT32)
SUBMITS = st.builds(Submit, KEYS, PHASES, TOKEN_IDS, SAMPLING, SECONDS, st.none() | HANDOFFS)
COMMANDS = SUBMITS | st.builds(Abort, KEYS)
EVENTS = st.one_of(
    st.builds(PrefillStarted, KEYS, SECONDS),
    st.builds(
        TokensGenerated,
        KEYS,
        TOKEN_IDS,
        INT32,
        st.none() | st.sampled_from(FinishReason),
        st.none() | SECONDS,
    ),
    st.builds(KvTransferred, KEYS, INT32, INT32, SECONDS, SECONDS),
    st.builds(RequestFailed, KEYS, st.sampled_from(FailureCode), TEXT),
)
STATUSES = st.builds(
    WorkerStatus,
    worker_id=TEXT.map(WorkerId),
    incarnation=INT32,
    phases=PHASES,
    state=st.sampled_from(WorkerState),
    message=TEXT,
    num_waiting=INT32,
    num_running=INT32,
    blocks=st.builds(BlockCounts, INT32, INT32, INT32, INT32, INT32),
    num_leases=INT32,
    num_steps=INT32,
    pid=INT32,
    memory_bytes=INT32,
)
MODELS = st.builds(
    ModelInfo,
    tokenizer_json=st.binary(max_size=20),
    chat_template=TEXT,
    architecture=TEXT,
    max_context_tokens=INT32,
    vocab_size=INT32,
    eos_token_ids=TOKEN_IDS,
    model_digest=TEXT,
    bos_token=TEXT,
    eos_token=TEXT,
    max_sequence_tokens=INT32,
)


def over_the_wire(message: Any) -> Any:
    return type(message).FromString(message.SerializeToString())


@given(COMMANDS, INT32)
def test_commands_come_back_as_they_were(command: Command, incarnation: int) -> None:
    message = over_the_wire(command_to_pb(command, incarnation))
    assert command_from_pb(message) == command
    if isinstance(command, Submit):
        assert message.submit.incarnation == incarnation


@given(EVENTS)
def test_events_come_back_as_they_were(event: Event) -> None:
    assert event_from_pb(over_the_wire(event_to_pb(event))) == event


@given(STATUSES)
def test_statuses_come_back_as_they_were(status: WorkerStatus) -> None:
    assert status_from_pb(over_the_wire(status_to_pb(status))) == status


@given(MODELS)
def test_models_come_back_as_they_were(model: ModelInfo) -> None:
    assert model_from_pb(over_the_wire(model_to_pb(model))) == model


def test_phases_are_sent_in_the_order_of_a_requests_life() -> None:
    assert phases_to_pb(frozenset(Phase)) == [pb.PHASE_ENCODE, pb.PHASE_PREFILL, pb.PHASE_DECODE]


@pytest.mark.parametrize("number", [0, 99])
def test_a_phase_of_another_version_is_left_out(number: Any) -> None:
    assert phases_from_pb([pb.PHASE_DECODE, number]) == frozenset({Phase.DECODE})


def test_a_kind_of_another_version_is_none() -> None:
    # Field 99 of a newer version, with a string in it.
    newer = bytes([99 << 3 & 0x7F | 2 | 0x80, 99 >> 4, 2]) + b"hi"
    assert command_from_pb(pb.Command.FromString(newer)) is None
    assert event_from_pb(pb.Event.FromString(newer)) is None
    assert command_from_pb(pb.Command()) is None
    assert event_from_pb(pb.Event(request_id="r1")) is None


def test_values_of_another_version_are_taken_for_the_careful_one() -> None:
    status = status_from_pb(pb.WorkerStatus(state=99))  # type: ignore[arg-type]
    assert status.state is WorkerState.FAILED
    assert status_from_pb(pb.WorkerStatus()).state is WorkerState.FAILED
    event = pb.Event()
    event.request_failed.code = 99  # type: ignore[assignment]
    failed = event_from_pb(event)
    assert isinstance(failed, RequestFailed)
    assert failed.code is FailureCode.INTERNAL
    event = pb.Event()
    event.tokens_generated.finish_reason = 99  # type: ignore[assignment]
    tokens = event_from_pb(event)
    assert isinstance(tokens, TokensGenerated)
    assert tokens.finish_reason is None


def test_every_value_that_we_have_has_its_number() -> None:
    key = RequestKey(RequestId("r"), 1)
    for code in FailureCode:
        assert event_from_pb(event_to_pb(RequestFailed(key, code, ""))) == RequestFailed(key, code, "")
    for state in WorkerState:
        status = WorkerStatus(WorkerId("w"), 1, frozenset(), state)
        assert status_from_pb(status_to_pb(status)).state is state


def test_a_first_token_without_a_prefill_time_is_not_one_of_zero_seconds() -> None:
    key = RequestKey(RequestId("r"), 1)
    for prefill_s in (None, 0.0):
        event = TokensGenerated(key, (1,), 0, None, prefill_s)
        assert event_from_pb(over_the_wire(event_to_pb(event))) == event
