"""The cheap part of an evaluation, on a few samples of the model that is being trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from improved_diffusion import sampling
from improved_diffusion.encodings import GREY, MaskEncoding
from improved_diffusion.evaluation import distribution, validity
from improved_diffusion.respace import SpacedDiffusion
from improved_diffusion.unet import UNetModel

# Samples that go through the network at once.
BATCH = 16


@dataclass
class Evaluation:
    """Draws samples with the same noise at every call, and measures them.

    :param diffusion: the process; it is sampled as ``image_sample.py`` does without flags.
    :param encoding: of the mask in what the network draws.
    :param channels: names of the slices' channels.
    :param real: uint8 [M, H, W, C], training slices to compare with.
    :param labels: int64 [N] classes, for a class-conditional model.
    """

    diffusion: SpacedDiffusion
    encoding: MaskEncoding
    channels: Sequence[str]
    real: np.ndarray
    num_samples: int = 32
    seed: int = 0
    labels: torch.Tensor | None = None

    def __post_init__(self) -> None:
        measured = validity.measure(self.real, self.channels)
        self.limits = validity.calibrate(measured)
        self.real_features = distribution.features(self.real)

    def measure(self, model: UNetModel, device: torch.device) -> dict[str, float]:
        """Measures of samples of ``model``, by the names under which they are logged.

        ``eval_valid_share`` (of samples without a flag, see :func:`.validity.check`),
        ``eval_broken_share`` (of samples with a channel that is all noise or constant),
        ``eval_background_level`` (mean of the worst channel), ``eval_channel_agreement``,
        ``eval_off_code_share``, ``eval_empty_mask_share``, and ``eval_distance`` (kernel distance
        of random features to the training slices: about 0 where nothing tells them apart).
        What does not apply is absent. Pixels off the codes are those before decoding, see
        :meth:`.MaskEncoding.off_code`.
        """
        samples, off_code = self._draw(model, device)
        measured = validity.measure(samples, self.channels)
        flags = validity.check(measured, self.limits)
        found = validity.report(measured, flags)
        levels = measured.values["background_level"]
        values: dict[str, Any] = {
            "valid_share": found["valid_share"]["value"],
            "broken_share": flags.broken(self.channels).mean(),
            "background_level": max(own.mean() for own in levels.values()),
        }
        for name in ("channel_agreement", "off_code_share", "empty_mask_share"):
            if name in found:
                values[name] = found[name]["value"]
        if self.encoding.name != GREY:  # whose levels, above, are raw
            values.pop("off_code_share", None)
            if off_code is not None:
                values["off_code_share"] = off_code
        features = distribution.scale(self.real_features, distribution.features(samples))
        values["distance"] = distribution.kernel_distance(*features)["value"]
        return {f"eval_{name}": float(value) for name, value in values.items()}

    def _draw(self, model: UNetModel, device: torch.device) -> tuple[np.ndarray, float | None]:
        """Levels [N, H, W, C], and the mean share of mask pixels off the codes, if it has any."""
        shape = (self.encoding.width, *self.real.shape[1:3])
        plan = sampling.choose_plan(self.diffusion)
        drawn, off_code = [], []
        for indices in sampling.batches(self.num_samples, BATCH):
            kwargs = {}
            if self.labels is not None:
                kwargs["y"] = self.labels[indices.start : indices.stop]
            samples = sampling.draw(
                model,
                self.diffusion,
                indices,
                shape,
                seed=self.seed,
                device=device,
                sampler=plan.sampler,
                timesteps=plan.timesteps,
                model_kwargs=kwargs,
            )
            drawn.append(sampling.to_levels(self.encoding.decode(samples)))
            if (shares := self.encoding.off_code(samples)) is not None:
                off_code += shares.tolist()
        return np.concatenate(drawn), float(np.mean(off_code)) if off_code else None
