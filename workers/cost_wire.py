"""Fitted latency models as messages of phasewise.worker.v1, and back. Pure."""

from collections.abc import Iterable

from protos import worker_pb2 as pb
from workers.step_shape import (
    ENOUGH_STEPS,
    Contention,
    Curve,
    DeviceShape,
    EncodeCosts,
    FactorSource,
    ModelShape,
    StepCosts,
)

SOURCES = {
    FactorSource.FITTED: pb.FACTOR_SOURCE_FITTED,
    FactorSource.PROFILE: pb.FACTOR_SOURCE_PROFILE,
    FactorSource.ROOFLINE: pb.FACTOR_SOURCE_ROOFLINE,
}
SOURCES_FROM_PB = {value: source for source, value in SOURCES.items()}


def step_costs_to_pb(costs: StepCosts | None) -> pb.StepCosts | None:
    """All of it."""
    if costs is None:
        return None
    model, device, contention = costs.model, costs.device, costs.device.contention
    return pb.StepCosts(
        model=pb.ModelShape(
            name=model.name,
            num_weights=model.num_weights,
            num_head_weights=model.num_head_weights,
            weight_bytes=model.weight_bytes,
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            kv_token_bytes=model.kv_token_bytes,
        ),
        device=pb.DeviceShape(
            name=device.name,
            flops_per_s=device.flops_per_s,
            attention_flops_per_s=device.attention_flops_per_s,
            bytes_per_s=device.bytes_per_s,
            step_overhead_s=device.step_overhead_s,
            memory_bytes=device.memory_bytes,
            transfer_bytes_per_s=device.transfer_bytes_per_s,
            is_reading_hidden=device.is_reading_hidden,
            compute_curve=_curve_to_pb(device.compute_curve),
            memory_curve=_curve_to_pb(device.memory_curve),
            contention=pb.Contention(
                compute=contention.compute,
                memory=contention.memory,
                sliced=contention.sliced,
                upper=contention.upper,
            ),
        ),
        factors=costs.factors,
        num_steps=costs.num_steps,
        mean_error=costs.mean_error,
        upper_ratio=costs.upper_ratio,
        source=SOURCES[costs.source],
        num_prompt_steps=costs.num_prompt_steps,
    )


def step_costs_from_pb(message: pb.StepCosts) -> StepCosts | None:
    """None when it is absent, or of a version with other factors."""
    if len(message.factors) != 4:
        return None
    model, device, contention = message.model, message.device, message.device.contention
    c0, c1, c2, c3 = message.factors
    return StepCosts(
        ModelShape(
            model.name,
            model.num_weights,
            model.num_head_weights,
            model.weight_bytes,
            model.num_layers,
            model.hidden_size,
            model.kv_token_bytes,
        ),
        DeviceShape(
            device.name,
            device.flops_per_s,
            device.attention_flops_per_s,
            device.bytes_per_s,
            device.step_overhead_s,
            device.memory_bytes,
            device.transfer_bytes_per_s,
            device.is_reading_hidden,
            _curve_from_pb(device.compute_curve),
            _curve_from_pb(device.memory_curve),
            Contention(contention.compute, contention.memory, contention.sliced, contention.upper),
        ),
        (c0, c1, c2, c3),
        message.num_steps,
        message.mean_error if message.HasField("mean_error") else None,
        message.upper_ratio,
        SOURCES_FROM_PB.get(message.source) or _assumed_source(message.num_steps),
        message.num_prompt_steps,
    )


def _assumed_source(num_steps: int) -> FactorSource:
    """Of a version that did not say so, and began with the roofline."""
    return FactorSource.FITTED if num_steps >= ENOUGH_STEPS else FactorSource.ROOFLINE


def encode_costs_to_pb(costs: EncodeCosts | None) -> pb.EncodeCosts | None:
    """All of it."""
    if costs is None:
        return None
    return pb.EncodeCosts(
        batch_s=costs.batch_s,
        patch_s=costs.patch_s,
        num_batches=costs.num_batches,
        mean_error=costs.mean_error,
        upper_ratio=costs.upper_ratio,
    )


def encode_costs_from_pb(message: pb.EncodeCosts) -> EncodeCosts | None:
    """None when it is absent: a ratio is 1 or more."""
    if message.upper_ratio < 1:
        return None
    return EncodeCosts(
        message.batch_s,
        message.patch_s,
        message.num_batches,
        message.mean_error if message.HasField("mean_error") else None,
        message.upper_ratio,
    )


def _curve_to_pb(curve: Curve) -> list[pb.CurvePoint]:
    return [pb.CurvePoint(share=share, rate=rate) for share, rate in curve]


def _curve_from_pb(points: Iterable[pb.CurvePoint]) -> Curve:
    return tuple((point.share, point.rate) for point in points)
