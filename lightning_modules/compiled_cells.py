"""``torch.compile`` of the cells of a model, in place."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Callback
from torch import nn

RECOMPILE_LIMIT = 64
"""Variants of a cell that are compiled at most; torch's own limit is 8.

A run asks for one with and one without a graph, in training, validation and testing, each for the first size of a batch
and once more for any size: 7 of a cell that sees tensors of one shape otherwise. A language model's memory grows, and
is one more shape. Beyond the limit a new variant runs as it was written, and torch says so.
"""


class CompileCells(Callback):
    """Compiles what is iterated, where the module was made with ``compile=True``, when a run begins.

    The loop of the solver stays as it is. Names of weights, checkpoints and copies are those of a model that is not
    compiled; the Jacobian penalty and the spectral radius differentiate twice, or in other ways, and run as written.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Compile each cell once; torch does so when it is first called."""
        if not getattr(pl_module, "compiles", False):
            return
        if find_compiler() is None:
            raise MisconfigurationException(
                "compile=true makes C++ of a cell, and there is no C++ compiler: none of "
                f"{', '.join(COMPILERS)} is on the PATH, and CXX names none. Install one (apt install g++), or leave "
                "compile out"
            )
        compile_in_place([deq.cell for deq in pl_module.equilibria().values()])  # type: ignore[operator]


COMPILERS = ("g++", "clang++", "c++")


def find_compiler() -> str | None:
    """The C++ compiler that there is."""
    names = (os.environ.get("CXX"), *COMPILERS)
    return next((found for name in names if name and (found := shutil.which(name))), None)


def compile_in_place(cells: list[nn.Module], **options: Any) -> None:
    """Have these modules compiled when they are called, if they are not yet."""
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    for cell in cells:
        if cell._compiled_call_impl is None:  # noqa: SLF001 - torch has no public way to ask
            cell.compile(**options)
