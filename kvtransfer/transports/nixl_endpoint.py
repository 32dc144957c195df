"""The NIXL agent of this process: memory that others may read, and reads of theirs.

A read arrives in memory of this endpoint and not in a pool's blocks, because NIXL cannot take it back: over TCP, bytes of
a read that was released, and whose peer was removed, were seen to arrive seconds later. By then the blocks could be
somebody else's. Memory of a read that was given up is not used again before NIXL says that it has ended.

What is not obvious of NIXL 1.5, each seen:
- An agent's thread polls all the time: a process that uses NIXL gives one core to it. So there is one agent per process,
  and none unless the manifest asks for it.
- Over TCP the owner's agent copies what it is asked for, without a look at what is still registered: a read of memory that
  was unmapped ends the owner's process. So memory that was offered is kept as long as the agent.
- Metadata that cannot be read spoils an agent's name at its reader for ever. So who carries it adds a checksum.
- To load an agent's metadata again, or to remove it, hides how its running reads end.
"""

import importlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvtransfer.errors import PoolUnreachable, TransportUnavailable

logger = logging.getLogger(__name__)

TRANSPORT = "nixl"
#: A read that takes longer has failed. The worker's event loop waits for so long when a peer stalls while it is read
#: from, or is opened while another is.
READ_TIMEOUT_S = 2.0
_BACKEND = "UCX"
_POLL_S = 50e-6
_MIN_STAGED_BYTES = 4 << 20

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]


class Agent(Protocol):
    """What is used of `nixl._api.nixl_agent`. Descriptors: (address, bytes, device[, ""]). Raises its own exceptions."""

    name: str
    backends: dict[str, Any]

    # fmt: off
    def register_memory(self, reg_list: Sequence[tuple[int, int, int, str]], mem_type: str) -> Any: ...
    def deregister_memory(self, dereg_list: Any) -> None: ...
    def get_partial_agent_metadata(self, descs: Any, inc_conn_info: bool, backends: list[str]) -> bytes: ...
    def add_remote_agent(self, metadata: bytes) -> bytes: ...
    def remove_remote_agent(self, agent: str) -> None: ...
    def get_xfer_descs(self, descs: npt.NDArray[np.uint64], mem_type: str) -> Any: ...
    def initialize_xfer(self, operation: str, local_descs: Any, remote_descs: Any, remote_agent: str) -> Any: ...
    def transfer(self, handle: Any) -> str: ...
    def check_xfer_state(self, handle: Any) -> str: ...
    def release_xfer_handle(self, handle: Any) -> None: ...
    # fmt: on


@dataclass(eq=False, slots=True)
class _Staged:
    """Memory that reads arrive in, and its registration."""

    data: Bytes
    registration: Any


@dataclass(eq=False, slots=True)
class _Peer:
    """Another agent, as long as somebody reads of it or a read of it has not ended."""

    num_users: int = 0
    #: Why nothing can be read of it any more.
    problem: str | None = None
    #: A read that was given up, and where it may still arrive. At most one: after it, `problem` is set.
    unfinished: tuple[Any, _Staged] | None = None


class NixlEndpoint:
    """The agent of this process, what it shares and what it reads. Used in one thread at a time.

    clock, sleep: of the wait for a read, in seconds.
    """

    def __init__(
        self,
        agent: Agent,
        *,
        timeout_s: float = READ_TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._agent = agent
        self._timeout_s = timeout_s
        self._clock = clock
        self._sleep = sleep
        self._peers: dict[str, _Peer] = {}
        self._staged: _Staged | None = None
        #: Kept, see above.
        self._shared: list[Bytes] = []

    @property
    def name(self) -> str:
        """Of the agent; no other has had it."""
        return self._agent.name

    def share(self, memories: Sequence[Bytes]) -> bytes:
        """The metadata by which others read these memories, which are kept as long as this endpoint.

        Raises TransportUnavailable when NIXL does not take them.
        """
        try:
            registration = self._agent.register_memory([_region(memory) for memory in memories], "DRAM")
            metadata = self._agent.get_partial_agent_metadata(registration, True, [_BACKEND])
        except Exception as error:
            reason = f"NIXL does not register the pool: {_said(error)}"
            raise TransportUnavailable(TRANSPORT, reason) from error
        self._shared.extend(memories)
        return metadata

    def connect(self, agent: str, metadata: bytes) -> None:
        """Make a peer's memory readable until as many `let_go`.

        Raises PoolUnreachable: there is no such agent any more, or an earlier read of it failed.
        """
        self._sweep()
        peer = self._peers.get(agent)
        if peer is not None and peer.problem is not None:
            raise PoolUnreachable(TRANSPORT, peer.problem)
        # An agent knows itself, and must not be told.
        if agent != self.name:
            try:
                # Also when it is known: this may be other memory of it.
                self._agent.add_remote_agent(metadata)
            except Exception as error:
                if peer is None:
                    self._remove(agent)
                reason = f"its agent cannot be connected to: {_said(error)}"
                raise PoolUnreachable(TRANSPORT, reason) from error
        self._peers.setdefault(agent, _Peer()).num_users += 1

    def problem(self, agent: str) -> str | None:
        """Why nothing can be read of a peer; None when all is well."""
        peer = self._peers.get(agent)
        return "its agent is not known any more" if peer is None else peer.problem

    def read(self, agent: str, addresses: Numbers, lengths: Numbers) -> Bytes:
        """Pieces of a peer's memory, one after the other; to be used before the next read.

        Raises ConnectionError when it failed or did not end in time. No other read of this peer is tried then.
        """
        peer = self._peers[agent]
        if peer.problem is not None:
            raise ConnectionError(peer.problem)
        num_bytes = int(lengths.sum())
        staged = self._staged_of(num_bytes)
        places = np.cumsum(lengths) - lengths + address_of(staged.data)
        handle = None
        try:
            local = self._agent.get_xfer_descs(_rows(places, lengths), "DRAM")
            remote = self._agent.get_xfer_descs(_rows(addresses, lengths), "DRAM")
            handle = self._agent.initialize_xfer("READ", local, remote, agent)
            state = self._wait(handle, self._agent.transfer(handle))
        except Exception as error:
            # NIXL ends reads so when the connection is gone, and with it what was on its way. Were it not, the
            # checksum of what is read next would tell.
            self._release(handle)
            raise self._lost(peer, agent, f"reading failed: {_said(error)}") from error
        if state == "PROC":
            peer.unfinished, self._staged = (handle, staged), None
            raise self._lost(peer, agent, f"a read did not end within {self._timeout_s:g} s")
        self._release(handle)
        if state != "DONE":
            raise self._lost(peer, agent, f"reading failed in state {state}")
        return staged.data[:num_bytes]

    def let_go(self, agent: str) -> None:
        """Undo one `connect`."""
        self._peers[agent].num_users -= 1
        self._sweep()

    def _wait(self, handle: Any, state: str) -> str:
        """The state of a read at its end, or when its time is over."""
        deadline_s = self._clock() + self._timeout_s
        while state == "PROC" and self._clock() < deadline_s:
            self._sleep(_POLL_S)
            state = self._agent.check_xfer_state(handle)
        return state

    def _sweep(self) -> None:
        """Forget peers that nobody reads of, once nothing of theirs can arrive any more."""
        for name, peer in list(self._peers.items()):
            if peer.unfinished is not None and self._has_ended(peer.unfinished[0]):
                handle, staged = peer.unfinished
                peer.unfinished = None
                self._release(handle)
                self._free(staged)
            if not peer.num_users and peer.unfinished is None:
                del self._peers[name]
                self._remove(name)

    def _has_ended(self, handle: Any) -> bool:
        try:
            return self._agent.check_xfer_state(handle) != "PROC"
        except Exception:  # noqa: BLE001 - so NIXL says that the peer is gone
            return True

    def _staged_of(self, num_bytes: int) -> _Staged:
        """Memory for a read, at least so large."""
        if self._staged is not None and self._staged.data.size >= num_bytes:
            return self._staged
        if self._staged is not None:
            self._free(self._staged)
            self._staged = None
        data = np.zeros(max(_MIN_STAGED_BYTES, 1 << (num_bytes - 1).bit_length()), np.uint8)
        try:
            registration = self._agent.register_memory([_region(data)], "DRAM")
        except Exception as error:
            raise ConnectionError(
                f"NIXL does not register {data.size} bytes to read into: {_said(error)}"
            ) from error
        self._staged = _Staged(data, registration)
        return self._staged

    def _free(self, staged: _Staged) -> None:
        try:
            self._agent.deregister_memory(staged.registration)
        except Exception as error:  # noqa: BLE001 - nothing that anybody could do: it goes with the process
            logger.warning("nixl_deregister_failed bytes=%d reason=%s", staged.data.size, _said(error))

    def _release(self, handle: Any) -> None:
        if handle is None:
            return
        try:
            self._agent.release_xfer_handle(handle)
        except Exception as error:  # noqa: BLE001 - as above
            logger.warning("nixl_release_failed reason=%s", _said(error))

    def _remove(self, agent: str) -> None:
        if agent == self.name:
            return
        try:
            self._agent.remove_remote_agent(agent)
        except Exception as error:  # noqa: BLE001 - as above
            logger.warning("nixl_remove_failed agent=%s reason=%s", agent, _said(error))

    @staticmethod
    def _lost(peer: _Peer, agent: str, problem: str) -> ConnectionError:
        peer.problem = f"agent {agent}: {problem}"
        logger.warning("nixl_peer_lost agent=%s reason=%s", agent, problem)
        return ConnectionError(peer.problem)


def make_agent() -> Agent:
    """Raises TransportUnavailable: NIXL is not here, or does not work. Takes a second."""
    try:
        api = importlib.import_module("nixl._api")
    except ModuleNotFoundError as error:
        if error.name != "nixl":
            raise TransportUnavailable(TRANSPORT, f"the package nixl cannot be loaded: {error}") from error
        raise TransportUnavailable(
            TRANSPORT, "the package nixl is not installed: pip install 'phasewise[nixl]'"
        ) from error
    except ImportError as error:
        raise TransportUnavailable(TRANSPORT, f"the package nixl cannot be loaded: {error}") from error
    # New at each start: a reader may still know the process that had this pid before.
    name = f"phasewise-{os.getpid()}-{secrets.token_hex(8)}"
    try:
        agent: Agent = api.nixl_agent(name, api.nixl_agent_config(backends=[_BACKEND]))
    except Exception as error:
        raise TransportUnavailable(TRANSPORT, f"NIXL makes no agent: {_said(error)}") from error
    if _BACKEND not in agent.backends:
        raise TransportUnavailable(TRANSPORT, f"NIXL has no backend {_BACKEND}")
    logger.info("nixl_agent_started agent=%s", name)
    return agent


def _region(memory: Bytes) -> tuple[int, int, int, str]:
    return address_of(memory), memory.size, 0, ""


def _rows(addresses: Numbers, lengths: Numbers) -> npt.NDArray[np.uint64]:
    """[pieces, 3]: address, bytes, device."""
    return np.stack((addresses, lengths, np.zeros_like(lengths)), axis=1).astype(np.uint64)


def address_of(memory: Bytes) -> int:
    """Where it begins in this process."""
    address: int = memory.__array_interface__["data"][0]
    return address


def _said(error: Exception) -> str:
    """NIXL's messages are the names of its codes; others say little without their own."""
    return str(error) if str(error).startswith("NIXL_") else repr(error)
