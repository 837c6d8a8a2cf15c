"""ResNet-50, in the form in which RadImageNet's authors publish theirs for PyTorch.

The network of He et al. 2016, with the stride in the 3 x 3 convolution of a block (torchvision's
form). RadImageNet (Mei et al. 2022) is 1.35 million radiological images of 165 classes. Its file
``RadImageNet_pytorch/ResNet50.pt`` is the state dict of torchvision's layers in one sequence,
without the last, so that its names are ``backbone.0.weight`` for ``conv1.weight`` and so on.

The file itself was not at hand: names and scaling are those of the authors' own
``pytorch_example.ipynb``, which loads it; the network's arithmetic is tested with random weights
against MONAI's ResNet-50.

Legend: N images, C channels, H, W height and width.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional

SIZE = 224  # height and width of the network's input
FEATURES = 2048
# Number of a part in the authors' sequence -> its name here and in torchvision. The sequence also
# counts the ReLU (2), the pooling (3, 8), which have no parameters.
_PARTS = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


class ResNet50(nn.Module):
    """Images to features: float32 [N, 3, 224, 224], see :func:`prepare`, to [N, 2048]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _layer(64, 64, blocks=3, stride=1)
        self.layer2 = _layer(256, 128, blocks=4, stride=2)
        self.layer3 = _layer(512, 256, blocks=6, stride=2)
        self.layer4 = _layer(1024, 512, blocks=3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = functional.relu(self.bn1(self.conv1(x)))  # [N, 64, 112, 112]
        h = functional.max_pool2d(h, 3, stride=2, padding=1)
        h = self.layer2(self.layer1(h))  # [N, 512, 28, 28]
        h = self.layer4(self.layer3(h))  # [N, 2048, 7, 7]
        return h.mean(dim=(2, 3))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions, added to their input: [N, inputs, H, W] to 4 width."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = functional.relu(self.bn1(self.conv1(x)))
        h = functional.relu(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(h))
        return functional.relu(h + (x if self.downsample is None else self.downsample(x)))


def _layer(inputs: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    others = [Bottleneck(4 * width, width, stride=1) for _ in range(blocks - 1)]
    return nn.Sequential(Bottleneck(inputs, width, stride), *others)


def with_own_names(weights: OrderedDict[str, torch.Tensor]) -> OrderedDict[str, torch.Tensor]:
    """RadImageNet's names as those of :class:`ResNet50`; a classifier's are left out.

    Names that are these already stay.
    """
    renamed = OrderedDict()
    for name, tensor in weights.items():
        part, _, rest = name.removeprefix("backbone.").partition(".")
        if part != "fc":
            renamed[f"{_PARTS.get(part, part)}.{rest}"] = tensor
    return renamed


def prepare(images: torch.Tensor) -> torch.Tensor:
    """Levels to the network's input: level / 127.5 - 1, then bilinear to 224 x 224.

    Pixels are centred and nothing is smoothed before it shrinks, as the authors' example does
    with OpenCV's default.

    :param images: [N, 3, H, W], levels from 0 to 255.
    :return: float32 [N, 3, 224, 224].
    """
    scaled = images.float() / 127.5 - 1
    return functional.interpolate(scaled, (SIZE, SIZE), mode="bilinear", align_corners=False)
