"""Gaussian divergence and discretised likelihood, in nats and elementwise; squared errors and how
they are weighted."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional as F

Number = torch.Tensor | float

# Half the width of an 8-bit level in [-1, 1].
HALF_BIN = 1.0 / 255.0

UNIFORM = "uniform"
WEIGHTINGS = (UNIFORM, "min_snr", "truncated_snr", "p2", "sigmoid", "debiased")
MIN_SNR_GAMMA = 5.0
# Of ``sigmoid``, for images of 64 x 64. Ours; not tuned.
SIGMOID_BIAS = -1.0


def normal_kl(mean1: Number, logvar1: Number, mean2: Number, logvar2: Number) -> torch.Tensor:
    """KL divergence of N(mean1, exp(logvar1)) from N(mean2, exp(logvar2)), in nats.

    Arguments broadcast against each other; at least one is a tensor.
    """
    like = next((a for a in (mean1, logvar1, mean2, logvar2) if torch.is_tensor(a)), None)
    if like is None:
        raise ValueError("normal_kl needs at least one tensor among its arguments")
    mean1, logvar1, mean2, logvar2 = (
        torch.as_tensor(a, dtype=like.dtype, device=like.device)
        for a in (mean1, logvar1, mean2, logvar2)
    )
    distance = (mean1 - mean2).square() * torch.exp(-logvar2)
    # In this order float32 rounds like the reference, which shows where the terms cancel.
    return 0.5 * (-1.0 + logvar2 - logvar1 + torch.exp(logvar1 - logvar2) + distance)


def approx_standard_normal_cdf(x: torch.Tensor) -> torch.Tensor:
    """The standard normal's distribution function by Page's tanh approximation (1977)."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(
    x: torch.Tensor, *, means: torch.Tensor, log_scales: torch.Tensor
) -> torch.Tensor:
    """Log-probability of 8-bit levels under a Gaussian, Ho et al. 2020, Eq. 13, in nats.

    A level's probability is the Gaussian's mass within half a level to either side; the lowest
    and the highest level take the tails.

    :param x: levels scaled to [-1, 1]: ``level / 127.5 - 1``.
    :param means: the Gaussian's mean, same shape.
    :param log_scales: the logarithm of its standard deviation, same shape.
    """
    assert x.shape == means.shape == log_scales.shape
    precision = torch.exp(-log_scales)
    centred = x - means
    below_upper = approx_standard_normal_cdf(precision * (centred + HALF_BIN))
    below_lower = approx_standard_normal_cdf(precision * (centred - HALF_BIN))
    probability = below_upper - below_lower
    probability = torch.where(x < -0.999, below_upper, probability)
    probability = torch.where(x > 0.999, 1.0 - below_lower, probability)
    return probability.clamp(min=1e-12).log()


def bits(nats: torch.Tensor) -> torch.Tensor:
    """Mean over all dimensions but the first, in bits: [N, ...] nats -> [N] bits per dimension."""
    return nats.flatten(1).mean(dim=1) / math.log(2.0)


def squared_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample: [N, ...] -> [N]."""
    return F.mse_loss(prediction, target, reduction="none").flatten(1).mean(dim=1)


def xstart_weights(
    weighting: str,
    snr: np.ndarray,
    gamma: float = MIN_SNR_GAMMA,
    sigmoid_bias: float = SIGMOID_BIAS,
) -> np.ndarray:
    """Weights of the squared error of x_0 at signal-to-noise ratios ``snr`` (0 or more).

    An error of x_0 stands for one of the noise that is ``snr`` times as large when squared, and for
    one of the velocity that is ``snr + 1`` times as large. So a weight w of x_0's error is the
    weight w / snr of the noise's and w / (snr + 1) of the velocity's.

    - ``min_snr``: min(snr, gamma), Hang et al. 2023.
    - ``truncated_snr``: max(snr, 1), Salimans & Ho 2022, section 4.
    - ``p2``: 1 / (1 + snr) of the noise's error, Choi et al. 2022 with k = gamma = 1.
    - ``sigmoid``: sigmoid(bias - log snr) of the noise's error, Kingma & Gao 2023, Hoogeboom et al.
      2024.
    - ``debiased``: 1 / sqrt(snr) of the noise's error, Yu et al. 2024.

    :raises ValueError: another name, or a gamma that is not above 0.
    """
    if not gamma > 0:
        raise ValueError(f"--min_snr_gamma {gamma:g}: give a number above 0")
    match weighting:
        case "min_snr":
            return np.minimum(snr, gamma)
        case "truncated_snr":
            return np.maximum(snr, 1.0)
        case "p2":
            return snr / (1.0 + snr)
        case "sigmoid":
            return snr / (1.0 + snr * math.exp(-sigmoid_bias))
        case "debiased":
            return np.sqrt(snr)
    raise ValueError(f"--loss_weighting {weighting}: choose from {', '.join(WEIGHTINGS)}")
