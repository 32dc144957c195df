"""What crosses the wire comes back as it was; what a newer version sends does no harm."""

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import worker_pb2 as pb
from workers.api import (
    Abort,
    BlockCounts,
    CautiousDecoding,
    Command,
    DecodingReport,
    DraftsGenerated,
    EmbeddingCounts,
    Encode,
    Event,
    FailureCode,
    FinishReason,
    GpuStatus,
    Grammar,
    GrammarKind,
    Handoff,
    ImageReduction,
    ImagesEncoded,
    ImagesReduced,
    ImagesWanted,
    ImageTile,
    KvBlocksRemoved,
    KvBlocksStored,
    KvDirection,
    KvEvent,
    KvLedger,
    KvPeer,
    KvReuseCounts,
    KvTransferCounts,
    KvTransferred,
    LedgerEntry,
    LedgerKind,
    ModelInfo,
    NgramDrafts,
    Phase,
    PrefillStarted,
    PromptScored,
    RequestFailed,
    RequestId,
    RequestKey,
    SamplingParams,
    Submit,
    SubscribeKvEvents,
    SuperposedDecoding,
    TokenLogprobs,
    TokensGenerated,
    WorkerId,
    WorkerState,
    WorkerStatus,
)
from workers.kv_wire import ledger_from_pb, ledger_to_pb
from workers.status_wire import model_from_pb, model_to_pb, status_from_pb, status_to_pb
from workers.step_shape import Contention, DeviceShape, EncodeCosts, FactorSource, ModelShape, StepCosts
from workers.wire import (
    command_from_pb,
    command_to_pb,
    event_from_pb,
    event_to_pb,
    kv_event_from_pb,
    kv_event_to_pb,
    phases_from_pb,
    phases_to_pb,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
UINT32 = st.integers(0, 2**32 - 1)
UINT64 = st.integers(0, 2**64 - 1)
INT32 = st.integers(0, 2**31 - 1)
SECONDS = st.floats(allow_nan=False)
TOKEN_IDS = st.lists(INT32, max_size=5).map(tuple)
KEYS = st.builds(RequestKey, TEXT.map(RequestId), INT32)
PHASES = st.frozensets(st.sampled_from(Phase))
TOP = st.lists(st.tuples(INT32, SECONDS), max_size=3).map(tuple)
LOGPROBS = st.lists(st.builds(TokenLogprobs, INT32, SECONDS, INT32, TOP), max_size=3).map(tuple)
DECODINGS = st.one_of(
    st.builds(NgramDrafts, INT32),
    st.builds(CautiousDecoding, INT32, SECONDS, SECONDS, INT32),
    st.builds(SuperposedDecoding, INT32),
)
SAMPLING = st.builds(
    SamplingParams,
    max_new_tokens=INT32,
    temperature=SECONDS,
    top_k=INT32,
    top_p=SECONDS,
    min_p=SECONDS,
    repetition_penalty=SECONDS,
    presence_penalty=SECONDS,
    frequency_penalty=SECONDS,
    logit_bias=TOP,
    seed=UINT64,
    min_new_tokens=INT32,
    stop_token_ids=st.frozensets(INT32, max_size=4),
    num_logprobs=st.none() | INT32,
    num_prompt_logprobs=st.none() | INT32,
    grammar=st.none() | st.builds(Grammar, st.sampled_from(GrammarKind), TEXT),
    decoding=st.none() | DECODINGS,
)
HANDOFFS = st.builds(Handoff, TEXT, TEXT, INT32)
HASHES = st.lists(st.binary(max_size=32), max_size=3).map(tuple)
REDUCTIONS = st.builds(
    ImageReduction, SECONDS, SECONDS, SECONDS, SECONDS, st.lists(SECONDS, max_size=3).map(tuple)
)
SUBMITS = st.builds(
    Submit,
    KEYS,
    PHASES,
    TOKEN_IDS,
    SAMPLING,
    SECONDS,
    st.none() | HANDOFFS,
    num_delivered=INT32,
    priority=st.integers(-(2**31), 2**31 - 1),
    cache_salt=TEXT,
    images=st.lists(
        st.builds(
            ImageTile, INT32, INT32, st.binary(max_size=32), st.none() | st.tuples(INT32, INT32, INT32)
        ),
        max_size=3,
    ).map(tuple),
    reduction=st.none() | REDUCTIONS,
    ttft_left_s=SECONDS,
    tpot_target_s=SECONDS,
    tenant_weight=SECONDS,
)


@st.composite
def encodes(draw: st.DrawFn) -> Encode:
    """The prompt that a picture is for is of the same request."""
    key, attempt = draw(KEYS), draw(INT32)
    numbers = draw(st.tuples(INT32, INT32, INT32, INT32, INT32))
    width, height, tile_lo, tile_hi, first_tile = numbers
    return Encode(
        key,
        draw(st.binary(max_size=20)),
        draw(TEXT),
        width,
        height,
        tile_lo,
        tile_hi,
        draw(HASHES),
        prefill=RequestKey(key.request_id, attempt),
        first_tile=first_tile,
        prefill_worker=WorkerId(draw(TEXT)),
        prefill_address=draw(TEXT),
        prefill_incarnation=draw(INT32),
        timeout_s=draw(SECONDS),
        cache_salt=draw(TEXT),
        reduction=draw(st.none() | REDUCTIONS),
    )


COMMANDS = SUBMITS | encodes() | st.builds(Abort, KEYS) | st.just(SubscribeKvEvents())
DRAFTS = st.lists(st.tuples(TOKEN_IDS, SECONDS), max_size=3)
EVENTS = st.one_of(
    st.builds(PrefillStarted, KEYS, SECONDS, TEXT),
    st.builds(
        TokensGenerated,
        KEYS,
        TOKEN_IDS,
        INT32,
        st.none() | st.sampled_from(FinishReason),
        st.none() | SECONDS,
        LOGPROBS,
        INT32,
        INT32,
        INT32,
        SECONDS,
    ),
    st.builds(PromptScored, KEYS, INT32, LOGPROBS),
    st.builds(
        lambda key, drafts: DraftsGenerated(key, tuple(d[0] for d in drafts), tuple(d[1] for d in drafts)),
        KEYS,
        DRAFTS,
    ),
    st.builds(DecodingReport, KEYS, INT32, INT32, INT32),
    st.builds(ImagesReduced, KEYS, INT32, INT32, INT32, SECONDS, st.booleans()),
    st.builds(
        KvTransferred,
        KEYS,
        INT32,
        INT32,
        SECONDS,
        SECONDS,
        transport=TEXT,
        transport_reason=TEXT,
        codec=TEXT,
        num_wire_bytes=INT32,
        num_resent_chunks=INT32,
        num_resumes=INT32,
    ),
    st.builds(ImagesWanted, KEYS, TOKEN_IDS.filter(bool)),
    st.builds(
        ImagesEncoded, KEYS, INT32, INT32, INT32, INT32, SECONDS, SECONDS, SECONDS, SECONDS, transport=TEXT
    ),
    st.builds(RequestFailed, KEYS, st.sampled_from(FailureCode), TEXT),
)
KV_EVENTS = st.builds(KvBlocksStored, st.binary(max_size=32), HASHES) | st.builds(KvBlocksRemoved, HASHES)
COUNTS = st.builds(BlockCounts, INT32, INT32, INT32, INT32, INT32)
TRANSFER_COUNTS = st.builds(KvTransferCounts, *[INT32] * len(fields(KvTransferCounts)))
REUSE_COUNTS = st.builds(
    KvReuseCounts,
    **{field.name: SECONDS if field.name == "fetch_s" else INT32 for field in fields(KvReuseCounts)},
)
EMBEDDING_COUNTS = st.builds(EmbeddingCounts, *[INT32] * len(fields(EmbeddingCounts)))
PEERS = st.builds(KvPeer, TEXT, st.sampled_from(KvDirection), TEXT, TEXT, TEXT, INT32, INT32, SECONDS, TEXT)
ENTRIES = st.builds(
    LedgerEntry,
    owner=TEXT,
    kind=st.sampled_from(LedgerKind),
    num_blocks=INT32,
    num_shared_blocks=INT32,
    lease_id=st.none() | INT32,
    generation=INT32,
    age_s=st.none() | SECONDS,
    peer=TEXT,
)
LEDGERS = st.builds(KvLedger, st.lists(ENTRIES, max_size=4).map(tuple), COUNTS, TOKEN_IDS)
RATIOS = st.floats(1.0, 10.0)
ERRORS = st.none() | st.floats(0.0, 9.0)
CURVES = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=3).map(tuple)
STEP_COSTS = st.builds(
    StepCosts,
    st.builds(ModelShape, TEXT, INT32, INT32, st.floats(0, 1e9), INT32, INT32, INT32),
    st.builds(
        DeviceShape,
        TEXT,
        *[st.floats(0, 1e18)] * 6,
        st.booleans(),
        CURVES,
        CURVES,
        st.builds(Contention, RATIOS, RATIOS, RATIOS, RATIOS),
    ),
    st.tuples(*[st.floats(0, 1e6)] * 4),
    INT32,
    ERRORS,
    RATIOS,
    st.sampled_from(FactorSource),
)
ENCODE_COSTS = st.builds(EncodeCosts, st.floats(0, 1e6), st.floats(0, 1e6), INT32, ERRORS, RATIOS)
GPUS = st.builds(
    GpuStatus,
    uuid=TEXT,
    name=TEXT,
    memory_used_bytes=st.none() | INT32,
    memory_total_bytes=st.none() | INT32,
    utilisation=st.none() | st.floats(0, 1),
    memory_utilisation=st.none() | st.floats(0, 1),
    sm_clock_mhz=st.none() | INT32,
    max_sm_clock_mhz=st.none() | INT32,
    memory_clock_mhz=st.none() | INT32,
    power_w=st.none() | st.floats(0, 1e4),
    power_limit_w=st.none() | st.floats(0, 1e4),
    temperature_c=st.none() | st.integers(-50, 200),
    throttle_reasons=st.lists(TEXT, max_size=2).map(tuple),
    ecc_uncorrected=st.none() | UINT64,
    ecc_corrected=st.none() | UINT64,
    is_remap_pending=st.booleans(),
    has_remap_failed=st.booleans(),
    xids=st.lists(UINT32, max_size=3).map(tuple),
    problem=TEXT,
    notes=st.lists(TEXT, max_size=2).map(tuple),
    missing=TEXT,
    age_s=st.floats(0, 1e6),
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
    blocks=COUNTS,
    num_leases=INT32,
    num_steps=INT32,
    pid=INT32,
    memory_bytes=INT32,
    leaked_blocks=INT32,
    num_invariant_failures=INT32,
    transfers=TRANSFER_COUNTS,
    reuse=REUSE_COUNTS,
    embeddings=EMBEDDING_COUNTS,
    peers=st.lists(PEERS, max_size=3).map(tuple),
    step_costs=st.none() | STEP_COSTS,
    encode_costs=st.none() | ENCODE_COSTS,
    gpu=st.none() | GPUS,
    layout_s=st.dictionaries(TEXT, SECONDS, max_size=3).map(lambda found: tuple(sorted(found.items()))),
    room_tokens=st.none() | st.integers(0, 2**40),
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
    vision_json=TEXT,
    max_image_embeddings=INT32,
)


def over_the_wire(message: Any) -> Any:
    return type(message).FromString(message.SerializeToString())


@given(COMMANDS, INT32)
def test_commands_come_back_as_they_were(command: Command, incarnation: int) -> None:
    message = over_the_wire(command_to_pb(command, incarnation))
    assert command_from_pb(message) == command
    if isinstance(command, Submit | Encode):
        assert getattr(message, message.WhichOneof("command")).incarnation == incarnation


@given(EVENTS)
def test_events_come_back_as_they_were(event: Event) -> None:
    assert event_from_pb(over_the_wire(event_to_pb(event))) == event


@given(KV_EVENTS)
def test_kv_events_come_back_as_they_were(event: KvEvent) -> None:
    assert kv_event_from_pb(over_the_wire(kv_event_to_pb(event))) == event


@given(STATUSES)
def test_statuses_come_back_as_they_were(status: WorkerStatus) -> None:
    assert status_from_pb(over_the_wire(status_to_pb(status))) == status


@given(LEDGERS, TEXT, INT32)
def test_ledgers_come_back_as_they_were(ledger: KvLedger, worker_id: str, incarnation: int) -> None:
    message = over_the_wire(ledger_to_pb(ledger, worker_id, incarnation))
    assert ledger_from_pb(message) == ledger
    assert (message.worker_id, message.incarnation) == (worker_id, incarnation)


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
    assert kv_event_from_pb(pb.KvEvent.FromString(newer)) is None


def test_what_an_older_sender_leaves_out_has_its_default() -> None:
    message = pb.Command()
    message.submit.sampling.max_tokens = 3
    message.submit.sampling.top_p = 1.0
    submit = command_from_pb(message)
    assert isinstance(submit, Submit)
    assert submit.sampling == SamplingParams(3)
    assert (submit.num_delivered, submit.priority, submit.cache_salt) == (0, 0, "")


def test_a_grammar_of_a_newer_kind_is_not_left_out_but_refused() -> None:
    message = pb.Command()
    message.submit.sampling.grammar.kind = 99  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"sampling\.grammar\.kind: is 99"):
        command_from_pb(message)


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


def test_what_a_newer_version_tells_of_kv_is_left_out_or_taken_for_the_careful_one() -> None:
    newer = pb.WorkerStatus(peers=[pb.KvPeer(address="a:1", direction=99)])  # type: ignore[arg-type]
    assert status_from_pb(newer).peers == ()
    newer = pb.WorkerStatus(step_costs=pb.StepCosts(factors=[1.0] * 5, upper_ratio=1.0))
    assert status_from_pb(newer).step_costs is None
    ledger = ledger_from_pb(pb.KvLedger(entries=[pb.LedgerEntry(owner="x", kind=99, num_blocks=3)]))  # type: ignore[arg-type]
    assert ledger.entries == (LedgerEntry("x", LedgerKind.SEQUENCE, 3),)


@pytest.mark.parametrize(("num_steps", "source"), [(29, FactorSource.ROOFLINE), (30, FactorSource.FITTED)])
def test_an_older_worker_that_does_not_say_where_its_factors_come_from_had_no_profile(
    num_steps: int, source: FactorSource
) -> None:
    older = pb.WorkerStatus(step_costs=pb.StepCosts(factors=[1.0] * 4, num_steps=num_steps))
    found = status_from_pb(older).step_costs
    assert found is not None
    assert found.source is source


def test_what_an_older_worker_leaves_out_of_a_transfer_is_empty() -> None:
    message = pb.Event(request_id="r", attempt=1)
    message.kv_transferred.num_bytes = 10
    event = event_from_pb(message)
    assert event == KvTransferred(RequestKey(RequestId("r"), 1), 10, 0, 0.0, 0.0)


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
