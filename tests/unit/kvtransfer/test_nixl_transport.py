"""Pools that are read through NIXL: what is asked of its agents, and what their failures become. See tests.support.nixl_double."""

import base64
import json
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import ModuleType

import numpy as np
import pytest
import torch

from kvtransfer.errors import PoolUnreachable, TransportUnavailable
from kvtransfer.host_pool import HostPool
from kvtransfer.pool import KvSpan, PoolOffer
from kvtransfer.transports import nixl
from kvtransfer.transports.nixl_endpoint import NixlEndpoint, make_agent
from kvtransfer.transports.opening import PoolOpener
from tests.support.nixl_double import Fault, NixlDouble, NixlWorld
from tests.support.pool_owner import LAYOUT, NUM_BLOCKS, filled_cache
from tests.support.waiting import in_loop

SPAN = KvSpan(tuple(range(NUM_BLOCKS)), 0, NUM_BLOCKS * LAYOUT.block_size, 0, 3, 0, 2)
PART = KvSpan((7, 2, 3, 11), 3, 9, 1, 3, 1, 2)
TIMEOUT_S = 2.0


@dataclass
class Clock:
    """Time that passes when somebody sleeps."""

    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        # As coarse as a busy machine.
        self.now_s += max(seconds, 0.01)


class Process:
    """One that has an agent."""

    def __init__(self, agent: NixlDouble) -> None:
        self.agent = agent
        self.clock = Clock()
        self.endpoint = NixlEndpoint(agent, timeout_s=TIMEOUT_S, clock=self.clock, sleep=self.clock.sleep)

    @contextmanager
    def running(self) -> Iterator[None]:
        """What is called happens in this process."""
        before, nixl._endpoint = nixl._endpoint, self.endpoint
        try:
            yield
        finally:
            nixl._endpoint = before

    def pool(self, seed: int = 0) -> PoolOffer:
        """The offer of a filled pool."""
        with self.running():
            pool = HostPool(filled_cache(seed=seed), LAYOUT, is_in_nixl=True)
        assert [one.transport for one in pool.offers] == ["in_process", "nixl"]
        return pool.offers[1]

    def open(self, offer: PoolOffer) -> nixl.NixlPool:
        with self.running():
            return nixl.open_pool(offer.descriptor)

    def is_gone(self, offer: PoolOffer) -> bool:
        with self.running():
            return nixl.is_owner_gone(offer.descriptor)


@dataclass
class Pair:
    """An owner, a reader, and the owner's pool."""

    owner: Process
    reader: Process
    offer: PoolOffer
    world: NixlWorld = field(repr=False)


@pytest.fixture
def pair() -> Pair:
    world = NixlWorld()
    owner, reader = Process(world.agent("agent-owner")), Process(world.agent("agent-reader"))
    return Pair(owner, reader, owner.pool(), world)


def empty_pool(dtype: str = LAYOUT.dtype) -> tuple[HostPool, torch.Tensor]:
    cache = torch.zeros(filled_cache().shape, dtype=getattr(torch, dtype))
    return HostPool(cache, replace(LAYOUT, dtype=dtype)), cache


def changed(offer: PoolOffer, **values: object) -> bytes:
    return json.dumps({**json.loads(offer.descriptor), **values}).encode()


# Reading.


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_a_pull_brings_the_kv_and_the_checksum_that_its_owner_announces(pair: Pair, dtype: str) -> None:
    mapped = pair.reader.open(pair.offer)
    target, cache = empty_pool(dtype)
    owned = HostPool(filled_cache(), LAYOUT)
    assert mapped.pull(SPAN, target, SPAN) == owned.checksum(SPAN, "nixl")
    assert torch.equal(cache, filled_cache().to(cache.dtype))
    mapped.close()


def test_a_part_goes_into_other_blocks_and_nothing_else_changes(pair: Pair) -> None:
    mapped = pair.reader.open(pair.offer)
    target, cache = empty_pool()
    into = replace(PART, block_ids=(5, 0, 1), first_token=0)
    owned = HostPool(filled_cache(), LAYOUT)
    assert mapped.pull(PART, target, into) == owned.checksum(PART, "nixl") == target.checksum(into, "nixl")
    assert np.count_nonzero(cache.view(torch.uint8)) <= 2 * 2 * 9 * 8 * 2
    # Tokens of one head: a piece for each, in each of K and V of each layer.
    assert pair.reader.agent.num_pieces[-1] == 2 * 2 * 9


def test_blocks_that_follow_each_other_are_one_piece(pair: Pair) -> None:
    mapped = pair.reader.open(pair.offer)
    mapped.pull(SPAN, empty_pool()[0], SPAN)
    assert pair.reader.agent.num_pieces[-1] == 2 * LAYOUT.num_layers


def test_no_tokens_are_no_read(pair: Pair) -> None:
    mapped = pair.reader.open(pair.offer)
    num_reads = len(pair.reader.agent.handles)
    nothing = replace(SPAN, num_tokens=0, block_ids=())
    assert mapped.pull(nothing, empty_pool()[0], nothing) == 0
    assert len(pair.reader.agent.handles) == num_reads


def test_a_read_larger_than_any_before_gets_memory_and_the_smaller_one_goes(pair: Pair) -> None:
    mapped, agent = pair.reader.open(pair.offer), pair.reader.agent
    assert agent.num_registered == 1
    pair.reader.endpoint._staged_of(5 << 20)
    assert agent.num_registered == 1
    mapped.pull(SPAN, empty_pool()[0], SPAN)
    assert agent.num_registered == 1
    assert agent.num_unreleased == 0


def test_a_slow_read_is_waited_for(pair: Pair) -> None:
    pair.owner.agent.fault = Fault.SLOW
    mapped = pair.reader.open(pair.offer)
    target, cache = empty_pool()
    mapped.pull(SPAN, target, SPAN)
    assert torch.equal(cache, filled_cache())
    assert pair.reader.clock.now_s > 100.0


def test_a_process_reads_its_own_pool_too(pair: Pair) -> None:
    mapped = pair.owner.open(pair.offer)
    target, cache = empty_pool()
    mapped.pull(SPAN, target, SPAN)
    assert torch.equal(cache, filled_cache())
    mapped.close()


def test_two_pools_of_one_process_are_open_at_once_and_the_agent_stays_known_until_both_are_closed(
    pair: Pair,
) -> None:
    first = pair.reader.open(pair.offer)
    second = pair.reader.open(pair.owner.pool(seed=1))
    first.close()
    first.close()
    target, cache = empty_pool()
    second.pull(SPAN, target, SPAN)
    assert torch.equal(cache, filled_cache(seed=1))
    assert set(pair.reader.agent.known) == {"agent-owner"}
    second.close()
    assert not pair.reader.agent.known


def test_a_closed_pool_is_not_read(pair: Pair) -> None:
    mapped = pair.reader.open(pair.offer)
    mapped.close()
    with pytest.raises(ConnectionError, match="not open any more"):
        mapped.pull(SPAN, empty_pool()[0], SPAN)


@pytest.mark.parametrize(
    ("source", "into"),
    [
        (replace(SPAN, block_ids=(NUM_BLOCKS,) * NUM_BLOCKS), SPAN),
        (replace(SPAN, layer_hi=4), SPAN),
        (replace(SPAN, num_tokens=3), SPAN),
        (SPAN, replace(SPAN, block_ids=(NUM_BLOCKS,) * NUM_BLOCKS)),
    ],
)
def test_a_span_that_is_not_within_its_pool_is_refused_and_the_pool_stays_good(
    pair: Pair, source: KvSpan, into: KvSpan
) -> None:
    mapped = pair.reader.open(pair.offer)
    target, cache = empty_pool()
    with pytest.raises(ValueError):
        mapped.pull(source, target, into)
    assert not cache.any()
    mapped.pull(SPAN, target, SPAN)


# Failures.


def test_a_read_that_does_not_end_fails_in_time_and_no_other_is_tried(pair: Pair) -> None:
    mapped, clock = pair.reader.open(pair.offer), pair.reader.clock
    pair.owner.agent.fault = Fault.STALLED
    began_s = clock.now_s
    with pytest.raises(ConnectionError, match="agent agent-owner: a read did not end within 2 s"):
        mapped.pull(SPAN, empty_pool()[0], SPAN)
    assert TIMEOUT_S <= clock.now_s - began_s < TIMEOUT_S + 0.1
    stopped_s = clock.now_s
    for attempt in (lambda: mapped.pull(SPAN, empty_pool()[0], SPAN), lambda: pair.reader.open(pair.offer)):
        with pytest.raises((ConnectionError, PoolUnreachable), match="did not end within 2 s"):
            attempt()
    assert clock.now_s == stopped_s


def test_what_arrives_after_its_time_changes_neither_the_target_nor_later_reads(pair: Pair) -> None:
    other = Process(pair.world.agent("agent-other"))
    others = pair.reader.open(other.pool(seed=1))
    mapped = pair.reader.open(pair.offer)
    pair.owner.agent.fault = Fault.STALLED
    target, cache = empty_pool()
    with pytest.raises(ConnectionError):
        mapped.pull(SPAN, target, SPAN)
    mapped.close()
    late = pair.reader.agent.handles[-1]
    staged = pair.reader.endpoint.read(
        "agent-other", np.array([other.endpoint._shared[0].ctypes.data]), np.array([4096])
    )
    before = staged.copy()
    pair.owner.agent.fault = Fault.NONE
    pair.reader.agent.arrive()
    assert late.is_done
    assert np.array_equal(staged, before)
    assert not cache.any()
    others.pull(SPAN, target, SPAN)
    assert torch.equal(cache, filled_cache(seed=1))


def test_memory_of_a_read_that_was_given_up_is_free_when_it_has_ended_and_the_pool_opens_again(
    pair: Pair,
) -> None:
    mapped, agent = pair.reader.open(pair.offer), pair.reader.agent
    pair.owner.agent.fault = Fault.STALLED
    with pytest.raises(ConnectionError):
        mapped.pull(SPAN, empty_pool()[0], SPAN)
    mapped.close()
    # The agent stays known, else NIXL would not say how the read ends.
    assert (agent.num_registered, agent.num_unreleased, set(agent.known)) == (1, 1, {"agent-owner"})
    assert pair.reader.is_gone(pair.offer)
    with pytest.raises(PoolUnreachable, match="did not end"):
        pair.reader.open(pair.offer)
    pair.owner.agent.fault = Fault.NONE
    again = pair.reader.open(pair.offer)
    target, cache = empty_pool()
    again.pull(SPAN, target, SPAN)
    assert torch.equal(cache, filled_cache())
    assert (agent.num_registered, agent.num_unreleased) == (1, 0)
    assert not pair.reader.is_gone(pair.offer)


def test_memory_of_a_read_that_was_given_up_is_free_when_the_peer_has_ended(pair: Pair) -> None:
    mapped, agent = pair.reader.open(pair.offer), pair.reader.agent
    pair.owner.agent.fault = Fault.STALLED
    with pytest.raises(ConnectionError):
        mapped.pull(SPAN, empty_pool()[0], SPAN)
    pair.owner.agent.fault = Fault.GONE
    mapped.close()
    assert (agent.num_registered, agent.num_unreleased, agent.known) == (0, 0, {})
    with pytest.raises(PoolUnreachable, match="agent cannot be connected to: NIXL_ERR_BACKEND"):
        pair.reader.open(pair.offer)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault.GONE, "reading failed: NIXL_ERR_REMOTE_DISCONNECT"),
        (Fault.BROKEN, "reading failed in state ERR"),
    ],
)
def test_a_peer_that_is_lost_is_a_connection_error_and_its_pool_is_to_be_opened_anew(
    pair: Pair, fault: Fault, reason: str
) -> None:
    mapped, agent = pair.reader.open(pair.offer), pair.reader.agent
    assert not pair.reader.is_gone(pair.offer)
    pair.owner.agent.fault = fault
    with pytest.raises(ConnectionError, match=f"agent agent-owner: {reason}"):
        mapped.pull(SPAN, empty_pool()[0], SPAN)
    assert pair.reader.is_gone(pair.offer)
    assert agent.num_unreleased == 0
    mapped.close()
    assert not agent.known
    pair.owner.agent.fault = Fault.NONE
    pair.reader.open(pair.offer).pull(SPAN, empty_pool()[0], SPAN)


def test_a_peer_that_does_not_answer_when_its_pool_is_opened_is_unreachable(pair: Pair) -> None:
    pair.owner.agent.fault = Fault.STALLED
    with pytest.raises(
        PoolUnreachable, match="read by nixl: agent agent-owner: a read did not end within 2 s"
    ):
        pair.reader.open(pair.offer)
    pair.owner.agent.fault = Fault.NONE
    pair.reader.open(pair.offer)
    assert pair.reader.agent.num_registered == 1


def test_without_memory_to_read_into_the_peer_is_not_taken_for_lost(pair: Pair) -> None:
    pair.reader.agent.is_full = True
    with pytest.raises(
        PoolUnreachable, match=r"NIXL does not register \d+ bytes to read into: NIXL_ERR_BACKEND"
    ):
        pair.reader.open(pair.offer)
    pair.reader.agent.is_full = False
    pair.reader.open(pair.offer)


# Descriptors.


def test_a_descriptor_is_small(pair: Pair) -> None:
    assert len(pair.offer.descriptor) < 2048


def test_where_another_pool_lies_by_now_nothing_is_read(pair: Pair) -> None:
    descriptor = changed(pair.offer, nonce="00" * 16)
    with pytest.raises(PoolUnreachable, match="agent agent-owner has something else where the pool was"):
        pair.reader.open(PoolOffer("nixl", descriptor))
    assert not pair.reader.agent.known


def test_metadata_that_came_damaged_does_not_reach_nixl_which_would_not_get_over_it(pair: Pair) -> None:
    metadata = base64.b64decode(json.loads(pair.offer.descriptor)["metadata"])
    for damaged in (metadata[:-3], b"", bytes([metadata[0] ^ 1]) + metadata[1:]):
        descriptor = changed(pair.offer, metadata=base64.b64encode(damaged).decode())
        with pytest.raises(PoolUnreachable, match="its descriptor makes no sense"):
            pair.reader.open(PoolOffer("nixl", descriptor))
    pair.reader.open(pair.offer)


@pytest.mark.parametrize(
    "values",
    [
        {"num_blocks": 0},
        {"num_blocks": "many"},
        {"layout": {}},
        {"address": -4096},
        {"nonce": "xx"},
        {"nonce": "ab"},
        {"metadata": "*"},
        {"crc": None},
    ],
)
def test_a_descriptor_that_makes_no_sense_is_refused(pair: Pair, values: dict[str, object]) -> None:
    with pytest.raises(PoolUnreachable, match="its descriptor makes no sense"):
        pair.reader.open(PoolOffer("nixl", changed(pair.offer, **values)))


@pytest.mark.parametrize("descriptor", [b"", b"\xff", b"[]", b"{}", b"null"])
def test_bytes_that_are_no_descriptor_are_refused(pair: Pair, descriptor: bytes) -> None:
    with pytest.raises(PoolUnreachable, match="its descriptor makes no sense"):
        pair.reader.open(PoolOffer("nixl", descriptor))


def test_a_descriptor_of_another_version_is_refused(pair: Pair) -> None:
    with pytest.raises(PoolUnreachable, match="its descriptor is of version 2, not 1"):
        pair.reader.open(PoolOffer("nixl", changed(pair.offer, version=2)))


def test_a_pool_said_to_be_larger_than_it_is_is_not_read_beyond_its_end(pair: Pair) -> None:
    mapped = pair.reader.open(PoolOffer("nixl", changed(pair.offer, num_blocks=10 * NUM_BLOCKS)))
    beyond = replace(SPAN, block_ids=(9 * NUM_BLOCKS,), num_tokens=1)
    with pytest.raises(ConnectionError, match="NIXL_ERR_NOT_FOUND"):
        mapped.pull(beyond, empty_pool()[0], replace(SPAN, num_tokens=1))


# NIXL itself.


def test_a_pool_that_nixl_does_not_register_is_an_error_of_this_side(pair: Pair) -> None:
    pair.owner.agent.is_full = True
    with pytest.raises(TransportUnavailable, match="NIXL does not register the pool: NIXL_ERR_BACKEND"):
        pair.owner.pool()


class NixlIsAbsent:
    """Goes first in `sys.meta_path`."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        if name == "nixl":
            raise ModuleNotFoundError("No module named 'nixl'", name=name)


def without_nixl(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it is not installed, whether it is or not."""
    for name in ("nixl", "nixl._api"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(nixl, "_endpoint", None)
    monkeypatch.setattr(sys, "meta_path", [NixlIsAbsent, *sys.meta_path])


@in_loop
async def test_without_the_package_the_reason_says_how_to_install_it(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = r"the package nixl is not installed: pip install 'phasewise\[nixl\]'"
    opener = PoolOpener()
    with monkeypatch.context() as patch:
        without_nixl(patch)
        with pytest.raises(TransportUnavailable, match=how) as caught:
            nixl.offer(np.zeros(LAYOUT.block_bytes, np.uint8), nixl.PoolGeometry(LAYOUT, 1))
        with pytest.raises(PoolUnreachable, match=f"read by nixl: here {how}"):
            nixl.open_pool(pair.offer.descriptor)
        transport, pool, why = await opener.open([pair.offer])
    assert (transport, pool) == ("grpc", None)
    assert why.startswith("nixl: here the package nixl is not installed")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (vars(copy), str(copy)) == (vars(caught.value), str(caught.value))


class LibraryOf:
    """The module `nixl._api`, as far as it is used."""

    def __init__(self, made: NixlDouble | Exception) -> None:
        self._made = made
        self.names: list[str] = []

    def nixl_agent_config(self, backends: list[str]) -> list[str]:
        return backends

    def nixl_agent(self, name: str, config: list[str]) -> NixlDouble:
        assert config == ["UCX"]
        self.names.append(name)
        if isinstance(self._made, Exception):
            raise self._made
        return self._made


def with_library(monkeypatch: pytest.MonkeyPatch, made: NixlDouble | Exception) -> LibraryOf:
    library = LibraryOf(made)
    monkeypatch.setitem(sys.modules, "nixl", ModuleType("nixl"))
    monkeypatch.setitem(sys.modules, "nixl._api", library)  # type: ignore[arg-type]
    return library


def test_an_agent_has_a_name_that_no_other_had(monkeypatch: pytest.MonkeyPatch) -> None:
    made = NixlWorld().agent("agent-a")
    library = with_library(monkeypatch, made)
    assert make_agent() is made
    assert make_agent() is made
    assert len(set(library.names)) == 2


def test_a_process_has_one_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    library = with_library(monkeypatch, NixlWorld().agent("agent-a"))
    monkeypatch.setattr(nixl, "_endpoint", None)
    assert nixl.this_endpoint() is nixl.this_endpoint()
    assert len(library.names) == 1


def test_nixl_that_does_not_work_is_said_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = NixlWorld().agent("agent-a")
    bare.backends = {}
    with_library(monkeypatch, bare)
    with pytest.raises(TransportUnavailable, match="NIXL has no backend UCX"):
        make_agent()
    with_library(monkeypatch, RuntimeError("No plugins available"))
    with pytest.raises(TransportUnavailable, match=r"NIXL makes no agent: RuntimeError\('No plugins"):
        make_agent()
    monkeypatch.setitem(sys.modules, "nixl._api", None)
    with pytest.raises(
        TransportUnavailable, match=r"the package nixl cannot be loaded: import of nixl\._api"
    ):
        make_agent()


@in_loop
async def test_the_opener_opens_a_lost_pool_anew_when_nobody_uses_it(pair: Pair) -> None:
    opener = PoolOpener()
    with pair.reader.running():
        transport, first, _ = await opener.open([pair.offer])
        assert transport == "nixl"
        assert first is not None
        pair.owner.agent.fault = Fault.BROKEN
        with pytest.raises(ConnectionError):
            first.pull(SPAN, empty_pool()[0], SPAN)
        pair.owner.agent.fault = Fault.NONE
        opener.release(first)
        assert opener.num_open == 0
        _, second, _ = await opener.open([pair.offer])
        assert second is not None
        second.pull(SPAN, empty_pool()[0], SPAN)
        opener.close()
