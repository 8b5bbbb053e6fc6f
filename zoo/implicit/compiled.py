"""What ``torch.compile`` needs to be told about an equilibrium whose f, or a part of it, is compiled.

Nothing is done until something has been compiled in this process.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def buffers_kept() -> AbstractContextManager[object]:
    """Within this context backward passes are compiled such that they can run again.

    A compiled backward pass overwrites ("donates") what it has saved, and then refuses ``retain_graph=True``, which the
    products of an adjoint solve need, if its first use did not ask for that: that of an unrolled solve, say.
    """
    if not _may_be_compiled():
        return nullcontext()
    from torch._functorch import config

    kept: AbstractContextManager[object] = config.patch(donated_buffer=False)
    return kept


def say_that_buffers_are_kept(node: Any) -> None:
    """Tell a node of a graph, if it was compiled within :func:`buffers_kept`.

    Torch asks whether the list of donated buffers is ``[]``, and leaves it at None where donation was off.
    """
    if type(node).__name__ == "CompiledFunctionBackward":
        metadata = getattr(getattr(node, "_forward_cls", None), "metadata", None)
        if getattr(metadata, "bw_donated_idxs", []) is None:
            metadata.bw_donated_idxs = []  # type: ignore[union-attr]


def eagerly() -> AbstractContextManager[object]:
    """Within this context compiled functions run as they were written.

    Their graphs have no second derivatives, and ``torch.func`` does not see into them.
    """
    if not _may_be_compiled():
        return nullcontext()
    eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return eager


def _may_be_compiled() -> bool:
    # Inside of a compiled region these contexts would break its graph.
    return "torch._dynamo" in sys.modules and not torch.compiler.is_compiling()
