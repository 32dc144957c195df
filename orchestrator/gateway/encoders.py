"""The dispatcher's pictures: which samples want encode workers, which have them, and who gets what."""

from collections.abc import Callable, Iterator

from orchestrator.control.encode_split import EncoderMemory, Shard, split
from orchestrator.control.router import LoadLedger, Refuse, Wait
from orchestrator.control.view import ClusterView, WorkerView
from orchestrator.gateway.live_request import LiveSample
from workers.api import ImagesEncoded


class Encoders:
    """Books alone: the dispatcher acts. `ledger` is the dispatcher's, and shards are counted in it."""

    def __init__(self, ledger: LoadLedger, is_linked: Callable[[WorkerView], bool]) -> None:
        self._ledger = ledger
        self._is_linked = is_linked
        self._memory = EncoderMemory()
        #: Samples whose shards are with workers, by the attempts of these, which are no other ones'.
        self._running: dict[int, LiveSample] = {}
        #: Samples that want workers, in order.
        self._wanting: dict[LiveSample, None] = {}

    def sample_of(self, attempt: int) -> LiveSample | None:
        """Whose shard that is, while it is with a worker."""
        return self._running.get(attempt)

    def want(self, sample: LiveSample) -> None:
        """Tiles of it are to be given to workers."""
        self._wanting[sample] = None

    def wanting(self) -> Iterator[LiveSample]:
        """Those that want workers, the first first; who is settled meanwhile is left out."""
        return (sample for sample in list(self._wanting) if sample.machine.encodes.wanted)

    def choose(self, view: ClusterView | None, sample: LiveSample) -> list[Shard] | Wait | Refuse:
        """Workers for all that it wants."""
        machine = sample.machine
        assert machine.route is not None
        return split(
            view,
            self._ledger,
            self._is_linked,
            self._memory,
            tiles=machine.encodes.wanted_tiles(),
            salt=machine.cache_salt,
            prefill=machine.route.prefill,
            avoided=frozenset(machine.encodes.avoided),
        )

    def why_waiting(self, view: ClusterView | None, sample: LiveSample) -> str:
        """Why it has no workers; empty when it wants none."""
        choice = self.choose(view, sample) if sample.machine.encodes.wanted else None
        return choice.reason if isinstance(choice, Wait | Refuse) else ""

    def given(self, sample: LiveSample) -> None:
        """Its machine has given shards to workers."""
        for attempt in sample.charge_encodes(self._ledger):
            self._running[attempt] = sample

    def encoded(self, worker: WorkerView, event: ImagesEncoded) -> None:
        """Remember how fast that was, and where. To be called before its machine is told."""
        sample = self._running.get(event.key.attempt)
        shard = sample.machine.encodes.running.get(event.key.attempt) if sample is not None else None
        if sample is not None and shard is not None and shard.worker.worker_id == worker.worker_id:
            machine = sample.machine
            self._memory.observe(worker, machine.cache_salt, machine.encodes.tiles_of(shard), event)

    def settle(self, sample: LiveSample) -> None:
        """Forget what its machine says is no longer with a worker, or wanted."""
        for attempt in sample.settle_encodes(self._ledger):
            del self._running[attempt]
        if not sample.machine.encodes.wanted:
            self._wanting.pop(sample, None)

    def check_invariants(self, sample: LiveSample, ledger: LoadLedger) -> None:
        """What its machine says is in these books; what it is charged for is added to `ledger`."""
        encodes = sample.machine.encodes
        for attempt, shard in encodes.running.items():
            assert self._running[attempt] is sample
            num_patches = sum(placed.num_patches for placed in encodes.tiles_of(shard))
            ledger.add(shard.worker.worker_id, encode_patches=num_patches)
        assert bool(encodes.wanted) == (sample in self._wanting)

    @property
    def is_idle(self) -> bool:
        """No sample wants, or has, a worker."""
        return not self._running and not self._wanting
