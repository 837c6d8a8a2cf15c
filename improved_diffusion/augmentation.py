"""Random changes of training slices that keep image and mask together.

Shapes: N slices, C channels, H rows, W columns. Rows are the volume's axis from right to left
(:mod:`improved_diffusion.brats`), so left and right are up and down in the picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from improved_diffusion.brats import MASK_CHANNEL, MASK_CODES

# A level above is nearer to a label's code than to the background's, as brats.snap_mask decides.
_ANY_LABEL = MASK_CODES[1] / 255 - 1


@dataclass(frozen=True)
class Augmentation:
    """Turns, resizes, shifts and mirrors slices, and changes the intensities of their images.

    A slice's channels share one affine map about its middle. What comes from outside is background.

    :param channels: names of the channels; ``Seg`` is the mask, all others are images.
    :param share: of the slices that are changed, 0 to 1.
    :param rotate: turn by up to so many degrees to either side.
    :param scale: resize by a factor of 1 - ``scale`` to 1 + ``scale``.
    :param shift: move along rows and columns by up to this share of their number.
    :param intensity: each image's levels v in [0, 1] become gain * v ** gamma, with both factors
        in 1 - ``intensity`` to 1 + ``intensity``; 1 at most.
    :param flip: mirror every other slice, left to right.
    :raises ValueError: a number out of its range.
    """

    channels: Sequence[str]
    share: float
    rotate: float = 10.0
    scale: float = 0.1
    shift: float = 0.05
    intensity: float = 0.1
    flip: bool = False

    def __post_init__(self) -> None:
        for flag, value, most in (
            ("augment", self.share, 1),
            ("augment_rotate", self.rotate, 180),
            ("augment_shift", self.shift, 1),
        ):
            if not 0 <= value <= most:
                raise ValueError(f"--{flag} {value}: give a number from 0 to {most}")
        for flag, value in (("augment_scale", self.scale), ("augment_intensity", self.intensity)):
            if not 0 <= value < 1:
                raise ValueError(f"--{flag} {value}: give a number from 0 to below 1")

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Random numbers for :meth:`apply`, a row for each of ``count`` slices."""
        columns = 6 + 2 * len(self.channels)
        return torch.rand(count, columns, generator=generator, dtype=torch.float64)

    def apply(
        self, images: torch.Tensor, cond: dict[str, torch.Tensor], drawn: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Changed slices, and what comes with them.

        Labels ``y``, whether there is a tumour, follow the mask, which may have lost a small one;
        without a mask among the channels they stay.

        :param images: [N, C, H, W] in [-1, 1].
        :param drawn: rows of :meth:`draw`'s result, on the CPU, [N, ...].
        """
        chosen = (drawn[:, 0] < self.share).nonzero().flatten()
        if not len(chosen):
            return images, cond
        numbers = 2 * drawn[chosen] - 1  # in [-1, 1)
        rows = chosen.to(images.device)
        changed = self._change(images[rows], numbers)
        images = images.index_copy(0, rows, changed)
        if "y" in cond and MASK_CHANNEL in self.channels:
            mask = images[:, self.channels.index(MASK_CHANNEL)]
            cond = {**cond, "y": (mask > _ANY_LABEL).flatten(1).any(dim=1).to(cond["y"].dtype)}
        return images, cond

    def _change(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        _, turn, zoom, down, right, mirror = numbers[:, :6].unbind(dim=1)
        maps = inverse_maps(
            turn * self.rotate,
            1 + zoom * self.scale,
            (mirror < 0) & self.flip,
        )
        size = torch.tensor(images.shape[2:], dtype=torch.float64)
        shifts = torch.stack([down, right], dim=1) * self.shift * size
        is_mask = [channel == MASK_CHANNEL for channel in self.channels]
        device = images.device
        moved = resample(images, maps.float().to(device), shifts.float().to(device), is_mask)
        if not self.intensity:
            return moved
        factors = 1 + numbers[:, 6:].float().to(device) * self.intensity  # [n, 2 C]
        gain, gamma = factors[:, :, None, None].chunk(2, dim=1)  # [n, C, 1, 1]
        levels = (moved + 1) / 2
        changed = (gain * levels**gamma).clamp(max=1) * 2 - 1
        keep = torch.tensor(is_mask, device=device).reshape(1, -1, 1, 1)
        return torch.where(keep, moved, changed)


def inverse_maps(degrees: torch.Tensor, zoom: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
    """From where in a slice its pixels come: [n, 2, 2] for (row, column) about the middle.

    The slice is mirrored along its rows, enlarged by ``zoom``, and turned anticlockwise as
    displayed, in this order; all three are [n], of float64 and bool.
    """
    angle = degrees * (math.pi / 180)
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    sign = 1.0 - 2.0 * mirrored
    return torch.stack([sign * cos, sign * sin, -sin, cos], dim=1).reshape(-1, 2, 2)


def resample(
    images: torch.Tensor, maps: torch.Tensor, shifts: torch.Tensor, is_mask: Sequence[bool]
) -> torch.Tensor:
    """Slices [n, C, H, W] read at other places: images bilinearly, masks at the nearest pixel.

    Pixel q gets the value at maps (q - middle - shift) + middle; outside there is -1. Whole places
    give the pixels' values exactly, and levels stay within those around them.

    :param maps: [n, 2, 2], see :func:`inverse_maps`.
    :param shifts: [n, 2], by how many rows and columns the content moves.
    :param is_mask: for each of the C channels.
    """
    height, width = images.shape[2:]
    row = torch.arange(height, device=images.device) - (height - 1) / 2 - shifts[:, :1]
    column = torch.arange(width, device=images.device) - (width - 1) / 2 - shifts[:, 1:]
    m = maps[:, :, :, None, None]
    row, column = row[:, :, None], column[:, None, :]  # [n, H, 1], [n, 1, W]
    rows = m[:, 0, 0] * row + m[:, 0, 1] * column + (height - 1) / 2  # [n, H, W]
    columns = m[:, 1, 0] * row + m[:, 1, 1] * column + (width - 1) / 2

    padded = F.pad(images, (1, 1, 1, 1), value=-1.0).flatten(2)  # [n, C, (H + 2)(W + 2)]

    def at(r: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        place = (r.clamp(-1, height) + 1) * (width + 2) + c.clamp(-1, width) + 1
        place = place.long().flatten(1)[:, None].expand(-1, images.shape[1], -1)
        return padded.gather(2, place).reshape(images.shape)

    top, left = rows.floor(), columns.floor()
    down, right = (rows - top)[:, None], (columns - left)[:, None]
    above = torch.lerp(at(top, left), at(top, left + 1), right)
    below = torch.lerp(at(top + 1, left), at(top + 1, left + 1), right)
    smooth = torch.lerp(above, below, down)
    nearest = at((rows + 0.5).floor(), (columns + 0.5).floor())
    keep = torch.tensor(is_mask, device=images.device).reshape(1, -1, 1, 1)
    return torch.where(keep, nearest, smooth)
