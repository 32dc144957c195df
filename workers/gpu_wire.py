"""The state of a GPU as a message of phasewise.worker.v1, and back; the fields of both have the same names. Pure."""

from dataclasses import asdict
from typing import Any

from protos import worker_pb2 as pb
from workers.api import GpuStatus

_LISTS = ("throttle_reasons", "xids", "notes")


def gpu_to_pb(gpu: GpuStatus) -> pb.GpuStatus:
    """All of it."""
    return pb.GpuStatus(**asdict(gpu))


def gpu_from_pb(message: pb.GpuStatus) -> GpuStatus:
    """All of it. What is absent is None, or what it is by default."""
    found: dict[str, Any] = {"uuid": message.uuid}
    for field, value in message.ListFields():
        found[field.name] = tuple(value) if field.name in _LISTS else value
    return GpuStatus(**found)
