"""Real launches of several processes: by the strategy ``ddp``, by torchrun, and on two "nodes" of this machine."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from commands.launches import refuse_other_counts
from lightning_modules.usage_errors import UsageError
from tests.command_line import rows
from tests.launching import CLI, FIT, TORCHRUN, TWO, free_port, output_of, start, wait_for

pytestmark = pytest.mark.usefixtures("nothing_is_left")

RUNS = Path("runs", "tanh_deq_digits")
BEST = RUNS / "version_0" / "checkpoints" / "best.ckpt"


def is_one_run(output: str) -> None:
    """Trained and tested, in one folder, and told once."""
    assert [folder.name for folder in RUNS.iterdir()] == ["version_0"]
    files = {str(file.relative_to(RUNS / "version_0")) for file in RUNS.rglob("*") if file.is_file()}
    assert {file for file in files if not file.startswith("pictures")} == {
        *("checkpoints/best.ckpt", "checkpoints/last.ckpt", "config.yaml", "metrics.csv", "hparams.yaml")
    }
    logged = rows(RUNS / "version_0" / "metrics.csv")
    assert [row["step"] for row in logged if row["train/loss"]] == ["0", "1"]
    assert len([row for row in logged if row["val/loss"]]) == 1
    (tested,) = [row for row in logged if row["test/accuracy"]]
    right = float(tested["test/accuracy"]) * 360
    assert right == pytest.approx(round(right), abs=1e-3), "each of 360 images once"
    for line in (f"Best checkpoint: {BEST}", "Result of the best checkpoint", "`Trainer.fit` stopped: `max_epochs=1`"):
        assert output.count(line) == 1, line
    assert "Warning" not in output


def test_ddp() -> None:
    process = start(sys.executable, CLI, *FIT, *TWO)
    output = output_of(process)
    assert process.returncode == 0, output
    is_one_run(output)


def test_torchrun() -> None:
    process = start(*TORCHRUN, "--standalone", "--nproc_per_node", "2", CLI, *FIT, *TWO)
    output = output_of(process)
    assert process.returncode == 0, output
    is_one_run(output)


def two_nodes(port: str) -> tuple[list[int], str]:
    """How the launchers of both ended, and what they said."""
    place = ("--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", port)
    counts = ("--trainer.num_nodes", "2", "--trainer.devices", "1", "--trainer.strategy", "ddp")
    nodes = [start(*TORCHRUN, "--node_rank", str(rank), *place, CLI, *FIT, *counts) for rank in range(2)]
    output = "".join(map(output_of, nodes))
    return [node.returncode for node in nodes], output


def test_two_nodes() -> None:
    statuses, output = two_nodes(free_port())
    if "address already in use" in output.lower():  # somebody else took it in between
        statuses, output = two_nodes(free_port())
    assert statuses == [0, 0], output
    is_one_run(output)


def test_torchrun_starts_more_than_the_trainer_knows_of() -> None:
    process = start(*TORCHRUN, "--standalone", "--nproc_per_node", "2", CLI, *FIT)
    output = output_of(process)
    assert process.returncode != 0
    (message,) = re.findall(r"^error: (.*)$", output, re.MULTILINE)
    assert message == (
        "torchrun started 2 processes, and the trainer was told of 1 node(s) with 1 device(s) each. Give it the same "
        "numbers as torchrun: --trainer.num_nodes 1 --trainer.devices 2 --trainer.strategy ddp"
    )
    assert 'cli.py", line' not in output, "a traceback of ours"
    assert not RUNS.exists()


@pytest.mark.parametrize(
    ("nodes", "devices", "there", "numbers"),
    [(1, 1, (4, 2), (2, 2)), (1, 2, (4, 4), (1, 4)), (2, 2, (2, 2), (1, 2))],
)
def test_the_numbers_that_it_takes(
    nodes: int, devices: int, there: tuple[int, int], numbers: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), there, strict=True):
        monkeypatch.setenv(name, str(value))
    trainer = SimpleNamespace(num_nodes=nodes, num_devices=devices)
    refuse_other_counts(trainer)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "as of torchrun")
    monkeypatch.setenv("RANK", "0")
    told = f"--trainer.num_nodes {numbers[0]} --trainer.devices {numbers[1]} --trainer.strategy ddp"
    with pytest.raises(UsageError, match=told):
        refuse_other_counts(trainer)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as exit_:
        refuse_other_counts(trainer)
    assert exit_.value.code == 2


def test_sigterm_to_torchrun() -> None:
    process = start(
        *TORCHRUN, "--standalone", "--nproc_per_node", "2", CLI, *FIT, *TWO, "--trainer.max_epochs", "100000"
    )
    wait_for(process, BEST.exists)
    process.send_signal(signal.SIGTERM)
    output = output_of(process)
    assert process.returncode != 0
    (step, path) = re.findall(r"Stopped at step (\d+) by SIGTERM. The state is saved in (\S+)", output)[0]
    assert int(step) > 0
    assert Path(path).is_file()
