"""Models of Hugging Face folders that take pictures, by architecture: what reads them, and where their weights are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from workers.model import hf_idefics3, hf_qwen2_5_vl
from workers.model.config import RopeConfig
from workers.model.hf_folder import JsonValues
from workers.model.hf_rope import read_mrope, read_rope
from workers.model.vision.config import VisionConfig


@dataclass(frozen=True, slots=True)
class VisionFamily:
    """What tells models that take pictures apart."""

    name: str
    #: Whose family the text model is, among the architectures of text models.
    text_architecture: str
    #: What config.json says of the text model.
    text_values: Callable[[JsonValues], JsonValues]
    #: Tokens have a position in time, in height and in width.
    has_mrope: bool
    #: From config.json, the folder, the tokenizer, and the hidden size of the text model.
    read_vision: Callable[[JsonValues, Path, Tokenizer, int], VisionConfig]
    #: A stored name as text models alone, or old folders, have it.
    plain_name: Callable[[str], str]
    #: Beginnings of the plain names of the encoder's tensors.
    prefixes: tuple[str, ...]
    #: By name in the converted file, the plain names of what it holds, one after another.
    names: Mapping[str, tuple[str, ...]]
    #: The same for a layer, whose names in the converted file begin with "vision.layers.N.".
    layer_names: Mapping[str, tuple[str, ...]]

    def read_rope(self, values: JsonValues, source: str, default_theta: float) -> tuple[RopeConfig, int]:
        """See hf_rope.read_rope."""
        return (read_mrope if self.has_mrope else read_rope)(values, source, default_theta)

    def stored_names(self, num_layers: int) -> dict[str, tuple[str, ...]]:
        """Of an encoder of so many layers: by name in the converted file, the plain names of what it holds."""
        stored = dict(self.names)
        for i in range(num_layers):
            for name, parts in self.layer_names.items():
                stored[f"vision.layers.{i}.{name}"] = tuple(part.format(layer=i) for part in parts)
        return stored


def _idefics3(name: str) -> VisionFamily:
    return VisionFamily(
        name=name,
        text_architecture="LlamaForCausalLM",
        text_values=hf_idefics3.text_values,
        has_mrope=False,
        read_vision=hf_idefics3.read_vision,
        plain_name=hf_idefics3.plain_name,
        prefixes=hf_idefics3.VISION_PREFIXES,
        names=hf_idefics3.VISION_NAMES,
        layer_names=hf_idefics3.VISION_LAYER_NAMES,
    )


#: By the name under `architectures`.
VISION_FAMILIES = {
    "Idefics3ForConditionalGeneration": _idefics3("idefics3"),
    # The same in all that matters to pictures; it also takes videos, which are not read here.
    "SmolVLMForConditionalGeneration": _idefics3("smolvlm"),
    hf_qwen2_5_vl.ARCHITECTURE: VisionFamily(
        name="qwen2_5_vl",
        text_architecture="Qwen2ForCausalLM",
        text_values=hf_qwen2_5_vl.text_values,
        has_mrope=True,
        read_vision=hf_qwen2_5_vl.read_vision,
        plain_name=hf_qwen2_5_vl.plain_name,
        prefixes=("visual.",),
        names=hf_qwen2_5_vl.VISION_NAMES,
        layer_names=hf_qwen2_5_vl.VISION_LAYER_NAMES,
    ),
}
