"""``last.ckpt`` that is the last."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint


class KeepLast(ModelCheckpoint):
    """Lightning's ModelCheckpoint, whose ``save_last`` saves each time, the best or not.

    Lightning 2.6 renews ``last.ckpt`` only where it has just saved one of the best: a run that stops long after its
    best epoch would go on from there.
    """

    @property
    def state_key(self) -> str:
        """Its state in a checkpoint is that of a ModelCheckpoint, for runs that go on with one."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def _save_topk_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Any]) -> None:
        """Save it if it is one of the best, and let what Lightning asks before it saves the last one be so."""
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        if self.save_last:
            self._last_global_step_saved = trainer.global_step
