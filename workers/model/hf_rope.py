"""The rotary embedding that a config.json describes, in the old spelling (`rope_theta`, `rope_scaling`) and in
the new one (`rope_parameters`)."""

from dataclasses import replace

from workers.errors import CorruptModel, UnsupportedModel
from workers.model.config import RopeConfig, RopeScaling, yarn_attention_factor
from workers.model.hf_folder import JsonValues

#: Name under `rope_type`, or `type` in older files.
ROPE_TYPES = {
    "default": RopeScaling.NONE,
    "linear": RopeScaling.LINEAR,
    "dynamic": RopeScaling.DYNAMIC,
    "yarn": RopeScaling.YARN,
    "llama3": RopeScaling.LLAMA3,
}
#: `finetuned` is a note in files of the first YaRN models.
KNOWN_KEYS = frozenset(
    {
        "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor",
        "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "low_freq_factor",
        "high_freq_factor", "partial_rotary_factor", "finetuned",
    }
)  # fmt: skip
#: M-RoPE of files that name no sections.
MROPE_SECTION = (16, 24, 24)
MROPE_TYPE = "mrope"


def read_rope(values: JsonValues, source: str, default_theta: float) -> tuple[RopeConfig, int]:
    """The rotary embedding, and the context in tokens that the model is for.

    values: of config.json. Raises UnsupportedModel and CorruptModel.
    """
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    told = values.inner(key)
    scaling = _scaling(told, source)
    theta = told.number("rope_theta", values.number("rope_theta", default_theta))
    context_tokens = values.positive("max_position_embeddings")
    match scaling:
        case RopeScaling.NONE:
            return RopeConfig(theta), context_tokens
        case RopeScaling.LINEAR:
            factor = told.number("factor")
            return RopeConfig(theta, scaling, factor), int(context_tokens * factor)
        case RopeScaling.DYNAMIC:
            # The context that transformers stretches is this one, whatever else the file says.
            factor = told.number("factor")
            return RopeConfig(theta, scaling, factor, context_tokens), int(context_tokens * factor)
        case RopeScaling.YARN:
            rope = _yarn(values, told, theta, context_tokens)
            return rope, max(context_tokens, int(rope.original_context_tokens * rope.factor))
        case RopeScaling.LLAMA3:
            rope = RopeConfig(
                theta,
                scaling,
                told.number("factor"),
                _original_context(values, told, context_tokens),
                low_freq_factor=told.number("low_freq_factor"),
                high_freq_factor=told.number("high_freq_factor"),
            )
            return rope, context_tokens


def read_mrope(values: JsonValues, source: str, default_theta: float) -> tuple[RopeConfig, int]:
    """As `read_rope`, for a model whose tokens have a position in time, in height and in width."""
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    told = dict(values.inner(key).values)
    section = told.pop("mrope_section", None)
    if section is None:
        section = list(MROPE_SECTION)
    if not isinstance(section, list) or not all(type(size) is int and size >= 0 for size in section):
        problem = f"'mrope_section' is {str(section)[:80]!r}, not a list of three sizes"
        raise CorruptModel(values.path, None, problem)
    # Old files name the kind so, when nothing is scaled.
    plain = {name: "default" for name in ("rope_type", "type") if told.get(name) == MROPE_TYPE}
    rope, context_tokens = read_rope(
        JsonValues(values.path, {**values.values, key: told | plain}), source, default_theta
    )
    return replace(rope, mrope_section=tuple(section)), context_tokens


def _scaling(told: JsonValues, source: str) -> RopeScaling:
    name = told.get("rope_type") or told.get("type") or "default"
    scaling = ROPE_TYPES.get(name) if isinstance(name, str) else None
    if scaling is None:
        raise UnsupportedModel(source, f"rope type {name!r}", ", ".join(ROPE_TYPES))
    if told.get("partial_rotary_factor") not in (None, 1, 1.0):
        feature = f"partial_rotary_factor = {told.get('partial_rotary_factor')}"
        raise UnsupportedModel(source, feature, "rotation of whole heads")
    other = sorted(set(told.values) - KNOWN_KEYS)
    if other:
        raise UnsupportedModel(source, f"rope parameter {other[0]!r}", ", ".join(sorted(KNOWN_KEYS)))
    return scaling


def _original_context(values: JsonValues, told: JsonValues, context_tokens: int) -> int:
    """Beside the parameters it counts more than within them."""
    within = told.positive("original_max_position_embeddings", context_tokens)
    return values.positive("original_max_position_embeddings", within)


def _yarn(values: JsonValues, told: JsonValues, theta: float, context_tokens: int) -> RopeConfig:
    original = _original_context(values, told, context_tokens)
    factor = told.number("factor", context_tokens / original)
    inferred = yarn_attention_factor(factor)
    if told.get("mscale") and told.get("mscale_all_dim"):
        inferred = yarn_attention_factor(factor, told.number("mscale")) / yarn_attention_factor(
            factor, told.number("mscale_all_dim")
        )
    if theta <= 1:
        raise CorruptModel(values.path, None, f"rope_theta is {theta} with yarn, not above 1")
    return RopeConfig(
        theta,
        RopeScaling.YARN,
        factor,
        original,
        beta_fast=told.number("beta_fast", 32.0),
        beta_slow=told.number("beta_slow", 1.0),
        attention_factor=told.number("attention_factor", inferred),
        truncate=told.flag("truncate", True),
    )
