"""What the EPD benchmark sends, and what its numbers say. Pure."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.control.slo import Slo, percentile, tpot_s

EPD = "E + PD"
#: A ratio this close to 1 is no difference.
EVEN = 0.05


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of load. output_tokens: least and most, drawn evenly."""

    name: str
    #: Fewer than 100.
    num_images: int
    output_tokens: tuple[int, int] = (10, 10)
    text_tokens: int = 22
    #: Part of the requests that have no picture.
    text_only: float = 0.0
    #: Pictures that there are in all; None is a new one each time.
    num_distinct: int | None = None


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request. at_s: since the load began. pictures: their seeds."""

    at_s: float
    number: int
    pictures: tuple[int, ...]
    num_text_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Seen:
    """What the client saw of one request. Token times in seconds since it was sent, at_s since the load began.

    One that failed has no tokens.
    """

    at_s: float
    token_times_s: tuple[float, ...]
    encode_s: float
    num_pictures: int
    #: That an encoder computed; the others were in a cache.
    num_encoded: int


@dataclass(frozen=True, slots=True)
class Row:
    """One shape under one load. Times in ms, rates in requests per second."""

    encoder: str
    workload: str
    shape: str
    #: Part of the capacity that was measured.
    load: float
    rate_rps: float
    num_requests: int
    num_failed: int
    ttft_p50_ms: float
    ttft_p90_ms: float
    ttft_p99_ms: float
    tpot_p50_ms: float
    tpot_p99_ms: float
    encode_p50_ms: float
    throughput_rps: float
    attainment: float
    slo_ttft_ms: float
    slo_tpot_ms: float
    #: Part of the pictures that were computed.
    encoded: float


def arrivals(workload: Workload, rate_rps: float, duration_s: float, seed: int) -> list[Arrival]:
    """A Poisson process, at least one request of it. The same arguments give the same requests.

    Other seeds give other pictures, unless the workload repeats them.
    """
    rng = random.Random(seed)
    found: list[Arrival] = []
    at_s = 0.0
    while not found or at_s < duration_s:
        number = seed * 100_000 + len(found)
        has_pictures = rng.random() >= workload.text_only
        found.append(
            Arrival(
                at_s,
                number,
                _pictures(workload, number, rng) if has_pictures else (),
                workload.text_tokens,
                rng.randint(*workload.output_tokens),
            )
        )
        at_s += rng.expovariate(rate_rps)
    return found


def _pictures(workload: Workload, number: int, rng: random.Random) -> tuple[int, ...]:
    if workload.num_distinct is not None:
        return tuple(rng.sample(range(workload.num_distinct), workload.num_images))
    first = 1000 + number * 100
    return tuple(range(first, first + workload.num_images))


def slo_of(unloaded: Sequence[Seen], scale: float) -> Slo:
    """So many times what the requests took that had the machine to themselves; the median one counts."""
    ttfts = sorted(seen.token_times_s[0] for seen in unloaded if seen.token_times_s)
    tpots = sorted(value for seen in unloaded if (value := tpot_s(seen.token_times_s)) is not None)
    return Slo(percentile(ttfts, 50) * scale, percentile(tpots, 50) * scale)


def row_of(
    encoder: str, workload: str, shape: str, *, load: float, rate_rps: float, slo: Slo, seen: Sequence[Seen]
) -> Row:
    """seen: at least one request that did not fail, each with two tokens or more. Those that failed missed the target."""
    num_failed = sum(not one.token_times_s for one in seen)
    seen = [one for one in seen if one.token_times_s]
    ttfts = sorted(one.token_times_s[0] * 1000 for one in seen)
    tpots = sorted(value * 1000 for one in seen if (value := tpot_s(one.token_times_s)) is not None)
    encodes = sorted(one.encode_s * 1000 for one in seen if one.num_pictures) or [0.0]
    num_pictures = sum(one.num_pictures for one in seen)
    end_s = max(one.at_s + one.token_times_s[-1] for one in seen)
    num_met = sum(slo.is_met(one.token_times_s[0], tpot_s(one.token_times_s)) for one in seen)
    return Row(
        encoder=encoder,
        workload=workload,
        shape=shape,
        load=load,
        rate_rps=rate_rps,
        num_requests=len(seen) + num_failed,
        num_failed=num_failed,
        ttft_p50_ms=percentile(ttfts, 50),
        ttft_p90_ms=percentile(ttfts, 90),
        ttft_p99_ms=percentile(ttfts, 99),
        tpot_p50_ms=percentile(tpots, 50),
        tpot_p99_ms=percentile(tpots, 99),
        encode_p50_ms=percentile(encodes, 50),
        throughput_rps=len(seen) / end_s,
        attainment=num_met / (len(seen) + num_failed),
        slo_ttft_ms=slo.ttft_s * 1000,
        slo_tpot_ms=slo.tpot_s * 1000,
        encoded=sum(one.num_encoded for one in seen) / num_pictures if num_pictures else 0.0,
    )


def markdown(rows: Sequence[Row]) -> str:
    """A table of all rows."""
    lines = [
        "| encoder | workload | load | shape | requests | TTFT p50 / p90 / p99 ms | TPOT p50 / p99 ms | requests/s | attainment | encoded |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.encoder} | {row.workload} | {row.load:.0%} | {row.shape} | {_count(row)} | "
        f"{row.ttft_p50_ms:.0f} / {row.ttft_p90_ms:.0f} / {row.ttft_p99_ms:.0f} | "
        f"{row.tpot_p50_ms:.1f} / {row.tpot_p99_ms:.1f} | {row.throughput_rps:.2f} | {row.attainment:.0%} | {row.encoded:.0%} |"
        for row in rows
    ]
    return "\n".join(lines)


def _count(row: Row) -> str:
    return f"{row.num_requests}, {row.num_failed} failed" if row.num_failed else str(row.num_requests)


def comparison(rows: Sequence[Row]) -> str:
    """EPD beside each other shape under the same load, as a table: where it wins and where it loses."""
    lines = [
        "| encoder | workload | load | against | TTFT p50 | TTFT p90 | TPOT p50 | requests/s | attainment |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for ours in rows:
        peers = [row for row in rows if _load_of(row) == _load_of(ours) and row.shape != EPD]
        for peer in peers if ours.shape == EPD else ():
            cells = [
                _ratio(ours.ttft_p50_ms, peer.ttft_p50_ms),
                _ratio(ours.ttft_p90_ms, peer.ttft_p90_ms),
                _ratio(ours.tpot_p50_ms, peer.tpot_p50_ms),
                _ratio(ours.throughput_rps, peer.throughput_rps, is_more_better=True),
                f"{ours.attainment:.0%} / {peer.attainment:.0%}",
            ]
            lines.append(
                f"| {ours.encoder} | {ours.workload} | {ours.load:.0%} | {peer.shape} | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def _load_of(row: Row) -> tuple[str, str, float]:
    return row.encoder, row.workload, row.load


def _ratio(ours: float, theirs: float, *, is_more_better: bool = False) -> str:
    """Ours to theirs, and who is ahead."""
    ratio = ours / theirs
    if abs(ratio - 1) <= EVEN:
        return f"{ratio:.2f} even"
    return f"{ratio:.2f} {'wins' if (ratio > 1) == is_more_better else 'loses'}"
