"""The commands fit, validate, test and predict: Lightning's own LightningCLI in subclass mode, with six things on top.

A checkpoint brings its own model and data, so that ``test --ckpt_path FILE`` needs nothing else; what is typed beats
what the checkpoint says, and is shown; an error is one message that names the nearest valid spelling; ``fit`` ends by
testing its best checkpoint; a run that is interrupted leaves a checkpoint and says how to go on; and
``fit --resume auto`` goes on, however it stopped.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6 calls jsonargparse's older names

import pytorch_lightning as pl
import torch
import yaml
from jsonargparse import _typehints
from jsonargparse.typing import PositiveInt
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.utilities import rank_zero_info
from rich.console import Console
from rich.table import Table

import lightning_modules
from commands import resuming
from commands.launches import refuse_other_counts
from commands.quiet import silence_what_users_cannot_act_on
from datamodules import DataError  # importing the package makes its classes known to the parser by their short names
from lightning_modules.checkpoints import CheckpointError, check_fits, read_checkpoint
from lightning_modules.continued_runs import ContinuedRun
from lightning_modules.ending_together import end_with_the_launcher, wait_for_the_others
from lightning_modules.keep_last import KeepLast
from lightning_modules.out_of_memory import NotEnoughMemoryError, told_of_memory
from lightning_modules.safe_checkpoints import NO_ROOM, replacing
from lightning_modules.usage_errors import UsageError, explain
from zoo import InputError, WeightsError
from zoo.implicit.choices import in_short


def _start_afresh(_: object, before: Any, now: Any) -> None:
    """Where another class is chosen, nothing of the one before is left over, though an argument has the same name.

    jsonargparse would keep what both classes take: the memory of the default Anderson for a Broyden, say.
    """
    if before and "init_args" in before:
        names = (str(choice["class_path"]).rpartition(".")[2] for choice in (before, now))
        if len(set(names)) > 1:
            before.pop("init_args")


_typehints.discard_init_args_on_class_path_change = _start_afresh

SUBCOMMANDS = ("fit", "validate", "test", "predict")
USERS_ERRORS = (
    UsageError,
    CheckpointError,
    WeightsError,
    InputError,
    DataError,
    MisconfigurationException,
    FileNotFoundError,
    lightning_modules.TrainingError,
    NotEnoughMemoryError,
)


def main(args: Sequence[str]) -> ZooCLI:
    """Run ``fit``, ``validate``, ``test`` or ``predict``, the first of ``args``.

    Raises:
        one of ``USERS_ERRORS``: what the user can do something about.
    """
    silence_what_users_cannot_act_on()
    end_with_the_launcher()
    try:
        with told_of_memory():
            done = ZooCLI(args)
        wait_for_the_others(done.trainer)
        return done
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise CheckpointError(
            f"{error.filename or 'a file of the run'} could not be written: {error.strerror}. Make room; a fit goes on "
            "from its last checkpoint, which is still whole, with the same command and --resume auto"
        ) from error


class Parser(LightningArgumentParser):
    """Raises instead of exiting, so that every error passes through one door."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """As always; a configuration that is not text is one more error."""
        try:
            return super().parse_args(*args, **kwargs)
        except UnicodeDecodeError as error:
            self.error(
                "a configuration is a text file, and one of those given is not; --ckpt_path takes checkpoints", error
            )

    def error(self, message: str, ex: Exception | None = None) -> Any:
        if not self.exit_on_error:  # jsonargparse trying one type after another
            super().error(message, ex)
        raise UsageError(explain(message, self)) from ex


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the folder of this run alone, whichever logger is used."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the configuration, for ``fit`` only: the other commands make nothing that it could repeat."""
        if stage != "fit" or trainer.logger is None:
            return
        folder = lightning_modules.run_dir(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / self.config_filename) as file:  # a run that goes on has one already
            file.write(self.parser.dump(self.config, skip_none=False).encode("utf-8"))


class ZooCLI(LightningCLI):
    """LightningCLI for equilibrium models; see the module's docstring."""

    def __init__(self, args: Sequence[str]) -> None:
        self.checkpoint: dict[str, Any] | None = None
        self.resumed: resuming.Resumed | None = None
        self.looked_for_checkpoints = False
        super().__init__(
            model_class=lightning_modules.EquilibriumModule,
            datamodule_class=pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            trainer_defaults={
                "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": ""}},
                "callbacks": [lightning_modules.InterruptCheckpoint()],
            },
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={"allow_abbrev": False},  # a typo is not an abbreviation
            args=list(args),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what the zoo has beyond Lightning's arguments."""
        parser.add_lightning_class_args(KeepLast, "checkpoint")
        parser.add_lightning_class_args(lightning_modules.PredictionWriter, "predictions")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/loss",
                "checkpoint.mode": "min",
                "checkpoint.filename": "best",
                "checkpoint.save_last": True,
                "checkpoint.enable_version_counter": False,
            }
        )
        parser.add_argument(
            "--num_threads",
            type=PositiveInt | None,
            default=None,
            help="CPU threads of one operation; torch's default is one a core, and small models are fastest with 1.",
        )
        parser.add_argument(
            "--resume",
            type=str | None,
            default=None,
            nargs="?",
            const="auto",
            help="fit --resume auto: go on with the run of this name, in its folder, from its last good checkpoint; "
            "start it if there is none.",
        )
        parser.add_argument(
            "--test_after_fit", type=bool, default=True, help="After fit, test the best checkpoint on the test set."
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, with the checkpoint's own model and data as the defaults of what is not given."""
        path = _ckpt_path(args)
        if _is_a_file(path) and args[0] in SUBCOMMANDS:
            self.checkpoint = read_checkpoint(path, _typed(args))
            self.config = _parsed_over(self.checkpoint, parser, args)
            self.config[args[0]].ckpt_path = path  # also where a configuration after it names another
            self._refuse_resume()
        else:
            self.config = parser.parse_args(args)
            path = self.config[self.config.subcommand].ckpt_path  # a configuration can name one too
            if path in {"best", "last"} or (path == "hpc" and self.config.subcommand != "fit"):
                newest = sorted(Path("runs").rglob("*.ckpt"), key=lambda file: file.stat().st_mtime)[-3:]
                there = f"the newest are {', '.join(map(str, newest))}" if newest else "there is none under runs"
                raise UsageError(f"--ckpt_path takes a file, since every run has a folder of its own; {there}")
            self.checkpoint = read_checkpoint(path, _typed(args)) if _is_a_file(path) else None
            if self._refuse_resume():
                self._look_for_checkpoints(parser, args)
        if self.checkpoint is not None:
            self._say_what_replaces(self.checkpoint, self.config.subcommand)

    def _refuse_resume(self) -> bool:
        """Whether ``--resume auto`` is given; UsageError where something is wrong with it."""
        command = self.config.subcommand
        if command != "fit" and self.config[command].resume is not None:
            raise UsageError(f"--resume goes with fit, and this is {command}, which takes --ckpt_path FILE")
        return resuming.wanted(self.config[command])

    def _look_for_checkpoints(self, parser: LightningArgumentParser, args: Sequence[str]) -> None:
        """``--resume auto``: take the last good one, as if it were typed."""
        self.looked_for_checkpoints = True
        self.resumed = resuming.find(self.config.fit, _typed(args))
        if self.resumed is not None:
            self.checkpoint = self.resumed.checkpoint
            self.config = _parsed_over(self.checkpoint, parser, args)
        self.config.fit.resume = None  # config.yaml says what the run is, and can be the start of another

    def _parse_ckpt_path(self) -> None:
        """Lightning would let the checkpoint's values replace typed ones here, without a word; see above."""

    def before_instantiate_classes(self) -> None:
        """Set the number of threads before anything is computed."""
        if (threads := self._get(self.config, "num_threads")) is not None:
            torch.set_num_threads(threads)

    def instantiate_classes(self) -> None:
        """Make model, data and trainer; what their constructors refuse is a usage error."""
        self.asked = self.config
        if self.resumed is not None:
            self.config = self.config.clone()
            self.config.fit = self.resumed.of_the_same_run(self.config.fit)
        try:
            super().instantiate_classes()
        except (ValueError, TypeError) as error:
            raise UsageError(explain(str(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make the trainer, whose config.yaml says what was asked for."""
        self.config = self.asked
        trainer: pl.Trainer = super().instantiate_trainer(**kwargs)
        refuse_other_counts(trainer)
        return trainer

    def after_instantiate_classes(self) -> None:
        """Refuse a checkpoint of another model before anything is touched; go on in the run's own folder."""
        if self.checkpoint is not None:
            check_fits(self.checkpoint, self.model)
        if self.looked_for_checkpoints:
            found = self.resumed
            run = ContinuedRun(None, 0) if found is None else ContinuedRun(found.path, found.step)
            run.take_up_logs(self.trainer)
            self.trainer.callbacks.append(run)  # type: ignore[attr-defined]

    def before_predict(self) -> None:
        """Keep no predictions in memory: each batch is written as it comes."""
        self.config_init["predict"]["return_predictions"] = False

    def before_fit(self) -> None:
        """Start the clock; go on from what was found."""
        self.started = time.monotonic()
        if self.resumed is not None:
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            self.config_init["fit"]["ckpt_path"] = str(self.resumed.path)

    def after_fit(self) -> None:
        """Test the best checkpoint, and show what came out and where it is."""
        seconds = time.monotonic() - self.started
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        if not best or self.trainer.interrupted:
            return
        metrics: dict[str, float] = {}
        if self._get(self.config, "test_after_fit"):
            # One that averages weights would put those of the last step in place of the checkpoint's averages.
            callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
            self.trainer.callbacks = [c for c in callbacks if not isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]
            metrics = dict(
                *self.trainer.test(datamodule=self.datamodule, ckpt_path=best, verbose=False, weights_only=True)
            )
        if self.trainer.is_global_zero:
            _print_results(best, {**metrics, "training time (s)": seconds})

    def _say_what_replaces(self, checkpoint: dict[str, Any], subcommand: str) -> None:
        path, config = checkpoint["path"], self.config[subcommand].as_dict()
        for group, made_by in checkpoint["made_by"].items():
            for key, was, now in _differences(made_by, config[group], group):
                if subcommand == "fit" and key == "model.optimizer":
                    raise UsageError(
                        f"fit --ckpt_path goes on with the optimizer state of {path}, which is one of {was}, not of "
                        f"{now}. To train with another optimizer, start a fit without --ckpt_path"
                    )
                name = key.removeprefix("model.").partition(".")[0]
                if name in {"weights_from", "pretrained", "backbone"}:
                    rank_zero_info(f"{key}={in_short(now)} has no effect here: all weights are those of {path}")
                    continue
                rank_zero_info(f"{key}: {in_short(now)} as given, in place of {in_short(was)} in {path}")
                if subcommand == "fit" and name in {"lr", "weight_decay", "schedule", "optimizer_args"}:
                    warnings.warn(
                        f"{key}={in_short(now)} has NO effect here: fit --ckpt_path goes on with the optimizer state "
                        f"of {path}. To train with another {key}, start a fit without --ckpt_path",
                        stacklevel=2,
                    )


def _parsed_over(checkpoint: Mapping[str, Any], parser: LightningArgumentParser, args: Sequence[str]) -> Any:
    """What is typed, with the checkpoint's own model and data as the defaults of what is not."""
    with tempfile.TemporaryDirectory() as folder:
        defaults = Path(folder, "checkpoint.yaml")
        defaults.write_text(yaml.safe_dump(checkpoint["made_by"]), encoding="utf-8")
        config = parser.parse_args([args[0], "--config", str(defaults), *args[1:]])
    config[args[0]].pop("config", None)
    return config


def _print_results(best: str, values: Mapping[str, float]) -> None:
    """What a fit ends with."""
    table = Table(title="Result of the best checkpoint", title_justify="left")
    table.add_column("")
    table.add_column("value", justify="right")
    for name, value in values.items():
        table.add_row(name, f"{value:.4g}")
    # The path is printed whole, where it can be copied: not in a table, which would fold it.
    print(f"\nBest checkpoint: {best}\nTest it again:   python cli.py test --ckpt_path {best}\n")
    Console().print(table)


def _ckpt_path(args: Sequence[str]) -> str | None:
    """The last value of ``--ckpt_path`` on the command line."""
    joined = [f"{a}={b}" if a == "--ckpt_path" else a for a, b in itertools.pairwise([*args, ""])]
    values = [arg.partition("=")[2] for arg in joined if arg.startswith("--ckpt_path=")]
    return values[-1] if values else None


def _typed(args: Sequence[str]) -> str:
    """What the user typed, with the text of the configurations."""
    files = (Path(arg.partition("=")[2] if arg.startswith("--") else arg) for arg in args)
    return "\n".join(
        (*args, *(file.read_text(encoding="utf-8", errors="replace") for file in files if _is_a_configuration(file)))
    )


def _is_a_configuration(file: Path) -> bool:
    return file.suffix in {".yaml", ".yml", ".json"} and file.is_file()


def _is_a_file(ckpt_path: str | None) -> TypeGuard[str]:
    """False for Lightning's own words for ``--ckpt_path``, like ``last``."""
    if not ckpt_path:
        return False
    return ckpt_path not in {"best", "last", "hpc"} and not ckpt_path.startswith("registry")


def _differences(was: Any, now: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """Where two configurations differ: the dotted key of the command line, and both values."""
    if not (isinstance(was, dict) and isinstance(now, dict) and was.get("class_path") == now.get("class_path")):
        if was != now:
            yield key, was, now
    elif "class_path" in was:
        was, now = was.get("init_args", {}), now.get("init_args", {})
        for name in sorted(was.keys() & now.keys()):
            yield from _differences(was[name], now[name], f"{key}.{name}")
    else:
        for name in sorted(was.keys() | now.keys()):
            yield from _differences(was.get(name), now.get(name), f"{key}.{name}")
