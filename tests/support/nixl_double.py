"""An agent of NIXL's shape over plain memory of this process, and what NIXL does when a peer misbehaves.

It refuses what NIXL refuses: memory that is not registered, pieces of different lengths, metadata that makes no sense,
an agent that is not known. As over TCP, a read that was released while it ran still arrives.
"""

import ctypes
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt

from kvtransfer.transports import nixl
from kvtransfer.transports.nixl_endpoint import NixlEndpoint

Region = tuple[int, int]


class NixlDoubleError(Exception):
    """As NIXL's: its message is the name of a code."""


class Fault(Enum):
    """What becomes of reads from an agent."""

    NONE = "they arrive at once"
    SLOW = "they arrive when they have been asked for a few times"
    STALLED = "they arrive when the fault is over"
    GONE = "its process has ended"
    BROKEN = "NIXL says ERR"


@dataclass(eq=False)
class Handle:
    """A read. is_done: it has arrived."""

    local: list[Region]
    remote: list[Region]
    peer: "NixlDouble"
    num_checks: int = 0
    is_done: bool = False
    is_released: bool = False


@dataclass(eq=False)
class Registration:
    """Regions that were registered together."""

    regions: list[Region] = field(default_factory=list)


class NixlWorld:
    """Agents that can reach each other."""

    def __init__(self) -> None:
        self.agents: dict[str, NixlDouble] = {}

    def agent(self, name: str) -> "NixlDouble":
        """A new agent."""
        assert name not in self.agents
        self.agents[name] = NixlDouble(name, self)
        return self.agents[name]


class NixlDouble:
    """Implements nixl_endpoint.Agent."""

    def __init__(self, name: str, world: NixlWorld) -> None:
        self.name = name
        self.backends: dict[str, Any] = {"UCX": 1}
        #: Of this agent as a peer.
        self.fault = Fault.NONE
        #: Memory is not registered while it is set.
        self.is_full = False
        self.handles: list[Handle] = []
        self.num_pieces: list[int] = []
        self._world = world
        self._registered: list[Registration] = []
        #: Agent -> what of its memory may be read.
        self.known: dict[str, list[Region]] = {}
        self._spoiled: set[str] = set()

    def register_memory(self, reg_list: Sequence[tuple[int, int, int, str]], mem_type: str) -> Registration:
        assert mem_type == "DRAM"
        if self.is_full:
            raise NixlDoubleError("NIXL_ERR_BACKEND")
        registration = Registration([(address, size) for address, size, _, _ in reg_list])
        self._registered.append(registration)
        return registration

    def deregister_memory(self, dereg_list: Registration) -> None:
        arriving = [one for one in self.handles if not one.is_done and one.peer.fault is not Fault.GONE]
        for region in dereg_list.regions:
            for read in arriving:
                assert not any(_is_within(piece, [region]) for piece in read.local), "a read arrives there"
        self._registered.remove(dereg_list)

    def get_partial_agent_metadata(
        self, descs: Registration, inc_conn_info: bool, backends: list[str]
    ) -> bytes:
        assert inc_conn_info
        assert backends == ["UCX"]
        return json.dumps({"agent": self.name, "regions": descs.regions}).encode()

    def add_remote_agent(self, metadata: bytes) -> bytes:
        try:
            about = json.loads(metadata)
        except ValueError:
            # NIXL reads the name first, and then does not get over it.
            self._spoiled.update(re.findall(r"agent-\w+", metadata.decode()))
            raise NixlDoubleError("NIXL_ERR_MISMATCH") from None
        name = about["agent"]
        assert not any(not one.is_done and one.peer.name == name for one in self._running), (
            "metadata loaded again while a read runs"
        )
        if name == self.name or name in self._spoiled:
            raise NixlDoubleError("NIXL_ERR_INVALID_PARAM")
        if self._world.agents[name].fault is Fault.GONE:
            raise NixlDoubleError("NIXL_ERR_BACKEND")
        self.known.setdefault(name, []).extend((address, size) for address, size in about["regions"])
        return str(name).encode()

    def remove_remote_agent(self, agent: str) -> None:
        assert not any(not one.is_done and one.peer.name == agent for one in self._running), (
            "an agent removed while a read of it runs"
        )
        self.known.pop(agent, None)

    def get_xfer_descs(self, descs: npt.NDArray[np.uint64], mem_type: str) -> list[Region]:
        assert mem_type == "DRAM"
        assert descs.dtype == np.uint64
        assert descs.ndim == 2
        assert descs.shape[1] == 3
        assert len(descs) > 0
        return [(address, size) for address, size, _ in descs.tolist()]

    def initialize_xfer(
        self, operation: str, local_descs: list[Region], remote_descs: list[Region], remote_agent: str
    ) -> Handle:
        assert operation == "READ"
        ours = [region for one in self._registered for region in one.regions]
        theirs = ours if remote_agent == self.name else self.known.get(remote_agent)
        if theirs is None or not all(_is_within(piece, theirs) for piece in remote_descs):
            raise NixlDoubleError("NIXL_ERR_NOT_FOUND")
        if not all(_is_within(piece, ours) for piece in local_descs):
            raise NixlDoubleError("NIXL_ERR_NOT_FOUND")
        if [size for _, size in local_descs] != [size for _, size in remote_descs]:
            raise NixlDoubleError("NIXL_ERR_INVALID_PARAM")
        handle = Handle(local_descs, remote_descs, self._world.agents[remote_agent])
        self.handles.append(handle)
        self.num_pieces.append(len(local_descs))
        return handle

    def transfer(self, handle: Handle) -> str:
        return self._state(handle)

    def check_xfer_state(self, handle: Handle) -> str:
        assert not handle.is_released
        handle.num_checks += 1
        return self._state(handle)

    def release_xfer_handle(self, handle: Handle) -> None:
        assert not handle.is_released
        handle.is_released = True

    # What tests do.

    def arrive(self) -> None:
        """What was on its way to this agent comes, whoever waits for it."""
        for handle in self.handles:
            if not handle.is_done and handle.peer.fault is Fault.NONE:
                _copy(handle)

    @property
    def num_registered(self) -> int:
        """Regions that are registered."""
        return sum(len(one.regions) for one in self._registered)

    @property
    def num_unreleased(self) -> int:
        """Reads that were not released."""
        return sum(not one.is_released for one in self.handles)

    @property
    def _running(self) -> list[Handle]:
        return [one for one in self.handles if not one.is_released]

    def _state(self, handle: Handle) -> str:
        match handle.peer.fault:
            case Fault.GONE:
                raise NixlDoubleError("NIXL_ERR_REMOTE_DISCONNECT")
            case Fault.BROKEN:
                return "ERR"
            case Fault.STALLED:
                return "PROC"
            case Fault.SLOW if handle.num_checks < 3:
                return "PROC"
        if not handle.is_done:
            _copy(handle)
        return "DONE"


def _copy(handle: Handle) -> None:
    for (to, size), (source, _) in zip(handle.local, handle.remote, strict=True):
        ctypes.memmove(to, source, size)
    handle.is_done = True


def _is_within(piece: Region, regions: Sequence[Region]) -> bool:
    address, size = piece
    return any(begin <= address and address + size <= begin + length for begin, length in regions)


@contextmanager
def nixl_agents() -> Iterator[Callable[[], None]]:
    """This process has the agent of an owner of pools, and after a call of what is given here that of a reader."""
    world = NixlWorld()

    def become_reader() -> None:
        nixl._endpoint = NixlEndpoint(world.agent("agent-reader"))

    with patch.object(nixl, "_endpoint", NixlEndpoint(world.agent("agent-owner"))):
        yield become_reader
