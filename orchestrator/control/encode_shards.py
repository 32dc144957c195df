"""The encoding of one sample's pictures: which tiles wait for an encode worker, and which are with one. Pure.

A shard that is lost is given to another worker, and only that shard. Each has an attempt number of its own, so that what
a worker says of one that was given up is told from the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestrator.control.encode_split import Shard
from orchestrator.control.prompt_images import PlacedTile, PromptImages
from orchestrator.control.request_actions import Send
from orchestrator.control.view import WorkerView
from workers.api import Abort, Encode, FailureCode, ImagesEncoded, RequestId, RequestKey, WorkerId

#: Times that a tile is given to workers, without one that has encoded it, before the request fails. One that had no room
#: for it is not counted.
MAX_TRIES = 3
#: Encode workers that could not bring embeddings to the same prefill worker, after which it is that one's fault.
MAX_UNREACHED = 2
#: What is said of a shard whose attempt failed.
GIVEN_UP = "given up"


@dataclass(frozen=True, slots=True)
class ShardFailed:
    """A shard cannot be had. The request fails with this.

    is_prefill_at_fault: its embeddings cannot be brought to the prefill worker; with another one they might be.
    """

    code: FailureCode
    reason: str
    is_prefill_at_fault: bool = False


@dataclass(slots=True)
class EncodeRecord:
    """Of one shard, for `explain`; times in seconds, those of its worker in `report`.

    attempt: the shard's own. prefill_attempt: that of the sample. problem: why it failed, or was given up. is_refused: the
    worker had no room for it.
    """

    worker_id: WorkerId
    attempt: int
    prefill_attempt: int
    first_tile: int
    num_tiles: int
    sent_at_s: float
    ended_at_s: float | None = None
    report: ImagesEncoded | None = None
    problem: str = ""
    is_refused: bool = False


@dataclass(slots=True)
class EncodeShards:
    """images: None of a prompt without any."""

    request_id: RequestId
    images: PromptImages | None = None
    #: Tiles that are to be given to a worker.
    wanted: set[int] = field(default_factory=set)
    #: By attempt.
    running: dict[int, Shard] = field(default_factory=dict)
    #: Workers that a shard failed at.
    avoided: set[WorkerId] = field(default_factory=set)
    #: All shards so far, at most MAX_TRIES for each time that a tile was wanted, and the last refusal of each worker.
    records: list[EncodeRecord] = field(default_factory=list)
    #: Tiles that are with somebody, and are wanted once more after that.
    _again: set[int] = field(default_factory=set)
    #: Attempts whose embeddings the prompt has been computed with: nothing hangs on what becomes of them.
    _unneeded: set[int] = field(default_factory=set)
    _tries: dict[int, int] = field(default_factory=dict)
    #: Workers that could not bring embeddings to the prefill worker, since somebody could.
    _unreached: set[WorkerId] = field(default_factory=set)

    def want(self, tiles: Sequence[int]) -> None:
        """The prefill worker has room for these and wants them.

        It wants a tile again once it has had it and dropped it. That its encoder is done may be told later than this, by
        another stream.
        """
        num_tiles = len(self.images.tiles) if self.images is not None else 0
        known = {tile for tile in tiles if 0 <= tile < num_tiles}
        with_somebody = {tile for shard in self.running.values() for tile in _tiles(shard)}
        self.wanted |= known - with_somebody
        self._again |= known & with_somebody

    def wanted_tiles(self) -> list[tuple[int, PlacedTile]]:
        """Those that wait for a worker, ascending."""
        assert self.images is not None
        return [(tile, self.images.tiles[tile]) for tile in sorted(self.wanted)]

    def tiles_of(self, shard: Shard) -> list[PlacedTile]:
        """The tiles of a shard."""
        assert self.images is not None
        return [self.images.tiles[tile] for tile in _tiles(shard)]

    def given(
        self,
        shards: Sequence[tuple[int, Shard]],
        prefill: WorkerView,
        key: RequestKey,
        *,
        salt: str,
        timeout_s: float,
        now_s: float,
    ) -> list[Send]:
        """Workers were chosen for all that was wanted. shards: with an attempt number for each. key: of the prefill."""
        sends = []
        for attempt, shard in shards:
            self.wanted -= set(_tiles(shard))
            self.running[attempt] = shard
            for tile in _tiles(shard):
                self._tries[tile] = self._tries.get(tile, 0) + 1
            self.records.append(
                EncodeRecord(shard.worker.worker_id, attempt, key.attempt, shard.first, shard.num, now_s)
            )
            sends.append(Send(shard.worker, self._encode(attempt, shard, prefill, key, salt, timeout_s)))
        return sends

    def done(self, worker_id: WorkerId, event: ImagesEncoded, now_s: float) -> Shard | None:
        """A worker has encoded a shard, which is returned; None when it is not one of these."""
        shard = self._take(worker_id, event.key.attempt)
        if shard is not None:
            record = self._record(event.key.attempt)
            record.ended_at_s, record.report = now_s, event
            for tile in _tiles(shard):
                self._tries.pop(tile, None)
            self._unreached.clear()
            again = self._again & set(_tiles(shard))
            self._again -= again
            self.wanted |= again
        return shard

    def failed(
        self, worker_id: WorkerId, attempt: int, code: FailureCode, reason: str, now_s: float
    ) -> ShardFailed | None:
        """A worker could not. Its tiles are wanted again, unless that is the end of it."""
        shard = self._take(worker_id, attempt)
        if shard is None:
            return None
        again = self._again & set(_tiles(shard))
        self._again -= again
        record = self._record(attempt)
        record.ended_at_s, record.problem = now_s, reason
        if attempt in self._unneeded:
            self.wanted |= again
            return None
        if code is FailureCode.OVERLOADED:
            self._refused(shard, record)
            return None
        if code is FailureCode.TRANSFER:
            self._unreached.add(worker_id)
        said = f"{worker_id} could not encode {self._name(shard)}: {reason.removeprefix('image: ')}"
        is_used_up = any(self._tries[tile] >= MAX_TRIES for tile in _tiles(shard))
        if code is FailureCode.TRANSFER and (is_used_up or len(self._unreached) >= MAX_UNREACHED):
            # They may well be able to bring them to another one.
            self.avoided -= self._unreached
            return ShardFailed(code, said, is_prefill_at_fault=True)
        if not code.is_retryable or is_used_up:
            return ShardFailed(code, said)
        self.avoided.add(worker_id)
        self.wanted |= set(_tiles(shard))
        return None

    def _refused(self, shard: Shard, record: EncodeRecord) -> None:
        """Its worker had no room for it: that costs no try. Who chooses workers knows when to ask that one again."""
        for tile in _tiles(shard):
            self._tries[tile] -= 1
        self.wanted |= set(_tiles(shard))
        record.is_refused = True
        # In place: the sample's record has the list.
        self.records[:] = [
            one
            for one in self.records
            if one is record or not one.is_refused or one.worker_id != record.worker_id
        ]

    def lost(self, worker: WorkerView, reason: str, now_s: float) -> ShardFailed | None:
        """The stream to that incarnation of a worker ended, and with it its shards."""
        failure: ShardFailed | None = None
        for attempt, shard in list(self.running.items()):
            used = shard.worker
            if (used.worker_id, used.incarnation) == (worker.worker_id, worker.incarnation):
                found = self.failed(used.worker_id, attempt, FailureCode.INTERNAL, reason, now_s)
                failure = failure or found
        return failure

    def prompt_computed(self) -> None:
        """The first token is there: every embedding that was wanted has come. What is wanted after this is wanted again."""
        self._unneeded = set(self.running)
        self.wanted.clear()

    def drop(self, problem: str = "") -> list[Send]:
        """Nothing is wanted any more: end what is with workers. problem: what is remembered of that."""
        sends = [
            Send(shard.worker, Abort(RequestKey(self.request_id, attempt)))
            for attempt, shard in self.running.items()
        ]
        for attempt in self.running:
            self._record(attempt).problem = problem
        self.running.clear()
        self.wanted.clear()
        self._again.clear()
        self._unneeded.clear()
        self._tries.clear()
        self._unreached.clear()
        return sends

    def check_invariants(self) -> None:
        """A tile is in one place."""
        places = [*self.wanted, *(tile for shard in self.running.values() for tile in _tiles(shard))]
        assert len(places) == len(set(places)), self
        assert self._again <= set(places) - self.wanted, self
        assert all(num <= MAX_TRIES for num in self._tries.values()), self

    def _encode(
        self, attempt: int, shard: Shard, prefill: WorkerView, key: RequestKey, salt: str, timeout_s: float
    ) -> Encode:
        assert self.images is not None
        placed = self.tiles_of(shard)
        file = self.images.files[placed[0].file]
        return Encode(
            RequestKey(self.request_id, attempt),
            file.data,
            file.media_type,
            file.width,
            file.height,
            tile_lo=placed[0].number,
            tile_hi=placed[-1].number + 1,
            keys=tuple(one.tile.key for one in placed),
            prefill=key,
            first_tile=shard.first,
            prefill_worker=prefill.worker_id,
            prefill_address=prefill.address,
            prefill_incarnation=prefill.incarnation,
            timeout_s=timeout_s,
            cache_salt=salt,
            reduction=self.images.reduction,
        )

    def _name(self, shard: Shard) -> str:
        """Of its picture, as the client counts them."""
        assert self.images is not None
        return f"image {self.images.tiles[shard.first].file + 1}"

    def _take(self, worker_id: WorkerId, attempt: int) -> Shard | None:
        shard = self.running.get(attempt)
        if shard is None or shard.worker.worker_id != worker_id:
            return None
        return self.running.pop(attempt)

    def _record(self, attempt: int) -> EncodeRecord:
        return next(record for record in reversed(self.records) if record.attempt == attempt)


def _tiles(shard: Shard) -> range:
    return range(shard.first, shard.first + shard.num)
