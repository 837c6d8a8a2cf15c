"""The training loop.

Shapes: N samples of a batch, C channels, H height, W width.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import blobfile as bf
import torch
from torch.optim import AdamW

from improved_diffusion import checkpoint, dist_util, execution, figures, logger, sampling
from improved_diffusion.cost import (
    free_memory,
    is_out_of_memory,
    largest_microbatch,
    training_cost,
)
from improved_diffusion.fp16_util import choose_precision, precision_name
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.nn import update_ema
from improved_diffusion.packed import to_unit_range
from improved_diffusion.resample import LossAwareSampler, ScheduleSampler, UniformSampler
from improved_diffusion.seeds import derive_seed
from improved_diffusion.unet import UNetModel

Batches = Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]

QUARTILES = 4
# With more classes than these the log would have more columns than anyone reads.
MAX_LOGGED_CLASSES = 10

# The reference's: its loss scale settles at 2^20 to 2^21 within a thousand steps.
INITIAL_LOG_LOSS_SCALE = 20.0

AUTO = "auto"

# A share of the time spent waiting for data that is worth telling.
NOTABLE_WAIT = 0.02

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
    :param shape: (C, H, W).
    :param channels: names for the picture; empty: none.
    :param model_kwargs: further arguments of the model, a row for each sample: ``y``,
        ``low_res``.
    """

    diffusion: GaussianDiffusion
    shape: tuple[int, int, int]
    channels: Sequence[str] = ()
    num_samples: int = 8
    seed: int = 0
    model_kwargs: dict[str, torch.Tensor] = field(default_factory=dict)

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
        levels = sampling.to_levels(samples)
        figures.save_grid(figures.sample_grid(levels, self.channels or None), path)


class LossMeter:
    """Means of finite loss terms: over all, over each quartile of the timesteps, each class.

    Sums stay on the device, so that adding to them does not wait for it.

    :param classes: names of the classes whose mean squared errors are told apart.
    """

    def __init__(self, num_timesteps: int, classes: Sequence[str] = ()) -> None:
        self.num_timesteps = num_timesteps
        self.classes = classes
        self._sums: dict[str, torch.Tensor] = {}  # [groups, 2]: sum and count of each

    def add(
        self, t: torch.Tensor, terms: dict[str, torch.Tensor], y: torch.Tensor | None = None
    ) -> None:
        """Take in terms [N] at timesteps [N] of samples of the classes ``y`` [N].

        Terms named ``mse_...``, of a single channel, are not divided into quartiles.
        """
        quartile = QUARTILES * t // self.num_timesteps
        for name, values in terms.items():
            if name.startswith("mse_"):
                self._add(name, torch.zeros_like(t), values, 1)
            else:
                self._add(name, quartile, values, QUARTILES)
        if self.classes and y is not None and "mse" in terms:
            self._add("mse_class", y, terms["mse"], len(self.classes))

    def _add(self, name: str, group: torch.Tensor, values: torch.Tensor, groups: int) -> None:
        finite = values.isfinite()
        pairs = torch.stack([torch.where(finite, values, 0), finite.to(values.dtype)], dim=1)
        sums = self._sums.setdefault(name, pairs.new_zeros(groups, 2))
        sums.index_add_(0, group, pairs)

    def read(self) -> dict[str, float]:
        """The means since the last reading.

        ``loss``; ``loss_q0`` to ``q3``, ``mse_class_<name>`` where there are any samples.
        """
        means = {}
        for name, sums in self._sums.items():
            rows = sums.tolist()
            groups = [f"{name}_q{i}" for i in range(QUARTILES)]
            if name == "mse_class":
                groups = [f"{name}_{own}" for own in self.classes]
            elif total_count := sum(row[1] for row in rows):
                means[name] = sum(row[0] for row in rows) / total_count
            if len(rows) == len(groups):
                for group, (total, count) in zip(groups, rows):
                    if count:
                        means[group] = total / count
        self._sums.clear()
        return means

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What has been added since the last reading."""
        return dict(self._sums)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from :meth:`state_dict`'s result."""
        self._sums = dict(state)


@dataclass
class StopRequest:
    """Whether a signal has asked the run to stop, and which."""

    signal: str = ""
    _previous: dict[int, Any] = field(default_factory=dict)

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        # Not through the logger: the signal may have come in the middle of its own writing.
        text = f"{self.signal}: finishing this step, then saving (a second signal stops at once)\n"
        os.write(2, text.encode())
        for other in self._previous:
            signal.signal(other, signal.SIG_DFL)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first SIGTERM or SIGINT into a request; the second ends the process as usual.

    Outside of the main thread, where Python takes no signals, there never is a request.
    """
    request = StopRequest()
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            request._previous[number] = signal.signal(number, request.handle)
    except ValueError:
        pass
    try:
        yield request
    finally:
        for number, handler in request._previous.items():
            signal.signal(number, handler)


class TrainLoop:
    """Train a model on batches, log, save, and continue where a checkpoint stopped.

    Files are written to ``logger.get_dir()``, see :mod:`improved_diffusion.checkpoint`.

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
    :param use_fp16: the reference's name for ``precision="fp16"``.
    :param fp16_scale_growth: by how much log2 of the loss scale grows in a step.
    :param schedule_sampler: which timesteps to train on; ``None``: uniformly.
    :param lr_anneal_steps: lower the learning rate linearly to 0 at this step and stop there; 0:
        constant.
    :param max_steps: stop when so many steps are completed in total; 0: don't.
    :param seed: from it derive the timesteps, the noise and dropout of every step.
    :param ema_warmup: limit each average's rate at update n (from 0) to (1 + n) / (10 + n), so
        that it forgets the untrained weights.
    :param sample_interval: write ``preview`` every so many steps; 0: never.
    :param metadata: plain values that travel in the weight files, see
        :func:`improved_diffusion.checkpoint.with_metadata`.
    :param flags: the command line's values, kept in the ``opt`` file for a continued run.
    :param channels: names of the image's channels, whose squared errors are then logged as
        ``mse_<name>``.
    :param classes: names of the classes; up to ten are logged as ``mse_class_<name>``.
    :param precision: in which the network computes, see
        :func:`improved_diffusion.fp16_util.choose_precision`. Parameters, optimizer and averages
        stay float32. With fp16 the loss is scaled, and a step whose gradient overflows halves the
        scale. A step whose gradient is not finite changes nothing, in any precision.
    :param compile: ``on``, ``off`` or ``auto`` (on a GPU): run the network through
        ``torch.compile``; where that fails the network runs as it is.
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
        lr_anneal_steps: int = 0,
        max_steps: int = 0,
        seed: int = 0,
        ema_warmup: bool = True,
        sample_interval: int = 0,
        preview: Preview | None = None,
        metadata: dict[str, Any] | None = None,
        flags: dict[str, Any] | None = None,
        channels: Sequence[str] = (),
        classes: Sequence[str] = (),
        precision: str = "auto",
        compile: str = "auto",
    ) -> None:
        if fp16_scale_growth <= 0:
            raise ValueError(f"--fp16_scale_growth {fp16_scale_growth}: give a number above 0")
        if not resume_checkpoint and checkpoint.holds_run(get_blob_logdir()):
            raise ValueError(
                f"{get_blob_logdir()} already holds a run, which would be overwritten; continue "
                "it by resume_checkpoint, or log to another folder"
            )
        self.device = dist_util.dev()
        self.model = model.to(self.device)
        self.diffusion = diffusion
        self.data = data
        self.batch_size = batch_size
        microbatch = parse_microbatch(microbatch)
        self.fits_memory = microbatch == AUTO
        self.microbatch = microbatch if microbatch not in (AUTO, -1) else batch_size
        self.lr = lr
        self.ema_rate = parse_ema_rates(ema_rate)
        self.log_interval = log_interval
        self.save_interval = save_interval
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        self.lr_anneal_steps = lr_anneal_steps
        self.max_steps = max_steps
        self.seed = seed
        self.ema_warmup = ema_warmup
        self.sample_interval = sample_interval if preview else 0
        self.preview = preview
        self.metadata = metadata or {}
        self.flags = flags or {}
        # By keyword only where there are names: another process's losses may not know it.
        self.named = {"channel_names": list(channels)} if channels else {}

        self.step = 0  # completed optimizer steps
        self._first_step = 0  # of this process
        self.params = list(self.model.parameters())
        self.opt = AdamW(self.params, lr=lr, weight_decay=weight_decay, fused=True)
        self.dtype, remark = choose_precision("fp16" if use_fp16 else precision, self.device)
        if remark:
            logger.log(remark)
        self.use_fp16 = self.dtype == torch.float16
        self.precision = precision_name(self.dtype)
        self.network = execution.for_training(model, self.dtype, compile, self.device)
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
        if resume_checkpoint:
            self._resume(resume_checkpoint)
            self._first_step = self.step
        else:
            dist_util.sync_params(self.params)
            self.ema_params = [[p.detach().clone() for p in self.params] for _ in self.ema_rate]

    # The run

    def run_loop(self) -> bool:
        """Train until the last step, a signal or the end of the data, and save.

        :return: whether a signal has cut the run short.
        """
        self.model.train()
        saved_step = self.step
        timer = _StepTimer(self.step)
        with stop_on_signals() as stop:
            while not self._is_finished() and not stop.signal:
                try:
                    with timer.waiting():
                        batch, cond = next(self.data)
                except StopIteration:
                    break
                except ValueError:
                    # A file that went bad must not cost what was learned before.
                    if self.step > saved_step:
                        self.save()
                    raise
                self.run_step(batch, cond)
                if self.step % self.log_interval == 0:
                    self.log_step()
                    logger.log(timer.report(self.step, self._last_step()))
                if self.sample_interval and self.step % self.sample_interval == 0:
                    self.write_preview()
                if self.save_interval and self.step % self.save_interval == 0:
                    self.save()
                    saved_step = self.step
                    if os.environ.get(STOP_VARIABLE):
                        break
            if self.step > saved_step:
                self.save()
        return bool(stop.signal)

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
        self.forward_backward(batch, cond)
        self.scaler.unscale_(self.opt)
        norm = _global_norm([p.grad for p in self.params])
        self._grad_norms.append(norm)
        self._anneal_lr()
        if not self.use_fp16:  # where the scaler does the same
            # Read on the device by the fused optimizer, which then leaves everything as it is.
            self.opt.found_inf = 1.0 - norm.isfinite().float()
        self.scaler.step(self.opt)
        self.scaler.update()
        for rate, averages in zip(self.ema_rate, self.ema_params):
            if self.ema_warmup:
                rate = min(rate, (1 + self.step) / (10 + self.step))
            update_ema(averages, self.params, rate=rate)
        self.step += 1

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
        # Drawn for the whole batch, so that its division does not change what is computed.
        t, weights = self.schedule_sampler.sample(n, self.device)
        noise = torch.randn_like(batch)

        if self.fits_memory and self.step == self._first_step:
            self._choose_microbatch(batch, cond)
        terms: list[dict[str, torch.Tensor]] = []
        while not terms:
            try:
                terms = self._accumulate(batch, cond, t, weights, noise)
            except RuntimeError as error:
                if not (self.fits_memory and self.microbatch > 1 and is_out_of_memory(error)):
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
    ) -> list[dict[str, torch.Tensor]]:
        """Add up the gradients of all microbatches; their loss terms."""
        terms = []
        for start in range(0, len(batch), self.microbatch):
            part = slice(start, start + self.microbatch)
            losses = self.diffusion.training_losses(
                self._forward,
                batch[part],
                t[part],
                model_kwargs={name: value[part] for name, value in cond.items()},
                noise=noise[part],
                **self.named,
            )
            # The sum over the microbatch by the size of the batch: its mean by its share.
            self.scaler.scale((losses["loss"] * weights[part]).sum() / len(batch)).backward()
            terms.append({name: value.detach() for name, value in losses.items()})
        return terms

    def _choose_microbatch(self, batch: torch.Tensor, cond: dict[str, torch.Tensor]) -> None:
        """Take as many images at once as the free memory holds by the network's cost."""
        shapes = {name: tuple(value.shape[1:]) for name, value in cond.items()}
        cost = training_cost(
            self.model,
            tuple(batch.shape[1:]),
            dtype=self.dtype,
            averages=len(self.ema_rate),
            model_kwargs=shapes,
        )
        # The parameters and their averages are there already.
        reserved = cost.state_bytes - 4 * cost.parameters * (1 + len(self.ema_rate))
        free = free_memory(self.device)
        self.microbatch = largest_microbatch(cost.image_bytes, reserved, free, len(batch))
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
        if isinstance(self.model, UNetModel):
            return self.network(*args, **kwargs).float()
        shorter = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=shorter):
            return self.network(*args, **kwargs).float()

    def _anneal_lr(self) -> None:
        if self.lr_anneal_steps:
            lr = self.lr * (1 - self.step / self.lr_anneal_steps)
            for group in self.opt.param_groups:
                group["lr"] = lr

    def log_step(self) -> None:
        """Write a row of means since the last one to the log."""
        logger.logkv("step", self.step)
        logger.logkv("samples", self.step * self.batch_size)
        norms = torch.stack(self._grad_norms)
        finite = norms.isfinite()
        if self.use_fp16:
            logger.logkv("lg_loss_scale", math.log2(self.scaler.get_scale()))
        if not finite.all():
            why = (
                "overflowed float16, which lowers the loss scale"
                if self.use_fp16
                else "is not finite"
            )
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
            self.preview.write(self.model, path)
        logger.log(f"wrote {path}")

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

    def save(self) -> None:
        """Write the checkpoint of this step; the model's file last, so that it marks the rest."""
        folder = get_blob_logdir()
        logger.log(f"saving step {self.step} to {folder}")
        for rate, averages in zip(self.ema_rate, self.ema_params):
            path = bf.join(folder, checkpoint.ema_name(rate, self.step))
            checkpoint.save(self._weights(averages, {"ema_rate": rate}), path)
        path = bf.join(folder, checkpoint.opt_name(self.step))
        checkpoint.save({**self.opt.state_dict(), "training": self._training_state()}, path)
        path = bf.join(folder, checkpoint.model_name(self.step))
        checkpoint.save(self._weights(self.params, {}), path)

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

        names = [name for name, _ in self.model.named_parameters()]
        self.ema_params = []
        for rate in self.ema_rate:
            ema_path = checkpoint.sibling(path, checkpoint.ema_name(rate, self.step))
            if not bf.exists(ema_path):
                raise ValueError(
                    f"{ema_path} is missing beside {path}; restore it, or leave {rate} out of "
                    "--ema_rate"
                )
            averages = checkpoint.load_weights(ema_path, self.device)
            own = checkpoint.metadata_of(averages).get("step", self.step)
            if own != self.step or averages.keys() != weights.keys():
                raise ValueError(
                    f"{ema_path} does not belong to {path}: it is of step {own} of "
                    "another run; restore the files that were saved together"
                )
            self.ema_params.append(
                [_laid_out_as(p, averages[name]) for name, p in zip(names, self.params)]
            )

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
        for name in checkpoint.supersede(get_blob_logdir(), self.step):
            logger.log(f"moved {name}, newer than step {self.step}, to {checkpoint.SUPERSEDED}/")
        logger.drop_rows_after(self.step)


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
            name: value if name == "step" else _laid_out_as(p, value)
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
