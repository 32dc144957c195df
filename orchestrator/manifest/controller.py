"""The part of a manifest that is about the controller."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from orchestrator.manifest.section import Allowed, Section, inconsistent


class Autoscale(Section):
    """Workers that are added when moves of phases do not help, and taken back."""

    group: Annotated[str, Allowed("the name of a group of workers")] = Field(
        description="Those that are added are like the workers of this group; what they serve the load says. Its replicas are always there."
    )
    max_workers: int = Field(ge=1, le=1024, description="Of that group, in all.")
    hold_s: float = Field(
        default=30.0,
        ge=1,
        le=86400,
        description="Seconds for which the load is more than all workers can do at their targets before more are asked for.",
    )
    release_s: float = Field(
        default=120.0,
        ge=1,
        le=86400,
        description="Seconds for which one worker fewer would do, before one is drained and given back.",
    )
    give_up_s: float = Field(
        default=300.0,
        ge=1,
        le=86400,
        description="Seconds after which a worker that no node took is not waited for.",
    )


class Controller(Section):
    """The loop that keeps the workers as declared."""

    tick_ms: int = Field(
        default=500, ge=10, le=60000, description="Time between two looks at the cluster, in ms."
    )
    heartbeat_timeout_ms: int = Field(
        default=5000,
        ge=100,
        le=600000,
        description="A worker silent for this long is lost and is started again.",
    )
    role_switch: Literal["off", "dryRun", "on"] = Field(
        default="off",
        description="Whether the controller has workers take other phases as the load asks for: on does it, dryRun "
        "only tells what it would do.",
    )
    autoscale: Autoscale | None = Field(
        default=None,
        description="How workers are added as the load asks for them, on nodes of Ray's autoscaler. Absent: their number is fixed.",
    )

    @model_validator(mode="after")
    def _check_autoscale(self) -> Self:
        if self.autoscale is not None and self.role_switch != "on":
            sentence = f"needs roleSwitch on, which is {self.role_switch}: workers are added when moves of phases do not help"
            inconsistent([(("autoscale",), sentence)])
        return self

    @model_validator(mode="after")
    def _check_timeout(self) -> Self:
        if self.heartbeat_timeout_ms < 2 * self.tick_ms:
            sentence = (
                f"is {self.heartbeat_timeout_ms}; allowed: at least twice tickMs = {2 * self.tick_ms}, "
                "or one late answer loses a worker"
            )
            inconsistent([(("heartbeatTimeoutMs",), sentence)])
        return self
