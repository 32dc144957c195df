"""The workers and the gateway that a deployment declares. Pure."""

import math

from kvtransfer.codecs.codec import CodecId
from kvtransfer.config import TransportChoice
from orchestrator.control.admission import Admission
from orchestrator.control.auto_switch import SwitchMode
from orchestrator.control.declared import DeclaredWorker, WorkerResources, growth_reserves, token_budgets
from orchestrator.control.scaling_config import ScalingConfig
from orchestrator.control.slo import Slo
from orchestrator.gateway.config import GatewayConfig
from orchestrator.manifest.engine import MIB, SpanReuse
from orchestrator.manifest.image_reduction import ImageReductionSection
from orchestrator.manifest.models import KIB, Deployment, KvTransfer
from orchestrator.manifest.worker_group import WorkerGroup
from workers.api import (
    Batching,
    Device,
    EngineConfig,
    HostCacheCodec,
    ImageReduction,
    KvDtype,
    KvTransferConfig,
    Phase,
    PhaseSharing,
    PrefillOrder,
    SpanReuseConfig,
    StepBudget,
    WorkerId,
)
from workers.limits import default_tile_tokens

GIB = 2**30


def worker_specs(deployment: Deployment) -> list[DeclaredWorker]:
    """Every declared worker, in the order of the manifest; ids are GROUP-0, GROUP-1 and so on."""
    return [_worker(deployment, group, i) for group in deployment.spec.workers for i in range(group.replicas)]


def extra_workers(deployment: Deployment) -> list[DeclaredWorker]:
    """Workers that the controller may add; their ids go on where those of their group end."""
    autoscale = deployment.spec.controller.autoscale
    if autoscale is None:
        return []
    group = next(one for one in deployment.spec.workers if one.name == autoscale.group)
    return [_worker(deployment, group, i) for i in range(group.replicas, autoscale.max_workers)]


def scaling_of(deployment: Deployment) -> ScalingConfig | None:
    """None where the number of workers is fixed."""
    autoscale = deployment.spec.controller.autoscale
    if autoscale is None:
        return None
    return ScalingConfig(
        tuple(one.worker_id for one in extra_workers(deployment)),
        hold_s=autoscale.hold_s,
        release_s=autoscale.release_s,
        give_up_s=autoscale.give_up_s,
    )


def _worker(deployment: Deployment, group: WorkerGroup, number: int) -> DeclaredWorker:
    return DeclaredWorker(
        worker_id=WorkerId(f"{group.name}-{number}"),
        phases=frozenset(Phase(phase) for phase in group.phases),
        model_source=deployment.spec.model.source,
        resources=_resources(group),
        engine=_engine_config(group),
        kv_transfer=_kv_transfer_config(deployment.spec.kv_transfer),
        device=Device.CUDA if group.is_on_gpu else Device.CPU,
        profile=group.profile.costs if group.profile is not None else None,
    )


def gateway_config(deployment: Deployment) -> GatewayConfig:
    """What the deployment's gateway is started with."""
    gateway = deployment.spec.gateway
    workers = (*worker_specs(deployment), *extra_workers(deployment))
    return GatewayConfig(
        deployment=deployment.metadata.name,
        model=deployment.spec.model.served_name,
        address=gateway.address,
        control_address=gateway.control_address,
        request_timeout_s=gateway.request_timeout_s,
        max_waiting_requests=gateway.max_waiting_requests,
        max_running_requests=gateway.max_running_requests,
        max_image_bytes=gateway.max_image_mib * MIB,
        image_reduction=_image_reduction(gateway.image_reduction),
        slo=slo_of(deployment),
        tenant_weights={one.cache_salt: one.weight for one in gateway.tenants},
        admission=Admission(gateway.admission),
        token_budgets=token_budgets(workers),
        growth_reserves=growth_reserves(workers),
    )


def slo_of(deployment: Deployment) -> Slo:
    """Targets of every request."""
    slo = deployment.spec.slo
    return Slo(slo.ttft_ms / 1000, slo.tpot_ms / 1000)


def switch_mode_of(deployment: Deployment) -> SwitchMode:
    """Whether the controller switches phases itself."""
    modes = {"off": SwitchMode.OFF, "dryRun": SwitchMode.DRY_RUN, "on": SwitchMode.ON}
    return modes[deployment.spec.controller.role_switch]


def cpu_warnings(deployment: Deployment, num_machine_cpus: int | None = None) -> list[str]:
    """What makes threads wait for each other, or workers for CPUs, as sentences that begin with the key.

    num_machine_cpus: CPUs of the machine that all workers run on; None when that is not known.
    """
    groups = deployment.spec.workers
    warnings = [
        f"spec.workers[{i}].engine.threads: is {group.num_threads} and resources.cpus is {group.resources.cpus:g}, "
        "which is all that Ray keeps for the worker: workers of one machine may get in each other's way"
        for i, group in enumerate(groups)
        if group.num_threads > math.ceil(group.resources.cpus)
    ]
    num_threads = sum(group.replicas * group.num_threads for group in groups)
    if num_machine_cpus is not None and num_threads > num_machine_cpus:
        warnings.append(
            f"spec.workers: they compute with {num_threads} threads in all and this machine has {num_machine_cpus} "
            "CPUs: workers get in each other's way and answer late"
        )
    if num_machine_cpus is not None and deployment.spec.controller.autoscale is not None:
        warnings.append(
            "spec.controller.autoscale: Ray on this machine has no autoscaler: workers are added only while some of its "
            f"{num_machine_cpus} CPUs are free"
        )
    return warnings


def _resources(group: WorkerGroup) -> WorkerResources:
    memory_gib = group.resources.memory_gib
    return WorkerResources(
        num_cpus=group.resources.cpus,
        num_gpus=group.resources.gpus,
        memory_bytes=None if memory_gib is None else int(memory_gib * GIB),
    )


def _engine_config(group: WorkerGroup) -> EngineConfig:
    engine = group.engine
    return EngineConfig(
        block_size=engine.block_size,
        kv_cache_bytes=_kv_cache_bytes(group),
        gpu_memory_fraction=engine.gpu_memory_fraction,
        token_budget=engine.token_budget,
        max_running_sequences=engine.max_running_sequences,
        max_waiting_requests=engine.max_waiting_requests,
        num_threads=group.num_threads,
        tensor_parallel=group.tensor_parallel,
        batching=Batching(engine.batching),
        prefill_order=PrefillOrder(engine.prefill_order),
        step_budget=StepBudget(engine.step_budget),
        phase_sharing=PhaseSharing(engine.phase_sharing),
        tile_tokens=default_tile_tokens(engine.token_budget, is_on_gpu=group.is_on_gpu)
        if engine.tile_tokens is None
        else engine.tile_tokens,
        growth_reserve=engine.growth_reserve,
        is_prefix_cache_on=engine.prefix_cache,
        weight_dtype=group.weight_dtype,
        kv_dtype=KvDtype(engine.kv_dtype),
        host_cache_bytes=engine.host_cache_mib * MIB,
        host_cache_codec=HostCacheCodec(engine.host_cache_codec),
        span_reuse=_span_reuse(engine.span_reuse),
        image_cache_bytes=engine.image_cache_mib * MIB,
        encode_patch_budget=engine.encode_patch_budget,
    )


def _kv_cache_bytes(group: WorkerGroup) -> int:
    if group.engine.kv_cache_mib is not None:
        return group.engine.kv_cache_mib * MIB
    return 0 if group.is_on_gpu else EngineConfig().kv_cache_bytes


def _span_reuse(section: SpanReuse | None) -> SpanReuseConfig | None:
    if section is None:
        return None
    return SpanReuseConfig(section.recompute_fraction, section.min_tokens)


def _image_reduction(section: ImageReductionSection | None) -> ImageReduction | None:
    if section is None:
        return None
    return ImageReduction(
        section.merge_threshold,
        section.global_threshold,
        section.individual_threshold,
        section.key_fraction,
        section.layers,
    )


def _kv_transfer_config(kv_transfer: KvTransfer) -> KvTransferConfig:
    return KvTransferConfig(
        lease_s=kv_transfer.lease_s,
        max_chunk_bytes=kv_transfer.max_chunk_kib * KIB,
        credits=kv_transfer.credits,
        layer_group_size=kv_transfer.layer_group_size,
        resume_s=kv_transfer.resume_s,
        transport=TransportChoice(kv_transfer.transport),
        num_streams=kv_transfer.streams,
        codec=None if kv_transfer.codec == "auto" else CodecId[kv_transfer.codec.upper()],
        is_prefix_fetched=kv_transfer.prefix_fetch,
    )
