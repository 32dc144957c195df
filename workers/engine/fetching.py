"""Beginnings of prompts that come from other workers' caches, and those that others get from here. Pure.

A fetched block is leased while it is filled. Once the transfer has committed it is nobody's, but known to the prefix
index, where the prompt that waits for it finds it like any other.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from kvtransfer.layout import blocks_needed
from workers.api import LedgerKind, RequestKey
from workers.engine.block_pool import BlockPool
from workers.engine.host_tier import SavedBlock
from workers.engine.ledger import Holder
from workers.engine.messages import (
    BlocksReserved,
    CachedFound,
    CommitTransfer,
    FetchPrefix,
    FindCached,
    ReservationRefused,
    ReserveBlocks,
)
from workers.engine.sequence import Sequence

#: Fewer blocks are not worth asking others for; more do not fit into one question.
MIN_BLOCKS, MAX_BLOCKS = 2, 2048
#: Blocks of the host tier that are put back into the pool for one transfer: no step runs meanwhile.
MAX_PUT_BACK = 128


@dataclass(slots=True)
class _Fetch:
    key: RequestKey
    #: Hash of the block before the first one, then of each block that is wanted.
    chain: tuple[bytes, ...]
    #: Tokens from the first block that is wanted on.
    token_ids: tuple[int, ...]
    since_s: float
    block_ids: tuple[int, ...] = ()
    #: Nobody waits for it any more; its blocks are still to come back.
    is_over: bool = False


@dataclass(frozen=True, slots=True)
class EndedFetch:
    """Whose fetch it was, and when it began."""

    key: RequestKey
    since_s: float


class PrefixFetching:
    """What one worker fetches, and what is fetched from it."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._fetches: dict[str, _Fetch] = {}
        #: Transfer -> blocks that it reads here, and since when.
        self._lent: dict[str, tuple[tuple[int, ...], float]] = {}
        self._num_started = 0
        #: Fetches that committed KV of other tokens than were asked for. Nothing of it was kept.
        self.num_digest_mismatches = 0

    @property
    def num_held(self) -> int:
        """Transfers that hold blocks."""
        return len(self._lent) + sum(bool(fetch.block_ids) for fetch in self._fetches.values())

    def knows(self, transfer_id: str) -> bool:
        """It fetches, or reads, under this id."""
        return transfer_id in self._fetches or transfer_id in self._lent

    def holders(self) -> Iterator[Holder]:
        """For the ledger."""
        for transfer_id, (block_ids, since_s) in self._lent.items():
            yield Holder(transfer_id, LedgerKind.SENDING, block_ids, since_s)
        for transfer_id, fetch in self._fetches.items():
            if fetch.block_ids:
                yield Holder(transfer_id, LedgerKind.RECEIVING, fetch.block_ids, fetch.since_s)

    def leased_block_ids(self) -> list[int]:
        """All blocks that its transfers hold."""
        lent = [block_id for block_ids, _ in self._lent.values() for block_id in block_ids]
        return lent + [block_id for fetch in self._fetches.values() for block_id in fetch.block_ids]

    # What this worker gets.

    def begin(
        self, sequence: Sequence, *, num_known: int, prefill_tokens_per_s: float, now_s: float
    ) -> FetchPrefix | None:
        """Ask for the whole blocks of a prompt beyond the first `num_known`, which are here; None when it is too few."""
        size = self._pool.block_size
        # The last token is always computed.
        num_whole = (len(sequence.token_ids) - 1) // size
        if num_whole - num_known < MIN_BLOCKS:
            return None
        num_whole = min(num_whole, num_known + MAX_BLOCKS)
        sequence.hash_blocks(num_whole, size)
        self._num_started += 1
        transfer_id = f"prefix-{sequence.key.request_id}-{sequence.key.attempt}-{self._num_started}"
        chain = tuple(sequence.block_hashes[num_known : num_whole + 1])
        token_ids = tuple(sequence.named_tokens(num_known * size, num_whole * size))
        self._fetches[transfer_id] = _Fetch(sequence.key, chain, token_ids, now_s)
        return FetchPrefix(
            transfer_id,
            sequence.prefix_peers,
            chain[1:],
            prefill_tokens_per_s,
            timeout_s=sequence.deadline_s - now_s,
        )

    def reserve(self, request: ReserveBlocks, *, num_kept: int) -> BlocksReserved | ReservationRefused | None:
        """Blocks for what comes, now or not at all; None when this id fetches nothing."""
        fetch = self._fetches.get(request.transfer_id)
        if fetch is None:
            return None
        size = self._pool.block_size
        num_blocks = blocks_needed(request.max_tokens, size)
        problem = None
        if fetch.is_over:
            problem = "nobody waits for it any more"
        elif fetch.block_ids:
            problem = "it has its blocks already"
        elif (
            request.num_tokens != request.max_tokens
            or request.num_tokens % size
            or not 0 < num_blocks < len(fetch.chain)
        ):
            problem = f"{request.num_tokens} tokens are not what was asked for"
        elif num_blocks > self._pool.num_available - num_kept:
            problem = "there are no blocks for it"
        if problem is not None:
            return ReservationRefused(request.transfer_id, problem, is_retryable=False)
        fetch.block_ids = tuple(self._pool.lease(num_blocks))
        return BlocksReserved(request.transfer_id, fetch.block_ids)

    def commit(self, commit: CommitTransfer) -> bool:
        """What has come is known from now on; False when this id fetches nothing."""
        fetch = self._fetches.get(commit.transfer_id)
        if fetch is None:
            return False
        block_ids, fetch.block_ids = fetch.block_ids, ()
        assert block_ids == commit.block_ids, commit
        size = self._pool.block_size
        if commit.token_digest != fetch.chain[len(block_ids)]:
            self.num_digest_mismatches += 1
        elif not commit.is_lossy:
            for i, block_id in enumerate(block_ids):
                tokens = fetch.token_ids[i * size : (i + 1) * size]
                self._pool.index.store(block_id, fetch.chain[i + 1], fetch.chain[i], tokens)
        self._pool.release(block_ids)
        self._forget_if_over(commit.transfer_id, fetch)
        return True

    def _forget_if_over(self, transfer_id: str, fetch: _Fetch) -> None:
        if fetch.is_over and not fetch.block_ids:
            del self._fetches[transfer_id]

    def end(self, transfer_id: str) -> EndedFetch | None:
        """The fetch is over. None when it is not known. Its blocks come back by the transfer's word."""
        fetch = self._fetches.get(transfer_id)
        if fetch is None or fetch.is_over:
            return None
        fetch.is_over = True
        self._forget_if_over(transfer_id, fetch)
        return EndedFetch(fetch.key, fetch.since_s)

    def transfer_of(self, key: RequestKey) -> str | None:
        """Under which id the beginning of this request's prompt comes."""
        return next(
            (name for name, fetch in self._fetches.items() if fetch.key == key and not fetch.is_over), None
        )

    # What others get.

    def find(self, wanted: FindCached, *, num_kept: int, now_s: float) -> CachedFound | ReservationRefused:
        """The longest known beginning of a chain of blocks, held until `release`.

        What the host tier has of it is put back into the pool, but for `num_kept` blocks that are to stay available.
        """
        size, name = self._pool.block_size, wanted.transfer_id
        if self.knows(name):
            return ReservationRefused(name, "this transfer id is in use here already", is_retryable=False)
        least = max(size, wanted.min_tokens)
        num_tokens = self._pool.count_exact(wanted.block_hashes)[0] * size
        if num_tokens < least:
            problem = f"{num_tokens} tokens of it are cached here; {least} are wanted"
            return ReservationRefused(name, problem, is_retryable=False)
        block_ids = self._lend(wanted.block_hashes, num_kept)
        if len(block_ids) * size < least:
            self._pool.release(block_ids)
            problem = f"of {num_tokens} tokens that are cached here too many are in host memory: there is no room for them"
            return ReservationRefused(name, problem, is_retryable=False)
        self._lent[name] = block_ids, now_s
        return CachedFound(name, block_ids, len(block_ids) * size, wanted.block_hashes[len(block_ids) - 1])

    def _lend(self, hashes: tuple[bytes, ...], num_kept: int) -> tuple[int, ...]:
        """These blocks, up to the first that is not known, or is in host memory and finds no room, held by one transfer more."""
        pool = self._pool
        # Each saved block is read to check it: no more of them than may be put back.
        num_checked, most = 0, max(0, min(MAX_PUT_BACK, pool.num_available - num_kept))
        found: list[int | SavedBlock] = []
        for name in hashes:
            if not pool.index.is_known(name):
                if num_checked == most:
                    break
                num_checked += 1
            one = pool.find_exact(name)
            if one is None:
                break
            found.append(one)
        held = [one for one in found if isinstance(one, int)]
        # A transfer holds what a sequence holds: so it is shared for a moment. Before others are put back, which could
        # take its blocks.
        pool.share(held)
        pool.hold(held)
        pool.free(held)
        num_room = max(0, min(MAX_PUT_BACK, pool.num_available - num_kept))
        saved = [one for one in found if isinstance(one, SavedBlock)]
        restored = iter(pool.put_back(saved[:num_room]))
        block_ids = [one if isinstance(one, int) else next(restored, None) for one in found]
        num_lent = block_ids.index(None) if None in block_ids else len(block_ids)
        pool.release([one for one in block_ids[num_lent:] if one is not None])
        return tuple(one for one in block_ids[:num_lent] if one is not None)

    def release(self, transfer_id: str) -> bool:
        """A transfer reads no more, or fills no more; False when this id is not known."""
        if transfer_id in self._lent:
            self._pool.release(self._lent.pop(transfer_id)[0])
            return True
        fetch = self._fetches.get(transfer_id)
        if fetch is None:
            return False
        self._pool.release(fetch.block_ids)
        fetch.block_ids = ()
        self._forget_if_over(transfer_id, fetch)
        return True
