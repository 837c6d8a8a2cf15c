"""Half precision: a network's convolutions, and master parameters for code that keeps its own.

:class:`improved_diffusion.train_util.TrainLoop` needs neither: its parameters stay float32 and
torch's autocast computes in float16.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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


def make_master_params(model_params: Iterable[torch.Tensor]) -> list[nn.Parameter]:
    """A float32 copy of all parameters in one flat vector, as a list of that one parameter."""
    flat = torch.cat([param.detach().float().flatten() for param in model_params])
    return [nn.Parameter(flat)]


def unflatten_master_params(
    model_params: Iterable[torch.Tensor], master_params: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """The vector of :func:`make_master_params` as views in the shapes of ``model_params``."""
    shapes = [param.shape for param in model_params]
    parts = master_params[0].detach().split([shape.numel() for shape in shapes])
    return tuple(part.view(shape) for part, shape in zip(parts, shapes))


def model_grads_to_master_grads(
    model_params: Iterable[torch.Tensor], master_params: Sequence[torch.Tensor]
) -> None:
    """Copy the gradients of ``model_params`` into the master parameter's, in float32."""
    grads = [param.grad.detach().float().flatten() for param in model_params]
    master_params[0].grad = torch.cat(grads)


@torch.no_grad()
def master_params_to_model_params(
    model_params: Iterable[torch.Tensor], master_params: Sequence[torch.Tensor]
) -> None:
    """Copy the master parameter's values into ``model_params``, in their own type."""
    model_params = list(model_params)
    for param, value in zip(model_params, unflatten_master_params(model_params, master_params)):
        param.copy_(value)


def zero_grad(model_params: Iterable[torch.Tensor]) -> None:
    """Set the gradients that exist to 0."""
    for param in model_params:
        if param.grad is not None:
            param.grad = torch.zeros_like(param.grad)
