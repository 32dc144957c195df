"""Steps as the latency model knows them. Pure."""

from workers.engine.step_plan import StepPlan
from workers.step_shape import StepShape


def shape_of(plan: StepPlan) -> StepShape:
    """What a step computes."""
    context = sum(len(sequence.token_ids) for sequence in plan.decodes)
    num_rows = len(plan.decodes) + sum(tree.num_drafts for tree in plan.drafts.values())
    num_prefill = pairs = 0
    for part in plan.chunks:
        rows = part.num_rows
        num_prefill += rows
        pairs += rows * part.start + rows * (rows + 1) // 2
    return StepShape(num_rows, context, num_prefill, pairs)


def is_described(plan: StepPlan) -> bool:
    """Its shape says all that takes time: no blocks are copied or unpacked, no chunk has a pass of its own."""
    return not (plan.copies or plan.restores or any(part.is_alone for part in plan.chunks))
