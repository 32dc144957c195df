"""The keys of `gateway.imageReduction`. Pure."""

from typing import Annotated

from pydantic import AfterValidator, Field

from orchestrator.manifest.section import Allowed, Section
from workers.api import MAX_REDUCTION_LAYERS, ImageReduction

_REDUCTION = ImageReduction()


def _check_layers(layers: tuple[float, ...]) -> tuple[float, ...]:
    if list(layers) != sorted(set(layers)) or not all(0 <= layer <= 1 for layer in layers):
        raise ValueError(f"{list(layers)} are no layers")
    return layers


class ImageReductionSection(Section):
    """Fewer embeddings of pictures than prompts have tokens for; what it costs in quality is in docs/multimodal.md."""

    merge_threshold: float = Field(
        default=_REDUCTION.merge_threshold,
        ge=0,
        le=1,
        description="A window of embeddings becomes one from this mean cosine on; 0 merges none.",
    )
    global_threshold: float = Field(
        default=_REDUCTION.global_threshold,
        ge=0,
        le=1,
        description="An embedding leaves the prompt when it gets less than this share of the attention that text gives "
        "to pictures, and less than individualThreshold; 0 drops none.",
    )
    individual_threshold: float = Field(
        default=_REDUCTION.individual_threshold,
        ge=0,
        le=1,
        description="What no token of text may give it of its attention, if it is to leave; 0 drops none.",
    )
    key_fraction: float = Field(
        default=_REDUCTION.key_fraction,
        ge=0,
        le=1,
        description="Part of a tile's embeddings that never leave.",
    )
    layers: Annotated[
        tuple[float, ...],
        AfterValidator(_check_layers),
        Allowed("a list of 1 to 16 numbers from 0 to 1, ascending"),
    ] = Field(
        default=_REDUCTION.layers,
        min_length=1,
        max_length=MAX_REDUCTION_LAYERS,
        description="After which layers of the text model embeddings leave, as fractions of its depth.",
    )
