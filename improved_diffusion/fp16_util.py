"""Half precision for the convolutions of a network."""

from __future__ import annotations

import torch
from torch import nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def convert_module_to_f16(module: nn.Module) -> None:
    """Make ``module`` float16 if it is a convolution; for use with ``nn.Module.apply``.

    Normalisation and the timestep branch stay float32, where float16 would lose accuracy.
    """
    if isinstance(module, CONVOLUTIONS):
        module.to(torch.float16)


def convert_module_to_f32(module: nn.Module) -> None:
    """Undo :func:`convert_module_to_f16`."""
    if isinstance(module, CONVOLUTIONS):
        module.to(torch.float32)
