"""A candidate as a manifest. Pure."""

import json

from orchestrator.control.slo import Slo
from orchestrator.manifest.engine import MIB
from orchestrator.planner.shapes import Candidate, phases_text

#: The gateway and the workers are to refuse nothing that the plan has counted on.
MAX_REQUESTS = 10_000


def text(candidate: Candidate, *, model: str, slo: Slo, kv_cache_bytes: int, comment: str) -> str:
    """YAML. comment: one line or several, without #."""
    knobs = candidate.knobs
    engine = (
        f"{{kvCacheMiB: {kv_cache_bytes // MIB}, tokenBudget: {knobs.token_budget}, "
        f"maxRunningSequences: {knobs.max_running_sequences}, maxWaitingRequests: {MAX_REQUESTS}, "
        f"prefillOrder: {knobs.prefill_order}}}"
    )
    lines = [
        *(f"# {line}" for line in comment.splitlines()),
        "apiVersion: phasewise/v1",
        "kind: Deployment",
        "metadata:",
        "  name: planned",
        "",
        "spec:",
        "  model:",
        f"    source: {json.dumps(f'/models/{model}')}   # put its folder here; only the model's shape was planned with",
        "",
        "  workers:",
    ]
    for phases, num in candidate.shape.groups:
        names = phases_text(phases).split("+")
        lines += [
            f"    - name: {'-'.join(names)}",
            f"      phases: [{', '.join(names)}]",
            f"      replicas: {num}",
            f"      engine: {engine}",
        ]
    lines += [
        "",
        "  slo:",
        f"    ttftMs: {slo.ttft_s * 1e3:.6g}",
        f"    tpotMs: {slo.tpot_s * 1e3:.6g}",
        "",
        "  gateway:",
        f"    maxWaitingRequests: {MAX_REQUESTS}",
        f"    maxRunningRequests: {MAX_REQUESTS}",
    ]
    return "\n".join(lines) + "\n"
