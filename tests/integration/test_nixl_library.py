"""NIXL itself, between two processes of this host without a GPU: what the double of the unit tests takes for granted."""

from collections.abc import Iterator

import pytest

from tests.support.nixl_process import NixlProcess, nixl_process
from tests.support.waiting import until_in_thread

Pair = tuple[NixlProcess, NixlProcess]


def start(ucx_tls: str) -> Iterator[Pair]:
    pytest.importorskip("nixl", reason="needs the extra nixl: pip install 'phasewise[nixl]'")
    with nixl_process(ucx_tls) as owner, nixl_process(ucx_tls) as reader:
        yield owner, reader


@pytest.fixture(params=["tcp", "tcp,sm,self"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """An owner and a reader, by TCP and by what UCX takes between processes of one host."""
    yield from start(request.param)


@pytest.fixture
def tcp_pair() -> Iterator[Pair]:
    yield from start("tcp")


def test_a_pool_is_read_and_opened_again_after_it_was_closed(pair: Pair) -> None:
    owner, reader = pair
    for _ in range(2):
        assert reader.tell(f"open {owner.descriptor}") == "opened"
        assert [reader.tell("pull"), reader.tell("pull")] == ["right", "right"]
        assert reader.tell("close") == "closed"
    assert owner.tell(f"open {reader.descriptor}") == "opened"
    assert owner.tell("pull") == "right"


def test_a_killed_owner_is_a_connection_error_and_then_unreachable(pair: Pair) -> None:
    owner, reader = pair
    assert reader.tell(f"open {owner.descriptor}") == "opened"
    assert reader.tell("pull") == "right"
    owner.kill()
    # By shared memory UCX sees the end of a peer some moments later; what it read until then was still right.
    until_in_thread(lambda: reader.tell("pull") != "right", "the reader sees that the owner has ended")
    assert reader.tell("pull").startswith("ConnectionError: agent phasewise-")
    assert reader.tell(f"is_gone {owner.descriptor}") == "True"
    assert reader.tell("close") == "closed"
    assert reader.tell(f"open {owner.descriptor}").startswith(
        "PoolUnreachable: the other side's pool cannot be read by nixl"
    )


def test_a_stopped_owner_fails_a_read_in_time_and_is_read_again_when_it_goes_on(tcp_pair: Pair) -> None:
    owner, reader = tcp_pair
    assert reader.tell(f"open {owner.descriptor}") == "opened"
    owner.stop()
    assert reader.tell("pull").endswith("a read did not end within 2 s")
    assert reader.tell("close") == "closed"
    assert reader.tell(f"open {owner.descriptor}").endswith("a read did not end within 2 s")
    owner.go_on()
    until_in_thread(
        lambda: reader.tell(f"open {owner.descriptor}") == "opened", "the read that was given up ends"
    )
    assert reader.tell("pull") == "right"


def test_a_process_that_is_not_there_is_unreachable(tcp_pair: Pair) -> None:
    owner, reader = tcp_pair
    owner.kill()
    assert reader.tell(f"open {owner.descriptor}").endswith(
        "its agent cannot be connected to: NIXL_ERR_BACKEND"
    )
