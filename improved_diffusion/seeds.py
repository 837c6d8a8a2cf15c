"""Seeds that derive from one user's seed, so that a run can be repeated, resumed and split."""

from __future__ import annotations

import numpy as np
import torch


def derive_seed(seed: int, purpose: str, index: int) -> int:
    """The seed of item ``index`` (a step, a sample) of the stream ``purpose`` under ``seed``.

    Items of one stream get distinct seeds: torch's CPU generator keeps only 32 bits of a seed, so
    hashing each index by itself would give two of 50,000 samples the same noise in three of ten
    runs. The stream's start is hashed and the index counts on from it.

    :return: an integer in [0, 2**32).
    :raises ValueError: if ``seed`` is negative.
    """
    if seed < 0:
        raise ValueError(f"--seed {seed}: give a whole number from 0 on")
    start = np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1)[0]
    return (int(start) + index) % 2**32


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
