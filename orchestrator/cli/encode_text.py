"""What is printed of pictures that were encoded, by `--timeline` and by `explain`. Pure."""

from collections.abc import Iterable
from typing import Protocol

from orchestrator.cli.transfer_text import MIB, counted, seconds


class Encoded(Protocol):
    """The numbers of one shard: of inference.proto, where a client gets them, or of control.proto."""

    @property
    def worker_id(self) -> str: ...
    @property
    def first_tile(self) -> int: ...
    @property
    def num_tiles(self) -> int: ...
    @property
    def duration_s(self) -> float: ...
    @property
    def num_cached_tiles(self) -> int: ...
    @property
    def queue_s(self) -> float: ...
    @property
    def decode_s(self) -> float: ...
    @property
    def encode_s(self) -> float: ...
    @property
    def transfer_s(self) -> float: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def transport(self) -> str: ...
    @property
    def problem(self) -> str: ...


def lines(shards: Iterable[Encoded]) -> list[str]:
    """One for each shard, in their order."""
    return [f"{shard.worker_id}: {_tiles(shard)}, {_course(shard)}" for shard in shards]


def _tiles(shard: Encoded) -> str:
    if shard.num_tiles == 1:
        return f"tile {shard.first_tile}"
    return f"tiles {shard.first_tile}-{shard.first_tile + shard.num_tiles - 1}"


def _course(shard: Encoded) -> str:
    """What became of it."""
    if shard.problem:
        has_ended = f"failed after {seconds(shard.duration_s)}: " if shard.duration_s else ""
        return has_ended + shard.problem
    if not shard.duration_s:
        return "not reported"
    times = (
        (shard.queue_s, "queue"),
        (shard.decode_s, "decode"),
        (shard.encode_s, "encode"),
        (shard.transfer_s, "transfer"),
    )
    found = [f"{name} {seconds(duration_s)}" for duration_s, name in times if duration_s]
    if shard.transport:
        found.append(f"{shard.num_bytes / MIB:.2f} MiB by {shard.transport}")
    if shard.num_cached_tiles:
        found.append(f"{counted(shard.num_cached_tiles, 'tile')} cached")
    whole = f"{seconds(shard.duration_s)} in all"
    return f"{whole}: {', '.join(found)}" if found else whole


def reduced(planned: int, encoded: int, kept: int, prefill_share: float, *, is_too_long: bool) -> str:
    """What was left of pictures, in tokens."""
    filtered = f"{kept} kept" if not is_too_long else "no filter, as the prompt is too long"
    return f"of {planned} tokens of pictures {encoded} encoded, {filtered}; {prefill_share:.0%} of the prefill's work"
