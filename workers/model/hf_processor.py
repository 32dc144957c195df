"""What a Hugging Face folder says of its image processor, in the spellings of transformers 4 and 5."""

from collections.abc import Sequence
from pathlib import Path

from workers.errors import CorruptModel, ModelUnavailable, UnsupportedModel
from workers.model.hf_folder import PREPROCESSOR, PROCESSOR, JsonValues, read_json

#: Steps that are always taken.
STEPS = ("do_resize", "do_rescale", "do_normalize")


def image_processor(folder: Path) -> JsonValues:
    """The image processor's numbers. New folders have one file for all processors, which counts more, as in transformers.

    Raises ModelUnavailable when there is none, and UnsupportedModel for one that leaves a step out.
    """
    values = read_json(folder / PROCESSOR).inner("image_processor")
    if not values.values:
        values = read_json(folder / PREPROCESSOR)
    if not values.values:
        problem = f"neither {PROCESSOR} nor {PREPROCESSOR} describes its image processor"
        raise ModelUnavailable(str(folder), problem, "Complete the download of the model")
    for step in STEPS:
        if not values.flag(step, True):
            feature = f"an image processor with {step} = false"
            raise UnsupportedModel(str(folder), feature, f"{step} absent or true")
    return values


def numbers(values: JsonValues, key: str, default: Sequence[float]) -> tuple[float, ...]:
    """An array of numbers. Raises CorruptModel when it holds something else."""
    items = values.items(key)
    if items is None:
        return tuple(default)
    found = tuple(
        float(item) for item in items if isinstance(item, int | float) and not isinstance(item, bool)
    )
    if len(found) != len(items):
        raise CorruptModel(values.path, None, f"{key!r} is {str(items)[:80]!r}, not a list of numbers")
    return found
