"""A small profile."""

from orchestrator.control.known_shapes import DEVICES, MODELS
from workers.profile import Profile, ProfileStep
from workers.step_shape import StepCosts, chunk

PROFILE = Profile(
    date="2026-11-26T10:00:00+00:00",
    machine={"cpu": "AMD EPYC", "num_cpus": 2},
    threads=1,
    model_digest="ab12",
    costs=StepCosts(MODELS["smollm2-135m"], DEVICES["h100"], (1.0, 0.8, 0.0, 1.5), 105, 0.06, 1.2),
    steps=(ProfileStep("chunk of 64", chunk(64), 0.2, 0.21),),
)
