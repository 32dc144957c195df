"""The vision encoders that there are, as configurations, and how these are kept as JSON. Pure."""

import hashlib
import json
from dataclasses import asdict, fields
from typing import Any

from workers.model.vision.idefics3_config import Idefics3Vision
from workers.model.vision.qwen2_5_vl_config import Qwen25Vision

VisionConfig = Idefics3Vision | Qwen25Vision

_FAMILIES: dict[str, type[Idefics3Vision] | type[Qwen25Vision]] = {
    str(cls.__dataclass_fields__["family"].default): cls for cls in (Idefics3Vision, Qwen25Vision)
}


def vision_json(config: VisionConfig) -> str:
    """As `read_vision_json` reads it."""
    return json.dumps(asdict(config), ensure_ascii=False)


def read_vision_json(text: str) -> VisionConfig:
    """Read what `vision_json` wrote. Raises ValueError when it is not that."""
    return vision_from_values(json.loads(text))


def vision_from_values(values: Any) -> VisionConfig:
    """From what JSON makes of a configuration. Raises ValueError for other fields."""
    cls = _FAMILIES.get(str(values.get("family"))) if isinstance(values, dict) else None
    if cls is None or set(values) != {field.name for field in fields(cls)}:
        raise ValueError("not a vision configuration of this version")
    told: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return cls(**told)


def processor_digest(config: VisionConfig) -> str:
    """Of all that the embeddings of a picture depend on beside the weights: SHA-256, hexadecimal."""
    return hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()
