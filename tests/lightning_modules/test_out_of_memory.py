"""Where memory runs out: which knobs are named, of which solve, and that nothing else is taken for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from datamodules import DigitsDataModule
from lightning_modules import EquilibriumModule
from lightning_modules.out_of_memory import NotEnoughMemoryError, is_out_of_memory, told_of_memory
from tests.command_line import DIGITS, QUIET, ROOT, TINY, refused
from tests.lightning_modules import flows, texts
from tests.lightning_modules.poison import multiscale
from tests.lightning_modules.runs import batches, small, train, trainer
from zoo.implicit import (
    GMRES,
    Anderson,
    Broyden,
    FixedPointIteration,
    ImplicitGradient,
    PhantomGradient,
    Solver,
    UnrolledGradient,
)

FULL = "CUDA out of memory. Tried to allocate 20.00 MiB."


def fail(*args: Any, **kwargs: Any) -> Any:
    raise torch.OutOfMemoryError(FULL)


def noted(module: EquilibriumModule, **arguments: Any) -> list[str]:
    """What is noted, line by line, where a fit of this module runs out of memory."""
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory") as error:
        train(module, **arguments)
    (note,) = error.value.__notes__
    return str(note).splitlines()


def outside(module: EquilibriumModule, **arguments: Any) -> list[str]:
    """The same for one that fails before it solves."""
    module.training_step = fail  # type: ignore[method-assign]
    first, *knobs = noted(module, **arguments)
    assert first == "Memory ran out outside of a solve. What takes less:"
    return [knob.strip().partition(" (now")[0].partition(":")[0] for knob in knobs]


def test_the_solve_is_named_with_what_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 x 10 states of 2048 samples of 128 numbers of 4 bytes."""
    monkeypatch.setattr(Anderson, "step", fail)
    module = small(model_args={"width": 128}, solver=Anderson(memory=10, mix_every=2))
    first, *knobs = noted(module, loader=batches(1, 2048), limit_val_batches=0)
    assert first == (
        "Memory ran out in a solve with Anderson, which keeps 20.8 MiB of states: each state is of 2048 x 128 numbers. "
        "What takes less:"
    )
    assert knobs[:2] == [
        "  --model.solver Anderson --model.solver.memory 4 (now 10): 8.1 MiB, and perhaps more steps",
        "  --model.solver FixedPointIteration: keeps none, and takes more steps",
    ]


@pytest.mark.parametrize("solver", [Anderson(memory=20), GMRES(restart=12)])
def test_the_adjoint_solve(monkeypatch: pytest.MonkeyPatch, solver: Solver) -> None:
    module = small(solver=FixedPointIteration(tol=1e-3), gradient=ImplicitGradient(solver))
    monkeypatch.setattr(type(solver), "step", fail)
    first, *knobs = noted(module)
    name, less = type(solver).__name__, "memory 10" if isinstance(solver, Anderson) else "restart 6"
    adjoint = "--model.gradient ImplicitGradient --model.gradient.solver"
    assert first.startswith(f"Memory ran out in an adjoint solve with {name}, which keeps ")
    assert knobs[0].startswith(f"  {adjoint} {name} {adjoint.rsplit(maxsplit=1)[-1]}.{less} (now ")
    assert knobs[1] == f"  {adjoint} BiCGSTAB: seven states, however many steps"
    assert not any("--model.solver" in knob for knob in knobs)


def test_what_keeps_nothing_cannot_keep_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FixedPointIteration, "step", fail)
    first, *knobs = noted(small(solver=FixedPointIteration()))
    assert "FixedPointIteration, which keeps 0.0 MiB" in first
    assert not any("solver" in knob for knob in knobs)
    monkeypatch.setattr(Broyden, "step", fail)
    assert not any("memory" in knob for knob in noted(small(solver=Broyden(memory=1)))[1:])


def test_the_knobs_are_those_of_the_model_and_of_its_gradient() -> None:
    batch, less = (
        "smaller batches with --trainer.accumulate_grad_batches 2 for steps as large",
        "--trainer.precision bf16-mixed",
    )
    again = "--model.model_args.recompute true"
    assert outside(small()) == [batch, less], "tanh has nothing to compute again"
    assert outside(multiscale()) == [batch, again, less]
    assert outside(multiscale(recompute=True)) == [batch, less]
    unrolled = small(gradient=UnrolledGradient())
    assert outside(unrolled) == [batch, "--model.gradient ImplicitGradient", less]
    phantom = small(gradient=PhantomGradient(steps=3))
    assert outside(phantom) == [batch, "--model.gradient PhantomGradient --model.gradient.steps 2", less]
    assert outside(small(gradient=PhantomGradient(steps=1))) == [batch, less]
    pretrained = small(pretrain_steps=5, pretrain_depth=4)
    assert outside(pretrained) == [batch, "--model.pretrain_depth 3", less]
    assert outside(flows.small(), loader=flows.pairs(), limit_val_batches=0) == [batch, again, less]
    assert outside(small(), precision="bf16-mixed", accumulate_grad_batches=4) == [batch.replace("2", "8")]


def test_the_batch_is_that_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """In evaluation it is another one, and nothing else is kept."""
    monkeypatch.setattr(Anderson, "step", fail)
    run = trainer(max_epochs=1, num_sanity_val_steps=0)
    with pytest.raises(torch.OutOfMemoryError) as error:
        run.fit(small(), datamodule=DigitsDataModule(batch_size=48))
    assert "\n  --data.batch_size 24 (now 48) with --trainer.accumulate_grad_batches 2 for" in error.value.__notes__[0]
    with pytest.raises(torch.OutOfMemoryError) as error:
        trainer().test(texts.small(), datamodule=texts.texts(eval_batch_size=6), verbose=False)
    assert error.value.__notes__[0].splitlines()[-1] == "  --data.eval_batch_size 3 (now 6)"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."),
            True,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."), True),
        (RuntimeError("shapes do not fit"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_is_taken_for_it(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
    with pytest.raises(NotEnoughMemoryError if expected else type(error)), told_of_memory():
        raise error


def test_other_errors_are_left_alone() -> None:
    def wrong(*args: Any) -> Any:
        raise RuntimeError("shapes do not fit")

    module = small()
    module.training_step = wrong  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"^shapes do not fit$") as error:
        train(module)
    assert not hasattr(error.value, "__notes__")


def test_the_command_line_says_it_in_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Anderson, "step", fail)
    told = refused(capsys, "fit", "-c", DIGITS, *TINY, "--trainer.num_sanity_val_steps", "0")
    assert told.splitlines()[0] == FULL
    assert "  --data.batch_size 32 (now 64) with --trainer.accumulate_grad_batches 2 for steps as large" in told


LIMITED = """
import resource, sys
from pathlib import Path
import commands.training, cli
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + int(sys.argv[1]) * 2**20,) * 2)
cli.main(sys.argv[2:])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the process by what Linux tells of it")
def test_a_host_that_runs_out(tmp_path: Path) -> None:
    """For real: 1024 samples of 2048 numbers are 8 MiB a state, and the solver keeps 20 where 150 MiB are left."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(Path(DIGITS).read_text().replace("contraction: 0.9 ", "contraction: null "))
    typed = ("fit", "-c", str(recipe), *QUIET, "--model.model_args.width", "2048", "--data.batch_size", "1024")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "150", *typed, "--trainer.num_sanity_val_steps", "0"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    (told,) = done.stderr.split("error: ")[1:]
    assert "allocat" in told.splitlines()[0]
    assert "Traceback" not in done.stderr
    assert "\n  --data.batch_size 512 (now 1024) with --trainer.accumulate_grad_batches 2 for steps as large\n" in told


def test_a_trainer_of_the_users_own_callbacks_has_it_too() -> None:
    module = small()
    run = train(module, pl.Callback())
    names = [type(callback).__name__ for callback in run.callbacks]  # type: ignore[attr-defined]
    assert {"MemoryAdvice", "SkippedSteps"} <= set(names)
