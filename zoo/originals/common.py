"""What the checkpoints of all families have in common: copies of the cell, sizes in shapes, and what does not fit."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import WeightsError
from zoo.registry import create_model


class UnusedWeightsWarning(UserWarning):
    """A checkpoint of another model was taken as a start, and the model has no place for a part of it."""


@dataclass(frozen=True)
class Checkpoint:
    """A state dict on its way into a model of the zoo.

    Attributes:
        state: its tensors.
        where: what it was read from.
        family: what it is of, with an article, like ``"an MDEQ model"``.
    """

    state: Mapping[str, Tensor]
    where: str
    family: str

    def without_copies(self, cell: str, copy: str) -> Checkpoint:
        """The cell once, where older code stored it four times.

        Args:
            cell: how the keys of the cell begin.
            copy: how those of its copy begin, in which products stand in place of weight normalisation's factors;
                training updates them one step late, so that their values are not asked to be equal.

        Raises:
            WeightsError: a copy is not complete, or ``deq.func.*`` or ``deq.func_copy.*``, which are the same tensors
                as the cell's and the copy's, have other values.
        """
        aliases = {"deq.func.": cell, "deq.func_copy.": copy}
        for alias, source in aliases.items():
            copies, kept = self._below(alias), self._below(source)
            self._check_names(alias, copies, source, kept)
            for name, value in copies.items():
                self._check_equal(alias + name, value, source + name, kept[name])
        plain = {
            re.sub(r"\.weight_v$", ".weight", name): value
            for name, value in self._below(cell).items()
            if not name.endswith(".weight_g")
        }
        copies = self._below(copy)
        self._check_names(copy, copies, cell, plain)
        for name, value in copies.items():
            if value.shape != plain[name].shape:
                raise WeightsError(
                    f"{self.where} has shape {tuple(value.shape)} for {copy}{name}, and {tuple(plain[name].shape)} for "
                    f"that of {cell.removesuffix('.')}, of which it is a copy"
                )
        kept = {key: value for key, value in self.state.items() if not key.startswith((*aliases, copy))}
        return replace(self, state=kept)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a weight, or of its direction where it is normalised; WeightsError where there is none."""
        for name in (key, f"{key}_v"):
            if name in self.state:
                value = self.state[name]
                if value.dim() < 2 or not value.numel():
                    raise WeightsError(f"{self.where} has shape {tuple(value.shape)} for {name}, which is no weight")
                return tuple(value.shape)
        raise WeightsError(
            f"{self.where} is no complete checkpoint of {self.family}: {key!r} is missing, with {key + '_v'!r}"
        )

    def create(self, name: str, sizes: Mapping[str, Any], overrides: Mapping[str, Any]) -> nn.Module:
        """The model of these sizes, without memory for its weights: nothing is drawn that is overwritten."""
        try:
            with torch.device("meta"):
                return create_model(name, **{**sizes, **overrides})
        except ValueError as error:
            if overrides:
                raise
            _, _, kind = self.family.partition(" ")
            raise WeightsError(f"{self.where} has sizes that no {kind} has: {error}") from None

    def fill(
        self, model: nn.Module, names: Mapping[str, str], sizes: Mapping[str, Any], told: Mapping[str, Any]
    ) -> nn.Module:
        """Give a model of :meth:`create` its weights, all of them, and put it in eval mode.

        Args:
            model: changed in place, and returned.
            names: what each key of a checkpoint is called in the model; tied weights have several keys.
            sizes: what was read off the shapes, for the message.
            told: the overrides that could be why the checkpoint does not fit.

        Raises:
            ValueError: the checkpoint does not fit, and something was ``told``.
            WeightsError: it does not fit; tied weights have different values.
        """
        shapes = model.state_dict()
        expected = {name: shapes[key] for name, key in names.items()}
        if found := problems(self.state, expected):
            if told:
                given = ", ".join(f"{key}={value!r}" for key, value in told.items())
                read = ", ".join(f"{key}={value!r}" for key, value in sizes.items())
                raise ValueError(
                    f"{self.where} does not fit a model with {given}: in it {found}. Read off it are {read}, which "
                    "need not be given"
                )
            raise WeightsError(f"{self.where} is no complete checkpoint of {self.family}: in it {found}")
        first: dict[str, str] = {}
        for name, key in names.items():
            source = first.setdefault(key, name)
            if source != name:
                self._check_equal(name, self.state[name], source, self.state[source])
        own = {
            key: torch.empty(shapes[key].shape, dtype=shapes[key].dtype, device="cpu").copy_(self.state[name].detach())
            for key, name in first.items()
        }
        model.load_state_dict(own, assign=True)
        return model.eval()

    def _below(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.state.items() if key.startswith(prefix)}

    def _check_names(self, copy: str, copies: Collection[str], source: str, names: Collection[str]) -> None:
        """Raise WeightsError where there is a copy, and not of all."""
        if copies and (different := set(copies) ^ set(names)):
            raise WeightsError(
                f"{self.where} has a copy of {source}* in {copy}* that is not complete: {len(different)} names are in "
                f"one of them only, like {min(different)!r}"
            )

    def _check_equal(self, key: str, value: Tensor, source: str, kept: Tensor) -> None:
        if not torch.equal(value, kept):
            raise WeightsError(
                f"{self.where} has two different values for one weight: {key} and {source}; nothing was loaded, since "
                "it is not known which was trained"
            )


def problems(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What is wrong with the tensors of a model, in words; nothing where all names, shapes and kinds are right."""
    told = []
    if unknown := [key for key in found if key not in expected]:
        named = []
        for key in unknown[:3]:
            close = difflib.get_close_matches(key, expected, n=1)
            named.append(repr(key) + (f" (near {close[0]!r})" if close else ""))
        told.append(f"{_count(unknown, 'key is', 'keys are')} unknown: {_list(named, unknown)}")
    if missing := [key for key in expected if key not in found]:
        told.append(f"{_count(missing, 'key is', 'keys are')} missing: {_list(map(repr, missing[:3]), missing)}")
    if wrong := [key for key, value in expected.items() if key in found and not _fits(found[key], value)]:
        named = [f"{key!r} is {_kind(found[key])} and should be {_kind(expected[key])}" for key in wrong[:3]]
        told.append(f"{_count(wrong, 'key has', 'keys have')} another shape or kind: {_list(named, wrong)}")
    return "; ".join(told)


def _fits(value: Tensor, expected: Tensor) -> bool:
    return value.shape == expected.shape and value.is_floating_point() == expected.is_floating_point()


def _kind(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _count(keys: list[str], one: str, many: str) -> str:
    return f"{len(keys)} {one if len(keys) == 1 else many}"


def _list(named: Iterable[str], keys: list[str]) -> str:
    named = list(named)
    return ", ".join(named) + (f" and {len(keys) - len(named)} more" if len(keys) > len(named) else "")
