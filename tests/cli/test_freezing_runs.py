"""``--model.freeze`` on the command line."""

from __future__ import annotations

import warnings

import pytest
import torch

import zoo
from tests.command_line import DIGITS, TINY, fit, main, weights

PRETRAINED = (*TINY[: TINY.index("--model.model_args.width")], "--model.pretrained", "tanh_deq.digits")


def test_a_fit_with_a_frozen_equilibrium(capsys: pytest.CaptureFixture[str]) -> None:
    filters = [*warnings.filters]
    done = fit("-c", DIGITS, *PRETRAINED, "--model.freeze", "[deq.*]", "--model.jacobian_weight", "0.1")
    assert not any("eval mode" in str(entry[1]) for entry in warnings.filters if entry not in filters)
    start = zoo.load_pretrained("tanh_deq.digits").state_dict()
    end = {key.removeprefix("model."): value for key, value in weights(done.last).items()}
    changed = {key for key, value in start.items() if not torch.equal(value, end[key])}
    assert changed == {key for key in start if not key.startswith("deq.")}
    assert "in eval mode" not in capsys.readouterr().err
    tested = main("test", "--ckpt_path", done.last, "--data.batch_size", "360")
    assert tested.model.hparams["freeze"] == ["deq.*"]
    assert float(tested.trainer.callback_metrics["test/accuracy"]) > 0.9


def test_a_name_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        main("fit", "-c", DIGITS, *PRETRAINED, "--model.freeze", "[stem.*]")
    assert exit_code.value.code == 2
    assert "no parameter of this TanhDEQ has a name like 'stem.*'" in capsys.readouterr().err
