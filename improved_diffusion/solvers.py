"""Solvers that go from noise to an image in 10 to 30 evaluations of the network.

A process is seen as a path x = alpha x_0 + sigma noise, with alpha^2 = alpha_bar and
sigma^2 = 1 - alpha_bar. In lambda = log(alpha / sigma), half the logarithm of the signal-to-noise
ratio, the probability-flow equation from point s to point t has the solution (Lu et al. 2022b,
"DPM-Solver++", Eq. 8)

    x_t = sigma_t / sigma_s x_s + alpha_t * integral of exp(lambda - lambda_t) D(x, lambda)

over lambda from s to t, where D is the model's prediction of x_0. Solvers differ in what they take
for D between the points at which they know it. They need the prediction alone, so they work for
every parametrisation, with a fixed or a learned variance, and on every schedule.

Shapes: images are [N, C, ...]; a path has S points and then the image itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from improved_diffusion.gaussian_diffusion import GaussianDiffusion, NoiseFn
from improved_diffusion.respace import space_timesteps

# The prediction of x_0 from x at a point of the path.
Denoise = Callable[[torch.Tensor, int], torch.Tensor]

SPACINGS = ("uniform", "trailing", "logsnr", "karras")
# Karras et al. 2022, table 1: the highest sigma / alpha, and how steps crowd at low noise.
KARRAS_SIGMA_MAX = 80.0
KARRAS_RHO = 7.0
UNIPC_ORDER = 3


class Path:
    """The noise levels that a solver visits, from the noisiest to the image.

    ``alpha`` and ``sigma`` [S + 1] and ``lambda_`` [S + 1] are float64; the last point is the image
    itself: alpha 1, sigma 0, lambda infinite.

    :param alpha_bar: [S] of the points, from the noisiest.
    """

    def __init__(self, alpha_bar: Sequence[float] | np.ndarray) -> None:
        bar = np.append(np.asarray(alpha_bar, dtype=np.float64), 1.0)
        assert (np.diff(bar) > 0).all(), "noise falls along the path"
        self.alpha, self.sigma = np.sqrt(bar), np.sqrt(1.0 - bar)
        with np.errstate(divide="ignore"):
            self.lambda_ = np.log(self.alpha) - np.log(self.sigma)

    def __len__(self) -> int:
        return len(self.alpha) - 1

    def decay(self, i: int) -> float:
        """exp(-h) of the step from point i, where h is how far lambda goes; 0 for an endless h."""
        return float(self.alpha[i] * self.sigma[i + 1] / (self.alpha[i + 1] * self.sigma[i]))

    def scale(self, i: int) -> float:
        """What the step from point i leaves of x: sigma_{i+1} / sigma_i."""
        return float(self.sigma[i + 1] / self.sigma[i])

    def width(self, i: int) -> float:
        """How far lambda goes in the step from point i."""
        return float(self.lambda_[i + 1] - self.lambda_[i])


def _euler(path: Path, i: int, x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """The step of first order, which is DDIM's: D stays what it is at point i."""
    return path.scale(i) * x + float(path.alpha[i + 1]) * (1.0 - path.decay(i)) * d


def heun(
    denoise: Denoise, x: torch.Tensor, path: Path, noise_fn: NoiseFn, steps: Iterable[int]
) -> torch.Tensor:
    """Heun's method in sigma / alpha, Karras et al. 2022, Algorithm 1 without its noise.

    Two evaluations a step, but one in the last: 2 S - 1. The second one's weight is limited to 1,
    which matters only where a step divides sigma / alpha by more than 3: beyond, the method would
    extrapolate from the second evaluation.
    """
    for i in steps:
        d = denoise(x, i)
        x = _euler(path, i, x, d)
        if i + 1 < len(path):
            decay = path.decay(i)
            weight = min(0.5 * (1.0 / decay - 1.0), 1.0) if decay else 1.0
            x = x + float(path.alpha[i + 1]) * weight * (denoise(x, i + 1) - d)
    return x


def _extrapolated(
    path: Path, i: int, d: torch.Tensor, previous: torch.Tensor | None
) -> torch.Tensor:
    """D in the middle of the step from point i, on the line through its last two values."""
    if previous is None or i + 1 == len(path) or math.isinf(path.width(i - 1)):
        return d
    return d + (0.5 * path.width(i) / path.width(i - 1)) * (d - previous)


def dpmpp_2m(
    denoise: Denoise, x: torch.Tensor, path: Path, noise_fn: NoiseFn, steps: Iterable[int]
) -> torch.Tensor:
    """DPM-Solver++(2M), Lu et al. 2022b, Algorithm 2: second order, one evaluation a step.

    The last step, to the image, is of first order.
    """
    previous = None
    for i in steps:
        d = denoise(x, i)
        x = _euler(path, i, x, _extrapolated(path, i, d, previous))
        previous = d
    return x


def dpmpp_2m_sde(
    denoise: Denoise, x: torch.Tensor, path: Path, noise_fn: NoiseFn, steps: Iterable[int]
) -> torch.Tensor:
    """SDE-DPM-Solver++(2M), Lu et al. 2022b, section 5: the same with fresh noise in each step."""
    previous = None
    for i in steps:
        d = denoise(x, i)
        decay = path.decay(i)
        new = 1.0 - decay**2
        mean = _extrapolated(path, i, d, previous)
        x = path.scale(i) * decay * x + float(path.alpha[i + 1]) * new * mean
        if i + 1 < len(path):
            x = x + float(path.sigma[i + 1]) * math.sqrt(new) * noise_fn(x)
        previous = d
    return x


def unipc(
    denoise: Denoise, x: torch.Tensor, path: Path, noise_fn: NoiseFn, steps: Iterable[int]
) -> torch.Tensor:
    """UniPC of order 3 with B(h) = exp(h) - 1, Zhao et al. 2023, Algorithms 5 and 6.

    A predictor through the last three values of D; the next step's evaluation then corrects what
    it predicted, so that a step takes one evaluation. The first steps and the last ones are of
    lower order.
    """
    known: list[tuple[int, torch.Tensor]] = []  # points and their D, the newest first
    start, order = x, 0  # where the last step began, and its order
    for i in steps:
        d = denoise(x, i)
        if known:
            x = _multistep(path, i - 1, start, known[:order], (i, d))
        known = [(i, d), *known[: UNIPC_ORDER - 1]]
        usable = sum(math.isfinite(path.lambda_[point]) for point, _ in known)
        order = max(1, min(usable, len(path) - i))
        start = x
        x = _multistep(path, i, start, known[:order])
    return x


def _multistep(
    path: Path,
    i: int,
    x: torch.Tensor,
    known: Sequence[tuple[int, torch.Tensor]],
    new: tuple[int, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The step from point i with D from a polynomial through ``known`` and, to correct, ``new``.

    :param known: points and their D, point i first.
    """
    others = [*known[1:], *([new] if new else [])]
    (_, d) = known[0]
    result = _euler(path, i, x, d)
    if not others or math.isinf(path.width(i)) or math.isinf(path.lambda_[i]):
        return result
    h = path.width(i)
    offsets = [float(path.lambda_[point] - path.lambda_[i]) / h for point, _ in others]
    for weight, (_, other) in zip(_weights(h, offsets), others):
        result = result + (float(path.alpha[i + 1]) * weight) * (other - d)
    return result


def _weights(h: float, offsets: Sequence[float]) -> np.ndarray:
    """Weights of D's differences to its value at the step's start.

    They make the integral exact for polynomials in lambda that vanish there, as many degrees as
    there are differences. For a single one UniPC takes half its share of the step (Zhao et al.
    2023, after Theorem 3.1), which is as accurate to the order it has.

    :param h: length of the step in lambda.
    :param offsets: where D is known beside the start, in steps: -1 is a step of this length ago.
    """
    moment = -math.expm1(-h)  # the integral of exp(-h (1 - s)) h over s from 0 to 1
    if len(offsets) == 1:
        return np.array([0.5 * moment / offsets[0]])
    moments = []
    for degree in range(1, len(offsets) + 1):
        moment = 1.0 - degree / h * moment  # the same times s ** degree, by parts
        moments.append(moment)
    powers = np.power.outer(offsets, np.arange(1, len(offsets) + 1)).T
    return np.linalg.solve(powers, moments)


SOLVERS: dict[str, Callable[..., torch.Tensor]] = {
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "unipc": unipc,
}


@torch.no_grad()
def solve(
    name: str,
    denoise: Denoise,
    x: torch.Tensor,
    path: Path,
    noise_fn: NoiseFn = torch.randn_like,
    steps: Iterable[int] | None = None,
) -> torch.Tensor:
    """Follow ``path`` from noise to an image.

    :param name: a key of :data:`SOLVERS`.
    :param denoise: gives the prediction of x_0 like its first argument, at the point of the path
        that its second argument names.
    :param x: [N, C, ...] at the path's first point.
    :param noise_fn: draws standard normal noise of its argument's shape.
    :param steps: ``range(len(path))``, e.g. with a progress bar around it.
    :return: [N, C, ...].
    """
    return SOLVERS[name](denoise, x, path, noise_fn, range(len(path)) if steps is None else steps)


def choose_timesteps(diffusion: GaussianDiffusion, steps: int, spacing: str) -> list[int]:
    """Timesteps of a process at which to evaluate, ascending: ``steps`` different ones.

    - ``uniform``: evenly spread, first and last included, as ``--timestep_respacing`` does.
    - ``trailing``: evenly spread, the noisiest included, as long a way below the least noisy one
      (Lin et al. 2024, table 2).
    - ``logsnr``: evenly spread in lambda.
    - ``karras``: evenly spread in (sigma / alpha) ** (1/7), Karras et al. 2022, Eq. 5.

    The last two begin with the noisiest timestep and go on from sigma / alpha 80 where the process
    has more noise than that; they end with timestep 0. One step is at the noisiest.

    :raises ValueError: an unknown spacing, or more steps than the process has.
    """
    count = diffusion.num_timesteps
    if spacing not in SPACINGS:
        raise ValueError(f"--timestep_spacing {spacing}: choose from {', '.join(SPACINGS)}")
    if not 1 <= steps <= count:
        raise ValueError(
            f"--sampling_steps {steps}: the process has {count} timesteps, so choose 1 to {count}"
        )
    if steps == 1:
        return [count - 1]
    if spacing == "uniform":
        return sorted(space_timesteps(count, [steps]))
    if spacing == "trailing":
        targets = np.arange(1, steps + 1) * count / steps - 1
    else:
        targets = _spread_in_noise(diffusion, steps, spacing)
    chosen = np.rint(targets).astype(int)
    # Different timesteps, also where several targets fall on one.
    first = np.arange(steps)
    chosen = np.maximum.accumulate(chosen - first) + first
    return np.minimum(chosen, count - steps + first).tolist()


def _spread_in_noise(diffusion: GaussianDiffusion, steps: int, spacing: str) -> np.ndarray:
    """Timesteps, not whole, ascending."""
    bar = diffusion.alphas_cumprod
    with np.errstate(divide="ignore"):
        noise = np.sqrt((1.0 - bar) / bar)  # ascending
    finite = noise[np.isfinite(noise)]
    most = min(finite[-1], max(KARRAS_SIGMA_MAX, finite[0])) if steps > 2 else finite[-1]
    rest = steps - int(most < noise[-1])
    u = np.linspace(0.0, 1.0, rest)
    if spacing == "logsnr":
        levels = np.exp((1 - u) * math.log(finite[0]) + u * math.log(most))
    else:
        low, high = finite[0] ** (1 / KARRAS_RHO), most ** (1 / KARRAS_RHO)
        levels = ((1 - u) * low + u * high) ** KARRAS_RHO
    targets = np.interp(np.log(levels), np.log(finite), np.arange(len(finite)))
    return np.append(targets, [len(noise) - 1] * (steps - rest))
