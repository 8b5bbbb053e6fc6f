"""Language modelling: the next token, from a text of which segment follows segment."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.utils import _pytree as pytree
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities.distributed import gather_all_tensors

import zoo.language
from zoo.implicit.solvers.base import is_count
from zoo.vocabulary import IGNORED

from .base import EquilibriumModule
from .options import with_own
from .samples import continued, show, undisturbed
from .targets import check_targets

Batch = tuple[Tensor, Tensor]
SHOWN = 3
"""Rows of a validation whose continuation is shown."""


class LanguageModel(EquilibriumModule):
    """Language modelling with an equilibrium model that remembers: the mean of -log p(next token).

    Row b of a batch goes on where row b of the batch before ended, and the model's memory of it is carried along: in
    training from batch to batch and from epoch to epoch, whatever is validated between; in validation, testing and
    prediction from an empty one at the beginning of each pass. A batch of another number of rows than the one before
    starts without memory, and no gradient flows into it. Each process carries the memory of its own rows.

    The memory is part of a checkpoint, that of all processes, and a run that is resumed goes on with it; on another
    number of processes too, if they have as many rows together. Where one process of several fails and leaves a
    checkpoint, this has no memory, since the others do not give theirs; a run that goes on from it says so.

    Logs ``{val,test}/loss``, in nats a token, ``/perplexity``, its exponential, and ``/bits_per_byte``, all from sums
    over the tokens that count, of all batches and processes; where the data do not say how many bytes a token stands
    for, ``/bits_per_token`` instead. In training ``train/loss`` is that of a step and the others are of an epoch.

    Args:
        model: a name of ``zoo.list_models()``, of a language model.
        vocab_size: number of tokens there are.
        model_args: further arguments of the model, plain numbers and words.
        eval_memory_length: positions that are remembered in validation, testing and prediction; the model's own
            memory_length if not given.
        options: see :class:`EquilibriumModule`.

    Shape:
        batches are ``(tokens int64 (B, L), target int64 (B, L))``: ``target[:, t]`` is the token after
        ``tokens[:, t]``; -100 does not count.

    Raises:
        ValueError: an argument is not as described.
    """

    token_bytes: Tensor | None

    def __init__(
        self,
        model: str = "deq_transformer_nano",
        vocab_size: int = 256,
        model_args: dict[str, Any] | None = None,
        eval_memory_length: int | None = None,
        **options: Any,
    ) -> None:
        if eval_memory_length is not None and not is_count(eval_memory_length, 0):
            raise ValueError(f"eval_memory_length takes an integer >= 0, or None; given: {eval_memory_length!r}")
        known = zoo.list_models(kind=zoo.language.TextModel)
        if model in zoo.list_models() and model not in known:
            raise ValueError(f"{model!r} is no language model; these are: {', '.join(known)}")
        super().__init__(model=model, model_args=with_own(model_args, vocab_size=vocab_size), **options)
        self.save_plain_hyperparameters(
            vocab_size=vocab_size, model_args=model_args, eval_memory_length=eval_memory_length
        )
        self.vocab_size = vocab_size
        self.eval_memory_length = eval_memory_length
        self.register_buffer("token_bytes", None, persistent=False)  # the data's, see setup
        self._memories: dict[str, Any] = {}
        self._restored: list[Tensor] | None = None
        self._before: tuple[Any, list[Tensor] | None] = None, None
        self._make_metrics()

    def setup(self, stage: str) -> None:
        """Refuse data of another vocabulary; ask them how many bytes a token stands for; forget all texts."""
        self.refuse_data_unless(vocab_size=self.vocab_size)
        token_bytes = getattr(getattr(self.trainer, "datamodule", None), "token_bytes", None)
        if token_bytes is not None and token_bytes.shape != (self.vocab_size,):
            raise MisconfigurationException(
                f"the data's token_bytes has one number a token, shape {(self.vocab_size,)}; given: shape "
                f"{tuple(token_bytes.shape)}"
            )
        self.token_bytes = None if token_bytes is None else token_bytes.to(self.device)
        self._make_metrics()
        self._memories.clear()
        self._restored = None

    def forward(self, tokens: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        """``(B, L)`` and the memory of what was before -> h ``(B, L, d)`` and the new memory, as the model says."""
        return cast(tuple[Tensor, Any], self.model(tokens, memory))

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """The mean of -log p over the targets that count, plus the Jacobian term."""
        tokens, target = batch
        counted = self._counted(tokens, target)
        (h, memory), jacobian_term = self.regularized("train", tokens, self._memory("train", tokens))
        self._keep("train", memory)
        nats = self._language.vocabulary.nll(h, target).sum()  # the targets were checked
        weight = self.of_joint_batch(torch.tensor(float(counted), device=nats.device))
        loss = nats / torch.where(weight > 0, weight, 1)
        if loss.isfinite():  # else the step is skipped
            self.train_metrics.update(nats.detach(), counted, self._bytes(target).sum())
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=max(1, counted))
        self.log_dict(self.train_metrics, on_step=False, on_epoch=True)
        return loss + jacobian_term

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Loss, perplexity and bits a byte."""
        self._evaluate("val", self.val_metrics, batch, batch_index)

    def test_step(self, batch: Batch, batch_index: int) -> None:
        """Loss, perplexity and bits a byte."""
        self._evaluate("test", self.test_metrics, batch, batch_index)

    def predict_step(self, batch: Batch, batch_index: int) -> dict[str, Tensor]:
        """Of each row with targets that count: how many, the log-probability of them in nats, and the bits a byte."""
        nll = self._read("predict", batch, batch_index, self.model).double().sum(dim=1)
        tokens, num_bytes = (batch[1] != IGNORED).sum(dim=1), self._bytes(batch[1]).sum(dim=1)
        per = tokens if self.token_bytes is None else num_bytes
        rows = {"tokens": tokens, "log_prob": -nll, self._bits: nll / math.log(2) / per}
        return {name: values[tokens > 0] for name, values in rows.items()}  # some streams end before others

    def _evaluate(self, stage: str, metrics: MetricCollection, batch: Batch, batch_index: int) -> None:
        def observed(*inputs: Any) -> Any:
            return self.observed(stage, batch_index, *inputs)

        target = batch[1]
        nll = self._read(stage, batch, batch_index, observed)
        metrics.update(nll.sum(), (target != IGNORED).sum(), self._bytes(target).sum())
        self.log_dict(metrics, on_epoch=True, prog_bar=True)
        if self.shows(stage, batch_index):
            texts = self._continued(*batch)
            show(self.trainer, "val/samples", lambda: continued(*(map(self._text, each) for each in texts)))

    def _continued(self, tokens: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The beginnings of a few rows, how they go on, and how the model goes on, which all processes let it do.

        Both go on for as long: 60 tokens, or half of a row that is shorter. What the model writes is drawn at a
        temperature of 0.7 from random numbers of its own.
        """
        text = torch.cat([tokens[:SHOWN], target[:SHOWN, -1:].clamp_min(0)], dim=1)
        length = min(60, text.shape[1] // 2)
        read, goes_on = text[:, :-length], text[:, -length:]
        positions = max(1, self._language.memory_length if self.eval_memory_length is None else self.eval_memory_length)
        with undisturbed(self.equilibria().values()), self._remembering(positions):
            written = self._language.generate(
                read,
                length,
                temperature=0.7,
                generator=torch.Generator(self.device).manual_seed(0),
                # What is read along depends on the texts, and some cells have the processes wait for each other.
                lookahead=8 if self.trainer.world_size == 1 else 0,
            )
        return read, goes_on, cast(Tensor, written)

    def _text(self, tokens: Tensor) -> str:
        """As the data module decodes it; numbers where it does not."""
        decode = getattr(getattr(self.trainer, "datamodule", None), "decode", None)
        tokens = tokens.cpu()
        return " ".join(map(str, tokens.tolist())) if decode is None else cast(str, decode(tokens))

    def _read(self, stage: str, batch: Batch, batch_index: int, model: Callable[..., Any]) -> Tensor:
        """-log p of each target, ``(B, L)``, after all that this pass has read."""
        tokens, target = batch
        self._counted(tokens, target)
        if batch_index == 0:
            self._memories.pop(stage, None)
        with self._remembering(self.eval_memory_length):
            h, memory = model(tokens, self._memory(stage, tokens))
        self._keep(stage, memory)
        return self._language.vocabulary.nll(h, target)

    @property
    def _language(self) -> zoo.language.TextModel:
        return cast(zoo.language.TextModel, self.model)

    # --- what counts

    def _counted(self, tokens: Tensor, target: Tensor) -> int:
        """How many targets count; the model itself looks at the tokens.

        Raises:
            InputError: targets of another shape than the tokens, or outside [0, vocab_size) and not -100.
        """
        return check_targets("targets", target, tuple(tokens.shape), "a token", self.vocab_size, IGNORED)

    def _bytes(self, target: Tensor) -> Tensor:
        """How many bytes of text each target stands for, ``(B, L)``: 0 where it does not count, or it is not known."""
        if self.token_bytes is None:
            return torch.zeros_like(target, dtype=torch.float32)
        counts = target != IGNORED
        return self.token_bytes[target.where(counts, 0)] * counts

    @property
    def _bits(self) -> str:
        return "bits_per_token" if self.token_bytes is None else "bits_per_byte"

    def _make_metrics(self) -> None:
        bits = NatsPer("tokens" if self.token_bytes is None else "bytes", _in_bits)
        metrics: dict[str, Any] = {"perplexity": NatsPer("tokens", torch.exp), self._bits: bits}
        self.train_metrics = MetricCollection(metrics, prefix="train/", compute_groups=False)
        self.val_metrics = self.train_metrics.clone(prefix="val/")
        self.val_metrics["loss"] = NatsPer("tokens")
        self.test_metrics = self.val_metrics.clone(prefix="test/")

    # --- memory

    def _memory(self, stage: str, tokens: Tensor) -> Any:
        """What the model remembers of the texts that these tokens go on with; None if they are others."""
        if stage == "train" and self._restored is not None:
            self._take_up(self._restored, tokens)
        memory = self._memories.get(stage)
        if any(x.shape[:1] != tokens.shape[:1] for x in _tensors(memory)):
            return None
        return pytree.tree_map_only(Tensor, lambda x: x.to(tokens.device), memory)

    def _keep(self, stage: str, memory: Any) -> None:
        self._memories[stage] = pytree.tree_map_only(Tensor, Tensor.detach, memory)

    def on_step_begin(self) -> None:
        """Keep what was read before it, should the step be made again."""
        self._before = self._memories.get("train"), self._restored

    def on_step_undone(self) -> None:
        """Go back there."""
        memory, self._restored = self._before
        self._memories["train"] = memory

    def on_step_skipped(self) -> None:
        """What was read in a step that does not count is remembered, but not what is no number."""
        if not all(x.isfinite().all() for x in _tensors(self._memories.get("train"))):
            self._memories.pop("train")

    @contextmanager
    def _remembering(self, positions: int | None) -> Iterator[None]:
        """Within this context the model remembers so many positions, if a number is given."""
        own = self._language.memory_length
        try:
            self._language.memory_length = own if positions is None else positions
            yield
        finally:
            self._language.memory_length = own

    def inference_spec(self) -> zoo.ModelSpec:
        """The model with the memory length of validation."""
        spec = super().inference_spec()
        if self.eval_memory_length is None:
            return spec
        return replace(spec, arguments={**spec.arguments, "memory_length": self.eval_memory_length})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the memory of training too, of all processes."""
        super().on_save_checkpoint(checkpoint)
        own = _tensors(self._memories.get("train")) if self._restored is None else self._restored
        if self.trainer.world_size == 1:
            found = [x.clone() for x in own]  # not all of what they are views of
        elif self.trainer.interrupted:
            rank_zero_info("The checkpoint has no memory of the text before: the other processes may have ended")
            return
        else:
            found = of_all_processes(own, self.device)
        if found:
            checkpoint["deq_zoo_memory"] = found

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the memory of the checkpoint, where training goes on; each process with that of its rows."""
        super().on_load_checkpoint(checkpoint)
        if self._trainer is None or self._trainer.state.fn != "fit":
            return
        memory = checkpoint.get("deq_zoo_memory")
        processes, rank = self.trainer.world_size, self.trainer.global_rank
        if memory is None:
            rank_zero_info("Training goes on without memory of the text before: this checkpoint has none")
        elif len(memory[0]) % processes:
            rank_zero_info(
                f"Training goes on without memory of the text before: the checkpoint's is of {len(memory[0])} rows, "
                f"which {processes} processes cannot share"
            )
        else:
            self._restored = [x.chunk(processes)[rank].clone() for x in memory]

    def _take_up(self, tensors: list[Tensor], tokens: Tensor) -> None:
        """Make of a checkpoint's tensors a memory as this model has it, unless the texts are others now."""
        self._restored = None
        rows = {len(x) for x in tensors}
        if rows != {len(tokens)}:
            rank_zero_info(
                f"Training goes on without memory of the text before: the checkpoint's is of batches of "
                f"{max(rows)} rows a process, and now they have {len(tokens)}"
            )
            return
        devices = [tokens.device] if tokens.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices), self._solving(1):
            _, example = self.model(tokens[:, :1], None)
        self._memories["train"] = pytree.tree_unflatten(tensors, pytree.tree_structure(example))


class NatsPer(Metric):
    """-log p of all that was read, in nats, over the tokens or the bytes that it was: a sum over a sum.

    Args:
        unit: what is counted.
        then: a function of that quotient; the quotient itself if not given.
    """

    full_state_update = False
    nats: Tensor
    count: Tensor

    def __init__(self, unit: Literal["tokens", "bytes"], then: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.unit = unit
        self.then = then
        for name in ("nats", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, tokens: Tensor | int, num_bytes: Tensor) -> None:
        """Add those of a batch."""
        self.nats += nats
        self.count += tokens if self.unit == "tokens" else num_bytes

    def compute(self) -> Tensor:
        """The value of all batches and processes so far; not a number where nothing counted."""
        mean = (self.nats / self.count).float()
        return mean if self.then is None else self.then(mean)


def _in_bits(nats: Tensor) -> Tensor:
    return nats / math.log(2)


def of_all_processes(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """The rows of all processes, those of the first one first; none if not all processes have as many tensors."""
    counts = gather_all_tensors(torch.tensor(len(tensors), device=device))
    if len({int(count) for count in counts}) > 1:
        return []
    return [torch.cat(gather_all_tensors(x.contiguous().to(device))) for x in tensors]


def _tensors(memory: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(memory) if isinstance(x, Tensor)]
