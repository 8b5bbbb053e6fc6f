"""The command line: ``python cli.py COMMAND ...``; without a command it says which there are.

Only what a command needs is imported: ``fit``, ``validate``, ``test`` and ``predict`` are Lightning's
(``commands/training.py``), the others are modules of ``commands`` that take plain arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Never

if TYPE_CHECKING:
    from commands.training import ZooCLI

TRAINING = {
    "fit": "train a model, and test its best checkpoint",
    "validate": "measure a checkpoint on the validation set",
    "test": "measure a checkpoint on the test set",
    "predict": "write what a checkpoint predicts",
}
VERBS = {
    "list": "commands.catalogue",
    "convert": "commands.convert",
    "evaluate": "commands.evaluate",
    "export": "commands.export",
}
SUMMARIES = {
    **TRAINING,
    "list": "show the pretrained weights, or the models",
    "convert": "write a checkpoint of the original authors, or of a run, as a weights file of the zoo",
    "evaluate": "measure pretrained weights beside what is recorded and published",
    "export": "write a model as ONNX, or for torch.export",
}


class Parser(argparse.ArgumentParser):
    """Raises instead of exiting, so that every error passes through one door."""

    def error(self, message: str) -> Never:
        """Name what is near to an option that does not exist.

        Raises:
            ValueError: always.
        """
        if found := re.fullmatch(r"unrecognized arguments: (\S+).*", message, re.DOTALL):
            options = [name for name in self._option_string_actions if name.startswith("--")]
            raise ValueError(f"unknown argument {found[1]!r}.{_nearest(found[1].partition('=')[0], options)}")
        raise ValueError(message)


def usage() -> str:
    """What ``--help`` prints: each command with a line."""
    width = max(map(len, SUMMARIES))
    lines = [f"  {name:{width}}  {summary}" for name, summary in SUMMARIES.items()]
    return "\n".join(
        ["usage: python cli.py COMMAND ...", "", *lines, "", "python cli.py COMMAND --help tells more of each."]
    )


def parse_verb(args: Sequence[str]) -> argparse.Namespace:
    """The arguments of one of ``VERBS``, which is the first of ``args``; nothing is run.

    Raises:
        ValueError: an argument is unknown, missing, or not of its type.
    """
    verb, *rest = args
    summary = SUMMARIES[verb]
    parser = Parser(prog=f"python cli.py {verb}", description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False)
    importlib.import_module(VERBS[verb]).add_arguments(parser)
    return parser.parse_args(rest)


def main(args: Sequence[str] | None = None) -> ZooCLI | None:
    """Run the command line. Returns the CLI object of fit, validate, test and predict, for use from Python.

    Raises:
        SystemExit: 0 after ``--help``; 2 after an error of the user's, whose message is on standard error; set
            ``DEQ_ZOO_DEBUG=1`` for the traceback.
    """
    args = list(sys.argv[1:] if args is None else args)
    argv, sys.argv = sys.argv, [__file__, *args]  # what the ddp strategy starts its other processes with
    try:
        with _told(ValueError):
            command = _command(args)
            parsed = parse_verb(args) if command in VERBS else None
        if command in TRAINING:
            return _train(args)
        if parsed is None:
            print(usage())
            raise SystemExit(0)
        _run(command, parsed)
        return None
    finally:
        sys.argv = argv


def _command(args: Sequence[str]) -> str:
    """The first of ``args``, which says what to do; or ``--help``."""
    if not args:
        raise ValueError(f"a command is missing\n\n{usage()}")
    if args[0] in {"-h", "--help", *SUMMARIES}:
        return args[0]
    if not args[0].startswith("-"):
        raise ValueError(f"unknown command {args[0]!r}.{_nearest(args[0], list(SUMMARIES))}")
    later = next((arg for arg in args if arg in SUMMARIES), "COMMAND")
    raise ValueError(
        f"what is given, {args[0]} too, goes after the command: python cli.py {later} {args[0].partition('=')[0]} ..."
    )


def _train(args: Sequence[str]) -> ZooCLI:
    from commands import training

    with _told(*training.USERS_ERRORS):
        return training.main(args)


def _run(verb: str, parsed: argparse.Namespace) -> None:
    from zoo import WeightsError

    with _told(ValueError, OSError, WeightsError):
        importlib.import_module(VERBS[verb]).run(parsed)


@contextlib.contextmanager
def _told(*errors: type[Exception]) -> Iterator[None]:
    """Errors of the user's are one message, and exit status 2."""
    try:
        yield
    except BrokenPipeError:  # no error: who reads the output has enough of it
        raise
    except errors as error:
        if os.environ.get("DEQ_ZOO_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _nearest(given: str, valid: list[str]) -> str:
    """Like ``zoo.implicit.choices.nearest``, without the time that importing torch takes."""
    close = difflib.get_close_matches(given, valid, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Known: {', '.join(valid)}."


def console() -> None:
    """The installed command ``deq-zoo``, whose exit status is 0 unless something is raised."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # as of ``| head``; nothing more can be written, at exit neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    console()
