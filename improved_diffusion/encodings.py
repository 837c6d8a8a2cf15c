"""How a mask's label codes enter the network: as one grey channel, or as several of their own.

Between two labels a network that is unsure draws what lies between their codes. On the grey scale
a third label lies there: a border of background (0) and enhancing tumour (204) becomes oedema
(102). Encodings of several channels have no such order, and a network that tells the probabilities
of the labels (:mod:`improved_diffusion.label_posterior`) ends on one of the codes.

Shapes: N slices, C image channels, C' channels of the network, K of them of the mask, H, W.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from improved_diffusion.brats import MASK_CHANNEL, MASK_CODES
from improved_diffusion.label_posterior import LabelPosterior

GREY, LABELS, ONE_HOT, BITS, SDF = "grey", "labels", "onehot", "bits", "sdf"
ENCODINGS = (GREY, LABELS, ONE_HOT, BITS, SDF)

# A mask pixel farther than this from every codeword is off the codes: 12 of 255 levels.
TOLERANCE = 12 / 127.5
# Signed distances end at this share of the image's size, but not below one pixel.
SDF_SHARE = 1 / 16

_OF_LABELS = tuple(f"_{code}" for code in MASK_CODES[1:])
# What stands behind the mask's name in the names of its channels.
_SUFFIXES = {
    GREY: ("",),
    LABELS: ("",),
    ONE_HOT: _OF_LABELS,
    BITS: ("_bit1", "_bit0"),
    SDF: _OF_LABELS,
}

_GREY_CODES = tuple(code / 127.5 - 1 for code in MASK_CODES)
# The codewords of background, necrotic core, oedema, enhancing tumour. The bits (Chen et al. 2023)
# are the label's number in plain binary, in which the labels that lie beside each other in a
# tumour, background - oedema - enhancing tumour - core (- background), differ in one bit: a border
# where that bit is unsure shows no third label. In the reflected Gray code background (00) and
# oedema (11), the longest border, would differ in both.
_CODEWORDS = {
    GREY: tuple((code,) for code in _GREY_CODES),
    LABELS: tuple((code,) for code in _GREY_CODES),
    ONE_HOT: ((-1.0, -1.0, -1.0), (1.0, -1.0, -1.0), (-1.0, 1.0, -1.0), (-1.0, -1.0, 1.0)),
    BITS: ((-1.0, -1.0), (-1.0, 1.0), (1.0, -1.0), (1.0, 1.0)),
}
# Half-way between neighbouring codes, where the lower one wins as in brats.snap_mask.
_LIMITS = tuple((a + b) / 255 - 1 for a, b in itertools.pairwise(MASK_CODES))


def network_channels(name: str, in_channels: int) -> int:
    """How many channels the network has for images of ``in_channels``.

    :raises ValueError: an unknown encoding.
    """
    if name not in ENCODINGS:
        raise ValueError(f"--mask_encoding {name}: choose from {', '.join(ENCODINGS)}")
    return in_channels - 1 + len(_SUFFIXES[name])


def network_logits(name: str) -> int:
    """How many outputs the network has for the labels, beyond those for its channels."""
    return len(MASK_CODES) - 1 if name == LABELS else 0


class MaskEncoding:
    """Brings the mask among the channels of slices into the network's form and back.

    ``grey``: the grey codes as they are, one channel. ``labels``: the same channel, of which the
    network tells the labels' probabilities, see :attr:`posterior`. ``onehot``: a channel for each
    label but the background, 1 where it is and -1 elsewhere. ``bits``: two analog bits of the
    label's number, -1 and 1 (Chen et al. 2023). ``sdf``: for each of the three labels the signed
    distance of pixel centres to the nearest pixel on the other side, positive inside, at most
    :data:`SDF_SHARE` of the image's size, which becomes 1.

    :param name: one of :data:`ENCODINGS`.
    :param channels: names of the image channels; empty where they have none.
    :param in_channels: how many image channels there are; by default as many as names.
    :raises ValueError: an unknown encoding, or another than ``grey`` without a mask.
    """

    def __init__(
        self, name: str = GREY, channels: Sequence[str] = (), in_channels: int | None = None
    ) -> None:
        count = len(channels) if in_channels is None else in_channels
        self.name = name
        self.width = network_channels(name, count)  # C'
        self.mask = channels.index(MASK_CHANNEL) if MASK_CHANNEL in channels else None
        if name != GREY and self.mask is None:
            found = ",".join(channels) or "ordinary pictures"
            raise ValueError(
                f"--mask_encoding {name} needs {MASK_CHANNEL} among --channels, not {found}; add "
                "it, or leave --mask_encoding out"
            )
        self.names: list[str] = []  # of the network's channels
        for channel in channels:
            suffixes = _SUFFIXES[name] if channel == MASK_CHANNEL else ("",)
            self.names += [channel + suffix for suffix in suffixes]

    @property
    def posterior(self) -> LabelPosterior | None:
        """How the process predicts the mask by its labels; None: as any other channel."""
        if self.name != LABELS:
            return None
        assert self.mask is not None
        return LabelPosterior(self.mask, _GREY_CODES)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images [N, C, H, W] in [-1, 1] -> [N, C', H, W] in [-1, 1].

        A mask that is off the codes is set to the nearest one, but stays as it is in ``grey``.
        """
        if self.name == GREY:
            return images
        before, mask, after = self._parts(images, 1)
        labels = torch.stack([mask[:, 0] > limit for limit in _LIMITS]).sum(dim=0)  # [N, H, W]
        if self.name == SDF:
            of_label = torch.arange(1, len(MASK_CODES), device=labels.device).reshape(-1, 1, 1)
            limit = max(1.0, max(labels.shape[1:]) * SDF_SHARE)
            planes = signed_distance(labels[:, None] == of_label, limit).to(mask.dtype) / limit
        else:
            planes = mask.new_tensor(_CODEWORDS[self.name])[labels].permute(0, 3, 1, 2)
        return torch.cat([before, planes, after], dim=1)

    def decode(self, encoded: torch.Tensor) -> torch.Tensor:
        """What the network draws, [N, C', H, W] -> images [N, C, H, W].

        The mask holds the codes of the nearest codewords, of equally near ones the lower code (of
        ``sdf``: the label that is deepest inside); in ``grey`` and ``labels`` it stays as it is.
        """
        if self.name in (GREY, LABELS):
            return encoded
        before, planes, after = self._parts(encoded, len(_SUFFIXES[self.name]))
        # [N, 1, H, W]
        if self.name == BITS:
            high, low = (planes > 0).long().chunk(2, dim=1)
            labels = 2 * high + low
        else:
            largest, index = planes.max(dim=1, keepdim=True)
            labels = torch.where(largest > 0, index + 1, 0)
        codes = planes.new_tensor(_GREY_CODES)
        return torch.cat([before, codes[labels], after], dim=1)

    def off_code(self, encoded: torch.Tensor) -> torch.Tensor | None:
        """Share [N] of mask pixels that are off the codes, before decoding.

        Off the codes is a pixel that differs from every codeword by more than :data:`TOLERANCE` in
        any of its channels. None without a mask, and for ``sdf``, where every distance is allowed.

        :param encoded: [N, C', H, W]; beyond [-1, 1] it counts as the end of that range, as it does
            in 8-bit levels.
        """
        if self.mask is None or self.name == SDF:
            return None
        _, planes, _ = self._parts(encoded.clamp(-1, 1), len(_SUFFIXES[self.name]))
        nearest = torch.stack(
            [
                (planes - planes.new_tensor(word).reshape(-1, 1, 1)).abs().amax(dim=1)
                for word in _CODEWORDS[self.name]
            ]
        ).amin(dim=0)
        return (nearest > TOLERANCE).float().mean(dim=(1, 2))

    def _parts(self, images: torch.Tensor, width: int) -> tuple[torch.Tensor, ...]:
        """The channels before the mask's, its own ``width``, and those behind them."""
        assert self.mask is not None
        return images.split([self.mask, width, images.shape[1] - self.mask - width], dim=1)


def signed_distance(inside: torch.Tensor, limit: float) -> torch.Tensor:
    """Distance of every pixel to the nearest one on the other side, in pixels.

    Euclidean, between pixel centres, exact up to ``limit``, where it ends.

    :param inside: bool [..., H, W].
    :return: float32, positive inside, in [-limit, limit]; a border pixel has 1 or -1.
    """
    return _distance_to(~inside, limit) - _distance_to(inside, limit)


def _distance_to(pixels: torch.Tensor, limit: float) -> torch.Tensor:
    """Distance to the nearest of ``pixels``, bool [..., H, W]; at most ``limit``.

    Separable (Felzenszwalb & Huttenlocher 2012): the squared distance in the plane is the minimum
    over the columns of the squared distance along each, plus the squared distance to it.
    """
    squared = torch.zeros(pixels.shape, device=pixels.device)
    squared.masked_fill_(~pixels, math.inf)
    for dim in (-2, -1):
        size, found = squared.shape[dim], squared.clone()
        for step in range(1, min(math.floor(limit), size - 1) + 1):
            for to, source in ((step, 0), (0, step)):
                part = found.narrow(dim, to, size - step)
                reached = squared.narrow(dim, source, size - step) + step**2
                torch.minimum(part, reached, out=part)
        squared = found
    return squared.sqrt().clamp(max=limit)
