"""The dispatcher's pictures: which samples want encode workers, which have them, and who gets what."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from orchestrator.control.encode_split import EncoderMemory, Shard, split
from orchestrator.control.router import LoadLedger, Refuse, Wait, ready_workers
from orchestrator.control.view import ClusterView, WorkerView
from orchestrator.gateway.live_request import LiveSample
from workers.api import Event, FailureCode, ImagesEncoded, Phase, RequestFailed, WorkerId

#: After so long a worker that had no room for a shard is asked again, if it has not said before that one has ended.
FULL_S = 0.2
#: A worker to which more bytes of pictures have yet to be sent gets no more. What one request brings comes on top.
MAX_UNSENT_BYTES = 128 * 2**20


@dataclass(slots=True)
class _Full:
    """A worker that had no room, until when at most, and what it said."""

    until_s: float
    said: str


class Encoders:
    """Books alone: the dispatcher acts. Times are the loop's, in seconds.

    ledger: the dispatcher's; shards are counted in it. unsent_bytes: of pictures, that have yet to be sent to a worker.
    """

    def __init__(
        self,
        ledger: LoadLedger,
        is_linked: Callable[[WorkerView], bool],
        unsent_bytes: Callable[[WorkerView], int],
    ) -> None:
        self._ledger = ledger
        self._is_linked = is_linked
        self._unsent_bytes = unsent_bytes
        self._memory = EncoderMemory()
        #: Workers that refused a shard, until one of theirs ends. Past its time it gets the shards of one sample, and no
        #: more until it has said something.
        self._full: dict[WorkerId, _Full] = {}
        #: Samples whose shards are with workers, by the attempts of these, which are no other ones'.
        self._running: dict[int, LiveSample] = {}
        #: Of these, the shards that are not done.
        self._shards: dict[int, Shard] = {}
        #: Samples that want workers, in order.
        self._wanting: dict[LiveSample, None] = {}

    def sample_of(self, attempt: int) -> LiveSample | None:
        """Whose shard that is, while it is with a worker."""
        return self._running.get(attempt)

    def want(self, sample: LiveSample) -> None:
        """Tiles of it are to be given to workers."""
        self._wanting[sample] = None

    def num_new_tiles(self, sample: LiveSample) -> int:
        """Of its pictures, that nobody has been given to encode for its tenant, as far as is remembered."""
        images, salt = sample.machine.images, sample.machine.cache_salt
        tiles = images.tiles if images is not None else ()
        return sum(not self._memory.knows(salt, placed.tile.key) for placed in tiles)

    @property
    def is_wanted(self) -> bool:
        """Some sample may want workers."""
        return bool(self._wanting)

    def wanting(self) -> Iterator[LiveSample]:
        """Those that want workers, the first first; who is settled meanwhile is left out."""
        return (sample for sample in list(self._wanting) if sample.machine.encodes.wanted)

    def choose(
        self, view: ClusterView | None, sample: LiveSample, now_s: float
    ) -> list[Shard] | Wait | Refuse:
        """Workers for all that it wants, with room as far as is known."""
        machine = sample.machine
        assert machine.route is not None
        full = self._why_full(view, now_s)
        choice = split(
            view,
            self._ledger,
            lambda worker: worker.worker_id not in full and self._is_linked(worker),
            self._memory,
            tiles=machine.encodes.wanted_tiles(),
            salt=machine.cache_salt,
            prefill=machine.route.prefill,
            avoided=frozenset(machine.encodes.avoided),
        )
        return Wait("; ".join(full.values())) if full and isinstance(choice, Wait | Refuse) else choice

    def is_anyone_full(self, view: ClusterView | None, now_s: float) -> bool:
        """A worker that has no room may have some a little later, without saying so."""
        return bool(self._why_full(view, now_s))

    def why_waiting(self, view: ClusterView | None, sample: LiveSample, now_s: float) -> str:
        """Why it has no workers; empty when it wants none."""
        choice = self.choose(view, sample, now_s) if sample.machine.encodes.wanted else None
        return choice.reason if isinstance(choice, Wait | Refuse) else ""

    def given(self, sample: LiveSample, now_s: float) -> None:
        """Its machine has given shards to workers."""
        encodes, salt = sample.machine.encodes, sample.machine.cache_salt
        for attempt in sample.charge_encodes(self._ledger):
            self._running[attempt] = sample
            shard = encodes.running[attempt]
            self._shards[attempt] = shard
            self._memory.given(shard.worker, salt, encodes.tiles_of(shard))
            full = self._full.get(shard.worker.worker_id)
            if full is not None:
                full.until_s = now_s + FULL_S

    def said(self, worker: WorkerView, event: Event, now_s: float) -> None:
        """A worker reported. To be called before the sample's machine is told."""
        if event.key.attempt not in self._running:
            return
        if isinstance(event, RequestFailed) and event.code is FailureCode.OVERLOADED:
            said = f"{worker.worker_id} could not encode: {event.reason}"
            self._full[worker.worker_id] = _Full(now_s + FULL_S, said)
        elif isinstance(event, RequestFailed | ImagesEncoded):
            self._full.pop(worker.worker_id, None)
        if isinstance(event, ImagesEncoded):
            self._encoded(worker.worker_id, event)

    def lost(self, worker: WorkerView) -> None:
        """The stream to it ended: it is asked anew when there is another."""
        self._full.pop(worker.worker_id, None)

    def _encoded(self, worker_id: WorkerId, event: ImagesEncoded) -> None:
        """Remember how fast that was, and that it is done."""
        shard = self._shards.get(event.key.attempt)
        if shard is not None and shard.worker.worker_id == worker_id:
            del self._shards[event.key.attempt]
            machine = self._running[event.key.attempt].machine
            if machine.route is not None:
                tiles = machine.encodes.tiles_of(shard)
                self._memory.observe(worker_id, tiles, event, machine.route.prefill.worker_id)

    def settle(self, sample: LiveSample) -> None:
        """Forget what its machine says is no longer with a worker, or wanted."""
        machine = sample.machine
        for attempt in sample.settle_encodes(self._ledger):
            del self._running[attempt]
            given_up = self._shards.pop(attempt, None)
            if given_up is not None:
                tiles = machine.encodes.tiles_of(given_up)
                self._memory.forget(given_up.worker, machine.cache_salt, tiles)
        if not machine.encodes.wanted:
            self._wanting.pop(sample, None)

    def check_invariants(self, sample: LiveSample, ledger: LoadLedger) -> None:
        """What its machine says is in these books; what it is charged for is added to `ledger`."""
        encodes = sample.machine.encodes
        for attempt, shard in encodes.running.items():
            assert self._running[attempt] is sample
            assert self._shards[attempt] is shard
            num_patches = sum(placed.num_patches for placed in encodes.tiles_of(shard))
            ledger.add(shard.worker.worker_id, encode_patches=num_patches)
        assert bool(encodes.wanted) == (sample in self._wanting)

    def _why_full(self, view: ClusterView | None, now_s: float) -> dict[WorkerId, str]:
        """Linked encode workers that have no room now, and what shows that."""
        why: dict[WorkerId, str] = {}
        for worker in ready_workers(view, Phase.ENCODE, self._is_linked) if view is not None else ():
            full = self._full.get(worker.worker_id)
            num_bytes = self._unsent_bytes(worker)
            if full is not None and now_s < full.until_s:
                why[worker.worker_id] = full.said
            elif num_bytes > MAX_UNSENT_BYTES:
                why[worker.worker_id] = f"{worker.worker_id} has yet to be sent {num_bytes} bytes of pictures"
        return why

    @property
    def is_idle(self) -> bool:
        """No sample wants, or has, a worker."""
        return not self._running and not self._shards and not self._wanting
