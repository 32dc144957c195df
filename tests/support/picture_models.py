"""What workers tell of models that take pictures: one of each family, with the byte tokenizer."""

from typing import Any

from tokenizers import AddedToken

from tests.support.fake_worker import byte_model, byte_tokenizer
from workers.api import ModelInfo
from workers.model.vision.config import VisionConfig, vision_json
from workers.model.vision.idefics3_config import Idefics3Vision
from workers.model.vision.qwen2_5_vl_config import Qwen25Vision

#: The first ids after those of the byte tokenizer.
IMAGE_TOKEN_ID, OTHER_TOKEN_ID, LAST_TOKEN_ID = 259, 260, 261
_SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "text_hidden_size": 32,
    "image_token_id": IMAGE_TOKEN_ID,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "rescale_factor": 1 / 255,
    "resample": 3,
}
#: A tile has 16 patches, four of which are one embedding; any picture has two or four tiles and a global view.
IDEFICS3 = Idefics3Vision(
    **_SHAPE,
    patch_size=2,
    image_size=8,
    scale_factor=2,
    layer_norm_eps=1e-6,
    image_token="<image>",
    around_text="<around>",
    global_text="<global>",
    is_tiled=True,
    longest_edge=16,
    tile_size=8,
)
#: A square of 4 pixels a side is one embedding; a picture is one tile.
QWEN = Qwen25Vision(
    **_SHAPE,
    patch_size=2,
    temporal_patch_size=2,
    merge_size=2,
    window_size=8,
    full_attention_layers=(1,),
    image_token="<|image_pad|>",
    start_token="<|vision_start|>",
    end_token="<|vision_end|>",
    min_pixels=16,
    max_pixels=400,
)
#: Goes through texts and pictures itself, as those of both families do.
PARTS_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}PLACEHOLDER{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def picture_model(vision: VisionConfig = IDEFICS3, **changes: Any) -> ModelInfo:
    """A model with this encoder; its image token is the first after those of `byte_model`."""
    tokens = (
        (vision.image_token, vision.around_text, vision.global_text)
        if isinstance(vision, Idefics3Vision)
        else (vision.image_token, vision.start_token, vision.end_token)
    )
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    fields: dict[str, Any] = {
        "tokenizer_json": tokenizer.to_str().encode(),
        "chat_template": PARTS_TEMPLATE.replace("PLACEHOLDER", vision.placeholder),
        "architecture": vision.family,
        "vocab_size": LAST_TOKEN_ID + 1,
        "max_context_tokens": 4096,
        "max_sequence_tokens": 4096,
        "vision_json": vision_json(vision),
        "max_image_embeddings": 512,
    }
    return byte_model(**(fields | changes))
