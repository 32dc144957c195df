"""An engine and the store of its embeddings, driven together, with a test in place of the loop and of all encoders."""

from collections import deque

from tests.support.engine_pair import REPORT
from workers.api import FailureCode, ImageTile, RequestFailed, RequestKey, TokensGenerated
from workers.embeddings.store import CannotFill, Effect, EmbeddingStore, Wanted
from workers.engine.engine import Engine
from workers.engine.messages import (
    EndTransfer,
    FinishTransfer,
    ImageReady,
    ImagesGranted,
    ImagesLost,
    ImagesNeeded,
    ImagesReleased,
    Message,
    ReleaseTransfer,
    StartTransfer,
    TransferSent,
)
from workers.engine.step_plan import StepPlan
from workers.engine.step_result import StepResult


class EngineWithEmbeddings:
    """What the store says waits in `inbox` until `deliver`; what is wanted waits for `encode`. Hand-offs succeed at once."""

    def __init__(self, engine: Engine, num_blocks: int, *, block_size: int = 4) -> None:
        self.engine = engine
        self.store = EmbeddingStore(num_blocks, block_size)
        self.inbox: deque[Message] = deque()
        #: Tiles that are to be encoded, each with whom it is for.
        self.wanted: list[tuple[RequestKey, int]] = []
        #: All that was asked for, in order: whose, and which tiles.
        self.asked: list[tuple[str, list[int]]] = []
        #: Requests that ended, with the reason of those that failed.
        self.ended: dict[str, str] = {}
        self._asking: dict[RequestKey, int] = {}
        self._sending: dict[str, tuple[int, ...]] = {}
        self._num_fills = 0

    def handle(self, message: Message) -> None:
        self.engine.handle(message, 0.0)
        self._carry()

    def deliver(self, num: int | None = None) -> None:
        """The engine hears so many of the messages that wait for it, or all."""
        for _ in range(len(self.inbox) if num is None else min(num, len(self.inbox))):
            self.handle(self.inbox.popleft())

    def encode(self, index: int = 0, *, succeeds: bool = True) -> None:
        """One of the wanted tiles is encoded and comes, or is to be encoded again; ignored when it is not wanted any more."""
        holder, tile = self.wanted.pop(index)
        self._num_fills += 1
        fill_id = f"f{self._num_fills}"
        try:
            self.store.begin_fill(fill_id, holder, [tile])
        except CannotFill:
            return
        if succeeds:
            self._apply(self.store.filled(fill_id))
        else:
            self.wanted.append((holder, tile))
            self._apply(self.store.fill_failed(fill_id))

    def step(self) -> StepPlan | None:
        self._check_running()
        plan = self.engine.schedule(1.0)
        if plan is not None:
            self._check_rows(plan)
            num_tokens = sum(part.yields_token for part in plan.slices)
            self.engine.complete(plan, StepResult([50] * num_tokens), 1.0)
        self.engine.check_invariants()
        self._carry()
        return plan

    def run(self, *, max_steps: int = 100, encodes: bool = True) -> int:
        """Until nothing goes on any more; returns the number of steps."""
        num_steps = 0
        for _ in range(max_steps):
            while encodes and self.wanted:
                self.encode()
            is_idle = not self.inbox
            self.deliver()
            if self.step() is not None:
                num_steps += 1
            elif is_idle and not self.inbox and not (encodes and self.wanted):
                break
        return num_steps

    def check_empty(self) -> None:
        """Nobody holds embeddings, or waits for any."""
        self.store.check_invariants()
        counts = self.store.counts()
        assert counts.num_waiting == 0, counts
        assert counts.num_free + counts.num_cached == counts.num_blocks, counts

    def _carry(self) -> None:
        """What the engine says reaches those whom it is for."""
        while outputs := self.engine.take_outputs():
            for output in outputs:
                match output:
                    case ImagesNeeded():
                        self._need(output)
                    case ImagesReleased(key):
                        self._apply(self.store.release(key))
                    case StartTransfer():
                        self._sending[output.transfer_id] = output.block_ids
                    case FinishTransfer(transfer_id) | EndTransfer(transfer_id):
                        self._end_transfer(transfer_id, is_sent=isinstance(output, FinishTransfer))
                    case RequestFailed(key, _, reason):
                        self.ended[key.request_id] = reason
                    case TokensGenerated(key) if output.finish_reason is not None:
                        self.ended[key.request_id] = ""
                    case _:
                        pass
        self.store.check_invariants()

    def _need(self, needed: ImagesNeeded) -> None:
        self.asked.append((needed.key.request_id, [i for i, _ in needed.tiles]))
        self._asking[needed.key] = needed.asking
        problem = self.store.problem([tile for _, tile in needed.tiles])
        if problem is not None:
            self.inbox.append(ImagesLost(needed.key, FailureCode.INVALID, problem))
            return
        self._apply(self.store.need(needed.key, needed.tiles, needed.cache_salt))

    def _end_transfer(self, transfer_id: str, *, is_sent: bool) -> None:
        block_ids = self._sending.pop(transfer_id, None)
        if block_ids is None:
            return
        self.engine.handle(ReleaseTransfer(transfer_id, block_ids, "done"), 0.0)
        if is_sent:
            self.ended[transfer_id.removeprefix("t-")] = ""
            self.engine.handle(TransferSent(transfer_id, REPORT), 0.0)

    def _apply(self, effects: list[Effect]) -> None:
        for effect in effects:
            asking = self._asking[effect.holder]
            if isinstance(effect, Wanted):
                self.inbox.append(ImagesGranted(effect.holder, asking))
                self.wanted += [(effect.holder, tile) for tile in effect.tiles]
            else:
                ready = ImageReady(effect.holder, effect.tile, effect.block_ids, asking, effect.kept)
                self.inbox.append(ready)

    def _check_running(self) -> None:
        """What a sequence believes to be its embeddings is held for it."""
        for key, sequence in self.engine._sequences.items():
            images = sequence.images
            for tile, block_ids in images.block_ids.items() if images is not None else ():
                assert images is not None
                self._check_blocks(key, images.tiles[tile], block_ids, sequence.cache_salt)

    def _check_blocks(self, key: RequestKey, tile: ImageTile, block_ids: tuple[int, ...], salt: str) -> None:
        held = {entry.name: entry for entry in self.store._held.get(key, ())}
        entry = held[salt, tile.key]
        assert entry.is_ready, entry
        assert entry.block_ids == block_ids, entry

    def _check_rows(self, plan: StepPlan) -> None:
        for part in plan.chunks:
            images = part.sequence.images
            if images is not None:
                assert set(images.overlapping(part.start, part.end)) <= images.block_ids.keys()
