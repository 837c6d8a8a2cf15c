"""Which timesteps to train on: all alike, or more often where the loss is large."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

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
        """Take in the losses [N] at timesteps [N] of this process."""
        self.update_with_all_losses(local_ts.tolist(), local_losses.tolist())

    def update_with_all_losses(self, ts: Iterable[int], losses: Iterable[float]) -> None:
        """Take in losses and their timesteps, oldest first."""
        raise NotImplementedError


class LossSecondMomentResampler(LossAwareSampler):
    """Draw a timestep in proportion to the root mean square of its last losses.

    Nichol & Dhariwal 2021, Eq. 18. Uniform until every timestep has ``history_per_term`` losses.

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
        # The newest loss of each timestep stands last.
        self._history = np.zeros((diffusion.num_timesteps, history_per_term))
        self._counts = np.zeros(diffusion.num_timesteps, dtype=np.int64)

    def weights(self) -> np.ndarray:
        steps = self.diffusion.num_timesteps
        if (self._counts < self.history_per_term).any():
            return np.ones(steps)
        root_mean_square = np.sqrt(np.square(self._history).mean(axis=1))
        share = root_mean_square / root_mean_square.sum()
        return (1.0 - self.uniform_prob) * share + self.uniform_prob / steps

    def update_with_all_losses(self, ts: Iterable[int], losses: Iterable[float]) -> None:
        for t, loss in zip(ts, losses):
            self._history[t] = np.append(self._history[t, 1:], loss)
            self._counts[t] = min(self._counts[t] + 1, self.history_per_term)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the losses and how many there are of each timestep."""
        return {
            "history": torch.from_numpy(self._history.copy()),
            "counts": torch.from_numpy(self._counts.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`'s result.

        :raises ValueError: if it belongs to another number of timesteps or losses.
        """
        if tuple(state["history"].shape) != self._history.shape:
            raise ValueError(
                f"the checkpoint's history of losses has shape {tuple(state['history'].shape)}, "
                f"this run's sampler {self._history.shape}: the number of diffusion steps differs"
            )
        self._history = state["history"].numpy().copy()
        self._counts = state["counts"].numpy().copy()
