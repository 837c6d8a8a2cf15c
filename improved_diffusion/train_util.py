"""The training loop.

Shapes: N samples of a batch, C channels, H height, W width.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import blobfile as bf
import torch
from torch.optim import AdamW

from improved_diffusion import (
    checkpoint,
    cli,
    dist_util,
    execution,
    figures,
    logger,
    power_ema,
    sampling,
)
from improved_diffusion.augmentation import Augmentation
from improved_diffusion.cost import (
    free_memory,
    is_out_of_memory,
    largest_microbatch,
    training_cost,
)
from improved_diffusion.encodings import MaskEncoding
from improved_diffusion.evaluation.in_training import Evaluation
from improved_diffusion.fp16_util import choose_precision, precision_name
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.meters import LossMeter, SkippedSteps
from improved_diffusion.nn import update_ema
from improved_diffusion.packed import to_unit_range
from improved_diffusion.resample import LossAwareSampler, ScheduleSampler, UniformSampler
from improved_diffusion.seeds import derive_seed
from improved_diffusion.unet import UNetModel

Batches = Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]

# With more classes than these the log would have more columns than anyone reads.
MAX_LOGGED_CLASSES = 10

# The reference's: its loss scale settles at 2^20 to 2^21 within a thousand steps.
INITIAL_LOG_LOSS_SCALE = 20.0

AUTO = "auto"

# A share of the time spent waiting for data that is worth telling.
NOTABLE_WAIT = 0.02

# On a GPU the count of skipped steps is looked at so often.
CHECK_INTERVAL = 10

# What a process can do next; of several, the last of this order counts.
_GO, _STOPPED, _ENDED, _FAILED = range(4)

# Set by tests of scripts that never end: training stops after a periodic checkpoint.
STOP_VARIABLE = "DIFFUSION_TRAINING_TEST"
# A folder for the checkpoints that is not the log's.
CHECKPOINT_FOLDER_VARIABLE = "DIFFUSION_BLOB_LOGDIR"


def parse_microbatch(value: int | str) -> int | str:
    """A number above 0; ``"auto"``; or -1, the whole batch, for any other number.

    :raises ValueError: anything else.
    """
    if value == AUTO:
        return AUTO
    try:
        return max(int(value), 0) or -1
    except ValueError:
        raise ValueError(f"--microbatch {value}: give a number of images, or {AUTO}") from None


def parse_ema_rates(text: str | float) -> list[float]:
    """``"0.9999,0.999"`` -> [0.9999, 0.999]."""
    try:
        rates = [float(part) for part in str(text).split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 <= rate < 1 for rate in rates) or len(set(rates)) < len(rates):
        raise ValueError(
            f"--ema_rate {text}: expected different numbers from 0 to below 1, separated by commas"
        )
    return rates


@dataclass
class Preview:
    """A small picture of what the moving average samples while it is trained.

    :param diffusion: a process of few steps.
    :param shape: (C, H, W) of what the network draws.
    :param channels: names for the picture; empty: none.
    :param model_kwargs: further arguments of the model, a row for each sample: ``y``,
        ``low_res``.
    :param encoding: of the mask in what the network draws.
    """

    diffusion: GaussianDiffusion
    shape: tuple[int, int, int]
    channels: Sequence[str] = ()
    num_samples: int = 8
    seed: int = 0
    model_kwargs: dict[str, torch.Tensor] = field(default_factory=dict)
    encoding: MaskEncoding = field(default_factory=MaskEncoding)

    def write(self, model: UNetModel, path: str) -> None:
        """Sample with the same noise at every call, and write the grid to ``path``."""
        samples = sampling.draw(
            model,
            self.diffusion,
            range(self.num_samples),
            self.shape,
            seed=self.seed,
            device=dist_util.dev(),
            model_kwargs=self.model_kwargs,
        )
        levels = sampling.to_levels(self.encoding.decode(samples))
        figures.save_grid(figures.sample_grid(levels, self.channels or None), path)


class TrainLoop:
    """Train a model on batches, log, save, and continue where a checkpoint stopped.

    Files are written to ``logger.get_dir()``, see :mod:`improved_diffusion.checkpoint`.

    Under several processes (:mod:`improved_diffusion.dist_util`) each trains on batches of its own;
    the gradient is that of all images together, and process 0 alone writes.

    :param data: batches of images [N, C, H, W] in [-1, 1], or uint8 levels, and a dict of further
        model arguments (labels ``y``, ``low_res``). A resumed run must be given the batches that
        follow the checkpoint.
    :param microbatch: samples that go through the network at once; -1: the whole batch;
        ``"auto"``: as many as fit into the memory that is free, and half as many whenever they
        turn out not to. The gradient is the whole batch's in any case, because each microbatch
        counts by its share.
    :param ema_rate: rates of the moving averages, separated by commas.
    :param resume_checkpoint: a model file whose ``opt`` and ``ema`` files lie beside it; empty:
        start anew.
    :param restart: the folder may hold what a run wrote that ended before its first checkpoint.
    :param use_fp16: the reference's name for ``precision="fp16"``.
    :param fp16_scale_growth: by how much log2 of the loss scale grows in a step.
    :param schedule_sampler: which timesteps to train on; ``None``: uniformly.
    :param warmup_steps: raise the learning rate linearly from 0 to ``lr`` over so many steps.
    :param grad_clip: scale gradients down to this L2 norm over all parameters; 0: don't.
    :param max_skipped_steps: end the run when so many steps in a row had no finite gradient.
    :param keep_checkpoints: thin out older checkpoints to this number in all, 2 or more, see
        :func:`improved_diffusion.checkpoint.to_thin_out`; 0: keep all.
    :param files_at: names the files behind the images at the places from ``begin`` to below
        ``end`` of the run, for the message about steps without a finite gradient.
    :param lr_anneal_steps: lower the learning rate linearly to 0 at this step and stop there; 0:
        constant.
    :param max_steps: stop when so many steps are completed in total; 0: don't.
    :param seed: from it derive the timesteps, the noise and dropout of every step.
    :param ema_warmup: limit each average's rate at update n (from 0) to (1 + n) / (10 + n), so
        that it forgets the untrained weights.
    :param ema_sigma_rel: relative lengths of power averages kept beside the others, separated by
        commas, see :mod:`improved_diffusion.power_ema`; empty: none.
    :param ema_snapshot_interval: write these averages alone every so many steps, beside those of
        the checkpoints; 0: don't.
    :param sample_interval: write ``preview`` every so many steps; 0: never.
    :param eval_interval: log the measures of ``evaluation``, which process 0 alone needs, every so
        many steps; 0: never.
    :param metadata: plain values that travel in the weight files, see
        :func:`improved_diffusion.checkpoint.with_metadata`.
    :param flags: the command line's values, kept in the ``opt`` file for a continued run.
    :param channels: names of the network's channels, whose squared errors are then logged as
        ``mse_<name>``.
    :param classes: names of the classes; up to ten are logged as ``mse_class_<name>``.
    :param precision: in which the network computes, see
        :func:`improved_diffusion.fp16_util.choose_precision`. Parameters, optimizer and averages
        stay float32. With fp16 the loss is scaled, and a step whose gradient overflows halves the
        scale. A step whose gradient is not finite changes nothing, in any precision.
    :param compile: ``on``, ``off`` or ``auto`` (on a GPU): run the network through
        ``torch.compile``; where that fails the network runs as it is.
    :param encoding: of the mask among the images' channels; None: they are trained on as they are.
    :param augmentation: changes the images before that; None: nothing does.
    :raises ValueError: a setting or a checkpoint that does not fit, or a log folder that holds
        another run.
    """

    def __init__(
        self,
        *,
        model: UNetModel,
        diffusion: GaussianDiffusion,
        data: Batches,
        batch_size: int,
        microbatch: int | str,
        lr: float,
        ema_rate: str | float,
        log_interval: int,
        save_interval: int,
        resume_checkpoint: str,
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        schedule_sampler: ScheduleSampler | None = None,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        grad_clip: float = 0.0,
        max_skipped_steps: int = 50,
        keep_checkpoints: int = 0,
        files_at: Callable[[int, int], Sequence[str]] | None = None,
        restart: bool = False,
        lr_anneal_steps: int = 0,
        max_steps: int = 0,
        seed: int = 0,
        ema_warmup: bool = True,
        ema_sigma_rel: str = "",
        ema_snapshot_interval: int = 0,
        sample_interval: int = 0,
        preview: Preview | None = None,
        eval_interval: int = 0,
        evaluation: Evaluation | None = None,
        metadata: dict[str, Any] | None = None,
        flags: dict[str, Any] | None = None,
        channels: Sequence[str] = (),
        classes: Sequence[str] = (),
        precision: str = "auto",
        compile: str = "auto",
        encoding: MaskEncoding | None = None,
        augmentation: Augmentation | None = None,
    ) -> None:
        if fp16_scale_growth <= 0:
            raise ValueError(f"--fp16_scale_growth {fp16_scale_growth}: give a number above 0")
        checkpoint.check_keep(keep_checkpoints)
        if not resume_checkpoint and not restart:
            dist_util.on_first(_refuse_used_folder)
        self.device = dist_util.dev()
        self.model = model.to(self.device)
        self.diffusion = diffusion
        self.data = data
        self.batch_size = batch_size
        microbatch = parse_microbatch(microbatch)
        self.fits_memory = microbatch == AUTO
        self.microbatch = microbatch if microbatch not in (AUTO, -1) else batch_size
        self.lr = lr
        self.warmup_steps = warmup_steps
        self.grad_clip = grad_clip
        self.max_skipped_steps = max_skipped_steps
        self.keep_checkpoints = keep_checkpoints
        self.files_at = files_at
        self.ema_rate = parse_ema_rates(ema_rate)
        self.sigma_rels = power_ema.parse_sigma_rels("--ema_sigma_rel", ema_sigma_rel)
        self.gammas = [power_ema.gamma_of(sigma_rel) for sigma_rel in self.sigma_rels]
        self.ema_snapshot_interval = ema_snapshot_interval if self.sigma_rels else 0
        self.log_interval = log_interval
        self.save_interval = save_interval
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        self.lr_anneal_steps = lr_anneal_steps
        self.max_steps = max_steps
        self.seed = seed
        self.ema_warmup = ema_warmup
        self.sample_interval = sample_interval if preview else 0
        self.preview = preview
        self.eval_interval = eval_interval
        self.evaluation = evaluation
        self.encoding = encoding or MaskEncoding()
        self.augmentation = augmentation
        # Copies in which no two values are one object, so that equal runs write equal files.
        self.metadata = json.loads(json.dumps(metadata or {}))
        self.flags = json.loads(json.dumps(flags or {}))
        # By keyword only where there are names: another process's losses may not know it.
        self.named = {"channel_names": list(channels)} if channels else {}

        self.step = 0  # completed optimizer steps
        self.samples = 0  # images seen, over all processes
        self._global_batch = 0  # images of the last step, over all processes
        self._retry_at = 0  # step at which to try again what could not be saved
        self._first_step = 0  # of this process
        self.params = list(self.model.parameters())
        self.opt = AdamW(self.params, lr=lr, weight_decay=weight_decay, fused=True)
        self.dtype, remark = choose_precision("fp16" if use_fp16 else precision, self.device)
        if remark:
            logger.log(remark)
        self.use_fp16 = self.dtype == torch.float16
        self.precision = precision_name(self.dtype)
        self.network, self._parallel = execution.for_training(
            model, self.dtype, compile, self.device
        )
        self.scaler = torch.amp.GradScaler(
            self.device.type,
            init_scale=2**INITIAL_LOG_LOSS_SCALE,
            growth_factor=2**fp16_scale_growth,
            backoff_factor=0.5,
            growth_interval=1,
            enabled=self.use_fp16,
        )
        logged = classes if len(classes) <= MAX_LOGGED_CLASSES else ()
        self.meter = LossMeter(diffusion.num_timesteps, list(logged))
        self._grad_norms: list[torch.Tensor] = []
        self._skipped = SkippedSteps(self.device)
        if resume_checkpoint:
            self._resume(resume_checkpoint)
        else:
            dist_util.sync_params(self.params)
            self.ema_params = [[p.detach().clone() for p in self.params] for _ in self.ema_rate]
            self.power_params = [[p.detach().clone() for p in self.params] for _ in self.gammas]
            if restart:
                dist_util.on_first(lambda: self._begin_after(-1))
        self._first_step = self._saved_step = self.step
        self._disk = _disk_of(get_blob_logdir())

    # The run

    def run_loop(self) -> bool:
        """Train until the last step, a signal or the end of the data, and save.

        :return: whether a signal has cut the run short.
        :raises ValueError: a file of the data that went bad, or too many steps without a finite
            gradient; after saving.
        :raises OSError: the last checkpoint cannot be written, or another process has ended.
        """
        self.model.train()
        timer = _StepTimer(self.step)
        state, failure = _GO, None
        with stop_on_signals() as signals, dist_util.ending_together():
            while not self._is_finished():
                state, batch, failure = self._next_batch(timer, bool(signals))
                # All do the same: what one process cannot do, none does.
                state = max(own for (own,) in dist_util.gather(state))
                if state != _GO:
                    break
                self.run_step(*batch)
                failure = self._failure_of_numbers()
                if failure:
                    break
                self._log_and_save(timer)
                if self.step == self._saved_step and os.environ.get(STOP_VARIABLE):
                    break
            if self.step > self._saved_step:
                self.save()
        if failure:
            raise failure
        if state == _FAILED:
            sys.exit(2)  # another process tells why
        return state == _STOPPED

    def _next_batch(
        self, timer: _StepTimer, stopped: bool
    ) -> tuple[int, tuple[torch.Tensor, dict[str, torch.Tensor]] | None, Exception | None]:
        """What this process can do next, and with which batch; or why it cannot."""
        if stopped:
            return _STOPPED, None, None
        try:
            with timer.waiting():
                return _GO, next(self.data), None
        except StopIteration:
            return _ENDED, None, None
        # A file that went bad must not cost what was learned before.
        except (ValueError, OSError) as error:
            return _FAILED, None, error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            return _FAILED, None, OSError(f"a process that decodes images was killed: {error}")

    def _failure_of_numbers(self) -> ValueError | None:
        """Whether too many steps in a row had no finite gradient."""
        # Reading the counts waits for a GPU, which is better done now and then.
        if self.device.type != "cpu" and self.step % CHECK_INTERVAL:
            return None
        if self.use_fp16 and self.scaler.get_scale() < 1:
            self.scaler.update(1.0)  # smaller ones would round gradients to 0 for a long time
        row, last = self._skipped.longest_row()
        if row < self.max_skipped_steps:
            return None
        images = ""
        if self.files_at is not None:
            begin = self.samples - (self.step - last) * self._global_batch
            names = self.files_at(begin, begin + self._global_batch)
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            images = f"; its images: {', '.join(names[:4])}{more}"
        return ValueError(
            f"{row} steps in a row had a loss or gradient that is not finite, up to step "
            f"{last + 1}{images}. The state of step {self.step} is saved; lower --lr, or try "
            "--grad_clip 1, --warmup_steps 1000 or --precision fp32, from an earlier checkpoint"
        )

    def _log_and_save(self, timer: _StepTimer) -> None:
        """What is due after a step."""
        if self.eval_interval and self.step % self.eval_interval == 0:
            dist_util.on_first(self.evaluate)
        if self.step % self.log_interval == 0:
            self.log_step()
            logger.log(timer.report(self.step, self._last_step()))
        if self.sample_interval and self.step % self.sample_interval == 0:
            dist_util.on_first(self.write_preview)
        due = self.save_interval and self.step % self.save_interval == 0
        if due or self.step == self._retry_at:
            try:
                self.save()
            except OSError as error:
                self._retry_at = self.step + max(1, self.save_interval // 10)
                logger.warn(
                    f"step {self.step} is not saved: {error}. Training goes on, and saving is "
                    f"tried again at step {self._retry_at}"
                )
        interval = self.ema_snapshot_interval
        if interval and self.step % interval == 0 and self.step != self._saved_step:
            dist_util.on_first(self.write_snapshots)

    def _last_step(self) -> int:
        """The step at which the run ends by itself; 0: it doesn't."""
        ends = [end for end in (self.max_steps, self.lr_anneal_steps) if end]
        return min(ends, default=0)

    def _is_finished(self) -> bool:
        return 0 < self._last_step() <= self.step

    def run_step(self, batch: torch.Tensor, cond: dict[str, torch.Tensor]) -> None:
        """One optimizer step on a batch."""
        # The step's own seed: a resumed run draws what an uninterrupted one would have drawn.
        torch.manual_seed(derive_seed(self.seed, "train", self.step))
        try:
            self.forward_backward(batch, cond)
        except RuntimeError as error:
            # The weights are still those of the last step. Other processes may not know of this.
            if is_out_of_memory(error) and dist_util.world_size() == 1:
                self.opt.zero_grad()
                if self.step > self._saved_step:
                    self.save()
            raise
        self.scaler.unscale_(self.opt)
        norm = _global_norm([p.grad for p in self.params])
        finite = norm.isfinite()
        self._grad_norms.append(norm)
        self._skipped.add(self.step, finite)
        if self.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.params, self.grad_clip, norm)
        self._set_lr()
        if not self.use_fp16:  # where the scaler does the same
            # Read on the device by the fused optimizer, which then leaves everything as it is.
            self.opt.found_inf = 1.0 - finite.float()
        self.scaler.step(self.opt)
        self.scaler.update()
        for rate, averages in zip(self.ema_rate, self.ema_params):
            if self.ema_warmup:
                rate = min(rate, (1 + self.step) / (10 + self.step))
            update_ema(averages, self.params, rate=rate)
        for gamma, averages in zip(self.gammas, self.power_params):
            update_ema(averages, self.params, rate=power_ema.rate(self.step + 1, gamma))
        self.step += 1
        self.samples += self._global_batch

    def forward_backward(self, batch: torch.Tensor, cond: dict[str, torch.Tensor]) -> None:
        """Set every parameter's gradient to that of the batch's (importance-weighted) mean loss.

        With ``use_fp16`` the gradient is multiplied by the loss scale.
        """
        self.opt.zero_grad()
        n = len(batch)
        batch = to_unit_range(batch.to(self.device, non_blocking=True))
        cond = {
            name: to_unit_range(value.to(self.device, non_blocking=True))
            for name, value in cond.items()
        }
        counts = [count for (count,) in dist_util.gather(n)]
        self._global_batch = sum(counts)
        rank = dist_util.rank()
        first = sum(counts[:rank])
        own = slice(first, first + n)
        if self.augmentation:
            # A stream of its own, so that timesteps and noise are those of a run without.
            seed = derive_seed(self.seed, "augmentation", self.step)
            drawn = self.augmentation.draw(self._global_batch, torch.Generator().manual_seed(seed))
            batch, cond = self.augmentation.apply(batch, cond, drawn[own])
        batch = self.encoding.encode(batch)
        # Drawn for the whole batch, so that its division does not change what is computed.
        t, weights = self.schedule_sampler.sample(self._global_batch, self.device)
        noise = torch.randn(self._global_batch, *batch.shape[1:], device=self.device)
        conditioned = None
        if getattr(self.diffusion, "self_condition", False):  # another process may not know it
            conditioned = self.diffusion.draw_conditioned(self._global_batch)[own]
        t, weights, noise = (drawn[own] for drawn in (t, weights, noise))
        if rank:  # dropout is to differ
            torch.manual_seed(derive_seed(self.seed, f"train {rank}", self.step))

        if self.fits_memory and self.step == self._first_step:
            self._choose_microbatch(batch, cond)
        terms: list[dict[str, torch.Tensor]] = []
        while not terms:
            try:
                terms = self._accumulate(batch, cond, t, weights, noise, conditioned)
            except RuntimeError as error:
                # Several processes may have begun to add up their gradients.
                several = dist_util.world_size() > 1
                shrinks = self.fits_memory and self.microbatch > 1 and not several
                if not (shrinks and is_out_of_memory(error)):
                    raise
            if not terms:  # outside of the handler, which keeps the failed pass's tensors alive
                self._shrink_microbatch(n)

        whole = {name: torch.cat([part[name] for part in terms]) for name in terms[0]}
        if isinstance(self.schedule_sampler, LossAwareSampler):
            self.schedule_sampler.update_with_local_losses(t, whole["loss"])
        weighted = {name: value * weights for name, value in whole.items()}
        self.meter.add(t, weighted, cond.get("y"))

    def _accumulate(
        self,
        batch: torch.Tensor,
        cond: dict[str, torch.Tensor],
        t: torch.Tensor,
        weights: torch.Tensor,
        noise: torch.Tensor,
        conditioned: torch.Tensor | None,
    ) -> list[dict[str, torch.Tensor]]:
        """Add up the gradients of all microbatches; their loss terms.

        The last backward pass averages the gradients over the processes.
        """
        terms = []
        whole = self._global_batch / dist_util.world_size()
        for start in range(0, len(batch), self.microbatch):
            part = slice(start, start + self.microbatch)
            last = part.stop >= len(batch)
            chosen = {} if conditioned is None else {"conditioned": conditioned[part]}
            with nullcontext() if last or self._parallel is None else self._parallel.no_sync():
                losses = self.diffusion.training_losses(
                    self._forward,
                    batch[part],
                    t[part],
                    model_kwargs={name: value[part] for name, value in cond.items()},
                    noise=noise[part],
                    **self.named,
                    **chosen,
                )
                # The sum over the microbatch by the size of the batch: its mean by its share.
                loss = (losses["loss"] * weights[part]).sum() / whole
                # A loss that is not finite leaves no gradient finite, so that the step is skipped.
                loss = loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)
                self.scaler.scale(loss).backward()
            terms.append({name: value.detach() for name, value in losses.items()})
        return terms

    def _choose_microbatch(self, batch: torch.Tensor, cond: dict[str, torch.Tensor]) -> None:
        """Take as many images at once as the free memory holds by the network's cost."""
        shapes = {name: tuple(value.shape[1:]) for name, value in cond.items()}
        averages = len(self.ema_rate) + len(self.sigma_rels)
        cost = training_cost(
            self.model,
            tuple(batch.shape[1:]),
            dtype=self.dtype,
            averages=averages,
            model_kwargs=shapes,
        )
        # The parameters and their averages are there already.
        reserved = cost.state_bytes - 4 * cost.parameters * (1 + averages)
        free = free_memory(self.device)
        own = largest_microbatch(cost.image_bytes, reserved, free, len(batch))
        self.microbatch = min(size for (size,) in dist_util.gather(own))
        logger.log(
            f"microbatch {self.microbatch} of {len(batch)}: {free / 2**30:.1f} GiB are free, an "
            f"image needs about {cost.image_bytes / 2**20:.0f} MiB and the optimizer "
            f"{reserved / 2**30:.1f} GiB"
        )

    def _shrink_microbatch(self, batch_size: int) -> None:
        self.opt.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        before = min(self.microbatch, batch_size)
        self.microbatch = (before + 1) // 2
        logger.log(f"microbatch {before} does not fit into memory: going on with {self.microbatch}")

    def _forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """The network's output, float32 as the losses need it."""
        # The first pass of a self-conditioned network has no gradient to add up, and another number
        # of images every time, for each of which compiled code would be made anew.
        network = self.network if torch.is_grad_enabled() else self.model
        if isinstance(self.model, UNetModel):
            return network(*args, **kwargs).float()
        shorter = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=shorter):
            return network(*args, **kwargs).float()

    def _set_lr(self) -> None:
        lr = self.lr
        if self.warmup_steps:
            lr *= min(1, (self.step + 1) / self.warmup_steps)
        if self.lr_anneal_steps:
            lr *= 1 - self.step / self.lr_anneal_steps
        for group in self.opt.param_groups:
            group["lr"] = lr

    def log_step(self) -> None:
        """Write a row of means since the last one to the log."""
        logger.logkv("step", self.step)
        logger.logkv("samples", self.samples)
        norms = torch.stack(self._grad_norms)
        finite = norms.isfinite()
        if self.use_fp16:
            logger.logkv("lg_loss_scale", math.log2(self.scaler.get_scale()))
        if self._skipped.total:
            logger.logkv("skipped", self._skipped.total)
        if not finite.all():
            why = "is not finite"
            if self.use_fp16:
                scale = math.log2(self.scaler.get_scale())
                why = f"overflowed float16, which lowers the loss scale, now 2^{scale:.1f}"
            logger.log(
                f"skipped {int((~finite).sum())} of {len(norms)} steps, whose gradient {why}"
            )
        if finite.any():
            logger.logkv("grad_norm", norms[finite].mean())
        logger.logkvs(self.meter.read())
        self._grad_norms.clear()
        logger.dumpkvs()

    def write_preview(self) -> None:
        """Write a grid of samples of the first moving average."""
        assert self.preview is not None
        path = bf.join(get_blob_logdir(), "previews", f"step{self.step:06d}.png")
        with self._averages_in_model(self.ema_params[0]):
            try:
                self._check_place()
                self.preview.write(self.model, path)
                logger.log(f"wrote {path}")
            except OSError as error:
                logger.warn(f"the preview is left out: {error}")

    def evaluate(self) -> None:
        """Log the measures of samples of the first moving average.

        They stand in the step's row of the log, or in a row of their own.
        """
        assert self.evaluation is not None
        with self._averages_in_model(self.ema_params[0]):
            values = self.evaluation.measure(self.model, dist_util.dev())
        logger.logkvs(values)
        if self.step % self.log_interval:
            logger.logkvs({"step": self.step, "samples": self.samples})
            logger.dumpkvs()

    @contextmanager
    def _averages_in_model(self, averages: Sequence[torch.Tensor]) -> Iterator[None]:
        """Let the model hold ``averages`` for a while; no copy is made."""
        own = [p.data for p in self.params]
        for parameter, average in zip(self.params, averages):
            parameter.data = average
        self.model.eval()
        try:
            yield
        finally:
            for parameter, value in zip(self.params, own):
                parameter.data = value
            self.model.train()

    # Checkpoints

    def _check_place(self) -> None:
        """Write nothing where a disk was mounted that is gone now.

        :raises OSError: the folder is not there, or on another disk than at the start.
        """
        if _disk_of(get_blob_logdir()) != self._disk:
            raise OSError(f"{get_blob_logdir()} is gone: its disk is no longer there")

    def save(self) -> None:
        """Write the checkpoint of this step, and thin out older ones.

        :raises OSError: if it cannot be written; earlier ones stay as they are.
        """
        training = self._training_state()
        problem = dist_util.on_first(lambda: self._write(training))
        if problem:
            raise OSError(problem)
        self._saved_step, self._retry_at = self.step, 0

    def _write(self, training: dict[str, Any]) -> str:
        """Write the files of a checkpoint, or none; what went wrong, in words."""
        folder = get_blob_logdir()
        logger.log(f"saving step {self.step} to {folder}")
        files = {}
        try:
            self._check_place()
            for rate, averages in zip(self.ema_rate, self.ema_params):
                name = checkpoint.ema_name(rate, self.step)
                weights = self._weights(averages, {"ema_rate": rate})
                files[name] = checkpoint.save(weights, bf.join(folder, name))
            for name, weights in self._snapshots():
                files[name] = checkpoint.save(weights, bf.join(folder, name))
            name = checkpoint.opt_name(self.step)
            state = {**self.opt.state_dict(), "training": training}
            files[name] = checkpoint.save(state, bf.join(folder, name))
            # The model's file last, so that it marks the rest.
            path = bf.join(folder, checkpoint.model_name(self.step))
            checkpoint.save(self._weights(self.params, {"files": files}), path)
        except OSError as error:
            steps = []
            with suppress(OSError):
                for name in files:  # of no use without the model's, and the disk may be full
                    bf.remove(bf.join(folder, name))
                steps = checkpoint.complete_steps(folder)
            newest = f"of step {steps[-1]}" if steps else "none"
            return f"{error} (the newest complete checkpoint: {newest})"
        if self.keep_checkpoints:
            try:
                removed = checkpoint.thin_out(folder, self.keep_checkpoints)
            except OSError as error:
                logger.warn(f"an old checkpoint stays: {error}")
                return ""
            if removed:
                logger.log(f"removed the checkpoint of step {', '.join(map(str, removed))}")
        return ""

    def write_snapshots(self) -> None:
        """Write the power averages alone. Where that fails, training goes on without."""
        folder = get_blob_logdir()
        try:
            self._check_place()
            for name, weights in self._snapshots():
                checkpoint.save(weights, bf.join(folder, name))
        except OSError as error:
            logger.warn(f"the snapshot of the averages at step {self.step} is left out: {error}")

    def _snapshots(self) -> Iterator[tuple[str, OrderedDict[str, torch.Tensor]]]:
        """File names and contents of the power averages."""
        for sigma_rel, averages in zip(self.sigma_rels, self.power_params):
            name = checkpoint.snapshot_name(sigma_rel, self.step)
            yield name, self._weights(averages, {"sigma_rel": sigma_rel})

    def _weights(
        self, params: Sequence[torch.Tensor], about: dict[str, Any]
    ) -> OrderedDict[str, torch.Tensor]:
        state = self.model.state_dict()
        for (name, _), value in zip(self.model.named_parameters(), params):
            state[name] = value.detach().contiguous()
        return checkpoint.with_metadata(state, {**self.metadata, "step": self.step, **about})

    def _training_state(self) -> dict[str, Any]:
        """What continuing needs beside the weights and the optimizer's state.

        Random state is the seed and the step, from which all else derives.
        """
        state = {
            "step": self.step,
            "samples": self.samples,
            "skipped": self._skipped.state_dict(),
            "flags": self.flags,
            "log": {"losses": self.meter.state_dict(), "grad_norms": self._grad_norms},
        }
        if isinstance(self.schedule_sampler, LossAwareSampler):
            state["schedule_sampler"] = self.schedule_sampler.state_dict()
        if self.use_fp16:
            state["loss_scale"] = self.scaler.get_scale()
        return state

    def _resume(self, path: str) -> None:
        weights = checkpoint.load_weights(path, self.device)
        self.step = checkpoint.step_of(path, checkpoint.metadata_of(weights))
        checkpoint.load_into(self.model, weights, path)

        self.ema_params = [
            self._read_average(
                path, checkpoint.ema_name(rate, self.step), weights, f"{rate} out of --ema_rate"
            )
            for rate in self.ema_rate
        ]
        self.power_params = [
            self._read_average(
                path,
                checkpoint.snapshot_name(sigma_rel, self.step),
                weights,
                f"{sigma_rel} out of --ema_sigma_rel",
            )
            for sigma_rel in self.sigma_rels
        ]

        opt_path = checkpoint.sibling(path, checkpoint.opt_name(self.step))
        state = checkpoint.load(opt_path, self.device)
        training = state.pop("training", {}) if isinstance(state, dict) else {}
        if training.get("step", self.step) != self.step:
            raise ValueError(
                f"{opt_path} is of step {training['step']} and {path} of step {self.step}; "
                "restore the files that were saved together"
            )
        try:
            # The settings of this start count, not those of the one that saved.
            groups = self.opt.state_dict()["param_groups"]
            per_parameter = _per_parameter(state["state"], self.params)
            self.opt.load_state_dict({"state": per_parameter, "param_groups": groups})
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{opt_path} holds no optimizer state of this network; "
                "restore the files that were saved together"
            ) from error
        self.samples = training.get("samples", self.step * self.batch_size * dist_util.world_size())
        if "skipped" in training:
            self._skipped.load_state_dict(training["skipped"])
        if "log" in training:
            self.meter.load_state_dict(training["log"]["losses"])
            self._grad_norms = list(training["log"]["grad_norms"])
        if self.use_fp16 and "loss_scale" in training:
            self.scaler.load_state_dict(
                {**self.scaler.state_dict(), "scale": training["loss_scale"]}
            )
        if "schedule_sampler" in training and isinstance(self.schedule_sampler, LossAwareSampler):
            self.schedule_sampler.load_state_dict(training["schedule_sampler"])
        logger.log(f"resuming from {path} at step {self.step}")
        dist_util.on_first(lambda: self._begin_after(self.step))

    def _read_average(
        self, path: str, name: str, weights: OrderedDict[str, torch.Tensor], without: str
    ) -> list[torch.Tensor]:
        """The average in the file ``name`` beside the model file ``path``, which held ``weights``.

        :param without: how to do without it, for the message.
        """
        ema_path = checkpoint.sibling(path, name)
        if not bf.exists(ema_path):
            raise ValueError(f"{ema_path} is missing beside {path}; restore it, or leave {without}")
        averages = checkpoint.load_weights(ema_path, self.device)
        own = checkpoint.metadata_of(averages).get("step", self.step)
        if own != self.step or averages.keys() != weights.keys():
            raise ValueError(
                f"{ema_path} does not belong to {path}: it is of step {own} of "
                "another run; restore the files that were saved together"
            )
        return [
            _laid_out_as(p, averages[name])
            for (name, _), p in zip(self.model.named_parameters(), self.params)
        ]

    def _begin_after(self, step: int) -> None:
        """Put aside what a run wrote past ``step``, which is done again."""
        folder = get_blob_logdir()
        checkpoint.remove_partial(folder)
        for name in checkpoint.supersede(folder, step):
            logger.log(f"moved {name}, newer than step {self.step}, to {checkpoint.SUPERSEDED}/")
        logger.drop_rows_after(step)


def _per_parameter(
    state: dict[int, dict[str, torch.Tensor]], params: Sequence[torch.Tensor]
) -> dict[int, dict[str, torch.Tensor]]:
    """AdamW's state for each parameter, from a file of this package or of the reference.

    With half precision the reference keeps the state of all parameters in one flat vector.

    :raises ValueError: if it belongs to other parameters.
    """
    if len(state) == 1 < len(params):
        sizes = [p.numel() for p in params]
        (flat,) = state.values()
        parts = {name: value.split(sizes) for name, value in flat.items() if name != "step"}
        state = {
            i: {
                "step": torch.as_tensor(flat["step"], dtype=torch.float32).clone(),
                **{name: part[i].view_as(p) for name, part in parts.items()},
            }
            for i, p in enumerate(params)
        }
    if len(state) != len(params) or any(
        state[i]["exp_avg"].shape != p.shape for i, p in enumerate(params)
    ):
        raise ValueError("an optimizer state of other parameters")
    return {
        i: {
            # Names as the optimizer has them, so that equal states make equal files.
            sys.intern(name): value if name == "step" else _laid_out_as(p, value)
            for name, value in state[i].items()
        }
        for i, p in enumerate(params)
    }


def _laid_out_as(like: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``values`` in the memory layout of ``like``, as the multi-tensor operations need them."""
    return torch.empty_like(like, requires_grad=False).copy_(values)


def _global_norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """L2 norm over all tensors together, computed on their device."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))


def get_blob_logdir() -> str:
    """The folder of the checkpoints: the log's, or what ``DIFFUSION_BLOB_LOGDIR`` names."""
    folder = os.environ.get(CHECKPOINT_FOLDER_VARIABLE) or logger.get_dir()
    assert folder is not None, "logger.configure() comes before training"
    return folder


def _disk_of(folder: str) -> int | None:
    """The number of a local folder's device; None: it is not there."""
    try:
        return os.stat(folder).st_dev
    except OSError:
        return None


def _refuse_used_folder() -> None:
    folder = get_blob_logdir()
    if checkpoint.holds_run(folder):
        raise ValueError(
            f"{folder} already holds a run, which would be overwritten; continue it by "
            "resume_checkpoint, or log to another folder"
        )


@contextmanager
def stop_on_signals() -> Iterator[list[str]]:
    """Collect the names of signals that ask the run to stop, see :func:`.cli.on_stop_signal`."""
    names: list[str] = []

    def note(name: str) -> None:
        names.append(name)
        text = f"{name}: finishing this step, then saving (a second signal stops at once)\n"
        # Not through the logger: the signal may have come in the middle of its own writing.
        if dist_util.rank() == 0:
            with suppress(OSError):
                os.write(2, text.encode())

    with cli.on_stop_signal(note):
        yield names


class _StepTimer:
    """Seconds per step since the last report, and how many of them went by waiting for data."""

    def __init__(self, step: int) -> None:
        self.step, self.time, self.waited = step, time.monotonic(), 0.0
        self._first = True

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        if not self._first:  # the first batch waits for the loader to start
            self.waited += time.monotonic() - start
        self._first = False

    def report(self, step: int, last_step: int) -> str:
        now = time.monotonic()
        seconds = (now - self.time) / (step - self.step)
        share = self.waited / (now - self.time)
        self.step, self.time, self.waited = step, now, 0.0
        line = f"step {step}: {seconds:.3g} s per step"
        if share >= NOTABLE_WAIT:
            line += f" ({share:.0%} of it waiting for data)"
        if last_step:
            minutes = (last_step - step) * seconds / 60
            line += f", {minutes:.0f} min left" if minutes >= 1 else ", under 1 min left"
        return line
