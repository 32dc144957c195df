"""Which encode workers get which tiles of a request: intra-request parallelism. Pure.

Source: EPD (arXiv 2501.05460), section 3.2, with tiles instead of slices and predicted times instead of counts.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from orchestrator.control.prompt_images import PlacedTile
from orchestrator.control.router import LoadLedger, Refuse, Wait, missing, ready_workers
from orchestrator.control.view import ClusterView, WorkerView
from workers.api import ImagesEncoded, Phase, WorkerId

#: Before a worker has reported, in seconds per patch; only ratios between workers matter then.
FIRST_PATCH_S = 1e-4
RATE_GAIN = 0.2
#: What reading a file costs in patches, so that a picture is not cut up for nothing.
DECODE_PATCHES = 16
#: Tiles whose encoder is remembered.
MAX_REMEMBERED = 65536
#: Ways of embeddings that are remembered, the last ones.
MAX_PAIRS = 4096


@dataclass(frozen=True, slots=True)
class Shard:
    """Tiles [first, first + num) of a prompt, all of one picture, for one worker."""

    worker: WorkerView
    first: int
    num: int


@dataclass(slots=True)
class EncoderMemory:
    """How fast encode workers were, and who has encoded what or was given it to encode.

    It may be wrong: a worker that has forgotten encodes again.
    """

    patch_s: dict[WorkerId, float] = field(default_factory=dict)
    #: What an embedding took from one worker to another, by both.
    move_s: dict[tuple[WorkerId, WorkerId], float] = field(default_factory=dict)
    _where: "OrderedDict[tuple[str, bytes], tuple[WorkerId, int]]" = field(default_factory=OrderedDict)

    def patch_seconds(self, worker_id: WorkerId) -> float:
        """Predicted seconds for one patch there."""
        known = self.patch_s.get(worker_id)
        if known is not None:
            return known
        return max(self.patch_s.values(), default=FIRST_PATCH_S)

    def move_seconds(self, source: WorkerId, target: WorkerId) -> float:
        """Predicted seconds for one embedding; 0 within a worker, and before anything was measured."""
        if source == target or not self.move_s:
            return 0.0
        known = self.move_s.get((source, target))
        return known if known is not None else min(self.move_s.values())

    def has(self, worker: WorkerView, salt: str, key: bytes) -> bool:
        """It has encoded this tile, and may have it still, or was given it."""
        return self._where.get((salt, key)) == (worker.worker_id, worker.incarnation)

    def knows(self, salt: str, key: bytes) -> bool:
        """Somebody has encoded this tile, or was given it."""
        return (salt, key) in self._where

    def given(self, worker: WorkerView, salt: str, tiles: Sequence[PlacedTile]) -> None:
        """The worker is to encode these tiles: who else wants them finds them there, or waits for them there."""
        for placed in tiles:
            name = salt, placed.tile.key
            self._where.pop(name, None)
            self._where[name] = worker.worker_id, worker.incarnation
        while len(self._where) > MAX_REMEMBERED:
            self._where.popitem(last=False)

    def forget(self, worker: WorkerView, salt: str, tiles: Sequence[PlacedTile]) -> None:
        """The worker did not encode these tiles."""
        for placed in tiles:
            if self.has(worker, salt, placed.tile.key):
                del self._where[salt, placed.tile.key]

    def observe(
        self, worker_id: WorkerId, tiles: Sequence[PlacedTile], event: ImagesEncoded, prefill: WorkerId
    ) -> None:
        """The worker has encoded these tiles, for that one."""
        if worker_id != prefill and event.num_embeddings > 0 and event.transfer_s >= 0:
            seen = event.transfer_s / event.num_embeddings
            known = self.move_s.pop((worker_id, prefill), seen)
            self.move_s[worker_id, prefill] = known + RATE_GAIN * (seen - known)
            while len(self.move_s) > MAX_PAIRS:
                del self.move_s[next(iter(self.move_s))]
        num_patches = sum(placed.num_patches for placed in tiles)
        if event.num_cached == 0 and event.encode_s > 0 and num_patches > 0:
            seen = event.encode_s / num_patches
            known = self.patch_s.get(worker_id, seen)
            self.patch_s[worker_id] = known + RATE_GAIN * (seen - known)


def split(
    view: ClusterView | None,
    ledger: LoadLedger,
    is_linked: Callable[[WorkerView], bool],
    memory: EncoderMemory,
    *,
    tiles: Sequence[tuple[int, PlacedTile]],
    salt: str,
    prefill: WorkerView,
    avoided: frozenset[WorkerId] = frozenset(),
) -> list[Shard] | Wait | Refuse:
    """Give each tile to the worker that is predicted to be done with it first; one that has it, or was given it, costs nothing there.

    tiles: (index in the prompt, tile), ascending. prefill: where the embeddings go; it wins ties, as nothing has to move
    then. avoided: used only when nobody else is there.
    """
    if view is None:
        return Wait("no controller has published a view of the cluster yet")
    workers = ready_workers(view, Phase.ENCODE, is_linked)
    workers = [one for one in workers if one.worker_id not in avoided] or workers
    if not workers:
        return missing(view, Phase.ENCODE)
    workers.sort(key=lambda one: (one.worker_id != prefill.worker_id, one.worker_id))
    done_s = {
        one.worker_id: ledger.of(one.worker_id).encode_patches * memory.patch_seconds(one.worker_id)
        for one in workers
    }
    moves_s = [memory.move_seconds(one.worker_id, prefill.worker_id) for one in workers]
    #: Index of a tile -> index of its worker.
    owners: dict[int, int] = {}
    for members in sorted(_by_file(tiles).values(), key=lambda members: -_patches(members)):
        counts: dict[int, int] = {}
        unknown: list[int] = []
        for index, placed in members:
            known = next((i for i, one in enumerate(workers) if memory.has(one, salt, placed.tile.key)), None)
            if known is not None:
                owners[index] = known
                continue
            costs_s = [
                (placed.num_patches + (0 if i in counts else DECODE_PATCHES))
                * memory.patch_seconds(one.worker_id)
                for i, one in enumerate(workers)
            ]
            # Its way keeps no encoder busy.
            there_s = [
                done_s[one.worker_id] + cost_s + placed.tile.num_embeddings * move_s
                for one, cost_s, move_s in zip(workers, costs_s, moves_s, strict=True)
            ]
            best = there_s.index(min(there_s))
            done_s[workers[best].worker_id] += costs_s[best]
            counts[best] = counts.get(best, 0) + 1
            unknown.append(index)
        # In runs: each worker gets as many as it was given, in the picture's order.
        runs = (owner for owner, num in counts.items() for _ in range(num))
        owners.update(zip(unknown, runs, strict=True))
    return _shards(tiles, owners, workers)


def _by_file(tiles: Sequence[tuple[int, PlacedTile]]) -> dict[int, list[tuple[int, PlacedTile]]]:
    found: dict[int, list[tuple[int, PlacedTile]]] = {}
    for index, placed in tiles:
        found.setdefault(placed.file, []).append((index, placed))
    return found


def _patches(members: Sequence[tuple[int, PlacedTile]]) -> int:
    return sum(placed.num_patches for _, placed in members)


def _shards(
    tiles: Sequence[tuple[int, PlacedTile]], owners: dict[int, int], workers: Sequence[WorkerView]
) -> list[Shard]:
    """Neighbours of one picture and one owner are one shard."""
    shards: list[Shard] = []
    last_file = -1
    for index, placed in tiles:
        worker, last = workers[owners[index]], shards[-1] if shards else None
        if (
            last is not None
            and last.worker is worker
            and last_file == placed.file
            and last.first + last.num == index
        ):
            shards[-1] = Shard(worker, last.first, last.num + 1)
        else:
            shards.append(Shard(worker, index, 1))
        last_file = placed.file
    return shards
