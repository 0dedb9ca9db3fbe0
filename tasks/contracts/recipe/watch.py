"""`watch` of a training section: what counts as going wrong, and what is done about it (tasks/jobs/watch)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from radlads.tasks.contracts.recipe.base import OPERATIONAL, Section, Undigested

Policy = Literal["off", "report", "stop", "rollback"]
"""report: put it on record and go on. stop: save a checkpoint and end the job. rollback: see Rollback."""


class NonFinite(Section):
    """A loss or gradient norm that is not finite. The optimizer never moves with it, so it cannot be ignored."""

    policy: Literal["stop", "rollback"] = "stop"
    """What is done about it."""


class Outlier(Section):
    """A number above median + z · spread, and above ratio · median, in `patience` steps in a row.

    Median and spread are those of the `window` steps before these. The spread is 1.4826 times the median distance from
    the median: the standard deviation, if the numbers are normal. Steps are compared with steps of their phase; those
    with a CE spike are left out.
    """

    policy: Policy = "report"
    """What is done about it."""
    z: float = Field(default=8.0, gt=0, le=1e6)
    """Spreads above the median."""
    ratio: float = Field(default=1.5, ge=1, le=1e6)
    """And so many times the median."""
    patience: int = Field(default=3, ge=1, le=1000)
    """Optimizer steps."""
    window: int = Field(default=64, ge=4, le=10_000)
    """Optimizer steps."""


class GradientExplosion(Outlier):
    """The same of the gradient norm before clipping, which varies more; one step suffices."""

    ratio: float = Field(default=10.0, ge=1, le=1e6)
    patience: int = Field(default=1, ge=1, le=1000)


class Plateau(Section):
    """In the last `window` steps the loss fell by less than `improvement`: the median of the second half compared with
    that of the first. Off by default, because every rate that decays ends in one."""

    policy: Policy = "off"
    """What is done about it."""
    window: int = Field(default=1000, ge=8, le=1_000_000)
    """Optimizer steps."""
    improvement: float = Field(default=0.002, ge=0, lt=1)
    """As a share of the loss."""


class Throughput(Section):
    """The median tokens per second of the last `window` steps is below `share` of the median before (of up to eight
    windows, at least one). No rollback: speed has no effect on the result."""

    policy: Literal["off", "report", "stop"] = "report"
    """What is done about it."""
    window: int = Field(default=32, ge=4, le=10_000)
    """Optimizer steps."""
    share: float = Field(default=0.5, gt=0, lt=1)
    """Of the median before."""


class Rollback(Section):
    """Go back to the last checkpoint before the evidence, and from there to the end of the stage train differently."""

    max_rollbacks: Annotated[int, OPERATIONAL] = Field(default=2, ge=1, le=100)
    """Rollbacks in a stage; the next one stops the job. Not in the digest: a job that it stops makes no product."""
    every: int = Field(default=500, gt=0)
    """Optimizer steps between the checkpoints that a rollback can go back to. They are saved beside those of
    `checkpoint_every`, which may change, and of requests to stop, which may come at any step."""
    rate_factor: float = Field(default=0.5, gt=0, le=1)
    """Factor of all learning rates; each rollback multiplies by it."""
    reshuffle: bool = True
    """Read the remaining rows of the epoch in another order; each is still read once."""

    @property
    def changes_something(self) -> bool:
        """Whether the steps that are repeated differ from those that went wrong."""
        return self.reshuffle or self.rate_factor < 1


_REPORTS = Undigested("it reports or stops, and has no effect on the result", unless=lambda it: it.policy == "rollback")


class Watch(Section):
    """Detectors, each with its own policy. Only what a rollback depends on enters the digest."""

    nonfinite: Annotated[NonFinite, _REPORTS] = NonFinite()
    """A loss or gradient norm that is not finite."""
    loss_spike: Annotated[Outlier, _REPORTS] = Outlier()
    """A loss far above those before it."""
    gradient_explosion: Annotated[GradientExplosion, _REPORTS] = GradientExplosion()
    """A gradient norm far above those before it."""
    plateau: Annotated[Plateau, _REPORTS] = Plateau()
    """A loss that no longer falls."""
    throughput: Annotated[Throughput, OPERATIONAL] = Throughput()
    """Steps that became slow."""
    rollback: Rollback = Rollback()
    """What `policy: rollback` does."""

    @property
    def rolls_back(self) -> bool:
        """Whether any detector has the policy `rollback`."""
        detectors = (self.nonfinite, self.loss_spike, self.gradient_explosion, self.plateau)
        return any(detector.policy == "rollback" for detector in detectors)

    @property
    def evidence_steps(self) -> int:
        """The most steps, with none left out, on which a rollback is decided; 0 if nothing is rolled back."""
        lengths = (
            (self.nonfinite, 1),
            (self.loss_spike, self.loss_spike.patience),
            (self.gradient_explosion, self.gradient_explosion.patience),
            (self.plateau, self.plateau.window),
        )
        return max((steps for detector, steps in lengths if detector.policy == "rollback"), default=0)

    @property
    def steps_needed(self) -> dict[str, int]:
        """Detector → the steps of one phase before which it finds nothing; of those that somebody asked for."""
        acts, plateau = ("stop", "rollback"), self.plateau
        needed = {
            name: detector.window + detector.patience
            for name, detector in (("loss_spike", self.loss_spike), ("gradient_explosion", self.gradient_explosion))
            if detector.policy in acts
        }
        needed |= {"plateau": plateau.window} if plateau.policy != "off" else {}
        return needed | ({"throughput": 2 * self.throughput.window} if self.throughput.policy in acts else {})

    @model_validator(mode="after")
    def _rollback_fits(self) -> Self:
        if not self.rolls_back and self.rollback != type(self.rollback)():
            raise ValueError("settings of `rollback` are given, but no detector has `policy: rollback`")
        if self.rolls_back and not self.rollback.changes_something:
            raise ValueError(
                "a rollback must change something, or the same steps go wrong again: rate_factor below 1, or reshuffle"
            )
        return self


NO_ROLLBACK = Undigested("it reports or stops, and has no effect on the result", unless=lambda it: it.rolls_back)
