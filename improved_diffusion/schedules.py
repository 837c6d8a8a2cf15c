"""Noise schedules: pure functions on float64 arrays, indexed by timestep from 0.

``betas[t]`` is the variance added at step t; ``alpha_bar[t]`` is the product of ``1 - betas`` up
to and including t, the share of the image's variance that is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

NAMES = ("linear", "cosine")
AUTO = "auto"
# Beyond these shifts too little signal or noise would be left to count with.
SHIFTS = (1e-4, 1e4)


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """The betas of a schedule by its name, [T] float64.

    ``linear``: Ho et al. 2020, from 1e-4 to 0.02 at 1000 steps; at other step counts scaled so
    that the process ends at about the same noise. ``cosine``: Nichol & Dhariwal 2021, Eq. 17.

    :raises ValueError: for any other name, or fewer than one step.
    """
    if num_diffusion_timesteps < 1:
        raise ValueError(f"--diffusion_steps is at least 1, not {num_diffusion_timesteps}")
    if schedule_name == "linear":
        scale = 1000 / num_diffusion_timesteps
        # Below 20 steps the scaled schedule would pass a variance of 1.
        return np.linspace(scale * 1e-4, scale * 0.02, num_diffusion_timesteps).clip(max=0.999)
    if schedule_name == "cosine":
        return betas_for_alpha_bar(num_diffusion_timesteps, cosine_alpha_bar)
    raise ValueError(f"--noise_schedule {schedule_name} is unknown; known are {', '.join(NAMES)}")


def cosine_alpha_bar(u: float) -> float:
    """Share of the image's variance left at time ``u`` in [0, 1], Eq. 17 without its divisor."""
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """Betas [T] whose running product follows ``alpha_bar`` on [0, 1], each at most ``max_beta``.

    The limit avoids a singularity where ``alpha_bar`` reaches 0 (Nichol & Dhariwal 2021,
    section 3.2).
    """
    times = np.arange(num_diffusion_timesteps + 1) / num_diffusion_timesteps
    left = np.array([alpha_bar(u) for u in times])
    return np.minimum(1.0 - left[1:] / left[:-1], max_beta)


def shift_snr(betas: np.ndarray, shift: float) -> np.ndarray:
    """Betas [T] of a schedule with ``shift`` times the signal-to-noise ratio of ``betas``.

    The ratio is alpha_bar / (1 - alpha_bar). Hoogeboom et al. 2023 ("simple diffusion"), section
    3.1: averaging pixels takes noise away, so that images of d x d pixels need (64 / d)^2 times the
    ratio for the noise that images of 64 x 64 have at the same timestep.

    :raises ValueError: a shift that is not within :data:`SHIFTS`.
    """
    low, high = SHIFTS
    if not low <= shift <= high:
        raise ValueError(f"--snr_shift {shift:g}: give a number from {low:g} to {high:g}, or auto")
    if shift == 1.0:
        return betas
    bar = np.cumprod(1.0 - betas)
    # sigmoid(logit(bar) + log(shift)), also where no signal is left.
    return betas_of_subset(shift * bar / (1.0 - bar + shift * bar), range(len(bar)))


def parse_snr_shift(text: str, image_size: int) -> float:
    """The number that ``--snr_shift`` stands for; ``auto`` is (64 / image_size)^2.

    :raises ValueError: neither ``auto`` nor a number.
    """
    if text == AUTO:
        return (64 / image_size) ** 2
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--snr_shift {text}: give a number above 0, or auto") from None


def end_without_signal(betas: np.ndarray) -> np.ndarray:
    """Betas [T] of the schedule that ends in pure noise, Lin et al. 2024, Algorithm 1.

    sqrt(alpha_bar) is shifted and scaled so that the last is exactly 0 and the first unchanged; the
    last beta is 1.

    :raises ValueError: for a single step, which is first and last.
    """
    if len(betas) < 2:
        raise ValueError("--zero_terminal_snr True needs --diffusion_steps 2 or more")
    root = np.sqrt(np.cumprod(1.0 - betas))
    root = root[0] * ((root - root[-1]) / (root[0] - root[-1]))
    return betas_of_subset(root**2, range(len(root)))


def betas_of_subset(alpha_bar: np.ndarray, timesteps: Sequence[int]) -> np.ndarray:
    """Betas of the process that visits only ``timesteps``, Nichol & Dhariwal 2021, Eq. 19.

    :param alpha_bar: [T] of the whole process.
    :param timesteps: ascending indices into it, S of them.
    :return: [S] float64; the running product of ``1 - betas`` equals ``alpha_bar[timesteps]``.
    """
    kept = alpha_bar[np.asarray(timesteps)]
    return 1.0 - kept / np.concatenate([[1.0], kept[:-1]])
