"""Pictures of a request: checked, planned, and put into its prompt. Pure, apart from the tokenizer that it is given.

Nothing is decoded here: a file's header says how large the picture is, and with that how many tokens stand for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.control.prompt_images import ImageFile, PlacedTile, PromptImages
from orchestrator.errors import InvalidRequest
from protos import inference_pb2 as pb
from workers.api import ImageReduction, ImageTile, ModelInfo
from workers.embeddings.names import embedding_key, image_digest
from workers.errors import ImageRejected
from workers.images.header import read_headers
from workers.images.limits import ImageLimits
from workers.model.vision.config import VisionConfig, processor_digest
from workers.model.vision.plan import ImagePlan

#: Of all pictures of a request.
MAX_TILES = 1024

LIMITS = ImageLimits()
#: Of the encoders that merge embeddings and know which matter most.
REDUCIBLE_FAMILY = "idefics3"


@dataclass(frozen=True, slots=True)
class PlannedImages:
    """Pictures of which it is known how each is cut and what stands for it."""

    files: tuple[ImageFile, ...]
    plans: tuple[ImagePlan, ...]
    #: What names the content of each file.
    digests: tuple[bytes, ...]
    reduction: ImageReduction | None = None


def plan_images(
    images: Sequence[pb.Image],
    model: ModelInfo,
    vision: VisionConfig | None,
    limits: ImageLimits = LIMITS,
    reduction: ImageReduction | None = None,
) -> PlannedImages:
    """How these pictures are cut. reduction: what is to become of them.

    Raises InvalidRequest, which says which picture is at fault.
    """
    if not images:
        return PlannedImages((), (), ())
    if vision is None:
        allowed = f"none, since {model.architecture} takes no pictures"
        raise InvalidRequest("images", f"{len(images)} pictures", allowed)
    try:
        headers = read_headers([(image.data, image.media_type) for image in images], limits)
        plans = tuple(_plan(vision, header.width, header.height, i) for i, header in enumerate(headers, 1))
    except ImageRejected as error:
        raise InvalidRequest("images", f"refused: {error}", "see docs/multimodal.md") from error
    num_tiles = sum(len(plan.tiles) for plan in plans)
    if num_tiles > MAX_TILES:
        allowed = f"at most {MAX_TILES} tiles; send fewer or smaller pictures"
        raise InvalidRequest("images", f"{len(images)} pictures of {num_tiles} tiles", allowed)
    num_embeddings = sum(plan.num_embeddings for plan in plans)
    if model.max_image_embeddings and num_embeddings > model.max_image_embeddings:
        allowed = (
            f"at most {model.max_image_embeddings} embeddings, what the workers have room for "
            "(engine.imageCacheMiB); send fewer or smaller pictures"
        )
        raise InvalidRequest("images", f"{len(images)} pictures of {num_embeddings} embeddings", allowed)
    # Before a text is made of them, and tokenised.
    if num_embeddings >= model.max_context_tokens:
        allowed = (
            f"fewer than {model.max_context_tokens} embeddings, since the context holds {model.max_context_tokens} "
            "tokens with text and output; send fewer or smaller pictures"
        )
        raise InvalidRequest("images", f"{len(images)} pictures of {num_embeddings} embeddings", allowed)
    files = tuple(
        ImageFile(image.data, header.media_type, header.width, header.height)
        for image, header in zip(images, headers, strict=True)
    )
    if reduction is not None and reduction.is_on and vision.family != REDUCIBLE_FAMILY:
        allowed = "none of this model, only of Idefics3 and SmolVLM; send it all 0"
        raise InvalidRequest("image_reduction", "for pictures", allowed)
    return PlannedImages(files, plans, tuple(image_digest(image.data) for image in images), reduction)


def _plan(vision: VisionConfig, width: int, height: int, number: int) -> ImagePlan:
    try:
        return vision.plan(width, height)
    except ImageRejected as error:
        raise error.of(number) from None


def place_images(
    text: str,
    field: str,
    images: PlannedImages,
    vision: VisionConfig | None,
    encode: Callable[[str], list[int]],
) -> tuple[tuple[int, ...], PromptImages | None]:
    """Token ids of a prompt with its pictures, whose placeholders are in the text, and where the tiles' tokens are.

    field: of the request, for errors. Raises InvalidRequest.
    """
    if vision is None:
        return tuple(encode(text)), None
    parts = text.split(vision.placeholder)
    if len(parts) - 1 != len(images.plans):
        value = f"a text with {len(parts) - 1} times {vision.placeholder!r}, which stands for a picture"
        raise InvalidRequest(field, value, f"once for each picture, so {len(images.plans)} times")
    expanded = "".join(
        part + plan.text for part, plan in zip(parts, (*images.plans, ImagePlan(0, 0, (), "")), strict=True)
    )
    token_ids = encode(expanded)
    if not images.plans:
        _refuse_stray_tokens(token_ids, vision, field)
        return tuple(token_ids), None
    return tuple(token_ids), _placed(token_ids, images, vision, field)


def _refuse_stray_tokens(token_ids: Sequence[int], vision: VisionConfig, field: str) -> None:
    if vision.image_token_id in token_ids:
        value = f"a text with {vision.image_token!r}, which stands for an embedding of a picture"
        raise InvalidRequest(field, value, "a text without it")


def _placed(
    token_ids: Sequence[int], images: PlannedImages, vision: VisionConfig, field: str
) -> PromptImages:
    """Where the embeddings of each tile are: its tokens are neighbours."""
    places = [i for i, token_id in enumerate(token_ids) if token_id == vision.image_token_id]
    if len(places) != sum(plan.num_embeddings for plan in images.plans):
        _refuse_stray_tokens([vision.image_token_id], vision, field)
    processor = processor_digest(vision)
    placed: list[PlacedTile] = []
    at = 0
    for file, (plan, digest) in enumerate(zip(images.plans, images.digests, strict=True)):
        for number, tile in enumerate(plan.tiles):
            start = places[at]
            at += tile.num_embeddings
            assert places[at - 1] == start + tile.num_embeddings - 1
            key = embedding_key(digest, processor, number, images.reduction)
            placed.append(
                PlacedTile(
                    file,
                    number,
                    tile.num_patches,
                    ImageTile(start, tile.num_embeddings, key, plan.grid),
                )
            )
    return PromptImages(images.files, tuple(placed), images.reduction)
