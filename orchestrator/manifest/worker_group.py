"""The keys of a group of workers, those of `engine` aside. Pure: a profile that is named is read by who validates."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, ValidationInfo, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from orchestrator.manifest.engine import Engine
from orchestrator.manifest.section import Allowed, Section, inconsistent
from workers import limits, profile
from workers.api import WeightDtype
from workers.errors import ProfileError

MAX_REPLICAS = 1000

Name = Annotated[
    str,
    Field(pattern=r"^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$"),
    Allowed("1 to 40 lower-case letters, digits and hyphens, the first a letter, the last no hyphen"),
]
PhaseName = Literal["encode", "prefill", "decode"]


def _read_profile(value: Any, info: ValidationInfo) -> profile.Profile:
    if not isinstance(value, str):
        raise PydanticCustomError("string_type", "is no path")
    context = info.context or {}
    folder = context.get("folder") or Path()
    found: profile.Profile
    try:
        found = context["read_profile"](folder / Path(value).expanduser())
    except ProfileError as error:
        raise ValueError("; ".join(str(error).splitlines())) from error
    return found


ProfileFile = Annotated[
    profile.Profile,
    PlainValidator(_read_profile),
    WithJsonSchema({"type": "string"}),
    Allowed("the path of a file that `phasewise calibrate` wrote"),
]


class Resources(Section):
    """What Ray reserves for one replica."""

    cpus: float = Field(
        default=1.0,
        gt=0,
        le=1024,
        description="CPU cores; the worker computes with as many threads, unless engine.threads says otherwise.",
    )
    gpus: int = Field(
        default=0,
        ge=0,
        le=limits.TENSOR_PARALLEL.most,
        description="GPUs, of NVIDIA and of one node; with several every layer is spread over them, as "
        "engine.tensorParallel says.",
    )
    memory_gib: float | None = Field(
        default=None,
        alias="memoryGiB",
        gt=0,
        le=65536,
        description="Memory in GiB that Ray sets aside for placement. Default: none set aside.",
    )


class WorkerGroup(Section):
    """Equal workers: the same phases, resources and engine."""

    name: Name = Field(description="Name of the group; its workers are NAME-0, NAME-1 and so on.")
    phases: Annotated[tuple[PhaseName, ...], Allowed("a list of encode, prefill, decode")] = Field(
        min_length=1, max_length=3, description="Phases that these workers serve."
    )
    replicas: int = Field(default=1, ge=1, le=MAX_REPLICAS, description="Number of workers.")
    resources: Resources = Field(default_factory=Resources, description="What one worker gets.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="What the worker computes with. auto: cuda, an NVIDIA GPU, where resources.gpus is above 0. cuda with "
        "resources.gpus: 0 shares a GPU that Ray does not hand out.",
    )
    engine: Engine = Field(default_factory=Engine, description="Limits of one worker's engine.")
    profile: ProfileFile | None = Field(
        default=None,
        description="What these workers' latency model begins with: measured for their model, device, dtypes and, on a CPU, threads. A relative "
        "path starts at the folder of the manifest; the file is read where the manifest is. Default: the roofline of the device.",
    )

    @model_validator(mode="after")
    def _check_phases(self) -> Self:
        if len(set(self.phases)) < len(self.phases):
            twice = next(i for i, phase in enumerate(self.phases) if phase in self.phases[:i])
            inconsistent([(("phases", twice), f"{self.phases[twice]} is there twice; once is enough")])
        return self

    @property
    def is_on_gpu(self) -> bool:
        """`device`, with auto decided."""
        return self.device == "cuda" or (self.device == "auto" and self.resources.gpus > 0)

    @property
    def tensor_parallel(self) -> int:
        """`engine.tensorParallel`, with the default."""
        if self.engine.tensor_parallel is not None:
            return self.engine.tensor_parallel
        return max(1, self.resources.gpus) if self.is_on_gpu else 1

    @property
    def num_threads(self) -> int:
        """`engine.threads`, with the default."""
        return self.engine.threads or max(1, int(self.resources.cpus))

    @property
    def weight_dtype(self) -> WeightDtype:
        """`engine.weightDtype`, with the default."""
        if self.engine.weight_dtype is not None:
            return WeightDtype(self.engine.weight_dtype)
        return WeightDtype.BFLOAT16 if self.is_on_gpu else WeightDtype.FLOAT32

    def why_not_profiled(self, model_source: str) -> str | None:
        """Why its profile is none for it, with this model; None when it is, and without one."""
        if self.profile is None:
            return None
        return profile.misfit(
            self.profile,
            model_source=model_source,
            is_on_gpu=self.is_on_gpu,
            num_threads=self.num_threads,
            tensor_parallel=self.tensor_parallel,
            weight_dtype=self.weight_dtype,
            kv_dtype=self.engine.kv_dtype,
        )

    @model_validator(mode="after")
    def _check_tensor_parallel(self) -> Self:
        degree, gpus = self.tensor_parallel, self.resources.gpus
        if self.is_on_gpu and gpus > 0 and degree != gpus:
            sentence = f"is {degree}; allowed: {gpus}, as many as resources.gpus, which would otherwise be idle or missing"
            inconsistent([(("engine", "tensorParallel"), sentence)])
        if degree == 1:
            return self
        spread = f"over {degree} devices (engine.tensorParallel, resources.gpus)"
        if "encode" in self.phases:
            index = self.phases.index("encode")
            inconsistent([(("phases", index), f"is encode; allowed: prefill and decode {spread}")])
        if self.engine.host_cache_mib > 0:
            sentence = (
                f"is {self.engine.host_cache_mib}; allowed: 0 {spread}, whose evicted blocks are not kept"
            )
            inconsistent([(("engine", "hostCacheMiB"), sentence)])
        if self.engine.span_reuse is not None:
            inconsistent([(("engine", "spanReuse"), f"is set; allowed: absent {spread}")])
        return self

    @model_validator(mode="after")
    def _check_device(self) -> Self:
        dtype = self.engine.weight_dtype
        if dtype is not None and not limits.is_computed_in(dtype, is_on_gpu=self.is_on_gpu):
            where, dtypes = ("a GPU", limits.GPU_DTYPES) if self.is_on_gpu else ("a CPU", limits.CPU_DTYPES)
            sentence = f"is {dtype}; allowed on {where}: {' or '.join(dtypes)}"
            inconsistent([(("engine", "weightDtype"), sentence)])
        if self.engine.kv_dtype != "auto" and not self.is_on_gpu:
            inconsistent([(("engine", "kvDtype"), f"is {self.engine.kv_dtype}; allowed on a CPU: auto")])
        if self.is_on_gpu and self.engine.span_reuse is not None:
            inconsistent(
                [(("engine", "spanReuse"), "is set; allowed: absent on a GPU, which does not do it yet")]
            )
        why = limits.why_mixed(
            is_on_gpu=self.is_on_gpu,
            tensor_parallel=self.tensor_parallel,
            phases=self.phases,
            step_budget=self.engine.step_budget,
        )
        if self.engine.phase_sharing != "mixed" and why is not None:
            sentence = f"is {self.engine.phase_sharing}; allowed: mixed {why}"
            inconsistent([(("engine", "phaseSharing"), sentence)])
        return self


def check_groups(groups: tuple[WorkerGroup, ...]) -> tuple[WorkerGroup, ...]:
    """Refuse groups that do not fit each other."""
    problems: list[tuple[tuple[str | int, ...], str]] = []
    first: dict[str, int] = {}
    for i, group in enumerate(groups):
        same = first.setdefault(group.name, i)
        if same != i:
            problems.append(((i, "name"), f"{group.name!r} is already the name of workers[{same}]"))
    served = {phase for group in groups for phase in group.phases}
    problems += [
        ((), f"no worker serves {phase}; a request needs prefill and decode")
        for phase in ("prefill", "decode")
        if phase not in served
    ]
    inconsistent(problems)
    return groups
