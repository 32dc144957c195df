"""Is a reduction of pictures one that can be done? Pure."""

from workers.api import MAX_REDUCTION_LAYERS, ImageReduction
from workers.sampling_check import Problem


def reduction_problem(reduction: ImageReduction) -> Problem | None:
    """The first thing that is wrong; None when nothing is."""
    for name in ("merge_threshold", "global_threshold", "individual_threshold", "key_fraction"):
        value: float = getattr(reduction, name)
        if not 0 <= value <= 1:
            return Problem(name, f"{value:g}", "0 to 1")
    layers = reduction.layers
    is_ascending = list(layers) == sorted(set(layers))
    if len(layers) > MAX_REDUCTION_LAYERS or not is_ascending or not all(0 <= layer <= 1 for layer in layers):
        allowed = f"at most {MAX_REDUCTION_LAYERS} fractions of the depth, ascending, each 0 to 1"
        return Problem("layers", str(list(layers)), allowed)
    return None
