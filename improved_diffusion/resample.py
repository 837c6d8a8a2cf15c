"""Which timesteps to train on: all alike, or more often where the loss is large."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from improved_diffusion import dist_util
from improved_diffusion.gaussian_diffusion import GaussianDiffusion

NAMES = ("uniform", "loss-second-moment")


def create_named_schedule_sampler(name: str, diffusion: GaussianDiffusion) -> ScheduleSampler:
    """A sampler over the timesteps of ``diffusion`` by its name, one of :data:`NAMES`."""
    if name == "uniform":
        return UniformSampler(diffusion)
    if name == "loss-second-moment":
        return LossSecondMomentResampler(diffusion)
    raise ValueError(f"--schedule_sampler {name} is unknown; known are {', '.join(NAMES)}")


class ScheduleSampler:
    """A distribution over timesteps, and weights that keep the mean loss unbiased under it."""

    def weights(self) -> np.ndarray:
        """[T] positive numbers, proportional to how often each timestep is drawn."""
        raise NotImplementedError

    def sample(
        self, batch_size: int, device: torch.device | str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw timesteps.

        :return: timesteps int64 [N], and float32 [N] weights 1 / (T p(t)) by which their losses
            are multiplied (importance sampling).
        """
        p = torch.from_numpy(np.asarray(self.weights(), dtype=np.float64))
        p = p / p.sum()
        t = torch.multinomial(p, batch_size, replacement=True)
        weights = 1.0 / (len(p) * p[t])
        return t.to(device), weights.float().to(device)


class UniformSampler(ScheduleSampler):
    """Every timestep alike."""

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        self.diffusion = diffusion

    def weights(self) -> np.ndarray:
        return np.ones(self.diffusion.num_timesteps)

    def sample(
        self, batch_size: int, device: torch.device | str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        t = torch.randint(self.diffusion.num_timesteps, (batch_size,), device=device)
        return t, torch.ones(batch_size, device=device)


class LossAwareSampler(ScheduleSampler):
    """A sampler that learns from the losses it is shown."""

    def update_with_local_losses(self, local_ts: torch.Tensor, local_losses: torch.Tensor) -> None:
        """Take in the losses [N] at timesteps [N] of this process, oldest first.

        Under several processes all call this, and each takes in those of all, by rank.
        """
        pairs = torch.stack([local_ts.double(), local_losses.detach().double()], dim=1)
        steps, losses = dist_util.gather_rows(pairs).unbind(dim=1)
        self.update(steps.long(), losses)

    def update(self, steps: torch.Tensor, losses: torch.Tensor) -> None:
        """Take in float64 losses [N] at timesteps int64 [N], oldest first."""
        self.update_with_all_losses(steps.tolist(), losses.tolist())

    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        """Take in losses and their timesteps, oldest first."""
        raise NotImplementedError


class LossSecondMomentResampler(LossAwareSampler):
    """Draw a timestep in proportion to the root mean square of its last losses.

    Nichol & Dhariwal 2021, Eq. 18. Uniform until every timestep has ``history_per_term`` losses.
    The losses are kept and drawn from on the device on which they come, so that training never
    waits for them. A batch with a loss that is not finite is left out, as its step is.

    :param history_per_term: how many losses are kept for each timestep.
    :param uniform_prob: share of the draws that stay uniform.
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        history_per_term: int = 10,
        uniform_prob: float = 0.001,
    ) -> None:
        self.diffusion = diffusion
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        steps = diffusion.num_timesteps
        # The newest loss of each timestep stands last.
        self._history = torch.zeros(steps, history_per_term, dtype=torch.float64)
        self._counts = torch.zeros(steps, dtype=torch.int64)

    def weights(self) -> np.ndarray:
        return self._weights().cpu().numpy()

    def _weights(self) -> torch.Tensor:
        """[T]; all 1 as long as a timestep lacks losses."""
        steps = self.diffusion.num_timesteps
        root_mean_square = self._history.square().mean(dim=1).sqrt()
        share = root_mean_square / root_mean_square.sum()
        weights = (1.0 - self.uniform_prob) * share + self.uniform_prob / steps
        complete = (self._counts >= self.history_per_term).all()
        return torch.where(complete, weights, torch.ones_like(weights))

    def sample(
        self, batch_size: int, device: torch.device | str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._move(torch.device(device))
        p = self._weights()
        p = p / p.sum()
        t = torch.multinomial(p, batch_size, replacement=True)
        return t, (1.0 / (len(p) * p[t])).float()

    def update(self, steps: torch.Tensor, losses: torch.Tensor) -> None:
        self._move(steps.device)
        kept = self.history_per_term
        usable = losses.isfinite().all()
        same = steps[:, None] == steps[None, :]
        # How many losses of the same timestep come after each one.
        later = same.triu(diagonal=1).sum(dim=1)
        new = torch.zeros_like(self._counts).index_add_(0, steps, torch.ones_like(steps))

        # Each row moves to the left by as many places as it gets new losses.
        places = torch.arange(kept, device=steps.device) + new[:, None]
        moved = self._history.gather(1, places.clamp(max=kept - 1))
        # A loss that is pushed out by later ones of this batch goes to a column of its own.
        padded = torch.cat([torch.zeros_like(moved[:, :1]), moved], dim=1)
        padded[steps, (kept - later).clamp(min=0)] = losses
        self._history = torch.where(usable, padded[:, 1:], self._history)
        self._counts = torch.where(usable, (self._counts + new).clamp(max=kept), self._counts)

    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        device = self._history.device
        self.update(
            torch.as_tensor(list(ts), dtype=torch.int64, device=device),
            torch.as_tensor(list(losses), dtype=torch.float64, device=device),
        )

    def _move(self, device: torch.device) -> None:
        self._history = self._history.to(device)
        self._counts = self._counts.to(device)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the losses and how many there are of each timestep."""
        return {"history": self._history.clone(), "counts": self._counts.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`'s result.

        :raises ValueError: if it belongs to another number of timesteps or losses.
        """
        if state["history"].shape != self._history.shape:
            raise ValueError(
                f"the checkpoint's history of losses has shape {tuple(state['history'].shape)}, "
                f"this run's sampler {tuple(self._history.shape)}: the number of diffusion steps "
                "differs"
            )
        self._history = state["history"].clone()
        self._counts = state["counts"].clone()
