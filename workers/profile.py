"""A profile file: how long steps take on one machine, as `phasewise calibrate` writes it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from workers.errors import ProfileError
from workers.limits import WEIGHT_BYTES
from workers.step_shape import Contention, Curve, DeviceShape, ModelShape, StepCosts, StepShape

FORMAT = "phasewise-profile/v1"
WRITTEN_BY = "`phasewise calibrate` writes one"

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Ratio = Annotated[float, Field(ge=1)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, slots=True)
class ProfileStep:
    """A step that was measured, and what the fitted model says of it."""

    name: str
    shape: StepShape
    measured_s: float
    predicted_s: float


@dataclass(frozen=True, slots=True)
class Profile:
    """A fitted model, and where it comes from.

    date: ISO 8601. machine: what `describe_machine` says. threads: of the CPU kernels. model_digest: see ModelInfo.
    """

    date: str
    machine: dict[str, Any]
    threads: int
    model_digest: str
    costs: StepCosts
    steps: tuple[ProfileStep, ...]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class _Model(_Section):
    name: str
    num_weights: Count
    num_head_weights: CountOrZero
    weight_bytes: Positive
    num_layers: Count
    hidden_size: Count
    kv_token_bytes: Count


class _Contention(_Section):
    compute: Ratio
    memory: Ratio
    sliced: Ratio
    upper: Ratio


class _Device(_Section):
    name: str
    flops_per_s: Positive
    attention_flops_per_s: Positive
    bytes_per_s: Positive
    step_overhead_s: NotNegative
    memory_bytes: Positive
    transfer_bytes_per_s: Positive
    is_reading_hidden: bool
    compute_curve: Curve
    memory_curve: Curve
    contention: _Contention

    @field_validator("compute_curve", "memory_curve")
    @classmethod
    def _rises(cls, curve: Curve) -> Curve:
        points = [(0.0, 0.0), *curve]
        for (share, rate), (next_share, next_rate) in pairwise(points):
            if not (share < next_share <= 1.0 and rate < next_rate <= 1.0):
                raise ValueError(
                    f"[{next_share}, {next_rate}] is not above the point before it and at most 1"
                )
        return curve


class _Costs(_Section):
    model: _Model
    device: _Device
    factors: tuple[NotNegative, NotNegative, NotNegative, NotNegative]
    num_steps: CountOrZero
    mean_error: NotNegative | None
    upper_ratio: Ratio
    source: Literal["fitted"] = "fitted"
    #: Files of before have none; whoever begins with a profile counts anew.
    num_prompt_steps: CountOrZero = 0


class _Shape(_Section):
    num_decodes: CountOrZero
    decode_context: CountOrZero
    num_prefill_tokens: CountOrZero
    prefill_pairs: CountOrZero


class _Step(_Section):
    name: str
    shape: _Shape
    measured_s: Positive
    predicted_s: NotNegative


class _File(_Section):
    format: Literal["phasewise-profile/v1"]
    date: str
    machine: dict[str, Any]
    threads: Count
    model_digest: str
    costs: _Costs
    steps: list[_Step]


def to_json(profile: Profile) -> str:
    """The file's text."""
    return json.dumps({"format": FORMAT, **asdict(profile)}, indent=1) + "\n"


def from_json(text: str, *, file: str) -> Profile:
    """What `to_json` wrote. file: its name in messages. Raises ProfileError, which names every field that is wrong.

    Only the format, where it is another one or no JSON.
    """
    try:
        found = _File.model_validate_json(text)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # Of what is no profile at all each field is wrong.
        other = [one for one in errors if one["loc"] in ((), ("format",))]
        if other:
            [sentence] = _sentences(other)
            raise ProfileError(file, (f"is no profile: {sentence}; {WRITTEN_BY}",)) from error
        raise ProfileError(file, _sentences(errors)) from error
    costs = found.costs
    device = costs.device.model_dump(exclude={"contention"})
    return Profile(
        found.date,
        found.machine,
        found.threads,
        found.model_digest,
        StepCosts(
            ModelShape(**costs.model.model_dump()),
            DeviceShape(**device, contention=Contention(**costs.device.contention.model_dump())),
            costs.factors,
            costs.num_steps,
            costs.mean_error,
            costs.upper_ratio,
            num_prompt_steps=costs.num_prompt_steps,
        ),
        tuple(
            ProfileStep(step.name, StepShape(**step.shape.model_dump()), step.measured_s, step.predicted_s)
            for step in found.steps
        ),
    )


def read(path: Path) -> Profile:
    """The profile in a file. Raises ProfileError."""
    file = str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ProfileError(file, (f"cannot be read: {error.strerror}; {WRITTEN_BY}",)) from error
    except UnicodeDecodeError as error:
        raise ProfileError(file, (f"is no profile: {error}; {WRITTEN_BY}",)) from error
    return from_json(text, file=file)


def misfit(
    profile: Profile,
    *,
    model_source: str,
    is_on_gpu: bool,
    num_threads: int,
    tensor_parallel: int,
    weight_dtype: str,
    kv_dtype: str,
) -> str | None:
    """Why it is none for such a worker, as far as that is known before one has loaded its model, and what to do; None when nothing says so."""
    costs, name = profile.costs, PurePath(model_source).name
    if tensor_parallel > 1:
        return f"is of one device, and the layers are spread over {tensor_parallel}, which nobody calibrates; leave it out"
    where = "a GPU" if is_on_gpu else "a CPU"
    bytes_each = costs.model.weight_bytes
    if costs.model.name != name:
        problem = f"is of {costs.model.name}, and the model is {name}"
    elif costs.device.is_reading_hidden is not is_on_gpu:
        problem = f"is of {costs.device.name}, and the worker computes on {where}"
    elif not _is_kept_in(weight_dtype, bytes_each):
        problem = f"is of weights of {bytes_each:g} bytes, and the worker keeps them in {weight_dtype}"
    elif not is_on_gpu and profile.threads != num_threads:
        problem = f"is of a worker with threads: {profile.threads}, and this one has {num_threads}"
    else:
        return None
    command = f"phasewise calibrate --model {model_source} --weight-dtype {weight_dtype}"
    command += f" --device cuda --kv-dtype {kv_dtype}" if is_on_gpu else f" --threads {num_threads}"
    return f"{problem}; `{command}` writes one that fits"


def _is_kept_in(weight_dtype: str, weight_bytes: float) -> bool:
    least = WEIGHT_BYTES[weight_dtype]
    # With fp8 the LM head is kept otherwise, and the mean is somewhere between.
    return least <= weight_bytes < 2 * least if weight_dtype == "fp8" else weight_bytes == least


def _sentences(errors: Sequence[ErrorDetails]) -> tuple[str, ...]:
    found = []
    for error in errors:
        path = ".".join(map(str, error["loc"]))
        found.append(f"{path}: {error['msg']}" if path else str(error["msg"]))
    return tuple(found)
