"""A mask predicted by the probabilities of its labels.

The pixels of a mask hold one of few codes. The denoiser with the least squared error is then the
mean of the codes under their probabilities given the noisy image (Dieleman et al. 2022, "Continuous
diffusion for categorical data": score interpolation). By Bayes' rule these have a factor that needs
no learning, the likelihood of the pixel's own noisy value, which alone decides at low noise, so
that a mask ends on its codes. A network that predicts grey levels has to learn this staircase from
the few pixels that carry a tumour, and where it is unsure draws levels of no label or a third one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

# The likelihood is that of so many times the noise. With 1 the network is hardly asked about pixels
# at low noise, whose own values are always right in training; in sampling they are what earlier
# steps made of them, and single pixels that went wrong stay. What a widened likelihood leaves open
# the network learns, so that the best probabilities are the same. A trained model depends on this
# number. Ours, as the weight.
WIDENING = 2.0
# Of the cross-entropy beside squared errors: few pixels carry a tumour.
WEIGHT = 4.0


@dataclass(frozen=True)
class LabelPosterior:
    """Which channel of the images holds codes, and which.

    :param channel: the channel's index.
    :param codes: K values in [-1, 1].
    """

    channel: int
    codes: tuple[float, ...]

    @property
    def extra(self) -> int:
        """Outputs of the network beyond one for each channel: K - 1, for K logits in all."""
        return len(self.codes) - 1

    def split(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The channels before this one, this one, and those behind it, each [N, ?, H, W]."""
        own = self.channel
        return images[:, :own], images[:, own : own + 1], images[:, own + 1 :]

    def log_probabilities(
        self, logits: torch.Tensor, x_t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
    ) -> torch.Tensor:
        """log p(code | x_t) of every pixel: [N, K, H, W].

        p is proportional to exp(logit) N(x_t; alpha code, (WIDENING sigma)^2).

        :param logits: [N, K, H, W], the network's.
        :param x_t: [N, 1, H, W], the channel with its noise.
        :param alpha, sigma: [N, 1, 1, 1], the factors of image and noise in it.
        """
        likelihood = -0.5 * ((x_t - alpha * self._codes(x_t)) / (WIDENING * sigma)).square()
        return (logits + likelihood).log_softmax(dim=1)

    def mean(self, log_probabilities: torch.Tensor) -> torch.Tensor:
        """The mean of the codes, x_0: [N, K, H, W] -> [N, 1, H, W]."""
        codes = self._codes(log_probabilities)
        return (log_probabilities.exp() * codes).sum(dim=1, keepdim=True)

    def cross_entropy(self, log_probabilities: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Mean over the pixels of -log p of the true code, in nats: [N].

        :param mask: [N, 1, H, W]; the true code is the one nearest to it.
        """
        truth = (mask - self._codes(mask)).abs().argmin(dim=1)
        loss = F.nll_loss(log_probabilities, truth, reduction="none")
        return loss.flatten(1).mean(dim=1)

    def _codes(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_tensor(self.codes).reshape(1, -1, 1, 1)
