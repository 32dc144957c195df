"""One end of a transfer in a `World`, and what holds of it at every moment whatever its machine believes."""

import math
from collections import Counter
from dataclasses import dataclass, field

from kvtransfer.frames import Ack, Chunk, Nack, ReceiverFrame, Reserve, Resume, Resumed, SenderFrame
from kvtransfer.kv_range import KvRange
from kvtransfer.receiver import ReceiverMachine
from kvtransfer.sender import SenderMachine
from kvtransfer.session import (
    BlocksReserved,
    CommitBlocks,
    End,
    ReserveBlocks,
    SendChunk,
    SendFrame,
    TransferState,
)
from tests.support.kvtransfer_tiny_pool import Kv, TinyPool


@dataclass(eq=False)
class Stream:
    """Messages on their way, oldest first, and who has left."""

    to_sender: list[bytes] = field(default_factory=list)
    to_receiver: list[bytes] = field(default_factory=list)
    #: Names of the sides that write no more, or of both when the way broke.
    left_by: set[str] = field(default_factory=set)
    #: The side that listens at the end that did not open it, once it has said what it is for.
    is_accepted: bool = False
    #: Sides that have got a message of it.
    heard_by: set[str] = field(default_factory=set)

    def to(self, name: str) -> list[bytes]:
        """What is on its way to this side."""
        return self.to_sender if name == "sender" else self.to_receiver


@dataclass(eq=False)
class Side:
    """A machine, its stream and its blocks. name: "sender" or "receiver"."""

    name: str
    machine: SenderMachine | ReceiverMachine
    transfer: "Transfer"
    pool: TinyPool
    lease_s: float
    resume_s: float
    #: When it is to have ended whatever happens.
    deadline_s: float
    incarnation: int = 0
    stream: Stream | None = None
    blocks: tuple[int, ...] = ()
    outbox: list[SendFrame | SendChunk] = field(default_factory=list)
    end: End | None = None
    #: Its process was killed.
    is_dead: bool = False
    heard_at_s: float = math.inf
    broken_at_s: float = math.inf
    reconnect_at_s: float = math.inf
    #: Sender: sent, and no answer has come. Receiver: always empty.
    unanswered: set[int] = field(default_factory=set)
    #: Sender: it is being read.
    reading: SendChunk | None = None
    reservation: ReserveBlocks | None = None
    is_reservation_cancelled: bool = False

    @property
    def is_over(self) -> bool:
        return self.is_dead or self.machine.is_ended

    @property
    def credits(self) -> int:
        assert isinstance(self.machine, SenderMachine)
        return self.machine.granted.credits if self.machine.granted else 0

    @property
    def awaits_parts(self) -> bool:
        """It is a part that is whole."""
        machine = self.machine
        return isinstance(machine, ReceiverMachine) and machine.awaited_commit is not None

    def note_before(self, event: object, now_s: float) -> None:
        """What an onlooker concludes from an event, before the machine does."""
        if isinstance(event, ReceiverFrame):
            self.heard_at_s = now_s
        if isinstance(event, (Ack, Nack)):
            self.unanswered.discard(event.sequence_number)
        if isinstance(event, Resumed) and self.machine.state is TransferState.SUSPENDED:
            self.unanswered.clear()
        if isinstance(event, Reserve) and self.machine.state is TransferState.NEW:
            self.deadline_s = now_s + event.timeout_s
        if isinstance(event, BlocksReserved):
            self.blocks = event.block_ids

    def note_after(self, event: object, now_s: float) -> None:
        """The same, once the machine has handled it."""
        if isinstance(self.machine, ReceiverMachine):
            of_other = isinstance(event, (Chunk, Resume)) and (event.lease_id, event.incarnation) != (
                self.machine.lease_id,
                self.incarnation,
            )
            if isinstance(event, BlocksReserved) or (isinstance(event, SenderFrame) and not of_other):
                self.heard_at_s = now_s
        is_suspended = self.machine.state is TransferState.SUSPENDED
        self.broken_at_s = min(self.broken_at_s, now_s) if is_suspended else math.inf

    def check(self, now_s: float) -> None:
        """What holds after every event."""
        machine, state = self.machine, self.machine.state
        machine.check_invariants()
        assert (self.end is not None) == machine.is_ended, f"{self.name} is {state}, its end is {self.end}"
        has_lease = isinstance(machine, ReceiverMachine) and machine.lease_id is not None
        holds_blocks = has_lease or (self.name == "sender" and not machine.is_ended)
        assert bool(self.blocks) == holds_blocks, f"{self.name} has blocks {self.blocks} while {state}"
        if machine.is_ended:
            is_asked_for = self.reservation is not None and not self.is_reservation_cancelled
            assert not is_asked_for, "the reservation outlives its transfer"
            return
        if isinstance(machine, SenderMachine):
            assert len(self.unanswered) <= self.credits, "more chunks in flight than credits"
        self.check_in_time(now_s)

    def check_in_time(self, now_s: float) -> None:
        """Of a side that lives: it may."""
        machine = self.machine
        granted = machine.granted if isinstance(machine, SenderMachine) else machine.lease_id
        due_s = min(self.deadline_s, self.broken_at_s + self.resume_s)
        if granted is not None:
            due_s = min(due_s, self.heard_at_s + self.lease_s)
        assert now_s < due_s, f"{self.name} is still {machine.state} at {now_s}, it was to end at {due_s}"


@dataclass(eq=False)
class Transfer:
    """One attempt to hand the KV of a sequence over."""

    transfer_id: str
    num_tokens: int
    token_digest: bytes
    #: Of the sender's pool, as it is computed. [layers, K/V, tokens, heads, head_dim]
    truth: Kv
    to_compute: list[KvRange]
    is_fetch: bool = False
    is_prefill_finished: bool = False
    #: The sender's is there from the start, unless it is fetched from.
    sender: Side | None = None
    #: The last one that was made for it.
    receiver: Side | None = None
    #: Chunks that come by streams of their own, which outlive the main one.
    strays: list[bytes] = field(default_factory=list)
    #: What is wrong with headers that will be written next: number -> range that they name instead.
    misnamed: dict[int, KvRange] = field(default_factory=dict)
    #: Ranges that were read, by their numbers.
    ranges_read: dict[int, KvRange] = field(default_factory=dict)
    committed: CommitBlocks | None = None
    num_damaged: Counter[int] = field(default_factory=Counter)

    @property
    def sides(self) -> list[Side]:
        return [side for side in (self.sender, self.receiver) if side is not None]

    @property
    def is_over(self) -> bool:
        """Nothing of it lives."""
        return all(side.is_over for side in self.sides)

    @property
    def has_succeeded(self) -> bool:
        """Both ends know that it was committed."""
        sender, receiver = self.sender, self.receiver
        return (
            sender is not None
            and receiver is not None
            and sender.machine.state is TransferState.RELEASED
            and receiver.machine.state is TransferState.COMMITTED
        )
