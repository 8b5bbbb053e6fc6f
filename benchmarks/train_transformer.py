"""The DEQ transformer of the benchmark: the weights that ship, or a small one that is trained for seconds."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

import zoo
from datamodules.pydocs import PyDocsDataModule, Sources
from zoo.implicit import DEQ, jacobian_penalty
from zoo.transformer import DEQTransformer, Memory

from .training_steps import State, Step


@dataclass(frozen=True)
class Recipe:
    """A model, and the batch on which it is measured.

    Attributes:
        name: in the tables.
        weights: of ``zoo.list_weights()``; None for a model that is trained here.
        arguments: of that model.
        sources: which of Python's documentation.
        batch, segment: B and L.
        steps: of Adam, where it is trained here.
        applications: of the cell in a training step.
    """

    name: str
    weights: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    sources: Sources = "all"
    batch: int = 16
    segment: int = 64
    steps: int = 150
    applications: int = 3
    jacobian_weight: float = 1.0
    learning_rate: float = 2e-3


NANO = Recipe("deq_transformer_nano", weights="deq_transformer_nano.pydocs")
SMALL = Recipe(
    "a small DEQ transformer",
    arguments={"d_model": 32, "num_heads": 2, "d_inner": 64, "memory_length": 16, "start": "local"},
    sources="topics",
    batch=4,
    segment=16,
    steps=60,
    jacobian_weight=0.1,
    learning_rate=1e-2,
)


@dataclass(frozen=True)
class LanguageStep(Step):
    """A step of a DEQ transformer: dL/dtheta of all its parameters, for one segment after a memory.

    Attributes:
        model: without dropout.
        tokens, target: int64 ``(B, L)``.
        memory: of the text before.
    """

    model: DEQTransformer
    tokens: Tensor
    target: Tensor
    memory: Memory

    @property
    def deq(self) -> DEQ:
        return self.model.deq

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return tuple(self.model.parameters())

    def injection(self) -> Tensor:
        """``(B, L, 3 H D)`` u, with its graph."""
        u: Tensor = self.model.injection(self.model.vocabulary.embed(self.tokens))
        return u

    def inputs(self) -> tuple[Any, ...]:
        return self.injection(), self.model.cell.past(self.memory, self.tokens.shape[1])

    def loss(self, z: State) -> Tensor:
        return self.model.nll(z, self.target).mean()

    def whole_loss(self) -> Tensor:
        return self.loss(self.model(self.tokens, self.memory)[0])

    def double(self) -> LanguageStep:
        memory = Memory(self.memory.z.double(), self.memory.u.double())
        return replace(self, model=copy.deepcopy(self.model).double(), memory=memory)


@dataclass(frozen=True)
class Loaded:
    """A step of a trained model, and the text of its test set."""

    step: LanguageStep
    text: Tensor  # uint8 (N,)


def loaded(recipe: Recipe) -> Loaded:
    """The model in eval mode, with the first batch of test text before which its memory is full."""
    data = PyDocsDataModule(
        recipe.sources, recipe.batch, recipe.segment, eval_batch_size=recipe.batch, eval_segment_length=recipe.segment
    )
    model = trained(recipe, data) if recipe.weights is None else zoo.load_pretrained(recipe.weights)
    model = cast(DEQTransformer, model).eval()
    memory: Memory | None = None
    for tokens, target in data.test_dataloader():
        if memory is not None and memory.z.shape[1] == model.memory_length:
            return Loaded(LanguageStep(model, tokens, target, memory), data.splits.test)
        with torch.no_grad():
            memory = model(tokens, memory)[1]
    raise ValueError(
        f"the test text is too short for {recipe.batch} streams with {model.memory_length} positions before a segment"
    )


def trained(recipe: Recipe, data: PyDocsDataModule, seed: int = 0) -> DEQTransformer:
    """The model after ``recipe.steps`` steps through an unrolled cell, with a penalty on its Jacobian."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = DEQTransformer(**recipe.arguments, unrolled=recipe.applications)
        optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
        memory: Memory | None = None
        for _, (tokens, target) in zip(range(recipe.steps), data.train_dataloader(), strict=False):
            if memory is None:
                memory = model(tokens)[1]
            step = LanguageStep(model, tokens, target, memory)
            inputs = step.inputs()
            z, _ = model.deq(*inputs)
            penalty = jacobian_penalty(model.cell, z, *inputs).mean()
            optimizer.zero_grad()
            (step.loss(z) + recipe.jacobian_weight * penalty).backward()
            optimizer.step()
            u = inputs[0]
            memory = Memory(*(model.remembered(old, x) for old, x in zip(memory, (z, u), strict=True)))
    optimizer.zero_grad()
    model.deq.unrolled = None
    return model
