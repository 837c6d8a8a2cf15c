"""The Inception network whose features define FID and KID.

It is the network of Szegedy et al. 2016 ("Rethinking the Inception Architecture") as TensorFlow's
file of 2015-12-05 holds it: 1008 classes, averages in the mixed blocks that leave out the padding,
a maximum in the last one. Heusel et al. 2017 measured with it, so that a published FID means this
network, this resizing and this scaling. Parameters have the names of the file
``weights-inception-2015-12-05-6726825d.pth``, which torch-fidelity publishes and others use.

Legend: N images, C channels, H, W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

SIZE = 299  # height and width of the network's input
FEATURES = 2048
CLASSES = 1008

# A convolution: its output channels, its kernel (a number or height and width), its stride. A
# tuple in the place of one: several read the same input, and their outputs are concatenated.
# A branch is a list of these, one after the other; the key is the start of their names.
_Branches = dict[str, list]


def _mixed_35(pool: int) -> _Branches:
    return {
        "branch1x1": [[64, 1]],
        "branch5x5": [[48, 1], [64, 5]],
        "branch3x3dbl": [[64, 1], [96, 3], [96, 3]],
        "branch_pool": [[pool, 1]],
    }


def _mixed_17(width: int) -> _Branches:
    across, down = (1, 7), (7, 1)
    return {
        "branch1x1": [[192, 1]],
        "branch7x7": [[width, 1], [width, across], [192, down]],
        "branch7x7dbl": [
            [width, 1],
            [width, down],
            [width, across],
            [width, down],
            [192, across],
        ],
        "branch_pool": [[192, 1]],
    }


_MIXED_8: _Branches = {
    "branch1x1": [[320, 1]],
    "branch3x3": [[384, 1], ([384, (1, 3)], [384, (3, 1)])],
    "branch3x3dbl": [[448, 1], [384, 3], ([384, (1, 3)], [384, (3, 1)])],
    "branch_pool": [[192, 1]],
}
_TO_17: _Branches = {
    "branch3x3": [[384, 3, 2]],
    "branch3x3dbl": [[64, 1], [96, 3], [96, 3, 2]],
    "branch_pool": [],
}
_TO_8: _Branches = {
    "branch3x3": [[192, 1], [320, 3, 2]],
    "branch7x7x3": [[192, 1], [192, (1, 7)], [192, (7, 1)], [192, 3, 2]],
    "branch_pool": [],
}


class InceptionV3(nn.Module):
    """Images to features: float32 [N, 3, 299, 299], see :func:`prepare`, to [N, 2048]."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvolutionUnit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvolutionUnit(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvolutionUnit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvolutionUnit(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvolutionUnit(80, 192, 3)
        self.Mixed_5b = Mixed(192, _mixed_35(pool=32))
        self.Mixed_5c = Mixed(256, _mixed_35(pool=64))
        self.Mixed_5d = Mixed(288, _mixed_35(pool=64))
        self.Mixed_6a = Mixed(288, _TO_17)
        self.Mixed_6b = Mixed(768, _mixed_17(128))
        self.Mixed_6c = Mixed(768, _mixed_17(160))
        self.Mixed_6d = Mixed(768, _mixed_17(160))
        self.Mixed_6e = Mixed(768, _mixed_17(192))
        self.Mixed_7a = Mixed(768, _TO_8)
        self.Mixed_7b = Mixed(1280, _MIXED_8)
        self.Mixed_7c = Mixed(2048, _MIXED_8, maximum=True)
        self.fc = nn.Linear(FEATURES, CLASSES)  # not used here; the file has it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))  # [N, 32, 147, 147]
        h = functional.max_pool2d(self.Conv2d_2b_3x3(h), 3, stride=2)  # [N, 64, 73, 73]
        h = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(h))
        h = functional.max_pool2d(h, 3, stride=2)  # [N, 192, 35, 35]
        h = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(h)))  # [N, 288, 35, 35]
        h = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(h)))  # [N, 768, 17, 17]
        h = self.Mixed_6e(self.Mixed_6d(h))
        h = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(h)))  # [N, 2048, 8, 8]
        return h.mean(dim=(2, 3))


class ConvolutionUnit(nn.Module):
    """A convolution without bias, batch normalisation, ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, the last of which pools; their outputs are concatenated.

    A block whose pooling branch has a convolution keeps the resolution, another halves it.

    :param inputs: number of input channels.
    :param branches: see the tables above.
    :param maximum: pool by maximum instead of by average, where the resolution is kept.
    """

    def __init__(self, inputs: int, branches: _Branches, maximum: bool = False) -> None:
        super().__init__()
        self.halves = not branches["branch_pool"]
        self.maximum = maximum
        self.branches = {  # branch -> names of its units, in the form of the table
            name: self._add_branch(name, inputs, units) for name, units in branches.items()
        }

    def _add_branch(self, name: str, inputs: int, units: Sequence) -> list[tuple[str, ...]]:
        found = []
        for number, unit in enumerate(units, start=1):
            parallel = unit if isinstance(unit, tuple) else (unit,)
            own = f"{name}_{number}" if len(units) > 1 else name
            letters = ("a", "b") if len(parallel) > 1 else ("",)
            found.append(tuple(own + letter for letter in letters))
            for child, arguments in zip(found[-1], parallel):
                self.add_module(child, _unit(inputs, *arguments))
            inputs = sum(arguments[0] for arguments in parallel)
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = []
        for name, units in self.branches.items():
            h = self._pool(x) if name == "branch_pool" else x
            for parallel in units:
                h = torch.cat([self.get_submodule(child)(h) for child in parallel], dim=1)
            outputs.append(h)
        return torch.cat(outputs, dim=1)

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        if self.halves:
            return functional.max_pool2d(x, 3, stride=2)
        if self.maximum:
            return functional.max_pool2d(x, 3, stride=1, padding=1)
        return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _unit(
    inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1
) -> ConvolutionUnit:
    """A unit that keeps the resolution, or halves it without padding."""
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (height // 2, width // 2) if stride == 1 else 0
    return ConvolutionUnit(inputs, outputs, (height, width), stride, padding)


def prepare(images: torch.Tensor) -> torch.Tensor:
    """Levels to the network's input: resized to 299 x 299, then (x - 128) / 128.

    :param images: [N, 3, H, W], levels from 0 to 255.
    :return: float32 [N, 3, 299, 299].
    """
    return (resize(images.float(), SIZE, SIZE) - 128) / 128


def resize(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bilinear as TensorFlow 1 resized: output pixel i shows input position i * old / new.

    Other implementations centre the pixels or smooth before they shrink; FID moves by whole units
    with that (Parmar et al. 2022, "On Aliased Resizing").

    :param images: float [N, C, H, W].
    """
    return _resize_axis(_resize_axis(images, 2, height), 3, width)


def _resize_axis(images: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    old = images.shape[axis]
    position = torch.arange(size, dtype=torch.float32, device=images.device) * (old / size)
    low = position.long()
    high = (low + 1).clamp(max=old - 1)
    shape = [size if i == axis else 1 for i in range(images.dim())]
    share = (position - low).view(shape)
    low_values, high_values = (images.index_select(axis, own) for own in (low, high))
    return low_values + (high_values - low_values) * share
