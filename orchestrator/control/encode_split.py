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


@dataclass(frozen=True, slots=True)
class Shard:
    """Tiles [first, first + num) of a prompt, all of one picture, for one worker."""

    worker: WorkerView
    first: int
    num: int


@dataclass(slots=True)
class EncoderMemory:
    """How fast encode workers were, and what they have encoded. It may be wrong: a worker that has forgotten encodes again."""

    patch_s: dict[WorkerId, float] = field(default_factory=dict)
    _where: "OrderedDict[tuple[str, bytes], tuple[WorkerId, int]]" = field(default_factory=OrderedDict)

    def patch_seconds(self, worker_id: WorkerId) -> float:
        """Predicted seconds for one patch there."""
        known = self.patch_s.get(worker_id)
        if known is not None:
            return known
        return max(self.patch_s.values(), default=FIRST_PATCH_S)

    def has(self, worker: WorkerView, salt: str, key: bytes) -> bool:
        """It has encoded this tile, and may have it still."""
        return self._where.get((salt, key)) == (worker.worker_id, worker.incarnation)

    def observe(
        self, worker: WorkerView, salt: str, tiles: Sequence[PlacedTile], event: ImagesEncoded
    ) -> None:
        """The worker has encoded these tiles."""
        for placed in tiles:
            name = salt, placed.tile.key
            self._where.pop(name, None)
            self._where[name] = worker.worker_id, worker.incarnation
        while len(self._where) > MAX_REMEMBERED:
            self._where.popitem(last=False)
        num_patches = sum(placed.num_patches for placed in tiles)
        if event.num_cached == 0 and event.encode_s > 0 and num_patches > 0:
            seen = event.encode_s / num_patches
            known = self.patch_s.get(worker.worker_id, seen)
            self.patch_s[worker.worker_id] = known + RATE_GAIN * (seen - known)


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
    """Give each tile to the worker that is predicted to be done with it first.

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
    given: dict[int, dict[int, int]] = {}
    for file, members in sorted(_by_file(tiles).items(), key=lambda item: -_patches(item[1])):
        counts = given.setdefault(file, {})
        for _, placed in members:
            best = min(
                range(len(workers)),
                key=lambda i: _done(workers[i], placed, i in counts, done_s, memory, salt),
            )
            worker_id = workers[best].worker_id
            done_s[worker_id] = _done(workers[best], placed, best in counts, done_s, memory, salt)
            counts[best] = counts.get(best, 0) + 1
    return _shards(tiles, given, workers)


def _done(
    worker: WorkerView,
    placed: PlacedTile,
    has_file: bool,
    done_s: dict[WorkerId, float],
    memory: EncoderMemory,
    salt: str,
) -> float:
    """When the worker would be done, with this tile after all that it has."""
    if memory.has(worker, salt, placed.tile.key):
        return done_s[worker.worker_id]
    num_patches = placed.num_patches + (0 if has_file else DECODE_PATCHES)
    return done_s[worker.worker_id] + num_patches * memory.patch_seconds(worker.worker_id)


def _by_file(tiles: Sequence[tuple[int, PlacedTile]]) -> dict[int, list[tuple[int, PlacedTile]]]:
    found: dict[int, list[tuple[int, PlacedTile]]] = {}
    for index, placed in tiles:
        found.setdefault(placed.file, []).append((index, placed))
    return found


def _patches(members: Sequence[tuple[int, PlacedTile]]) -> int:
    return sum(placed.num_patches for _, placed in members)


def _shards(
    tiles: Sequence[tuple[int, PlacedTile]], given: dict[int, dict[int, int]], workers: Sequence[WorkerView]
) -> list[Shard]:
    """Runs of neighbours: each worker of a picture gets as many of its tiles as it was given, in the picture's order."""
    shards: list[Shard] = []
    for file, members in _by_file(tiles).items():
        owners = [worker for worker, num in given[file].items() for _ in range(num)]
        for (index, _), owner in zip(members, owners, strict=True):
            last = shards[-1] if shards else None
            is_next = (
                last is not None
                and last.worker is workers[owner]
                and last.first + last.num == index
                and index != members[0][0]
            )
            if is_next:
                assert last is not None
                shards[-1] = Shard(last.worker, last.first, last.num + 1)
            else:
                shards.append(Shard(workers[owner], index, 1))
    return shards
