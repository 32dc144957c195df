"""EmbeddingHost: embeddings that come from another worker, all of a tile's or fewer, and those that are not what they should be."""

import asyncio
from collections.abc import Sequence

import pytest

from kvtransfer.config import KvTransferConfig
from kvtransfer.errors import ReservationRefused
from workers.api import ImageTile, RequestId, RequestKey
from workers.embeddings.host import EmbeddingHost, transfer_digest
from workers.embeddings.kept import KeptEmbeddings, to_numbers
from workers.embeddings.memory import BLOCK_SIZE, embedding_layout, host_memory
from workers.embeddings.names import NOT_NEEDED, EmbeddingTransfer

KEY = RequestKey(RequestId("r"), 1)
#: Two blocks each.
TILES = [(i, ImageTile(0, 2 * BLOCK_SIZE, bytes([i]))) for i in range(2)]
NAME = EmbeddingTransfer(KEY, 0, 2, 7).transfer_id
DIGEST = transfer_digest([tile.key for _, tile in TILES])
#: One block and two.
KEPT = [
    KeptEmbeddings((1, 5), (True, False)),
    KeptEmbeddings(tuple(range(2, 22)), (False,) * 20),
]


class Needed:
    """What a host says to whoever needs TILES."""

    def __init__(self) -> None:
        #: What it was told to see to, each time.
        self.asked: list[tuple[int, ...]] = []
        self.ready_tiles: dict[int, tuple[tuple[int, ...], KeptEmbeddings | None]] = {}

    def granted(self) -> None:
        pass

    def wanted(self, tiles: tuple[int, ...]) -> None:
        self.asked.append(tiles)

    def ready(self, tile: int, block_ids: tuple[int, ...], kept: KeptEmbeddings | None) -> None:
        self.ready_tiles[tile] = block_ids, kept


def make_host(needed: Needed) -> EmbeddingHost:
    """Five blocks, of which TILES need four."""
    layout = embedding_layout(8, model_digest="m", processor_digest="p")
    memory = host_memory(layout, 5)
    host = EmbeddingHost(memory, 1, lambda _: None, lambda _: None, KvTransferConfig())
    host.need(KEY, TILES, "", needed)
    return host


async def offer(host: EmbeddingHost, first: int, num: int, attempt: int) -> str:
    """An Encode of this attempt is about to send these tiles; returns its transfer."""
    name = EmbeddingTransfer(KEY, first, num, attempt).transfer_id
    num_tokens = num * 2 * BLOCK_SIZE
    await host.reserve(name, num_tokens=num_tokens, max_tokens=num_tokens, timeout_s=1.0)
    return name


def receive(num_blocks: int, numbers: Sequence[int], digest: bytes = DIGEST) -> tuple[Needed, EmbeddingHost]:
    """A transfer of so many blocks, committed with these numbers."""
    needed = Needed()

    async def main() -> EmbeddingHost:
        host = make_host(needed)
        num = num_blocks * BLOCK_SIZE
        block_ids = await host.reserve(NAME, num_tokens=num, max_tokens=num, timeout_s=1.0)
        assert len(block_ids) == num_blocks
        host.commit(NAME, block_ids, numbers, digest)
        host.check_invariants()
        await host.close("done")
        return host

    return needed, asyncio.run(main())


def test_all_embeddings_of_a_tile_come_as_ever() -> None:
    needed, host = receive(4, ())
    assert [len(blocks) for blocks, _ in needed.ready_tiles.values()] == [2, 2]
    assert [kept for _, kept in needed.ready_tiles.values()] == [None, None]
    assert host.store.counts().num_free == 1


def test_fewer_embeddings_take_fewer_blocks() -> None:
    needed, host = receive(3, to_numbers(KEPT))
    assert [len(needed.ready_tiles[i][0]) for i in range(2)] == [1, 2]
    assert [needed.ready_tiles[i][1] for i in range(2)] == KEPT
    assert host.store.counts().num_free == 2


@pytest.mark.parametrize(
    ("num_blocks", "numbers", "digest"),
    [
        (3, (), DIGEST),
        (4, to_numbers(KEPT), DIGEST),
        (3, to_numbers(KEPT)[:-1], DIGEST),
        (3, (2, 0, 999, 1, 0), DIGEST),
        (4, (), b"other pictures"),
    ],
    ids=["too few blocks", "too many blocks", "cut off", "out of the tile", "other pictures"],
)
def test_what_is_not_what_it_should_be_is_never_read(
    num_blocks: int, numbers: tuple[int, ...], digest: bytes
) -> None:
    needed, host = receive(num_blocks, numbers, digest)
    assert needed.ready_tiles == {}
    # Its sender believes that they came.
    assert sorted(tile for tiles in needed.asked[1:] for tile in tiles) == [0, 1]
    assert host.store.counts().num_cached == 0


@pytest.mark.parametrize("num_blocks", [0, 5])
def test_more_than_the_tiles_have_is_refused(num_blocks: int) -> None:
    with pytest.raises(ReservationRefused, match="embeddings with padding"):
        receive(num_blocks, ())


def test_a_shard_that_came_already_is_not_needed_and_what_is_missing_of_it_is_wanted_again() -> None:
    needed = Needed()

    async def main() -> None:
        host = make_host(needed)
        name = await offer(host, 0, 1, attempt=7)
        host.commit(name, range(2), (), transfer_digest([TILES[0][1].key]))
        assert list(needed.ready_tiles) == [0]
        with pytest.raises(ReservationRefused) as refused:
            await offer(host, 0, 2, attempt=8)
        assert refused.value.reason.startswith(NOT_NEEDED)
        assert needed.asked == [(0, 1), (1,)]
        host.forget(KEY)
        with pytest.raises(ReservationRefused) as refused:
            await offer(host, 1, 1, attempt=9)
        assert refused.value.reason.startswith(NOT_NEEDED)
        host.check_invariants()
        await host.close("done")

    asyncio.run(main())


def test_a_later_attempt_takes_the_place_of_one_whose_encoder_is_lost() -> None:
    needed = Needed()

    async def main() -> None:
        host = make_host(needed)
        first = await offer(host, 0, 2, attempt=7)
        second = await offer(host, 1, 1, attempt=9)
        host.check_invariants()
        # Of the first one nothing comes any more, and nothing is asked for on its account.
        with pytest.raises(ReservationRefused) as refused:
            await offer(host, 1, 1, attempt=8)
        assert refused.value.reason.startswith(NOT_NEEDED)
        host.release(first, range(4), "its lease ended")
        assert needed.asked == [(0, 1)]
        host.commit(second, range(2), (), transfer_digest([TILES[1][1].key]))
        assert list(needed.ready_tiles) == [1]
        host.check_invariants()
        await host.close("done")

    asyncio.run(main())
