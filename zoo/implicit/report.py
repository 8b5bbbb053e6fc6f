"""What a solve tells about itself: one status, residual and step count a sample, and what to try when it failed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, get_args

import torch
from torch import Tensor

from .collectives import everywhere

OnFailure = Literal["ignore", "warn", "raise"]


class SolverStatus(IntEnum):
    """How the solve of one sample ended. ``advice`` says what it means and what to try."""

    CONVERGED = 0
    MAX_STEPS = 1
    DIVERGED = 2
    NON_FINITE = 3

    @property
    def advice(self) -> str:
        return _ADVICE[self]


_ADVICE = {
    SolverStatus.CONVERGED: "the residual is within tol",
    SolverStatus.MAX_STEPS: (
        "max_steps was reached with the residual above tol, and the best state so far was returned; "
        "raise max_steps or tol, start nearer (z0), or make f more contractive (Jacobian regularisation); "
        "where Anderson stagnates, try Broyden; where f computes in bfloat16 or float16, take a tol above its rounding "
        "(5e-3 or 1e-3), or bfloat16_until=5e-3"
    ),
    SolverStatus.DIVERGED: (
        "the solve moved away from a solution, and the state of the lowest residual was returned; f expands there: "
        "try damping < 1, Anderson, or Newton for small states, regularise the Jacobian, or bound f's weights"
    ),
    SolverStatus.NON_FINITE: (
        "f returned NaN or infinity, and the best finite state before it was returned; "
        "check the inputs for NaN, use a smaller damping, or compute f in a wider dtype"
    ),
}


class ConvergenceWarning(UserWarning):
    """A solve did not converge for every sample of the batch."""


class ConvergenceError(RuntimeError):
    """A solve did not converge for every sample of the batch; ``report`` says which and how."""

    def __init__(self, message: str, report: SolverReport) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class SolverReport:
    """The outcome of one solve, sample by sample. Tensors are detached and live on the state's device.

    Attributes:
        residual: ``(B,)`` residual of the state *returned*, in the solver's ``norm`` (infinity where f was never
            finite).
        steps: ``(B,)`` updates made until the sample stopped; 0 for a start at the solution.
        converged: ``(B,)`` whether the residual is within ``tol``.
        status: ``(B,)`` the :class:`SolverStatus` of each sample, as integers.
        evaluations: how often the solver's loop called f on the batch. What a gradient records, and what Newton's
            Jacobian takes where f has none of its own, comes on top.
        row_evaluations: the rows of all these evaluations; ``B * evaluations``, or fewer with ``compact=True``.
        trace: ``(K, B)`` residual at evaluation k, NaN where it was not looked at; None unless asked for.
    """

    residual: Tensor
    steps: Tensor
    converged: Tensor
    status: Tensor
    evaluations: int
    row_evaluations: int
    trace: Tensor | None = None

    def count(self, status: SolverStatus) -> int:
        """How many samples ended with ``status``."""
        return int((self.status == status).sum())

    def summary(self) -> str:
        """One line for people: counts, evaluations, and advice for each way in which samples failed."""
        batch = self.status.numel()
        parts = [f"{int(self.converged.sum())} of {batch} samples converged in {self.evaluations} evaluations"]
        if batch:
            parts.append(f"worst residual {float(self.residual.max()):.2e}")
        parts += [f"{self.count(status)} x {status.name}: {status.advice}" for status in self.failures()]
        return "; ".join(parts)

    def failures(self) -> list[SolverStatus]:
        """The ways in which samples failed, each once."""
        return [s for s in SolverStatus if s is not SolverStatus.CONVERGED and self.count(s)]


def act_on_failure(report: SolverReport, on_failure: OnFailure, what: str) -> None:
    """Warn or raise if a sample of ``report`` did not converge.

    The text of the warning does not depend on the batch, so that Python's default filter shows it once, not at
    every step of a training run. Processes that agree all raise, or none does: the others would wait for the one that
    did, in the next collective.

    Raises:
        ConvergenceError: if ``on_failure`` is ``"raise"``.
    """
    if on_failure == "ignore":
        return
    converged = bool(report.converged.all())
    if on_failure == "raise":
        if everywhere(converged, report.converged.device):
            return
        where = " in this process, and some samples of another one failed" if converged else ""
        raise ConvergenceError(f"{what}: {report.summary()}{where}", report)
    if converged:
        return
    advice = "; ".join(f"{status.name}: {status.advice}" for status in report.failures())
    warnings.warn(f"{what} did not converge for every sample. {advice}", ConvergenceWarning, stacklevel=3)


def check_on_failure(on_failure: str) -> None:
    """Raise ValueError unless ``on_failure`` is one of the three words."""
    if on_failure not in get_args(OnFailure):
        raise ValueError(f"on_failure must be one of {', '.join(get_args(OnFailure))}; given: {on_failure!r}")


def empty_report(device: torch.device, dtype: torch.dtype, *, trace: bool) -> SolverReport:
    """The report of a solve over no sample."""
    integers = torch.zeros(0, dtype=torch.int64, device=device)
    return SolverReport(
        residual=torch.zeros(0, dtype=dtype, device=device),
        steps=integers,
        converged=torch.zeros(0, dtype=torch.bool, device=device),
        status=integers.clone(),
        evaluations=1,
        row_evaluations=0,
        trace=torch.zeros(1, 0, dtype=dtype, device=device) if trace else None,
    )
