"""Every key of a manifest, those of worker groups aside: type, limits, default and meaning. Pure.

The table in docs/manifests.md and the JSON schema are made from these classes. Keys are camelCase in
YAML and snake_case here. A rule that compares keys stands at the smallest section that has them all.
"""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from orchestrator.manifest.controller import Controller
from orchestrator.manifest.engine import MIB
from orchestrator.manifest.image_reduction import ImageReductionSection
from orchestrator.manifest.section import Allowed, Section, inconsistent
from orchestrator.manifest.tenants import Tenant, check_tenants
from orchestrator.manifest.worker_group import Name, WorkerGroup, check_groups
from workers import limits
from workers.api import KvTransferConfig
from workers.images.limits import ImageLimits

API_VERSION = "phasewise/v1"
PACKAGE_PREFIX = "package:"
KIB = limits.KIB

#: `https:`, or a misspelt `package:`.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_FILES_OF_A_FOLDER = (".safetensors", ".json", ".bin", ".pt", ".pth", ".ckpt", ".onnx")

_KV_TRANSFER = KvTransferConfig()


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port`; brackets of an IPv6 address are kept. Raises ValueError."""
    match = re.fullmatch(
        r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?):([0-9]{1,5})", address
    )
    if match is None or int(match[2]) > 65535:
        raise ValueError(f"{address!r} is not an address")
    return match[1], int(match[2])


def _check_address(address: str) -> str:
    split_address(address)
    return address


def _check_source(source: str, info: ValidationInfo) -> str:
    if source.startswith(PACKAGE_PREFIX):
        if re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", source.removeprefix(PACKAGE_PREFIX)) is None:
            raise ValueError(f"{source!r} names no Python package")
        return source
    if "\0" in source or _SCHEME.match(source) or Path(source).name in ("", ".."):
        raise ValueError(f"{source!r} is no model source")
    if source.endswith(_FILES_OF_A_FOLDER):
        raise ValueError(f"{source!r} is one file of a model; name the folder that it is in")
    if not source.endswith(".gguf") and "/" not in source:
        raise ValueError(f"{source!r} is no model source; a folder beside the manifest is './{source}'")
    folder = (info.context or {}).get("folder")
    return source if folder is None or source.startswith("~") else str(Path(folder) / source)


ModelName = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$"),
    Allowed("1 to 128 letters, digits and any of . _ / -, the first a letter or digit"),
]
Address = Annotated[
    str,
    AfterValidator(_check_address),
    Allowed("host:port, with a port from 0 to 65535; port 0 takes a free one"),
]


class Metadata(Section):
    """What the deployment is called."""

    name: Name = Field(description="Name of the deployment; `phasewise down` and `status` use it.")


class Model(Section):
    """The model that all workers load."""

    source: Annotated[
        str,
        Field(max_length=4096),
        AfterValidator(_check_source),
        Allowed(
            "`package:NAME` of an installed Python package, the path of a .gguf file, or that of a Hugging Face "
            "folder, with a / in it"
        ),
    ] = Field(
        description="Where the weights are. A relative path starts at the folder of the manifest; "
        "a path must exist on every node that runs a worker."
    )
    name: ModelName | None = Field(
        default=None,
        description="Name that clients ask for. Default: the package, the folder, or the file name without .gguf.",
    )

    @property
    def served_name(self) -> str:
        """`name`, or the one made from the source."""
        if self.name is not None:
            return self.name
        if self.source.startswith(PACKAGE_PREFIX):
            return self.source.removeprefix(PACKAGE_PREFIX)
        return Path(self.source).name.removesuffix(".gguf")


class Slo(Section):
    """Targets of every request."""

    ttft_ms: float = Field(
        default=2000.0,
        gt=0,
        le=1e7,
        description="Time from arrival at the gateway to the first token, in ms.",
    )
    tpot_ms: float = Field(
        default=100.0,
        gt=0,
        le=1e6,
        description="Time per token after the first, averaged over a request, in ms.",
    )


class KvTransfer(Section):
    """How the KV of a prompt goes from a prefill worker to a decode worker."""

    lease_s: float = Field(
        default=_KV_TRANSFER.lease_s,
        ge=limits.LEASE_S.least,
        le=limits.LEASE_S.most,
        description="Seconds after which both ends free the blocks of a transfer that stands still.",
    )
    max_chunk_kib: int = Field(
        default=_KV_TRANSFER.max_chunk_bytes // KIB,
        alias="maxChunkKiB",
        ge=limits.MAX_CHUNK_KIB.least,
        le=limits.MAX_CHUNK_KIB.most,
        description="Payload of one chunk at most, in KiB.",
    )
    credits: int = Field(
        default=_KV_TRANSFER.credits,
        ge=limits.CREDITS.least,
        le=limits.CREDITS.most,
        description="Chunks in flight, unacknowledged, per transfer.",
    )
    layer_group_size: int | None = Field(
        default=_KV_TRANSFER.layer_group_size,
        ge=limits.LAYER_GROUP_SIZE.least,
        le=limits.LAYER_GROUP_SIZE.most,
        description="KV leaves after this many layers of a prompt chunk have been computed. Default: chosen for each "
        "step from the measured times of computing and of sending.",
    )
    resume_s: float = Field(
        default=_KV_TRANSFER.resume_s,
        ge=limits.RESUME_S.least,
        le=limits.RESUME_S.most,
        description="Seconds in which a transfer whose connection broke goes on at its first missing chunk; with 0 "
        "it fails at once.",
    )
    transport: Literal["auto", "in_process", "shm", "grpc", "cuda_ipc", "nixl"] = Field(
        default=_KV_TRANSFER.transport.value,
        description="How KV travels. auto: the best way that the two workers can use. With another a transfer that "
        "cannot go this way is refused.",
    )
    streams: int = Field(
        default=_KV_TRANSFER.num_streams,
        ge=limits.STREAMS.least,
        le=limits.STREAMS.most,
        description="Connections that the chunks of one transfer are spread over, when they travel by gRPC.",
    )
    codec: Literal["none", "fp8", "int4_hadamard", "gear", "gear_l", "auto"] = Field(
        default="none",
        description="How KV is packed when it travels by gRPC; all but none change what is generated. auto: fp8 or "
        "int4_hadamard where the connection is so slow that it pays, else none.",
    )
    prefix_fetch: bool = Field(
        default=_KV_TRANSFER.is_prefix_fetched,
        description="The beginning of a prompt is got from another worker that has its KV, where that is faster than "
        "computing it.",
    )

    @model_validator(mode="after")
    def _check_ways(self) -> Self:
        problems: list[tuple[tuple[str | int, ...], str]] = []
        carries_payload = self.transport in limits.CARRYING_TRANSPORTS
        if self.codec != "none" and not carries_payload:
            sentence = (
                f"is {self.codec}, and with transport {self.transport} nothing is packed; use auto or grpc"
            )
            problems.append((("codec",), sentence))
        if self.streams > 1 and not carries_payload:
            sentence = (
                f"is {self.streams}, and with transport {self.transport} no chunks travel; use auto or grpc"
            )
            problems.append((("streams",), sentence))
        inconsistent(problems)
        return self


class Gateway(Section):
    """The front door."""

    address: Address = Field(default="127.0.0.1:8480", description="Address that clients call (gRPC).")
    control_address: Address = Field(
        default="127.0.0.1:8481",
        description="Address at which the controller publishes the state of the cluster.",
    )
    request_timeout_s: float = Field(
        default=300.0, gt=0, le=86400, description="Deadline in seconds of a request whose client sets none."
    )
    max_waiting_requests: int = Field(
        default=1024, ge=1, le=MIB, description="Requests that wait in the gateway; one more is refused."
    )
    max_running_requests: int = Field(
        default=256, ge=1, le=MIB, description="Requests that the gateway has on workers at a time."
    )
    admission: Literal["off", "predicted"] = Field(
        default="off",
        description="Which new requests are taken, as long as there is room. predicted: one whose first token is predicted to "
        "come after slo.ttftMs is refused at once, with the time in which one like it would be taken.",
    )
    tenants: Annotated[tuple[Tenant, ...], AfterValidator(check_tenants)] = Field(
        default=(),
        min_length=0,
        max_length=1024,
        description="Tenants of another weight than 1, for prefillOrder least_slack: one with 2 gets twice as much of the workers "
        "while others wait.",
    )
    max_image_mib: int = Field(
        default=1024,
        alias="maxImageMiB",
        ge=ImageLimits().max_total_bytes // MIB,
        le=16 * MIB,
        description="Pictures of all requests in the gateway, together, in MiB; a request that would bring more is "
        "refused. The least is what one request may have.",
    )
    image_reduction: ImageReductionSection | None = Field(
        default=None,
        description="Pictures of requests that say nothing of it get fewer embeddings; answers are then approximations. "
        "Absent: they do not.",
    )

    @model_validator(mode="after")
    def _check_ports(self) -> Self:
        port = split_address(self.address)[1]
        if port != 0 and port == split_address(self.control_address)[1]:
            inconsistent([(("controlAddress",), f"has the port of gateway.address, {port}; use another")])
        return self


class Network(Section):
    """Who can reach the workers."""

    bind: Literal["loopback", "node"] = Field(
        default="loopback",
        description="Where workers listen: loopback for one machine, node for the address by which "
        "other nodes of the Ray cluster reach this one.",
    )


class Spec(Section):
    """What is to run."""

    model: Model = Field(description="The model that all workers load.")
    workers: Annotated[tuple[WorkerGroup, ...], AfterValidator(check_groups)] = Field(
        min_length=1, max_length=64, description="Groups of equal workers."
    )
    slo: Slo = Field(default_factory=Slo, description="Targets of every request.")
    kv_transfer: KvTransfer = Field(
        default_factory=KvTransfer, description="KV from prefill to decode workers."
    )
    gateway: Gateway = Field(default_factory=Gateway, description="The front door.")
    network: Network = Field(default_factory=Network, description="Who can reach the workers.")
    controller: Controller = Field(default_factory=Controller, description="Keeps workers as declared.")

    @model_validator(mode="after")
    def _check_autoscale(self) -> Self:
        autoscale = self.controller.autoscale
        if autoscale is None:
            return self
        group = next((one for one in self.workers if one.name == autoscale.group), None)
        where = ("controller", "autoscale")
        if group is None:
            known = ", ".join(one.name for one in self.workers)
            inconsistent([((*where, "group"), f"is {autoscale.group!r}; groups are {known}")])
        elif autoscale.max_workers < group.replicas:
            sentence = (
                f"is {autoscale.max_workers}; allowed: at least replicas of {group.name} = {group.replicas}"
            )
            inconsistent([((*where, "maxWorkers"), sentence)])
        return self

    @model_validator(mode="after")
    def _check_profiles(self) -> Self:
        found = [group.why_not_profiled(self.model.source) for group in self.workers]
        inconsistent([(("workers", i, "profile"), why) for i, why in enumerate(found) if why is not None])
        return self

    @model_validator(mode="after")
    def _check_ways_of_groups(self) -> Self:
        transport = self.kv_transfer.transport
        most = max(group.tensor_parallel for group in self.workers)
        if most > 1 and transport not in limits.CARRYING_TRANSPORTS:
            sentence = f"is {transport}; allowed: auto or grpc with workers over {most} devices (engine.tensorParallel)"
            inconsistent([(("kvTransfer", "transport"), sentence)])
        return self


class Deployment(Section):
    """A manifest."""

    api_version: Literal["phasewise/v1"] = Field(description="Version of this format.")
    kind: Literal["Deployment"] = Field(description="What the manifest describes.")
    metadata: Metadata = Field(description="What the deployment is called.")
    spec: Spec = Field(description="What is to run.")
