"""What a request says of the reduction of its pictures. Pure."""

from orchestrator.errors import InvalidRequest
from protos import inference_pb2 as pb
from workers.api import ImageReduction
from workers.reduction_check import reduction_problem


def image_reduction(request: pb.GenerateRequest, default: ImageReduction | None) -> ImageReduction | None:
    """What it asks for, or the deployment's; None when that changes nothing. Raises InvalidRequest."""
    reduction = default
    if request.HasField("image_reduction"):
        asked, plain = request.image_reduction, ImageReduction()
        reduction = ImageReduction(
            asked.merge_threshold,
            asked.global_threshold,
            asked.individual_threshold,
            asked.key_fraction if asked.HasField("key_fraction") else plain.key_fraction,
            tuple(asked.layers) or plain.layers,
        )
        problem = reduction_problem(reduction)
        if problem is not None:
            raise InvalidRequest(f"image_reduction.{problem.field}", problem.value, problem.allowed)
        if reduction.is_on and request.sampling.HasField("prompt_logprobs"):
            allowed = "one of the two: prompt_logprobs need every token of the prompt"
            raise InvalidRequest("image_reduction", "set together with sampling.prompt_logprobs", allowed)
    is_scored = request.sampling.HasField("prompt_logprobs")
    return reduction if reduction is not None and reduction.is_on and not is_scored else None
