"""What is mistyped is refused with exit code 2 and one message that says what was given and what is near to it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import cli
from lightning_modules.usage_errors import UsageError
from tests.command_line import DIGITS, QUIET, ROOT, TINY, Fitted, refused

# What a mistake that passed would cost; the parser takes its time for each option, so this is but one.
SHORT = ("--trainer.fast_dev_run", "1")

TYPED = {
    # an argument's name
    "--model.solver.tool 3": (
        "unknown argument 'model.solver.tool' of Anderson. Did you mean 'tol'? "
        "Known: tol, norm, max_steps, compact, bfloat16_until, memory, mix_every, ridge, damping, kind."
    ),
    "--model.solver.init_args.tool=3": "unknown argument 'model.solver.tool' of Anderson. Did you mean 'tol'?",
    "--model.gradient.solver.max_step 3": (
        "unknown argument 'model.gradient.solver.max_step' of Anderson. Did you mean 'max_steps'?"
    ),
    "--model.lrr 3": "unknown argument 'model.lrr' of ImageClassifier. Did you mean 'lr'?",
    "--data.batchsize 3": "unknown argument 'data.batchsize' of DigitsDataModule. Did you mean 'batch_size'?",
    "--trainer.logger.nam x": "unknown argument 'trainer.logger.nam' of CSVLogger. Did you mean 'name'?",
    "--model.model_args.widht 3": "model 'tanh_deq' has no argument 'widht'. Did you mean 'width'?",
    "--model.model_args.num_classes 3": "num_classes is an argument of its own, beside model_args",
    # an option's name; an abbreviation is not a name
    "--trainr.max_epochs 3": "unknown argument '--trainr.max_epochs'. Did you mean '--trainer.max_epochs'?",
    "--trainr.max_epochs=3": "unknown argument '--trainr.max_epochs=3'. Did you mean '--trainer.max_epochs'?",
    "--trainer.max_epoch 3": "unknown argument '--trainer.max_epoch'. Did you mean '--trainer.max_epochs'?",
    "--ckpt x": "unknown argument '--ckpt'. Did you mean '--ckpt_path'?",
    "--checkpoint.monitr x": "unknown argument '--checkpoint.monitr'. Did you mean '--checkpoint.monitor'?",
    "--configs x": "unknown argument '--configs'. Did you mean '--config'?",
    "further": "unknown argument 'further'. See --help",
    "--ckpt_path": "argument --ckpt_path: expected one argument",
    # a class
    "--model ImageClasifier": "unknown class 'ImageClasifier' for 'model'. Did you mean 'ImageClassifier'?",
    "--model lightning_modules.ImageClasifier": (
        "unknown class 'lightning_modules.ImageClasifier' for 'model'. Did you mean 'ImageClassifier'?"
    ),
    "--model nowhere.ImageClassifier": "unknown class 'nowhere.ImageClassifier' for 'model'. Did you mean",
    "--model datamodules.DigitsDataModule": (
        "model: Import path does not correspond to a subclass of EquilibriumModule; "
        "given: 'datamodules.DigitsDataModule'"
    ),
    "--data DigitDataModule": "unknown class 'DigitDataModule' for 'data'. Did you mean 'DigitsDataModule'?",
    "--model.solver Andersn": (
        "unknown class 'Andersn' for 'model.solver'. Did you mean 'Anderson'? "
        "Known: Anderson, BiCGSTAB, Broyden, FixedPointIteration, GMRES, Newton."
    ),
    "--model.gradient ImplicitGradent": (
        "unknown class 'ImplicitGradent' for 'model.gradient'. Did you mean 'ImplicitGradient'? "
        "Known: ImplicitGradient, NeumannGradient, PhantomGradient, UnrolledGradient."
    ),
    "--model.gradient.solver Newtn": (
        "unknown class 'Newtn' for 'model.gradient.solver'. Did you mean 'Newton'? "
        "Known: Anderson, BiCGSTAB, Broyden, FixedPointIteration, GMRES, Newton."
    ),
    "--trainer.logger CVSLogger": "unknown class 'CVSLogger' for 'trainer.logger'. Did you mean 'CSVLogger'?",
    "--trainer.callbacks EarlyStoping": (
        "unknown class 'EarlyStoping' for 'trainer.callbacks'. Did you mean 'EarlyStopping'?"
    ),
    "--optimizer Adm": "unknown class 'Adm' for 'optimizer'. Did you mean 'Adam'?",
    # a model, weights
    "--model.model tanh_dec": "unknown model 'tanh_dec'. Did you mean 'tanh_deq'?",
    "--model.pretrained tanh_deq.digit": "unknown weights 'tanh_deq.digit'. Did you mean 'tanh_deq.digits'?",
    # a type
    "--model.lr fast": "'model.lr' takes a value of type float; given: 'fast'",
    "--model.num_classes ten": "'model.num_classes' takes a value of type int; given: 'ten'",
    "--model.solver.tol small": "'model.solver.tol' takes a value of type float; given: 'small'",
    "--model.solver.max_steps 2.5": "'model.solver.max_steps' takes a value of type int; given: '2.5'",
    "--model.solver 3": "unknown class '3' for 'model.solver'.",
    "--model.schedule cosin": (
        "'model.schedule' takes a value of type Literal['cosine', 'one_cycle', 'constant']; given: 'cosin'"
    ),
    "--model.model_args 3": "'model.model_args' takes a value of type dict; given: '3'",
    "--model.model_args.width 2.5": "argument 'width' of model 'tanh_deq' takes int; given: 2.5 (float)",
    "--model.model_args.width wide": "argument 'width' of model 'tanh_deq' takes int; given: 'wide' (str)",
    "--trainer.max_epochs many": "'trainer.max_epochs' takes a value of type int; given: 'many'",
    "--seed_everything x": "'seed_everything' takes a value of type bool or int; given: 'x'",
    "--test_after_fit maybe": "'test_after_fit' takes a value of type bool; given: 'maybe'",
    # a range
    "--model.solver.max_steps -1": "Anderson(max_steps=...) takes an integer >= 0; given: -1",
    "--model.gradient.solver.damping 2": "Anderson(damping=...) takes a number in (0, 1]; given: 2",
    "--model.jacobian_weight -1": "jacobian_weight takes a number >= 0",
    "--model.jacobian_frequency 2": "jacobian_frequency one in [0, 1]; given: 0.0 and 2.0",
    "--model.label_smoothing 1": "label_smoothing takes a number in [0, 1); given: 1.0",
    "--model.lr=-1": "lr and weight_decay take numbers >= 0; given: -1.0 and 0.01",
    "--data.batch_size 0": "batch_size is a whole number, at least 1; given: 0",
    "--data.max_scale 1": "max_scale is at least 0 and below 1; given: 1",
    "--trainer.accelerator xpuu": "You selected an invalid accelerator name: `accelerator='xpuu'`",
    "--trainer.strategy dpd": "You selected an invalid strategy name: `strategy='dpd'`",
}


@pytest.mark.parametrize("typed", TYPED)
def test_what_is_mistyped(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert TYPED[typed] in refused(capsys, "fit", "-c", DIGITS, *SHORT, *typed.split())
    assert not list(Path.cwd().iterdir())


WRITTEN = {
    "model: {init_args: {wdth: 3}}": "unknown argument 'model.wdth' of ImageClassifier. Known: model, num_classes,",
    "model: {lrr: 3}": "unknown argument 'model.lrr' of ImageClassifier. Did you mean 'lr'?",
    "model: {solver: {init_args: {tool: 3}}}": "unknown argument 'model.solver.tool' of Anderson. Did you mean 'tol'?",
    "model: {solver: {class_path: Andersn}}": "unknown class 'Andersn' for 'model.solver'. Did you mean 'Anderson'?",
    "model: {gradient: {class_path: ImplicitGradient, init_args: {solver: {class_path: Newtn}}}}": (
        "unknown class 'Newtn' for 'model.gradient.solver'. Did you mean 'Newton'?"
    ),
    "model: {model_args: {widht: 3}}": "model 'tanh_deq' has no argument 'widht'. Did you mean 'width'?",
    "trainer: {max_epoch: 3}": "unknown argument 'trainer.max_epoch'. Did you mean 'trainer.max_epochs'?",
    "traner: {max_epochs: 3}": "unknown argument 'traner.max_epochs'. Did you mean 'trainer.max_epochs'?",
    "seed_everthing: 3": "unknown argument 'seed_everthing'. Did you mean 'seed_everything'?",
    "trainer: {max_epochs: many}": "'trainer.max_epochs' takes a value of type int; given: 'many'",
    "model: {lr: [1, 2]}": "'model.lr' takes a value of type float; given: '[1, 2]'",
    "model: [": "Problems parsing config: while parsing a flow",
    "- fit\n- test": "a configuration file holds keys and their values; given: '- fit\\n- test'",
    "": "a configuration file holds keys and their values; given: an empty file",
}


@pytest.mark.parametrize("written", WRITTEN, ids=repr)
def test_what_is_miswritten(written: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(written)
    assert WRITTEN[written] in refused(capsys, "fit", "-c", DIGITS, "-c", "mine.yaml", *SHORT)
    assert [path.name for path in Path.cwd().iterdir()] == ["mine.yaml"]


MISSING = "missing: data, model. Give a configuration, like -c configs/tanh_deq_digits.yaml, or"
COMMANDS = {
    f"fitt -c {DIGITS}": (
        "unknown command 'fitt'. Did you mean 'fit'? "
        "Known: fit, validate, test, predict, list, convert, evaluate, export."
    ),
    f"-c {DIGITS} fit": "what is given, -c too, goes after the command: python cli.py fit -c ...",
    "lsit": "unknown command 'lsit'. Did you mean 'list'?",
    "--json list": "what is given, --json too, goes after the command: python cli.py list --json ...",
    "--jsn": "what is given, --jsn too, goes after the command: python cli.py COMMAND --jsn ...",
    "": "a command is missing\n\nusage: python cli.py COMMAND ...",
    **dict.fromkeys(("fit", "validate", "test", "predict"), MISSING),
    "fit -c nowhere/at_all.yaml": "there is no file {cwd}/nowhere/at_all.yaml.",
    f"fit -c {DIGITS.replace('digits', 'digit')}": f"{DIGITS.replace('digits', 'digit')}. Did you mean '{DIGITS}'?",
    f"fit --config={DIGITS.replace('digits', 'digit')}": f"Did you mean '{DIGITS}'?",
    f"fit -c {ROOT / 'configs'}": "Path is not a file",
    f"fit -c {ROOT / 'checkpoints/tanh_deq.digits.safetensors'}": (
        "a configuration is a text file, and one of those given is not; --ckpt_path takes checkpoints"
    ),
}


@pytest.mark.parametrize("typed", COMMANDS)
def test_commands_and_files(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMANDS[typed].replace("{cwd}", str(Path.cwd())) in refused(capsys, *typed.split())


@pytest.mark.parametrize("command", ["fit", "test"])
def test_data_that_is_not_there(fitted: Fitted, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before anything is trained or measured, with the two ways to get it."""
    model = ("-c", DIGITS, *TINY) if command == "fit" else ("--ckpt_path", fitted.best, *QUIET)
    message = refused(capsys, command, *model, "--data", "MNISTDataModule", "--data.root", "mine")
    assert message.startswith("MNIST was not found: there is no train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz")
    assert f"in {Path.cwd() / 'mine/MNIST/raw'}. To fetch it, add --data.download true" in message
    assert not list(Path.cwd().rglob("*.ckpt"))


def test_the_traceback_is_there_for_those_who_ask(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DEQ_ZOO_DEBUG", "1")
    argv = list(sys.argv)
    with pytest.raises(UsageError, match=re.escape("unknown argument 'model.lrr'")) as error:
        cli.main(["fit", "-c", DIGITS, "--model.lrr", "3"])
    assert error.value.__cause__ is not None
    assert capsys.readouterr().err == ""
    assert sys.argv == argv


@pytest.mark.parametrize("typed", ["--help", "fit --help", "test --print_config --model ImageClassifier"])
def test_help_is_no_error(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--data", "DigitsDataModule"] if "--model" in typed else []
    with pytest.raises(SystemExit) as exit_:
        cli.main([*typed.split(), *more])
    assert exit_.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 10
