"""Pools read by another process, and what is left when either ends."""

import errno
import json
import mmap
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvtransfer import shared_memory
from kvtransfer.errors import PoolUnreachable, SharedMemoryUnavailable
from kvtransfer.host_pool import HostPool
from kvtransfer.pool import KvSpan
from kvtransfer.shared_memory import HEADER_BYTES, MappedMemory, SharedMemory, SharedMemoryDescriptor
from kvtransfer.transports import in_process, shm
from tests.support.pool_owner import (
    LAYOUT,
    NUM_BLOCKS,
    PoolOwner,
    filled_cache,
    pool_owner,
    shared_pool,
    shm_offer,
)
from tests.support.waiting import BOUND_S, until_in_thread

SPAN = KvSpan(tuple(range(NUM_BLOCKS)), 0, NUM_BLOCKS * LAYOUT.block_size, 0, 3, 0, 2)


@pytest.fixture(scope="module")
def owner() -> Iterator[PoolOwner]:
    """For all that leave it as it is."""
    with pool_owner() as found:
        yield found


def empty_pool(dtype: str = LAYOUT.dtype) -> tuple[HostPool, torch.Tensor]:
    cache = torch.zeros(filled_cache().shape, dtype=getattr(torch, dtype))
    return HostPool(cache, replace(LAYOUT, dtype=dtype)), cache


def changed(descriptor: bytes, **values: object) -> bytes:
    about = json.loads(descriptor)
    for name, value in values.items():
        (about["memory"] if name in about["memory"] else about)[name] = value
    return json.dumps(about).encode()


def holders_of(name: str) -> list[int]:
    """Processes that have memory of this name open or mapped."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "maps").read_text() + "".join(map(link_of, (folder / "fd").iterdir()))
        except OSError:
            # It has ended meanwhile.
            continue
        if name in text:
            found.append(int(folder.name))
    return found


def link_of(path: Path) -> str:
    try:
        return os.readlink(path)
    except FileNotFoundError:
        # That by which the folder itself was read.
        return ""


def test_another_process_reads_the_pool_and_its_checksum(owner: PoolOwner) -> None:
    mapped = shm.open_pool(owner.offer.descriptor)
    expected, cache_of = filled_cache(), {}
    ours, _ = empty_pool()
    for dtype in ("float16", "float32", "bfloat16"):
        target, cache_of[dtype] = empty_pool(dtype)
        checksum = mapped.pull(SPAN, target, SPAN)
        ours.write(SPAN, memoryview(bytes(read_all(expected))), "float16")
        assert checksum == ours.checksum(SPAN, "shm")
        assert torch.equal(cache_of[dtype], expected.to(cache_of[dtype].dtype))
    mapped.close()


def read_all(cache: torch.Tensor) -> bytearray:
    pool, out = HostPool(cache, LAYOUT), bytearray(cache.nbytes)
    pool.read(SPAN, memoryview(out))
    return out


def test_what_the_owner_writes_later_is_seen_by_the_checksum(owner: PoolOwner) -> None:
    mapped = shm.open_pool(owner.offer.descriptor)
    target, _ = empty_pool()
    before = mapped.pull(SPAN, target, SPAN)
    assert mapped.pull(SPAN, target, SPAN) == before
    owner.tell("flip")
    assert mapped.pull(SPAN, target, SPAN) != before
    owner.tell("flip")
    assert mapped.pull(SPAN, target, SPAN) == before
    mapped.close()


def test_the_memory_cannot_be_written_from_outside(owner: PoolOwner) -> None:
    memory = MappedMemory.open(SharedMemoryDescriptor(**json.loads(owner.offer.descriptor)["memory"]))
    with pytest.raises(ValueError, match="read-only"):
        memory.bytes()[0] = 1
    memory.close()
    with pytest.raises(ConnectionError, match="not mapped"):
        memory.bytes()


def test_a_killed_owner_leaves_what_is_mapped_readable_and_nothing_to_clean_up() -> None:
    name = f"kill-{os.getpid()}"
    with pool_owner(name) as owner:
        mapped = shm.open_pool(owner.offer.descriptor)
        assert set(holders_of(name)) == {owner.process.pid, os.getpid()}
        assert not shm.is_owner_gone(owner.offer.descriptor)
        owner.kill()
        target, cache = empty_pool()
        mapped.pull(SPAN, target, SPAN)
        assert torch.equal(cache, filled_cache())
        with pytest.raises(PoolUnreachable, match=f"process {owner.process.pid} is gone"):
            shm.open_pool(owner.offer.descriptor)
        assert shm.is_owner_gone(owner.offer.descriptor)
        assert holders_of(name) == [os.getpid()]
        mapped.close()
        until_in_thread(lambda: holders_of(name) == [], "it is unmapped")
        assert not list(Path("/dev/shm").glob("*phasewise*"))
        with pytest.raises(ConnectionError, match="not mapped"):
            mapped.pull(SPAN, target, SPAN)


def test_memory_is_mapped_whole_and_unmapped_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    unmapping = threading.Event()
    threads: list[str] = []

    class WatchedMap(mmap.mmap):
        def close(self) -> None:
            threads.append(threading.current_thread().name)
            super().close()
            unmapping.set()

    memory = SharedMemory.create(2**20, "whole")
    monkeypatch.setattr(shared_memory.mmap, "mmap", WatchedMap)
    mapped = MappedMemory.open(memory.descriptor())
    address = mapped.bytes().__array_interface__["data"][0] - HEADER_BYTES
    about = Path("/proc/self/smaps").read_text().partition(f"{address:x}-")[2]
    resident_kib = next(line for line in about.splitlines() if line.startswith("Rss:")).split()[1]
    # Not one by one when they are touched; the kernel may take a page back at any time.
    assert int(resident_kib) * 1024 > 0.9 * memory.num_bytes
    mapped.close()
    assert unmapping.wait(BOUND_S)
    assert threads == ["unmap-pool"]
    memory.close()


def test_bytes_that_someone_still_has_stay_readable_and_are_unmapped_after_that() -> None:
    memory = SharedMemory.create(4096, name="still-read")
    mapped = MappedMemory.open(memory.descriptor())
    kept = mapped.bytes()
    mapped.close()
    until_in_thread(
        lambda: not any(thread.name == "unmap-pool" for thread in threading.enumerate()), "the thread"
    )
    assert not kept.any()
    lines = Path("/proc/self/maps")
    assert lines.read_text().count("still-read") == 2
    del kept
    assert lines.read_text().count("still-read") == 1
    memory.close()


def test_a_pool_that_its_owner_closed_is_not_found() -> None:
    with pool_owner() as owner:
        mapped = shm.open_pool(owner.offer.descriptor)
        owner.tell("close")
        with pytest.raises(PoolUnreachable, match="has closed its pool"):
            shm.open_pool(owner.offer.descriptor)
        assert shm.is_owner_gone(owner.offer.descriptor)
        mapped.close()


def test_another_process_under_the_same_pid_is_found_out(owner: PoolOwner) -> None:
    descriptor = owner.offer.descriptor
    for wrong, message in (
        # The new process has such a memory under the same number: the nonce tells.
        ({"nonce": "00" * 16}, "not the one meant"),
        ({"num_bytes": json.loads(descriptor)["memory"]["num_bytes"] + 1}, "another size"),
        # Standard input, which is a pipe: it must not even be opened.
        ({"fd": 0}, "another one by now"),
        ({"fd": 4000}, "has closed its pool"),
    ):
        with pytest.raises(PoolUnreachable, match=message):
            shm.open_pool(changed(descriptor, **wrong))


def test_other_hosts_and_containers_are_named() -> None:
    pool = shared_pool()
    descriptor = shm_offer(pool).descriptor
    with pytest.raises(PoolUnreachable, match="on another host"):
        shm.open_pool(changed(descriptor, boot_id="other"))
    with pytest.raises(PoolUnreachable, match="in another container"):
        shm.open_pool(changed(descriptor, pid_namespace=1))


@pytest.mark.parametrize(
    ("error", "message"),
    [(PermissionError(errno.EACCES, "no"), "another user"), (OSError(errno.EMFILE, "too many"), "too many")],
)
def test_what_the_system_refuses_is_a_reason(
    error: OSError, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = shared_pool()

    def refuse(*_: object) -> int:
        raise error

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PoolUnreachable, match=message):
        shm.open_pool(shm_offer(pool).descriptor)


@pytest.mark.parametrize(
    "descriptor",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        {"version": 2},
        {"num_blocks": NUM_BLOCKS + 1},
        {"num_blocks": -1},
        {"num_blocks": 1.0},
        {"offset": -1},
        {"offset": 1},
        {"nonce": 3},
        {"pid": "../../self"},
        {"fd": True},
        {"layout": {"dtype": "float16"}},
    ],
    ids=str,
)
def test_a_descriptor_that_makes_no_sense_is_refused(descriptor: bytes | dict[str, object]) -> None:
    if isinstance(descriptor, dict):
        descriptor = changed(shm_offer(shared_pool()).descriptor, **descriptor)
    with pytest.raises(PoolUnreachable, match=r"makes no sense|version"):
        shm.open_pool(descriptor)


def test_memory_is_whole_pages_of_zeros_that_may_not_change_their_size() -> None:
    memory = SharedMemory.create(10_000)
    tensor = memory.tensor((2, 5000), torch.uint8)
    assert tensor.data_ptr() == memory.address
    assert memory.address % 4096 == 0
    assert not tensor.any()
    descriptor = memory.descriptor()
    with open(descriptor.link, "r+b") as file, pytest.raises(PermissionError):
        os.ftruncate(file.fileno(), 4096)
    # All of it is there: nothing is left to be found, or not, when it is touched.
    assert os.stat(descriptor.link).st_blocks * 512 >= 10_000 + shared_memory.HEADER_BYTES
    with pytest.raises(ValueError, match="a tensor of 10001 bytes"):
        memory.tensor((10_001,), torch.uint8)
    memory.close()
    memory.close()
    with pytest.raises(ValueError, match="closed"):
        memory.tensor((1,), torch.uint8)
    # Who has it keeps it.
    tensor.fill_(1)


def test_dev_shm_has_no_part_in_it() -> None:
    memory = SharedMemory.create(1000)
    link = memory.descriptor().link
    assert os.stat(link).st_dev != os.stat("/dev/shm").st_dev
    assert os.readlink(link).startswith("/memfd:")
    memory.close()


def test_memory_that_was_forgotten_is_closed() -> None:
    memory = SharedMemory.create(1000)
    descriptor = memory.descriptor()
    del memory
    assert shared_memory.is_owner_gone(descriptor)


def test_more_memory_than_the_machine_has_is_an_error_and_not_a_signal() -> None:
    with pytest.raises(SharedMemoryUnavailable, match="bytes of memory free") as caught:
        SharedMemory.create(1 << 50)
    assert caught.value.num_bytes == 1 << 50


def test_memory_that_runs_out_while_it_is_taken_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(SharedMemoryUnavailable, match="No space left on device"):
        SharedMemory.create(1000, "full-test")
    assert not [link for link in Path("/proc/self/fd").iterdir() if "full-test" in os.path.realpath(link)]


def test_systems_without_memfd_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(SharedMemoryUnavailable, match="memfd_create"):
        SharedMemory.create(1000)


def test_a_forked_child_is_another_process() -> None:
    pool = shared_pool()
    descriptor = pool.offers[0].descriptor
    with pytest.raises(PoolUnreachable, match="of another process"):
        in_process.open_pool(json.dumps({**json.loads(descriptor), "pid": os.getppid()}).encode())
    with pytest.raises(PoolUnreachable, match="makes no sense"):
        in_process.open_pool(b"{}")
