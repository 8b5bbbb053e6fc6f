"""Training with frozen parts: in every stage, with the penalty, across checkpoints; and the mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from lightning_modules import ImageClassifier
from lightning_modules.base import EquilibriumModule
from tests.lightning_modules.runs import Steps, batches, small, trainer

MDEQ: dict[str, Any] = {"model": "mdeq_nano", "pretrained": "mdeq_nano.digits", "lr": 1e-2}


def state(module: EquilibriumModule) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.model.state_dict().items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {key for key, value in after.items() if not torch.equal(value, before[key])}


def test_a_pretrained_backbone_stays_and_the_head_trains() -> None:
    module = ImageClassifier(**MDEQ, freeze=["stem.*", "deq.*"])
    before, log = state(module), Steps()
    run = trainer(logger=log, log_every_n_steps=1)
    run.fit(module, batches(2, 8), batches(1, 8))
    changed = moved(before, state(module))
    assert changed
    assert all(key.startswith("head.") for key in changed)
    assert not any("adjoint" in key for step in log.logged for key in step), "no adjoint equation was solved"
    count = sum(len(group["params"]) for group in run.optimizers[0].param_groups)
    assert count == sum(name.startswith("head.") for name, _ in module.model.named_parameters())
    trainer().fit(
        module, batches(1), batches(1)
    )  # a second run, whose norms are still frozen, and of which nothing warns
    assert not moved(before, state(module)) - changed


@pytest.mark.parametrize(
    "stage",
    [
        {"jacobian_weight": 0.5},
        {"pretrain_steps": 2, "pretrain_depth": 3, "jacobian_pretrain_weight": 0.5},
        {"gradient": {"class_path": "UnrolledGradient"}},
        {"gradient": {"class_path": "PhantomGradient"}},
    ],
)
@pytest.mark.parametrize("frozen", [["deq.*"], ["stem.*", "deq.*"]])
def test_every_stage_of_training(stage: dict[str, Any], frozen: list[str]) -> None:
    module = ImageClassifier(**MDEQ, freeze=frozen, **stage)
    before = state(module)
    trainer().fit(module, batches(2, 8), batches(1, 8))
    still = tuple(pattern[:-1] for pattern in frozen)
    changed = moved(before, state(module))
    assert changed
    assert not any(key.startswith(still) for key in changed)
    assert any(key.startswith("stem.") for key in changed) is ("stem.*" not in frozen)


def test_a_checkpoint_knows_what_is_frozen(tmp_path: Path) -> None:
    module = small(freeze=["deq.*"])
    run = trainer()
    run.fit(module, batches(), batches())
    run.save_checkpoint(tmp_path / "mine.ckpt")
    again = ImageClassifier.load_from_checkpoint(tmp_path / "mine.ckpt", weights_only=True)
    assert again.hparams["freeze"] == ["deq.*"]
    names = {name for name, p in again.model.named_parameters() if not p.requires_grad}
    assert names == {name for name, _ in again.model.named_parameters() if name.startswith("deq.")}
    before = state(again)
    trainer(max_epochs=2).fit(again, batches(), batches(), ckpt_path=str(tmp_path / "mine.ckpt"), weights_only=True)
    assert moved(before, state(again)) == {key for key in before if not key.startswith("deq.")}


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (["deq.cel.*"], r"no parameter of this TanhDEQ has a name like 'deq.cel.\*'"),
        ("deq.*", r"freeze takes a list of patterns, like \['stem.\*'\]; given: 'deq.\*'"),
        (["*"], r"freeze has to leave a part of the model to train, like its head; given: \['\*'\]"),
    ],
)
def test_mistakes(freeze: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(freeze=freeze)


def test_nothing_is_frozen_unless_asked() -> None:
    for freeze in (None, []):
        assert all(p.requires_grad for p in small(freeze=freeze).parameters())
    assert not zoo.freezing.frozen_statistics(small().model)
