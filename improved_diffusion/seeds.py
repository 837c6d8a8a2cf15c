"""Seeds that derive from one user's seed, so that a run can be repeated, resumed and split."""

from __future__ import annotations

import functools

import numpy as np


def check_seed(seed: int) -> None:
    """Refuse a seed that numpy's generators do not take."""
    if seed < 0:
        raise ValueError(f"--seed {seed}: a seed is 0 or a positive whole number.")


def derive_seed(seed: int, purpose: str, index: int) -> int:
    """The seed of item ``index`` (a step, a sample) of the stream ``purpose`` under ``seed``.

    Items of one stream get distinct seeds: torch's CPU generator keeps only 32 bits of a seed, so
    hashing each index by itself would give two of 50,000 samples the same noise in three of ten
    runs. The stream's start is hashed and the index counts on from it.

    :return: an integer in [0, 2**32).
    :raises ValueError: if ``seed`` is negative.
    """
    check_seed(seed)
    return (_start(seed, purpose) + index) % 2**32


@functools.lru_cache(maxsize=64)
def _start(seed: int, purpose: str) -> int:
    return int(np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1)[0])
