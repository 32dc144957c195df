"""What `phasewise status` prints of one deployment, for a terminal of 80 columns and as JSON. Pure."""

from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.cli import table
from orchestrator.cli.gpu_text import gpu_lines
from orchestrator.cli.switch_text import scale_text, switch_text
from orchestrator.cli.transfer_text import counted
from orchestrator.control.role_switch import phase_text
from orchestrator.control.view import ClusterView, WorkerView
from orchestrator.runtime.registry import RunningDeployment
from workers.api import (
    BlockCounts,
    EmbeddingCounts,
    KvDirection,
    KvPeer,
    KvReuseCounts,
    Phase,
    WorkerId,
    WorkerStatus,
)

MIB = 2**20
#: A controller that has not spoken for so long is called silent; it speaks at every tick.
SILENT_AFTER_S = 5.0
#: Changes of phases that are shown.
MAX_SWITCHES = 5


@dataclass(frozen=True, slots=True)
class GatewayReport:
    """What a gateway answered: the view it holds, and its counts of requests."""

    #: None until a controller has published one.
    view: ClusterView | None
    #: Seconds since the view arrived.
    age_s: float
    num_running: int
    num_waiting: int
    num_finished: int
    num_failed: int
    #: As too late, before they ran.
    num_refused: int = 0


@dataclass(frozen=True, slots=True)
class DeploymentStatus:
    """One registered deployment and what its gateway said; `problem` says why when it said nothing."""

    running: RunningDeployment
    report: GatewayReport | None
    problem: str = ""


def lines(status: DeploymentStatus) -> list[str]:
    """The text for people."""
    running, report = status.running, status.report
    if report is None:
        return [
            f"{running.name}: DOES NOT ANSWER",
            f"  {status.problem}",
            f"  `phasewise down {running.name}` clears it away",
        ]
    view = report.view
    if view is None:
        return [f"{running.name}: no controller has reported yet", *_requests(running, report)]
    return [
        f"{view.deployment}: model {view.model}, {_readiness(view)}",
        *_requests(running, report),
        *_controller(view, report.age_s),
        "",
        *table.lines(_LIFE_HEADER, [_life_row(worker) for worker in view.workers], left=_LEFT),
        *_reasons(view),
        "",
        *table.lines(_LOAD_HEADER, [_load_row(worker) for worker in view.workers], left=_LEFT),
        *_switches(view),
        *_wrongs(view),
        *_gpus(view),
        *_transfers(view),
        *_reuse(view),
        *_pictures(view),
        *_latency(view),
        *_layouts(view),
    ]


def as_json(status: DeploymentStatus) -> dict[str, Any]:
    """The same for programs; without `report` when the gateway does not answer."""
    found: dict[str, Any] = {**asdict(status.running), "answers": status.report is not None}
    if status.report is None:
        return {**found, "problem": status.problem}
    report = asdict(status.report)
    view = status.report.view
    if view is not None:
        report["view"]["is_ready"] = view.is_ready
        report["view"] = _plain(report["view"])
    return {**found, "report": report}


def _readiness(view: ClusterView) -> str:
    if view.is_ready:
        return "ready"
    served = {phase for w in view.workers if w.state == "ready" for phase in w.phases}
    missing = [phase.value for phase in (Phase.PREFILL, Phase.DECODE) if phase not in served]
    return f"NOT READY: no worker is ready for {' and '.join(missing)}"


def _requests(running: RunningDeployment, report: GatewayReport) -> list[str]:
    now = f"{report.num_running} running, {report.num_waiting} waiting"
    so_far = f"{report.num_finished} finished, {report.num_failed} failed"
    if report.num_refused:
        so_far += f", {report.num_refused} refused"
    return [f"  gateway     {running.address}", f"  requests    {now}, {so_far}"]


def _controller(view: ClusterView, age_s: float) -> list[str]:
    if age_s >= SILENT_AFTER_S:
        what = f"the controller has been silent for {age_s:.0f} s: serving goes on"
        return [f"  controller  pid {view.controller_pid}; {what}"]
    heard = f"heard {age_s:.1f} s ago"
    return [f"  controller  pid {view.controller_pid}, start {view.controller_epoch}, {heard}"]


#: INC is the incarnation.
_LIFE_HEADER = ("WORKER", "PHASES", "STATE", "INC", "RESTARTS", "PID", "ADDRESS")
_LOAD_HEADER = (
    "WORKER",
    "WAITING",
    "RUNNING",
    "KV FREE",
    "IN USE",
    "LEASED",
    "TOTAL",
    "LEASES",
    "MEMORY",
)
_LEFT = ("WORKER", "PHASES", "STATE", "ADDRESS")
_NO_BLOCKS = BlockCounts(0, 0, 0, 0, 0)


def _life_row(worker: WorkerView) -> tuple[str, ...]:
    return (
        worker.worker_id,
        _phases(worker),
        worker.state.value,
        str(worker.incarnation),
        str(worker.num_restarts),
        str(worker.status.pid) if worker.status else "-",
        worker.address or "-",
    )


def _load_row(worker: WorkerView) -> tuple[str, ...]:
    status = worker.status
    if status is None:
        return (worker.worker_id, *["-"] * (len(_LOAD_HEADER) - 1))
    blocks = status.blocks
    counts = (blocks.free + blocks.cached, blocks.in_use, blocks.leased, blocks.total)
    return (
        worker.worker_id,
        str(status.num_waiting),
        str(status.num_running),
        *(["-"] * len(counts) if blocks == _NO_BLOCKS else [str(count) for count in counts]),
        str(status.num_leases),
        f"{status.memory_bytes / MIB:.0f} MiB",
    )


def _reasons(view: ClusterView) -> list[str]:
    """One line for each worker that is not simply ready, or that says something about itself."""
    found = []
    for worker in view.workers:
        message = worker.status.message if worker.status else ""
        texts = [text for text in (worker.reason, message) if text]
        if texts and worker.state != "ready":
            found.append(f"  {worker.worker_id}: {'; '.join(dict.fromkeys(texts))}")
    return found


def _phases(worker: WorkerView) -> str:
    kept, leaving = phase_text(worker.phases), phase_text(worker.leaving)
    return " ".join(text for text in (kept, leaving and f"(leaving {leaving})") if text)


def _plain(found: Any) -> Any:
    """With phases as lists, in the order in which requests pass them."""
    if isinstance(found, frozenset):
        return [phase.value for phase in Phase if phase in found]
    if isinstance(found, dict):
        return {name: _plain(value) for name, value in found.items()}
    return [_plain(one) for one in found] if isinstance(found, list | tuple) else found


def _switches(view: ClusterView) -> list[str]:
    """The last changes of phases, and of the number of workers, the latest last."""
    return [
        *(f"  switch {switch_text(one)}" for one in view.switches[-MAX_SWITCHES:]),
        *(f"  scale {scale_text(one)}" for one in view.scales[-MAX_SWITCHES:]),
    ]


def _wrongs(view: ClusterView) -> list[str]:
    """A line for each worker whose own books are wrong. There should be none, ever."""
    found = []
    for worker in view.workers:
        status = worker.status
        if status is not None and (status.leaked_blocks or status.num_invariant_failures):
            found.append(
                f"  {worker.worker_id}: {status.leaked_blocks} LEAKED BLOCKS, {status.num_invariant_failures} idle "
                f"checks failed; `phasewise kv ledger {worker.worker_id}` shows who holds what"
            )
    return found


def _gpus(view: ClusterView) -> list[str]:
    """A line for each worker with a GPU, and one for what is worth one of its own."""
    found = []
    for worker in view.workers:
        gpu = worker.status.gpu if worker.status is not None else None
        if gpu is not None:
            found += [f"  {worker.worker_id}: {line}" for line in gpu_lines(gpu)]
    return ["", *found] if found else []


def _transfers(view: ClusterView) -> list[str]:
    """A line for each pair of workers that KV went between, and one for each worker that had trouble with it.

    A pair is told of by the worker that sends.
    """
    at = {worker.address: worker.worker_id for worker in view.workers if worker.address}
    known = [(worker.worker_id, worker.status) for worker in view.workers if worker.status is not None]
    pairs = [
        _pair(worker_id, peer, at)
        for worker_id, status in known
        for peer in status.peers
        if peer.direction is KvDirection.SENDING
    ]
    troubles = [f"  {worker_id}: {trouble}" for worker_id, status in known if (trouble := _trouble(status))]
    return ["", *pairs, *troubles] if pairs or troubles else []


def _reuse(view: ClusterView) -> list[str]:
    """A line for each worker that did not have to compute all KV."""
    known = [(worker.worker_id, worker.status.reuse) for worker in view.workers if worker.status is not None]
    found = [f"  {worker_id}: {text}" for worker_id, reuse in known if (text := _reused(reuse))]
    return ["", *found] if found else []


def _pictures(view: ClusterView) -> list[str]:
    """A line for each worker that has embeddings of pictures."""
    found = [
        f"  {worker.worker_id}: {_embeddings(worker.status.embeddings, Phase.ENCODE in worker.phases)}"
        for worker in view.workers
        if worker.status is not None and worker.status.embeddings.num_blocks
    ]
    return ["", *found] if found else []


def _latency(view: ClusterView) -> list[str]:
    """A line for each worker that has learned how long its work takes."""
    known = [(worker.worker_id, worker.status) for worker in view.workers if worker.status is not None]
    found = [f"  {worker_id}: {text}" for worker_id, status in known if (text := _learned(status))]
    return ["", *found] if found else []


def _layouts(view: ClusterView) -> list[str]:
    """A line for each worker whose steps may be split: for which part of the time that its device computed it had which layout."""
    found = []
    for worker in view.workers:
        layout_s = worker.status.layout_s if worker.status is not None else ()
        total_s = sum(seconds for _, seconds in layout_s)
        if total_s > 0:
            parts = "; ".join(f"{name} {seconds / total_s:.0%}" for name, seconds in layout_s)
            found.append(f"  {worker.worker_id}: steps {parts}")
    return ["", *found] if found else []


def _learned(status: WorkerStatus) -> str:
    found = []
    steps, batches = status.step_costs, status.encode_costs
    if steps is not None and steps.mean_error is not None:
        found.append(f"step model: {steps.source}, {steps.mean_error:.0%} off, {steps.num_steps:,} steps")
    if batches is not None and batches.mean_error is not None:
        found.append(f"encode model: {batches.mean_error:.0%} off, {batches.num_batches:,} batches")
    return ", ".join(found)


def _embeddings(counts: EmbeddingCounts, can_encode: bool) -> str:
    found = [
        f"embedding blocks: {counts.num_free} free, {counts.num_cached} cached, of {counts.num_blocks}",
        f"{counted(counts.num_waiting, 'request')} waiting for room",
        f"tiles: {counts.num_hits} found, {counts.num_misses} not, {counts.num_evictions} evicted",
    ]
    if can_encode:
        found.append(
            f"encode: {counts.num_encodes_running} running, {counted(counts.num_tiles_encoded, 'tile')} in "
            f"{counted(counts.num_batches, 'batch', 'batches')}, {counts.num_tiles_cached} cached"
        )
    return ", ".join(found)


def _reused(reuse: KvReuseCounts) -> str:
    """What was taken from where; empty when nothing was."""
    found = []
    if reuse.num_cached_tokens:
        found.append(f"{counted(reuse.num_cached_tokens, 'prompt token')} cached")
    if reuse.num_reused_tokens:
        found.append(f"{reuse.num_reused_tokens} reused from other contexts")
    if reuse.num_prefixes_asked or reuse.num_prefixes_refused:
        rate = (
            f" ({reuse.num_fetched_tokens} tokens in {reuse.fetch_s:.3g} s)"
            if reuse.num_prefixes_fetched
            else ""
        )
        found.append(
            f"prefixes: {reuse.num_prefixes_asked} asked for, {reuse.num_prefixes_fetched} fetched{rate}, "
            f"{reuse.num_prefixes_refused} faster computed"
        )
    if reuse.num_host_saved:
        found.append(
            f"host memory: {counted(reuse.num_host_blocks, 'block')}, {reuse.num_host_bytes / MIB:.1f} MiB, "
            f"{reuse.num_host_hits} restored of {reuse.num_host_saved} saved, {reuse.num_host_dropped} dropped"
        )
    if reuse.num_host_corrupt:
        found.append(f"{reuse.num_host_corrupt} DAMAGED in host memory")
    return ", ".join(found)


def _pair(sender: WorkerId, peer: KvPeer, at: dict[str, WorkerId]) -> str:
    why = f" ({peer.reason})" if peer.reason else ""
    rate = f" at {peer.bytes_per_s / MIB:.3g} MiB/s" if peer.bytes_per_s else ""
    problem = f"; last problem: {peer.last_problem}" if peer.last_problem else ""
    transfers = counted(peer.num_transfers, "transfer")
    return (
        f"  {sender} -> {at.get(peer.address, peer.address)}: {transfers} by {peer.transport or 'none yet'}{why}, "
        f"codec {peer.codec or 'none'}, {peer.num_bytes / MIB:.1f} MiB{rate}{problem}"
    )


def _trouble(status: WorkerStatus) -> str:
    """What went wrong in hand-offs of this worker; empty when nothing did."""
    counts = status.transfers
    named = (
        (counts.num_corrupt_chunks, "corrupt chunk"),
        (counts.num_resent_chunks, "resent chunk"),
        (counts.num_digest_mismatches, "wrong digest"),
        (counts.num_resumed, "resumed transfer"),
        (counts.num_expired, "expired transfer"),
        (counts.num_refused, "refused transfer"),
    )
    return ", ".join(counted(number, noun) for number, noun in named if number)
