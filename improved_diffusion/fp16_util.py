"""Precision: in which type a network computes.

:func:`choose_precision` is what training uses, whose parameters always stay float32. The other
functions are for code written for openai/improved-diffusion, which keeps parameters in float16
and a float32 copy of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The first GPUs with bfloat16 in hardware (Ampere).
BF16_CAPABILITY = (8, 0)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def choose_precision(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The type that ``--precision`` stands for on a device.

    ``auto`` is bf16 on a GPU that has it in hardware, else fp32. bf16 on a GPU without it becomes
    fp32.

    :return: the type, and a line for the user where it isn't what was asked for or is slow.
    :raises ValueError: an unknown name.
    """
    if name not in ("auto", *PRECISIONS):
        raise ValueError(f"--precision {name}: choose from auto, {', '.join(PRECISIONS)}")
    has_bf16 = device.type != "cuda" or (
        torch.cuda.get_device_capability(device) >= BF16_CAPABILITY
    )
    if name == "auto":
        return (torch.bfloat16 if has_bf16 and device.type == "cuda" else torch.float32), ""
    if name == "bf16" and not has_bf16:
        return torch.float32, "--precision bf16: this GPU lacks it in hardware; computing in fp32"
    if name == "fp16" and device.type == "cpu":
        return torch.float16, "--precision fp16: slow on a CPU; fp32 or bf16 are faster here"
    return PRECISIONS[name], ""


def precision_name(dtype: torch.dtype) -> str:
    """The name in :data:`PRECISIONS` of a type."""
    return next(name for name, own in PRECISIONS.items() if own == dtype)


def allow_tf32(allowed: bool) -> None:
    """Whether float32 products on GPUs from Ampere on may round their inputs to 10 bits (TF32).

    torch's own default is yes for convolutions and no for matrix products.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


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
