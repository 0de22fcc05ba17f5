"""The one training loop: any net, any number of devices, from any step on."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mm_autofocus.errors import InputError
from mm_autofocus.training.batches import batches_of, learning_rate
from mm_autofocus.training.checkpoint import BEST, LAST, save_checkpoint
from mm_autofocus.training.progress import TrainingDisplay

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch.utils.data import DataLoader

    from mm_autofocus.models.nets.base import Net
    from mm_autofocus.models.nets.sparsefocus import SparseFocus
    from mm_autofocus.training.options import TrainOptions
    from mm_autofocus.training.samples import MosaicSource, Source
    from mm_autofocus.training.validate import Validation

__all__ = ["Job", "fit"]

_WORST = 1e9
_ADAPTED = 0.1  # of the learning rate, for what was taught before


@dataclass(slots=True)
class Job:
    """All that a process needs to train; it travels to processes that are spawned.

    Attributes
    ----------
    run : Path
        Folder of the run.
    options : TrainOptions
        As they were asked for.
    patches : Source
        What it is trained on.
    mosaics : MosaicSource | None
        For the importance; None: the net has no part for it.
    validation : Validation
        What it is judged by after each epoch.
    identity : dict
        ``model``, ``net``, ``context``: what is written into checkpoints to make the net.
    state : dict | None
        ``last.ckpt``, to go on from.
    """

    run: Path
    options: TrainOptions
    patches: Source
    mosaics: MosaicSource | None
    validation: Validation
    identity: dict[str, Any]
    state: dict[str, Any] | None = None


class _Step(nn.Module):
    """Net and losses in one forward pass, so that a wrapper for several devices sees both."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.net.losses_of(batch)


@dataclass(slots=True)
class _Where:
    """Where a training stands; all of it is in a checkpoint."""

    epoch: int = 0
    step: int = 0  # in the epoch
    elapsed_s: float = 0.0
    best: float = _WORST
    best_epoch: int = 0
    sums: dict[str, float] = field(default_factory=dict)


def fit(fabric: Fabric, job: Job, net: Net) -> dict[str, Any]:
    """Train `net` as `job` says; every process of a training runs this.

    Returns
    -------
    dict
        ``epochs``, ``best_epoch``, ``validation`` (the best one), ``elapsed_s``,
        ``stopped``: why it ended before its last epoch, or ""; ``best_of_each_process``: the
        best validation as each process knows it.

    Raises
    ------
    InputError
        The loss became NaN, or a stack cannot be read.
    """
    return _Loop(fabric, job, net).run()


class _Loop:
    def __init__(self, fabric: Fabric, job: Job, net: Net) -> None:
        self.fabric, self.job, self.options = fabric, job, job.options
        options = job.options
        torch.manual_seed(options.seed)
        rin = getattr(net, "rin", None)
        if rin is not None and (job.mosaics is None or not options.mosaics):
            rin.requires_grad_(False)  # processes wait for gradients of all that have one
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.averaged = copy.deepcopy(net).eval().requires_grad_(False)
        optimiser = torch.optim.AdamW(_groups(net, options), lr=options.lr)
        self.where = _Where()
        self.figures: dict[str, Any] = {}
        if job.state is not None:
            self._restore(net, optimiser, job.state)
        self.averaged.to(fabric.device)
        self.net = net
        self.step, self.optimiser = fabric.setup(_Step(net), optimiser)
        share = -(-options.batch // fabric.world_size)
        self.batch = max(2, min(share, len(job.patches) // fabric.world_size))
        self.steps = max(1, len(job.patches) // (self.batch * fabric.world_size))
        self.mosaics = 0
        if job.mosaics is not None and options.mosaics:
            self.mosaics = max(1, round(self.batch * options.mosaics))

    # ------------------------------------------------------------------------ the course

    def run(self) -> dict[str, Any]:
        where, options = self.where, self.options
        log = self.job.run / "log.jsonl" if self.fabric.is_global_zero else None
        stopped = ""
        with TrainingDisplay(log, options.epochs, self.steps) as display:
            while where.epoch < options.epochs and not stopped:
                started, before = time.perf_counter(), where.elapsed_s
                self._epoch(display)
                row = self._validate(time.perf_counter() - started, where.elapsed_s - before)
                stopped = self._why_stop()
                if self.fabric.is_global_zero:
                    display.epoch(row, self.job.validation.line(row["validation"]))
                    self._save(LAST)
                if stopped:
                    display.say(stopped)
        return {
            "epochs": where.epoch,
            "best_epoch": where.best_epoch,
            "validation": self.figures,
            "elapsed_s": where.elapsed_s,
            "stopped": stopped,
            "best_of_each_process": self._everywhere(where.best),
        }

    def _everywhere(self, value: float) -> list[float]:
        """A number as each process has it."""
        mine = torch.tensor([value], dtype=torch.float64, device=self.fabric.device)
        every = cast("Tensor", self.fabric.all_gather(mine))
        return [float(v) for v in every.reshape(-1)]

    def _epoch(self, display: TrainingDisplay) -> None:
        where, saved = self.where, time.monotonic()
        self.step.train()
        tick = time.perf_counter()
        for batch in self._batches():
            total = self._one(batch)
            now = time.perf_counter()
            seconds, tick = now - tick, now
            where.elapsed_s += seconds
            rate = self.batch * self.fabric.world_size / max(seconds, 1e-9)
            display.step(where.epoch, where.step, total, rate)
            where.step += 1
            late = time.monotonic() - saved > 60 * self.options.checkpoint_minutes
            if late and where.step < self.steps and self.fabric.is_global_zero:
                self._save(LAST)
                saved = time.monotonic()
            if self._out_of_time():
                break

    def _one(self, batch: dict[str, Tensor]) -> float:
        where = self.where
        rate = learning_rate(self.options, self._part())
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group.get("part", 1.0)  # checkpoints were once without
        names = batch.pop("field")
        # What a net drops is, as the samples are, a function of the seed and the step: a run
        # that was killed goes on exactly where it was.
        number = where.epoch * self.steps + where.step
        turn = number * self.fabric.world_size + self.fabric.global_rank
        torch.manual_seed(((self.options.seed << 32) + turn) % (1 << 63))  # torch takes no more
        losses = self.step(self.fabric.to_device(batch))
        loss = cast("Tensor", sum(losses.values()))
        seen = cast("Tensor", self.fabric.all_reduce(loss.detach(), reduce_op="mean"))
        if not math.isfinite(float(seen)):
            self._refuse(names)
        self.optimiser.zero_grad(set_to_none=True)
        self.fabric.backward(loss)
        self.fabric.clip_gradients(self.step, self.optimiser, max_norm=self.options.clip)
        self.optimiser.step()
        self._average()
        for name, value in (("loss", loss), *losses.items()):
            where.sums[name] = where.sums.get(name, 0.0) + float(value.detach())
        return float(loss.detach())

    def _part(self) -> float:
        """How much of the training is done, by steps or by time, whichever is more."""
        where = self.where
        done = (where.epoch * self.steps + where.step) / (self.options.epochs * self.steps)
        if self.options.max_minutes is not None:
            done = max(done, self._clock() / (60 * self.options.max_minutes))
        return min(done, 1.0)

    def _clock(self) -> float:
        """Elapsed seconds, alike in all processes."""
        if self.fabric.world_size == 1:
            return self.where.elapsed_s
        return float(self.fabric.broadcast(self.where.elapsed_s))

    def _out_of_time(self) -> bool:
        limit = self.options.max_minutes
        return limit is not None and self._clock() >= 60 * limit

    def _why_stop(self) -> str:
        where, patience = self.where, self.options.patience
        if self._out_of_time() and where.epoch < self.options.epochs:
            return f"stopped after {self.options.max_minutes:g} minutes (max_minutes)"
        if patience is not None and where.epoch - where.best_epoch >= patience:
            return f"stopped: no better validation for {patience} epochs (patience)"
        return ""

    def _refuse(self, names: Tensor) -> None:
        fields = self.job.patches.fields
        files = sorted({fields[int(i)].stack.file for i in names})
        shown = ", ".join(files[:8]) + (f" and {len(files) - 8} more" if len(files) > 8 else "")
        raise InputError(
            f"the loss is not a number at epoch {self.where.epoch + 1}, batch "
            f"{self.where.step + 1}, with patches of {shown}; look at these files, or train "
            "with a smaller lr"
        )

    # -------------------------------------------------------------------------- the data

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        patches = self._loader(self.job.patches, self.batch)
        if not self.mosaics or self.job.mosaics is None:
            yield from patches
            return
        mosaics = self._loader(self.job.mosaics, self.mosaics)
        for batch, beside in zip(patches, mosaics, strict=True):
            yield {**batch, **beside}

    def _loader(self, source: Any, count: int) -> DataLoader[Any]:
        where, fabric = self.where, self.fabric
        return batches_of(
            source,
            count,
            range(where.epoch * self.steps + where.step, (where.epoch + 1) * self.steps),
            share=(fabric.global_rank, fabric.world_size),
            workers=self.options.workers,
            cuda=fabric.device.type == "cuda",
        )

    # -------------------------------------------------------------------- weights, states

    def _average(self) -> None:
        """Averaged weights follow; fast at first, when the weights still mean nothing."""
        done = self.where.epoch * self.steps + self.where.step
        decay = min(self.options.ema, (1 + done) / (10 + done)) if self.options.ema else 0.0
        with torch.no_grad():
            mine = self.averaged.state_dict()
            for name, value in self.net.state_dict().items():
                if value.is_floating_point():
                    mine[name].lerp_(value.to(mine[name].dtype), 1 - decay)
                else:
                    mine[name].copy_(value)

    def _validate(self, seconds: float, training_s: float) -> dict[str, Any]:
        """Validate at the end of an epoch; keep the best; move on to the next epoch."""
        where, fabric, job = self.where, self.fabric, self.job
        if fabric.world_size > 1:  # statistics of BatchNorm are each process's own
            for buffer in self.averaged.buffers():
                if buffer.is_floating_point():
                    mean = fabric.all_reduce(buffer.clone(), reduce_op="mean")
                    buffer.copy_(cast("Tensor", mean))
        looked_at = job.validation.items
        share = -(-len(looked_at) // fabric.world_size)
        # all processes answer for equally many; the last ones again for the first patches
        numbers = np.arange(share) + share * fabric.global_rank
        own = [int(i) % len(looked_at) for i in numbers]
        with fabric.autocast():
            mine = job.validation.predict(self.averaged, own, fabric.device)
        both = cast("Tensor", fabric.all_gather(torch.from_numpy(mine).to(fabric.device)))
        predicted = both.reshape(-1, mine.shape[1])[: len(looked_at)].cpu().numpy()
        figures, frames = job.validation.score(predicted)
        worth = job.validation.worth(figures)
        steps = max(where.step, 1)
        row = {
            "epoch": where.epoch + 1,
            "steps": where.step,
            "lr": self.optimiser.param_groups[0]["lr"],
            **{k: v / steps for k, v in where.sums.items()},
            "validation": figures,
            "patches_per_s": steps * self.batch * fabric.world_size / max(training_s, 1e-9),
            "seconds": seconds,
            "best": worth < where.best,
        }
        where.epoch, where.step, where.sums = where.epoch + 1, 0, {}
        if row["best"] or not self.figures:
            where.best, where.best_epoch = worth, where.epoch
            self.figures = figures
            if fabric.is_global_zero:
                self._save(BEST)
                np.save(job.run / "validation.npy", frames)
        return row

    def _save(self, name: str) -> None:
        where = self.where
        state: dict[str, Any] = {
            **self.job.identity,
            "weights": self.averaged.state_dict(),
            "epoch": where.epoch,
            "figures": self.figures,
        }
        if name == LAST:
            state |= {
                "training": self.net.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "where": {k: getattr(where, k) for k in _Where.__slots__},
            }
        save_checkpoint(self.job.run / name, state)

    def _restore(
        self, net: Net, optimiser: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        net.load_state_dict(state["training"])
        self.averaged.load_state_dict(state["weights"])
        try:
            optimiser.load_state_dict(state["optimiser"])
        except ValueError as e:  # other groups of weights
            raise InputError(
                f"{self.job.run}: begun by another version, which trained what reads spectra "
                "at another rate; begin a new run (its weights serve as init)"
            ) from e
        self.where = _Where(**state["where"])
        self.figures = state["figures"]


def _groups(net: nn.Module, options: TrainOptions) -> list[dict[str, Any]]:
    """Weights that are decayed, and those (biases, norms, scales) that are not.

    What reads spectra, if it was taught first, is only adapted: its rate is part of the rate.
    """
    first = options.spectra_patches or options.theory.patches
    # `prepare` refuses nets that read none
    reader = cast("SparseFocus", net).reading_parameters() if first else []
    taught = {id(p) for p in reader}
    groups = []
    for part, known in ((1.0, False), (_ADAPTED, True)):
        mine = [p for p in net.parameters() if (id(p) in taught) == known]
        many, few = [p for p in mine if p.ndim > 1], [p for p in mine if p.ndim <= 1]
        for weights, decay in ((many, options.weight_decay), (few, 0.0)):
            groups.append({"params": weights, "weight_decay": decay, "part": part})
    return [g for g in groups if g["params"]]
