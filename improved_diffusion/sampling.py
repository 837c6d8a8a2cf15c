"""Drawing samples in batches, each sample from its own noise, and turning them into levels.

Shapes: N samples, C channels, H height, W width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from improved_diffusion.gaussian_diffusion import GaussianDiffusion, Model
from improved_diffusion.seeds import derive_seed


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


def draw(
    model: Model,
    diffusion: GaussianDiffusion,
    indices: range,
    shape: Sequence[int],
    *,
    seed: int,
    device: torch.device | str,
    use_ddim: bool = False,
    clip_denoised: bool = True,
    progress: bool = False,
    model_kwargs: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Draw the samples with the numbers ``indices``.

    A sample depends on the seed and its number alone (up to rounding, which may differ with the
    composition of a batch), because its noise at the start and at every step is its own.

    :param shape: (C, H, W).
    :param use_ddim: deterministic DDIM steps instead of ancestral ones.
    :param clip_denoised: limit every step's predicted image to [-1, 1].
    :param model_kwargs: further arguments of the model, a row for each sample: ``y``,
        ``low_res``.
    :return: [N, C, H, W], about in [-1, 1].
    """
    loop = diffusion.ddim_sample_loop if use_ddim else diffusion.p_sample_loop
    return loop(
        model,
        (len(indices), *shape),
        clip_denoised=clip_denoised,
        device=device,
        progress=progress,
        model_kwargs={name: value.to(device) for name, value in (model_kwargs or {}).items()},
        noise_fn=SampleNoise(seed, indices, device),
    )


def draw_batches(
    model: Model,
    diffusion: GaussianDiffusion,
    num_samples: int,
    batch_size: int,
    shape: Sequence[int],
    *,
    progress: bool = False,
    model_kwargs_of: Callable[[range], dict[str, torch.Tensor]] = lambda indices: {},
    **options: object,
) -> Iterator[np.ndarray]:
    """Yield batches of :func:`draw`, as levels [N, H, W, C], until there are ``num_samples``.

    :param progress: say which samples are being drawn, and show the steps of each batch.
    :param model_kwargs_of: gives the model's further arguments for samples by their numbers.
    """
    for indices in batches(num_samples, batch_size):
        if progress:
            done = f"samples {indices.start + 1} to {indices.stop} of {num_samples}"
            print(done, file=sys.stderr, flush=True)
        kwargs = model_kwargs_of(indices)
        samples = draw(
            model, diffusion, indices, shape, progress=progress, model_kwargs=kwargs, **options
        )
        yield to_levels(samples)


def to_levels(samples: torch.Tensor) -> np.ndarray:
    """8-bit levels of samples: [N, C, H, W] in [-1, 1] -> uint8 [N, H, W, C] in [0, 255].

    The inverse of ``level / 127.5 - 1``, rounded to the nearest level.
    """
    levels = ((samples + 1) * 127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
