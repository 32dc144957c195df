"""Faults of a simulation, from a YAML file that is written like a manifest."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from orchestrator.manifest.fields import Path, allowed_text
from orchestrator.manifest.load import read_text, validated
from orchestrator.manifest.problems import closest, shown
from orchestrator.manifest.section import Allowed, Section, inconsistent

KindName = Literal[
    "crash",
    "pause",
    "slow",
    "cut_from_gateway",
    "cut_from_workers",
    "controller_crash",
    "loss_with_gateway",
    "loss_with_workers",
    "loss_of_views",
]
#: What a kind of fault has beside `kind` and `at_s`: all of it, and nothing else.
FIELDS_OF_KIND: Mapping[str, tuple[str, ...]] = {
    "crash": ("worker",),
    "pause": ("worker", "duration_s"),
    "slow": ("worker", "duration_s", "factor"),
    "cut_from_gateway": ("worker", "duration_s"),
    "cut_from_workers": ("worker", "duration_s"),
    "controller_crash": ("duration_s",),
    "loss_with_gateway": ("worker", "duration_s", "rate"),
    "loss_with_workers": ("worker", "duration_s", "rate"),
    "loss_of_views": ("duration_s", "rate"),
}
#: Workers that a message names at most.
MAX_NAMES = 8


class FaultSection(Section):
    """One thing that goes wrong."""

    kind: KindName = Field(description="What goes wrong.")
    at_s: float = Field(ge=0, le=1e6, description="When it begins, in seconds since arrivals began.")
    worker: Annotated[str | None, Allowed("the id of a worker")] = Field(
        default=None, description="The worker that it happens to."
    )
    duration_s: float | None = Field(default=None, gt=0, le=1e6, description="How long it lasts, in seconds.")
    factor: float | None = Field(
        default=None, gt=1, le=1000, description="How many times as long a step takes."
    )
    rate: float | None = Field(default=None, gt=0, le=1, description="The share of messages that is lost.")

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        inconsistent(list(self._misfits()))
        return self

    def _misfits(self) -> Iterator[tuple[Path, str]]:
        wanted = FIELDS_OF_KIND[self.kind]
        for name, value in self:
            field = FaultSection.model_fields[name]
            key = field.alias or name
            if name in wanted and value is None:
                meaning = (field.description or "").rstrip(".")
                yield (
                    (key,),
                    f"this key is required with kind: {self.kind} ({meaning}); allowed: {allowed_text(field)}",
                )
            elif name not in ("kind", "at_s", *wanted) and value is not None:
                yield (key,), f"kind: {self.kind} has none; leave it out"


class FaultFile(Section):
    """All that goes wrong in one simulation."""

    faults: tuple[FaultSection, ...] = Field(
        min_length=1, max_length=1000, description="What goes wrong, in any order."
    )

    @model_validator(mode="after")
    def _check_run(self, info: ValidationInfo) -> Self:
        context = info.context or {}
        worker_ids, duration_s = context["worker_ids"], context["duration_s"]
        problems: list[tuple[Path, str]] = []
        for i, fault in enumerate(self.faults):
            if fault.worker is not None and fault.worker not in worker_ids:
                problems.append((("faults", i, "worker"), _unknown(fault.worker, worker_ids)))
            if fault.at_s >= duration_s:
                sentence = f"is {fault.at_s:g}; allowed: from 0 to less than {duration_s:g}, the --duration in which requests arrive"
                problems.append((("faults", i, "atS"), sentence))
        inconsistent(problems)
        return self


def _unknown(worker_id: str, worker_ids: Sequence[str]) -> str:
    names = ", ".join(worker_ids[:MAX_NAMES])
    more = f" and {len(worker_ids) - MAX_NAMES} more" if len(worker_ids) > MAX_NAMES else ""
    guess = closest(worker_id, list(worker_ids))
    meant = f"; did you mean {guess!r}?" if guess else ""
    return f"is {shown(worker_id)}; allowed: {names}{more}{meant}"


def load_faults(path: FilePath, worker_ids: Sequence[str], duration_s: float) -> tuple[FaultSection, ...]:
    """Those of a YAML file, for a run with these workers and so many seconds of arrivals. Raises ManifestError."""
    context = {"worker_ids": worker_ids, "duration_s": duration_s}
    return validated(read_text(path), FaultFile, file=str(path), context=context).faults
