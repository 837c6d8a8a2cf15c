"""Drawing samples in batches, each sample from its own noise, and turning them into levels.

Shapes: N samples, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from improved_diffusion import solvers
from improved_diffusion.gaussian_diffusion import Model, SamplingRun
from improved_diffusion.respace import SpacedDiffusion, on_timesteps
from improved_diffusion.seeds import derive_seed

SAMPLERS = ("ancestral", "ddim", *solvers.SOLVERS)
AUTO = "auto"

# The fewest evaluations whose samples are as good as those of 1000 ancestral steps, see
# benchmarks/README.md.
DEFAULT_SAMPLER, DEFAULT_STEPS, DEFAULT_SPACING = "dpmpp_2m_sde", 15, "logsnr"


class SampleNoise:
    """Standard normal noise in which every sample has a stream of its own.

    Sample ``i`` draws the same numbers whatever samples are drawn beside it. The numbers are made
    on ``device``, so a CPU and a CUDA GPU give different ones.

    :param indices: the sample's number for each row of a batch.
    """

    def __init__(self, seed: int, indices: range, device: torch.device | str) -> None:
        self.generators = [
            torch.Generator(device).manual_seed(derive_seed(seed, "sample", i)) for i in indices
        ]

    def __call__(self, like: torch.Tensor) -> torch.Tensor:
        """The next noise of every sample: ``like``'s shape [N, ...], type and device."""
        assert len(like) == len(self.generators)
        return torch.stack(
            [
                torch.randn(like.shape[1:], generator=generator, device=like.device)
                for generator in self.generators
            ]
        ).to(like.dtype)


def batches(num_samples: int, batch_size: int) -> list[range]:
    """Sample numbers 0 to ``num_samples`` - 1 in runs of at most ``batch_size``."""
    return [
        range(start, min(start + batch_size, num_samples))
        for start in range(0, num_samples, batch_size)
    ]


def evaluations(sampler: str, steps: int) -> int:
    """How often the network is evaluated for a sample in so many steps."""
    return 2 * steps - 1 if sampler == "heun" else steps


def draw(
    model: Model,
    diffusion: SpacedDiffusion,
    indices: range,
    shape: Sequence[int],
    *,
    seed: int,
    device: torch.device | str,
    sampler: str = "ancestral",
    timesteps: Sequence[int] | None = None,
    clip_denoised: bool | str = AUTO,
    on_step: Callable[[], None] = lambda: None,
    model_kwargs: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Draw the samples with the numbers ``indices``.

    A sample depends on the seed and its number alone (up to rounding, which may differ with the
    composition of a batch), because its noise at the start and at every step is its own.

    :param shape: (C, H, W).
    :param sampler: one of :data:`SAMPLERS`.
    :param timesteps: those of ``diffusion`` at which to evaluate, ascending, see
        :func:`improved_diffusion.solvers.choose_timesteps`; None: all.
    :param clip_denoised: limit every step's predicted image to [-1, 1]; ``auto``: all of them with
        the classic samplers, with the solvers those at less signal than noise, see
        :func:`clips`.
    :param on_step: called after every step.
    :param model_kwargs: further arguments of the model, a row for each sample: ``y``,
        ``low_res``.
    :return: [N, C, H, W], about in [-1, 1].
    """
    check_sampler(sampler)
    kwargs = {name: value.to(device) for name, value in (model_kwargs or {}).items()}
    noise_fn = SampleNoise(seed, indices, device)
    size = (len(indices), *shape)
    if sampler in ("ancestral", "ddim"):
        if timesteps is not None:
            whole = [diffusion.timestep_map[t] for t in timesteps]
            diffusion = on_timesteps(diffusion, whole)
        loop = (
            diffusion.p_sample_loop_progressive
            if sampler == "ancestral"
            else diffusion.ddim_sample_loop_progressive
        )
        for out in loop(  # noqa: B007
            model,
            size,
            clip_denoised=clip_denoised is not False,
            device=device,
            model_kwargs=kwargs,
            noise_fn=noise_fn,
        ):
            on_step()
        return out["sample"]

    if timesteps is None:
        timesteps = range(diffusion.num_timesteps)
    visited = list(reversed(timesteps))
    path = solvers.Path(diffusion.alphas_cumprod[visited])
    run = SamplingRun(model, diffusion.self_condition)

    def denoise(x: torch.Tensor, i: int) -> torch.Tensor:
        t = torch.full((len(x),), visited[i], device=x.device)
        clip = clips(clip_denoised, float(diffusion.alphas_cumprod[visited[i]]))
        run.prediction = diffusion.predict_xstart(run, x, t, clip, kwargs)
        return run.prediction

    def steps() -> Iterator[int]:
        for i in range(len(path)):
            yield i
            on_step()

    x = noise_fn(torch.empty(size, device=device))
    return solvers.solve(sampler, denoise, x, path, noise_fn, steps())


def clips(clip_denoised: bool | str, alpha_bar: float) -> bool:
    """Whether a solver limits the image that is predicted at this noise level to [-1, 1].

    Most of a slice is exactly -1. There the limit cuts off half of a prediction's error, and the
    mean of what remains is above -1: little by little the steps put a speckle into the background.
    Without any limit the noisiest predictions, with the largest errors, may leave the range of
    images. ``auto`` therefore limits where noise outweighs the signal: alpha_bar below 1/2.
    """
    return alpha_bar < 0.5 if clip_denoised == AUTO else bool(clip_denoised)


def check_sampler(name: str) -> None:
    """:raises ValueError: an unknown name."""
    if name not in SAMPLERS:
        raise ValueError(f"--sampler {name}: choose from {', '.join(SAMPLERS)}")


@dataclass(frozen=True)
class Plan:
    """How samples are drawn.

    :param sampler: one of :data:`SAMPLERS`.
    :param timesteps: of the process, ascending.
    :param spacing: how they were chosen.
    """

    sampler: str
    timesteps: list[int]
    spacing: str

    @property
    def evaluations(self) -> int:
        """How often the network is evaluated for a sample."""
        return evaluations(self.sampler, len(self.timesteps))


def choose_plan(
    diffusion: SpacedDiffusion,
    *,
    sampler: str = AUTO,
    steps: int = 0,
    spacing: str = AUTO,
    use_ddim: bool = False,
    respaced: bool = False,
) -> Plan:
    """What the flags of the sampling scripts stand for.

    Without any, :data:`DEFAULT_SAMPLER` in :data:`DEFAULT_STEPS` steps. ``--timestep_respacing``
    and ``--use_ddim`` mean what they mean to openai/improved-diffusion: ancestral or DDIM steps at
    every timestep of the process.

    :param diffusion: the process, respaced as ``--timestep_respacing`` says.
    :param sampler: one of :data:`SAMPLERS`, or ``auto``.
    :param steps: 0: every timestep for ancestral and DDIM sampling and for a respaced process, else
        :data:`DEFAULT_STEPS`.
    :param respaced: ``--timestep_respacing`` is given.
    :param spacing: one of :data:`improved_diffusion.solvers.SPACINGS`, or ``auto``: evenly spread
        timesteps for ancestral and DDIM steps, else :data:`DEFAULT_SPACING`.
    :raises ValueError: unknown names, contradictions, or more steps than there are.
    """
    if use_ddim and sampler not in (AUTO, "ddim"):
        raise ValueError(
            f"--use_ddim True contradicts --sampler {sampler}; leave --use_ddim out, or choose "
            "--sampler ddim"
        )
    if use_ddim:
        sampler = "ddim"
    elif sampler == AUTO:
        sampler = "ancestral" if respaced else DEFAULT_SAMPLER
    check_sampler(sampler)
    classic = sampler in ("ancestral", "ddim")
    if spacing == AUTO:
        spacing = "uniform" if classic else DEFAULT_SPACING
    if steps == 0:
        most = diffusion.num_timesteps
        steps = most if classic or respaced else min(DEFAULT_STEPS, most)
    return Plan(sampler, solvers.choose_timesteps(diffusion, steps, spacing), spacing)


def to_levels(samples: torch.Tensor) -> np.ndarray:
    """8-bit levels of samples: [N, C, H, W] in [-1, 1] -> uint8 [N, H, W, C] in [0, 255].

    The inverse of ``level / 127.5 - 1``, rounded to the nearest level.
    """
    levels = ((samples + 1) * 127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
