"""Solvers and gradients as plain data and back, and what is refused on the way."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.problems import ADJOINT_SOLVERS, GRADIENTS
from zoo.implicit import (
    Anderson,
    FixedPointIteration,
    Gradient,
    ImplicitGradient,
    NeumannGradient,
    Newton,
    PhantomGradient,
    Solver,
    UnrolledGradient,
    describe,
    from_description,
)
from zoo.implicit.choices import MOST, nearest

positive = st.floats(min_value=0, exclude_min=True, max_value=1e6)
unit = st.floats(min_value=0, exclude_min=True, max_value=1)
shared = {
    "tol": st.floats(min_value=0, max_value=1e6),
    "norm": st.sampled_from(["relative", "absolute"]),
    "max_steps": st.integers(0, 1000),
}


@st.composite
def andersons(draw: st.DrawFn) -> Anderson:
    every = draw(st.integers(1, 5))
    return Anderson(
        **{name: draw(strategy) for name, strategy in shared.items()},
        memory=every * draw(st.integers(1, 6)),
        mix_every=every,
        ridge=draw(positive),
        damping=draw(unit),
    )


solvers = st.one_of(st.builds(FixedPointIteration, **shared, damping=unit), st.builds(Newton, **shared), andersons())
gradients = st.one_of(
    st.builds(ImplicitGradient, solver=solvers),
    st.builds(PhantomGradient, steps=st.integers(1, 100), damping=unit),
    st.builds(UnrolledGradient),
)
thorough = settings(deadline=None, derandomize=True, database=None)


@thorough
@given(solvers)
def test_solvers_survive_the_round_trip_through_json(solver: Solver) -> None:
    assert from_description(json.loads(json.dumps(describe(solver))), Solver) == solver


@thorough
@given(gradients)
def test_gradients_survive_the_round_trip_through_json(gradient: Gradient) -> None:
    assert from_description(json.loads(json.dumps(describe(gradient))), Gradient) == gradient


@pytest.mark.parametrize("solver", ADJOINT_SOLVERS.values(), ids=ADJOINT_SOLVERS)
def test_the_solvers_of_the_table(solver: Solver) -> None:
    assert from_description(describe(solver), Solver) == solver
    assert from_description(type(solver).__name__, Solver) == type(solver)()
    for make in GRADIENTS.values():
        assert from_description(describe(make(solver)), Gradient) == make(solver)


def test_what_a_description_looks_like() -> None:
    described = describe(ImplicitGradient(Newton(tol=1e-3)))
    assert described == {
        "class_path": "zoo.implicit.ImplicitGradient",
        "init_args": {
            "solver": {
                "class_path": "zoo.implicit.Newton",
                "init_args": {
                    "tol": 1e-3,
                    "norm": "relative",
                    "max_steps": 50,
                    "compact": False,
                    "bfloat16_until": None,
                },
            }
        },
    }


@pytest.mark.parametrize(
    ("description", "kind", "expected"),
    [
        ("Newton", Solver, Newton()),
        ("zoo.implicit.Newton", Solver, Newton()),
        ({"class_path": "Newton"}, Solver, Newton()),
        ({"class_path": "Newton", "init_args": None}, Solver, Newton()),
        ({"class_path": "Newton", "init_args": {"tol": 1}}, Solver, Newton(tol=1)),
        (Newton(tol=2), Solver, Newton(tol=2)),
        ("ImplicitGradient", Gradient, ImplicitGradient()),
        ({"class_path": "ImplicitGradient", "init_args": {"solver": "Newton"}}, Gradient, ImplicitGradient(Newton())),
        ({"class_path": "ImplicitGradient", "init_args": {"solver": Newton()}}, Gradient, ImplicitGradient(Newton())),
    ],
    ids=str,
)
def test_ways_to_describe(description: Any, kind: Any, expected: Any) -> None:
    assert from_description(description, kind) == expected


def test_every_default_is_plain_data() -> None:
    for choice in (*ADJOINT_SOLVERS.values(), PhantomGradient(), NeumannGradient(), UnrolledGradient()):
        for field in fields(choice):
            assert isinstance(getattr(choice, field.name), int | float | str | None)


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("description", "kind", "error", "text"),
    [
        ("Andersen", Solver, ValueError, r"unknown solver 'Andersen'. Did you mean 'Anderson'\? Known: .*Newton"),
        ("anderson", Solver, ValueError, "Did you mean 'Anderson'"),
        ("PhantomGradient", Solver, ValueError, "unknown solver 'PhantomGradient'"),
        ("Newton", Gradient, ValueError, "unknown gradient 'Newton'. Known: ImplicitGradient"),
        ("ImplictGradient", Gradient, ValueError, r"Did you mean 'ImplicitGradient'\?"),
        ("Solver", Solver, ValueError, "unknown solver 'Solver'"),
        ("", Solver, ValueError, "unknown solver ''"),
        ({}, Solver, ValueError, "unknown solver ''"),
        ({"class_path": ["Newton"]}, Solver, ValueError, r"unknown solver \['Newton'\]"),
        ({"class_path": "Newton", "args": {}}, Solver, ValueError, r"keys class_path and init_args.*\['args'\]"),
        ({"class_path": "Newton", "init_args": {"tolerance": 1}}, Solver, ValueError, "Newton has no argument 'toler"),
        ({"class_path": "Newton", "init_args": {"max_step": 1}}, Solver, ValueError, r"Did you mean 'max_steps'\?"),
        ({"class_path": "Newton", "init_args": {1: 2}}, Solver, ValueError, "Newton has no argument 1"),
        ({"class_path": "Newton", "init_args": "tol"}, Solver, TypeError, "init_args of Newton.*given: 'tol'"),
        ({"class_path": "Newton", "init_args": [1e-3]}, Solver, TypeError, r"init_args of Newton.*given: \[0.001\]"),
        (3, Solver, TypeError, "a solver is described by a name or a mapping; given: 3"),
        (None, Gradient, TypeError, "a gradient is described by a name or a mapping; given: None"),
        (Newton(), Gradient, TypeError, r"a gradient is described by a name or a mapping; given: Newton\("),
        (
            {"class_path": "ImplicitGradient", "init_args": {"solver": "Newtn"}},
            Gradient,
            ValueError,
            r"unknown solver 'Newtn'. Did you mean 'Newton'\?",
        ),
    ],
    ids=str,
)
def test_what_is_refused_and_how(description: Any, kind: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        from_description(description, kind)


@pytest.mark.parametrize("path", ["os.system", "builtins.eval", "this.Zen", "torch.nn.Linear", "zoo.tanh.TanhCell"])
def test_nothing_is_imported(path: str) -> None:
    before = set(sys.modules)
    with pytest.raises(ValueError, match=f"unknown solver '{path}'"):
        from_description({"class_path": path, "init_args": {}}, Solver)
    assert set(sys.modules) == before
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Anderson(tol=-1), r"Anderson\(tol=...\) takes a number >= 0; given: -1"),
        (lambda: Anderson(tol=float("nan")), r"Anderson\(tol=...\) takes a number >= 0; given: nan"),
        (lambda: Newton(tol="1e-4"), r"Newton\(tol=...\) takes a number >= 0; given: '1e-4'"),
        (lambda: Newton(tol=None), r"Newton\(tol=...\) takes a number >= 0; given: None"),
        (lambda: Newton(tol=True), r"Newton\(tol=...\) takes a number >= 0; given: True"),
        (lambda: Newton(norm="rel"), r"Newton\(norm=...\) takes 'relative' or 'absolute'; given: 'rel'"),
        (lambda: Newton(max_steps=-1), r"Newton\(max_steps=...\) takes an integer >= 0; given: -1"),
        (lambda: Newton(max_steps=3.0), r"Newton\(max_steps=...\) takes an integer >= 0; given: 3.0"),
        (lambda: Newton(max_steps=True), r"max_steps=...\) takes an integer >= 0; given: True"),
        (lambda: FixedPointIteration(damping=0), r"damping=...\) takes a number in \(0, 1\]; given: 0"),
        (lambda: FixedPointIteration(damping=1.5), r"damping=...\) takes a number in \(0, 1\]; given: 1.5"),
        (lambda: FixedPointIteration(damping="1"), r"damping=...\) takes a number in \(0, 1\]; given: '1'"),
        (lambda: Anderson(damping=-0.5), r"Anderson\(damping=...\) takes a number in \(0, 1\]; given: -0.5"),
        (lambda: Anderson(damping=[1]), r"Anderson\(damping=...\) takes a number in \(0, 1\]; given: \[1\]"),
        (lambda: Anderson(mix_every=0), r"Anderson\(mix_every=...\) takes an integer >= 1; given: 0"),
        (lambda: Anderson(memory=5), r"Anderson\(memory=...\) takes a positive multiple of mix_every=2; given: 5"),
        (lambda: Anderson(memory=0), r"Anderson\(memory=...\) takes a positive multiple of mix_every=2; given: 0"),
        (lambda: Anderson(ridge=0), r"Anderson\(ridge=...\) takes a number > 0; given: 0"),
        (lambda: Anderson(ridge="1e-6"), r"Anderson\(ridge=...\) takes a number > 0; given: '1e-6'"),
        (lambda: PhantomGradient(steps=0), r"PhantomGradient\(steps=...\) takes an integer >= 1; given: 0"),
        (lambda: PhantomGradient(steps=2.0), r"PhantomGradient\(steps=...\) takes an integer >= 1; given: 2.0"),
        (lambda: PhantomGradient(steps=True), r"PhantomGradient\(steps=...\) takes an integer >= 1; given: True"),
        (lambda: PhantomGradient(damping=0), r"PhantomGradient\(damping=...\) takes a number in \(0, 1\]; given: 0"),
        (
            lambda: PhantomGradient(damping="x"),
            r"PhantomGradient\(damping=...\) takes a number in \(0, 1\]; given: 'x'",
        ),
    ],
)
def test_a_wrong_value_is_named(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize("make", [lambda: Newton(memory=3), lambda: UnrolledGradient(steps=2)])
def test_no_option_is_swallowed(make: Any) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        make()


def test_of_many_names_those_that_are_near_are_shown_if_there_is_a_listing() -> None:
    many = [f"name_{n:02}" for n in range(MOST)]
    assert nearest("name_0", many, "names()").endswith(f" Known: {', '.join(many)}.")
    assert nearest("other", [*many, "x"]).endswith("name_11, x.")
    told = nearest("name_0", [*many, "x"], "names()")
    assert re.fullmatch(r" Did you mean 'name_\d\d'\? Near too: name_\d\d, name_\d\d\. names\(\) lists all 13\.", told)
    assert nearest("y", [*many, "x"], "names()") == " names() lists all 13."
