"""What is printed of one KV transfer, by `--timeline` and by `explain`. Pure."""

from typing import Protocol

MIB = 2**20


class Transferred(Protocol):
    """The numbers of a transfer: of inference.proto, where a client gets them, or of worker.proto."""

    @property
    def num_bytes(self) -> int: ...
    @property
    def num_chunks(self) -> int: ...
    @property
    def transfer_s(self) -> float: ...
    @property
    def busy_s(self) -> float: ...
    @property
    def exposed_s(self) -> float: ...
    @property
    def transport(self) -> str: ...
    @property
    def transport_reason(self) -> str: ...
    @property
    def codec(self) -> str: ...
    @property
    def num_wire_bytes(self) -> int: ...
    @property
    def num_resent_chunks(self) -> int: ...
    @property
    def num_resumes(self) -> int: ...


def seconds(duration_s: float) -> str:
    """With three digits, in ms below one second."""
    if duration_s >= 0.9995:
        return f"{duration_s:.2f} s" if duration_s < 99.995 else f"{duration_s:.0f} s"
    return f"{duration_s * 1000:.1f} ms" if duration_s < 0.09995 else f"{duration_s * 1000:.0f} ms"


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 chunk`, `6 chunks`. plural: where it is not the noun with an s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def lines(transfer: Transferred) -> list[str]:
    """Bytes, rate, the part that prefill hid, how it went, and what went wrong on the way."""
    size = f"{transfer.num_bytes / MIB:.2f} MiB in {counted(transfer.num_chunks, 'chunk')}"
    rate = f", {transfer.num_bytes / MIB / transfer.busy_s:.3g} MiB/s" if transfer.busy_s > 0 else ""
    hidden_s = max(0.0, transfer.transfer_s - transfer.exposed_s)
    share = f" ({hidden_s / transfer.transfer_s:.0%})" if transfer.transfer_s > 0 else ""
    found = [
        size + rate,
        f"{seconds(hidden_s)}{share} hidden by prefill (-), {seconds(transfer.exposed_s)} exposed (#)",
    ]
    if transfer.transport:
        why = f" ({transfer.transport_reason})" if transfer.transport_reason else ""
        codec = f", codec {transfer.codec}" if transfer.codec else ""
        found.append(f"by {transfer.transport}{why}{codec}{_moved(transfer)}")
    if transfer.num_resent_chunks or transfer.num_resumes:
        resent = f"{counted(transfer.num_resent_chunks, 'chunk')} sent again"
        found.append(f"{resent}, resumed {counted(transfer.num_resumes, 'time')}")
    return found


def _moved(transfer: Transferred) -> str:
    """What travelled; of what the receiver read by itself only headers did."""
    if not transfer.num_wire_bytes:
        return ""
    if transfer.transport != "grpc":
        return ", all read in place"
    return f", {transfer.num_wire_bytes / MIB:.2f} MiB moved"


def reuse(num_cached: int, num_fetched: int, num_reused: int, cached: str) -> str:
    """What of a prompt was not computed, in brackets after a space; empty when all was. cached: what cached tokens are called."""
    found = [f"{num_cached} {cached}"] if num_cached else []
    if num_fetched:
        found.append(f"{num_fetched} of them from another worker")
    if num_reused:
        found.append(f"{num_reused} reused from other contexts")
    return f" ({', '.join(found)})" if found else ""
