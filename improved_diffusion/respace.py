"""A diffusion process on a subset of another's timesteps (Nichol & Dhariwal 2021, section 4)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.schedules import betas_of_subset


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """Choose timesteps out of ``range(num_timesteps)``.

    :param section_counts: ``"250"`` or ``[250]``: 250 evenly spread timesteps, first and last
        included. ``"10,15,20"``: the range is cut into three equal sections of which 10, 15 and
        20 timesteps are taken. ``"ddim50"``: every n-th timestep from 0, 50 of them, as in the
        DDIM paper (only where an integer n gives that count).
    :raises ValueError: for counts that cannot be met.
    """
    flag = f"--timestep_respacing {section_counts}"
    if isinstance(section_counts, str) and section_counts.startswith("ddim"):
        wanted = _count(section_counts.removeprefix("ddim"), flag)
        for stride in range(1, num_timesteps + 1):
            steps = range(0, num_timesteps, stride)
            if len(steps) == wanted:
                return set(steps)
        raise ValueError(
            f"{flag}: no whole stride through {num_timesteps} steps takes exactly {wanted}; "
            f"choose another count, or {wanted} without 'ddim'"
        )
    if isinstance(section_counts, str):
        counts = [_count(part, flag) for part in section_counts.split(",")]
    else:
        counts = [int(count) for count in section_counts]

    chosen: set[int] = set()
    for section, count in zip(np.array_split(np.arange(num_timesteps), len(counts)), counts):
        if not 0 < count <= len(section):
            raise ValueError(
                f"{flag}: cannot take {count} of {len(section)} steps"
                + ("" if len(counts) == 1 else f" (each of {len(counts)} sections has so many)")
                + "; choose at least 1 and at most as many as there are"
            )
        stride = (len(section) - 1) / (count - 1) if count > 1 else 1.0
        # A running sum, because its rounding decides which neighbour a half falls to.
        offsets = np.cumsum([0.0] + [stride] * (count - 1))
        chosen.update(int(section[0] + round(offset)) for offset in offsets)
    return chosen


def _count(text: str, flag: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"{flag}: '{text}' is not a number of steps; give for example 250, 10,15,20 or ddim50"
        ) from None


def respaced(diffusion: SpacedDiffusion, section_counts: str | Sequence[int]) -> SpacedDiffusion:
    """The same process on other timesteps; ``section_counts`` as for :func:`space_timesteps`."""
    return on_timesteps(diffusion, space_timesteps(diffusion.original_num_steps, section_counts))


def on_timesteps(diffusion: SpacedDiffusion, timesteps: Iterable[int]) -> SpacedDiffusion:
    """The same process on ``timesteps`` of the whole process."""
    return SpacedDiffusion(timesteps, **diffusion.settings)


class SpacedDiffusion(GaussianDiffusion):
    """The process that visits only ``use_timesteps`` of the process with the given betas.

    The model is still told the timesteps of the whole process, on which it was trained.

    :param use_timesteps: timesteps of the whole process.
    :param kwargs: arguments of :class:`GaussianDiffusion`; ``betas`` of the whole process.
    """

    def __init__(self, use_timesteps: Iterable[int], **kwargs: Any) -> None:
        self.original_betas = np.array(kwargs["betas"], dtype=np.float64)
        self.use_timesteps = set(use_timesteps)
        self.timestep_map = sorted(self.use_timesteps)
        self.original_num_steps = len(self.original_betas)
        self.settings = {**kwargs, "betas": self.original_betas}
        alpha_bar = np.cumprod(1.0 - self.original_betas)
        kwargs["betas"] = betas_of_subset(alpha_bar, self.timestep_map)
        super().__init__(**kwargs)
        self._timestep_table = np.array(self.timestep_map)

    def model_timesteps(self, t: torch.Tensor) -> torch.Tensor:
        original = self._at("_timestep_table", t, t).reshape(-1)
        if self.rescale_timesteps:
            return original.float() * (1000.0 / self.original_num_steps)
        return original
