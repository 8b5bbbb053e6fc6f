"""The DEQ transformer: a training step beside TorchDEQ's with the same cell, attention, generation, memory.

    python -m benchmarks.transformer             # the weights that ship: minutes; writes results/transformer.*
    python -m benchmarks.transformer --quick     # a small model: seconds, and nothing to quote

One thread. Prints tables, and writes them with all numbers (``transformer.json``). Counts and bytes do not depend on
the machine; times do, and are quoted as ratios within the same rounds.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from zoo.attention import RelativeAttention, sinusoids
from zoo.implicit import Anderson, Broyden
from zoo.transformer import Block

from . import contestants as c
from .clock import interleaved
from .command import RESULTS, Data, arguments, machine, made_by, measured
from .contestants import Contestant, Zoo
from .report import table
from .spelled_out import SpelledOutAttention, SpelledOutStep, Unprojected
from .train_transformer import NANO, SMALL, Loaded, Recipe, loaded
from .training_steps import PAIRS, ZOO_GMRES, compared, comparison, costs_of

MIB = 2**20
LONGER = Zoo("zoo anderson, memory 20, mixing always", Anderson(memory=20, mix_every=1))
COMPACT_ANDERSON = Zoo("zoo anderson, compact", Anderson(compact=True))
COMPACT_BROYDEN = Zoo("zoo broyden, compact", Broyden(compact=True))
TRANSFORMER_PAIRS: tuple[tuple[Contestant, Contestant], ...] = (
    (COMPACT_ANDERSON, ZOO_GMRES),
    (c.ANDERSON, c.ANDERSON),
    (c.ANDERSON, ZOO_GMRES),
    (LONGER, ZOO_GMRES),
    (c.BROYDEN, c.BROYDEN),
    (COMPACT_BROYDEN, ZOO_GMRES),
    *(pair for pair in PAIRS if not isinstance(pair[0], Zoo)),
    (c.T_BROYDEN, c.T_ANDERSON_SMALL),
)
"""The default of the DEQ transformer first."""

AS_ITS_ZOO = "cell as its zoo writes it"


@dataclass(frozen=True)
class Size:
    """Of an attention layer: d, H, L, m and B."""

    d_model: int
    num_heads: int
    length: int
    memory: int
    batch: int

    def __str__(self) -> str:
        return f"d = {self.d_model}, {self.num_heads} heads, {self.batch} x {self.length} after {self.memory}"


PUBLISHED = Size(700, 10, 150, 150, 2)


@dataclass(frozen=True)
class Plan:
    """What a run measures.

    Attributes:
        recipe: the model.
        level: the error of the gradient that all pairs of solvers are set for.
        pairs: of solvers, forward and adjoint; the zoo's first one is the default that others are compared with.
        rounds: of timing.
        sizes: of attention layers, besides the model's own.
        prompts: how many, of ``prompt_length`` bytes of test text.
        length: bytes that are written after each.
        tol: of the solver that writes.
        unrolled: how many applications of the cell the implicit step is compared with.
    """

    recipe: Recipe = NANO
    level: float = 3e-2  # about what the default tolerances of 1e-3 give
    pairs: Sequence[tuple[Contestant, Contestant]] = TRANSFORMER_PAIRS
    rounds: int = 5
    sizes: Sequence[Size] = (PUBLISHED,)
    prompts: int = 8
    prompt_length: int = 200
    length: int = 100
    tol: float = 1e-3
    unrolled: Sequence[int] = (12, 24)


QUICK = Plan(
    recipe=SMALL,
    pairs=((c.ANDERSON, c.ANDERSON), (c.T_BROYDEN, c.T_BROYDEN)),
    rounds=2,
    sizes=(),
    prompts=2,
    prompt_length=32,
    length=12,
)

# --------------------------------------------------------------------------------------------------------- measurements


def model(plan: Plan, found: Loaded) -> Data:
    """What is measured."""
    step, recipe = found.step, plan.recipe
    radii = step.spectral_radii()
    with torch.no_grad():
        loss = step.loss(step.solution)
    return {
        "name": recipe.name,
        "weights": recipe.weights,
        "parameters": sum(p.numel() for p in step.parameters),
        "tokens": list(step.tokens.shape),
        "memory": step.memory.z.shape[1],
        "state": step.solution[0].numel(),
        "loss": float(loss),
        "radius": [float(radii.min()), float(radii.max())],
    }


def costs(plan: Plan, found: Loaded) -> Data:
    """Seconds of what a step is made of, with the zoo's cell and with that of TorchDEQ's zoo."""
    return {"own": costs_of(found.step, plan.rounds), "theirs": costs_of(_as_its_zoo(found), plan.rounds)}


def steps(plan: Plan, found: Loaded) -> Data:
    return compared(found.step, plan.level, plan.pairs, plan.rounds, {AS_ITS_ZOO: _as_its_zoo(found)})


def attention(plan: Plan, found: Loaded) -> Data:
    """Seconds of one evaluation of an attention layer without graph, ``[size][way]``, and how its outputs differ."""
    step = found.step
    (B, L), attention = step.tokens.shape, cast(Block, step.model.cell.blocks[0]).attention
    own = Size(attention.qkv.in_features, attention.heads[0], L, step.memory.z.shape[1], B)
    return {str(size): _attention(size, plan.rounds) for size in (own, *plan.sizes)}


def _attention(size: Size, rounds: int) -> Data:
    generator = torch.Generator().manual_seed(0)
    d, heads = size.d_model, size.num_heads
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        layer = RelativeAttention(d, heads, d // heads, span=1000, dropout=0.0, attention_dropout=0.0)
    layer = layer.requires_grad_(requires_grad=False)  # so that no graph is made where it is spelled out
    x_before, x = (torch.randn(size.batch, n, d, generator=generator) for n in (size.memory, size.length))
    u_before, u = (torch.randn(size.batch, n, 3 * d, generator=generator) for n in (size.memory, size.length))
    distances = sinusoids(size.memory + size.length, d, x)
    past = layer.past(x_before, u_before, distances)
    unprojected = Unprojected(x_before, u_before, distances)
    other = SpelledOutAttention(layer)

    @torch.no_grad()
    def fused() -> Tensor:
        return layer(x, u, past)  # type: ignore[no-any-return]

    @torch.enable_grad()
    def spelled_out() -> Tensor:
        return layer(x, u, past)  # type: ignore[no-any-return]

    @torch.no_grad()
    def again() -> Tensor:
        return layer(x, u, layer.past(x_before, u_before, distances))  # type: ignore[no-any-return]

    @torch.no_grad()
    def theirs() -> Tensor:
        return other(x, u, unprojected)  # type: ignore[no-any-return]

    ways: dict[str, Callable[[], Tensor]] = {
        "fused": fused,
        "spelled out": spelled_out,
        "fused, memory projected again": again,
        "as TorchDEQ's zoo writes it": theirs,
    }
    exact = copy.deepcopy(layer).double()
    with torch.no_grad():
        exact_past = exact.past(x_before.double(), u_before.double(), distances.double())
        reference = exact(x.double(), u.double(), exact_past)
    times = interleaved(ways, max(rounds, 3))
    return {
        way: {
            "seconds": times[way].median,
            "ratio": times[way].ratio(times["fused"]),
            "difference": float((run() - reference).abs().max() / reference.abs().max()),
        }
        for way, run in ways.items()
    }


def generation(plan: Plan, found: Loaded) -> Data:
    """Evaluations of the cell a byte, after prompts from the test text, and how many texts are as the cold start's."""
    starts = torch.linspace(0, len(found.text) - plan.prompt_length, plan.prompts).long().tolist()
    prompts = [found.text[i : i + plan.prompt_length].long().unsqueeze(0) for i in starts]
    ways: dict[str, Data] = {
        "cold": {"warm_start": False},
        "warm, nothing read along": {"lookahead": 0},
        "warm": {},
    }
    written = {way: [_written(plan, found, prompt, **options) for prompt in prompts] for way, options in ways.items()}
    cold = [text for text, _ in written["cold"]]
    return {
        "prompts": plan.prompts,
        "prompt_length": plan.prompt_length,
        "length": plan.length,
        "tol": plan.tol,
        "ways": {
            way: {
                "evaluations": sum(evaluations for _, evaluations in texts) / (plan.prompts * (plan.length - 1)),
                "same": sum(torch.equal(a, b) for a, (b, _) in zip(cold, texts, strict=True)),
            }
            for way, texts in written.items()
        },
    }


def _written(plan: Plan, found: Loaded, prompt: Tensor, **options: Any) -> tuple[Tensor, int]:
    """The most probable text after a prompt, and the evaluations after those that read the prompt."""
    model = copy.deepcopy(found.step.model)
    model.deq.solver = replace(model.deq.solver, tol=plan.tol, max_steps=60)
    counts = {"evaluations": 0}

    def count(*_: Any) -> None:
        counts["evaluations"] += 1

    model.cell.register_forward_hook(count)
    model.generate(prompt, 1, temperature=0, **options)
    reading, counts["evaluations"] = counts["evaluations"], 0
    text = model.generate(prompt, plan.length, temperature=0, **options)
    return torch.as_tensor(text), counts["evaluations"] - reading


def memory(plan: Plan, found: Loaded) -> Data:
    """Peak bytes of one forward and backward pass of the whole model, implicit and unrolled."""
    step = found.step
    sizes = {"parameters": sum(p.numel() * p.element_size() for p in step.parameters), "implicit": step.peak()}
    sizes["implicit, recompute"] = step.peak(recompute=True)
    sizes |= {f"unrolled {n} times": step.peak(n) for n in plan.unrolled}
    return {"bytes": sizes, "ratio": {name: size / sizes["implicit"] for name, size in sizes.items()}}


def _as_its_zoo(found: Loaded) -> SpelledOutStep:
    step = found.step
    return SpelledOutStep(step.model, step.tokens, step.target, step.memory)


MEASUREMENTS: dict[str, Callable[[Plan, Loaded], Data]] = {
    "model": model,
    "costs": costs,
    "steps": steps,
    "attention": attention,
    "generation": generation,
    "memory": memory,
}

# --------------------------------------------------------------------------------------------------------------- tables


def markdown(data: Data) -> str:
    """All that ``data`` holds, as one page."""
    parts = [
        "# The DEQ transformer, and its training step beside TorchDEQ's",
        (
            f"{made_by('transformer', data['machine'])} float32. Times are of the processor; their ratios are medians "
            "over rounds in which all take turns."
        ),
    ]
    parts += [section(data[name]) for name, section in _SECTIONS.items() if name in data]
    return "\n\n".join(parts) + "\n"


def _model(found: Data) -> str:
    origin = f"the weights `{found['weights']}`" if found["weights"] else "trained for seconds within the benchmark"
    return (
        "## The model\n\n"
        f"{found['name']}, {origin}: {found['parameters']:,} parameters, {found['tokens'][0]} texts x "
        f"{found['tokens'][1]} bytes of Python's documentation that it was not trained on, with a memory of "
        f"{found['memory']} positions before, a state of {found['state']:,} numbers a text. The loss is "
        f"{found['loss']:.2f} nats a byte, and the spectral radius of df/dz at z* "
        "is {:.2f} to {:.2f}.".format(*found["radius"])
    )


def _costs(found: Data) -> str:
    rows = [
        [name, f"{1e3 * own:.1f}", f"{1e3 * found['theirs'][name]:.1f}", f"{found['theirs'][name] / own:.2f}"]
        for name, own in found["own"].items()
    ]
    header = ["", "ms", "cell of TorchDEQ's zoo, ms", "ratio"]
    return (
        "## What a step is made of\n\nThe same for both libraries, with the same cell; and with the cell as TorchDEQ's "
        "own zoo writes it. That is the same function of the same weights: the memory and the vectors of all distances "
        "are projected again at each evaluation, and attention is not fused.\n\n" + table(header, rows)
    )


def _steps(found: Data) -> str:
    remark = (
        "TorchDEQ drives the zoo's cell, with its fused attention and its memory that is projected once; and "
        f'("{AS_ITS_ZOO}") the one described above, also with weights that are computed once a step. '
    )
    return comparison(found, "all parameters", remark)


def _attention_table(found: Data) -> str:
    rows = [
        [name, way, f"{1e3 * item['seconds']:.2f}", f"{item['ratio']:.2f}", f"{item['difference']:.0e}"]
        for name, ways in found.items()
        for way, item in ways.items()
    ]
    header = ["size", "", "ms", "to fused", "difference"]
    return (
        f"## Attention\n\nOne evaluation of an attention layer without a graph, of texts x positions after those of "
        "the memory, at the size of the model and at the published one: with "
        "`torch.nn.functional.scaled_dot_product_attention`, and with scores, weights and sums spelled out, as where a "
        "graph is recorded. The memory's keys and values are computed once a solve; beside it an evaluation that "
        "computes them again, with those of the distances. The difference is the largest of all outputs to those in "
        f"float64, relative to the largest output.\n\n{table(header, rows)}"
    )


def _generation(found: Data) -> str:
    cold = found["ways"]["cold"]["evaluations"]
    rows = [
        [
            way,
            f"{item['evaluations']:.1f}",
            f"{cold / item['evaluations']:.2f}",
            f"{item['same']} of {found['prompts']}",
        ]
        for way, item in found["ways"].items()
    ]
    header = ["start", "evaluations a byte", "times fewer", "the same text"]
    return (
        f"## Generation\n\nThe {found['length']} most probable bytes after each of {found['prompts']} prompts, which "
        f"are {found['prompt_length']} bytes of the test text each, with a relative residual of {found['tol']:g}. A "
        "cold start is z0 = 0 at each byte; a warm one begins where the memory has read the same before, and reads "
        f"along what followed there (`generate(warm_start=True, lookahead=8)`, its default); such "
        f"an evaluation is of up to nine positions in place of one.\n\n{table(header, rows)}"
    )


def _memory(found: Data) -> str:
    rows = [[name, f"{size / MIB:.1f}", f"{found['ratio'][name]:.2f}"] for name, size in found["bytes"].items()]
    return (
        "## Peak memory of a step\n\n"
        "Live tensor bytes above the model's own, with the model's own solvers, the gradients of all parameters "
        "included; unrolled is backpropagation through so many applications of the same cell.\n\n"
        + table(["", "MiB", "to implicit"], rows)
    )


_SECTIONS: dict[str, Callable[[Data], str]] = {
    "model": _model,
    "costs": _costs,
    "steps": _steps,
    "attention": _attention_table,
    "generation": _generation,
    "memory": _memory,
}

# ------------------------------------------------------------------------------------------------------------------ run


def run(plan: Plan, parts: Iterable[str] = tuple(MEASUREMENTS), say: Callable[[str], object] = print) -> Data:
    """The measurements named, as plain data."""
    start = time.perf_counter()
    found = loaded(plan.recipe)
    say(f"model: {time.perf_counter() - start:.0f} s")
    measurements = {name: partial(measure, plan, found) for name, measure in MEASUREMENTS.items()}
    return {"machine": machine(), **measured(parts, measurements, say)}


def main(argv: Sequence[str] | None = None) -> None:
    given = arguments(__doc__, MEASUREMENTS, argv, RESULTS)
    data = run(QUICK if given.quick else Plan(), given.parts)
    given.write(markdown(data), "transformer.md", data, "transformer")


if __name__ == "__main__":
    main()
