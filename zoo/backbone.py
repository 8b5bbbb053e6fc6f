"""One model's stem and equilibrium in another: from classification to segmentation, as the published runs go."""

from __future__ import annotations

import os

from torch import nn

from .errors import WeightsError
from .originals import load_original
from .originals.common import problems
from .weights import ForeignWeightsError, load_pretrained

_HEAD = "head."


def load_backbone(model: nn.Module, source: str | os.PathLike[str] | nn.Module) -> None:
    """Copy the stem and the equilibrium layer of another model into ``model``, whose head stays as it is.

    So begin the published Cityscapes runs of MDEQ, from a model trained on ImageNet (Bai, Koltun and Kolter,
    "Multiscale Deep Equilibrium Models", NeurIPS 2020).

    Args:
        model: a model with a ``head``, like :class:`~zoo.MDEQSegmenter`; changed in place.
        source: what :func:`load_pretrained` takes, a file that :func:`load_original` reads, or a model.

    Raises:
        WeightsError: the source cannot be loaded; or the parts besides the heads differ, in a name or in a shape.
            Nothing was changed.
        ValueError: ``model`` has no head.

    Example:
        >>> model = zoo.create_model("mdeq_small_cityscapes")
        >>> zoo.load_backbone(model, "MDEQ_Small_Cls.pkl")
    """
    ours = model.state_dict()
    if not any(key.startswith(_HEAD) for key in ours):
        raise ValueError(f"load_backbone takes a model with a head, like MDEQSegmenter; given: {type(model).__name__}")
    if isinstance(source, nn.Module):
        name, found = type(source).__name__, source
    else:
        name = os.fspath(source)
        try:
            found = load_pretrained(name)
        except ForeignWeightsError:
            found = load_original(name)
    theirs = {key: value for key, value in found.state_dict().items() if not key.startswith(_HEAD)}
    wanted = {key: value for key, value in ours.items() if not key.startswith(_HEAD)}
    if different := problems(theirs, wanted):
        raise WeightsError(
            f"{name} has another stem or cell than this {type(model).__name__}: in it {different}. Make the model with "
            "the same channels, expansion, post_affine and weight_norm"
        )
    model.load_state_dict({**ours, **theirs})
