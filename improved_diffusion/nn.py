"""Layers and small functions that the networks are built from.

Shapes: N batch, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as torch_checkpoint

NORM_GROUPS = 32

SiLU = nn.SiLU
linear = nn.Linear


class SiLUInPlace(nn.SiLU):
    """SiLU that overwrites its input where no gradient is needed: for what nobody else reads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.silu(x, inplace=not torch.is_grad_enabled())


class GroupNorm32(nn.GroupNorm):
    """Group normalisation in the input's type; torch sums up its statistics in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        short = x.dtype != weight.dtype
        if short and x.device.type == "cpu" and _is_channels_last(x) and torch.is_grad_enabled():
            return _GroupNormChannelsLast.apply(x, weight, bias, self.num_groups, self.eps)
        if short and x.device.type != "cpu":  # whose kernel takes parameters of any type
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        return functional.group_norm(x, self.num_groups, weight, bias, self.eps)


class _GroupNormChannelsLast(torch.autograd.Function):
    """Group normalisation whose backward pass computes in float32.

    In shorter types torch's CPU kernel for it is several times slower in the channels-last layout
    than in float32, the way there and back included.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
    ) -> torch.Tensor:
        n, channels, positions = len(x), x.shape[1], x.shape[2] * x.shape[3]
        y, mean, rstd = torch.ops.aten.native_group_norm(
            x, weight, bias, n, channels, positions, groups, eps
        )
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups = groups
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        layout = torch.channels_last
        dx, dweight, dbias = torch.ops.aten.native_group_norm_backward(
            dy.float().contiguous(memory_format=layout),
            x.float(),
            mean,
            rstd,
            weight,
            len(x),
            x.shape[1],
            x.shape[2] * x.shape[3],
            ctx.groups,
            [True, True, True],
        )
        return dx.to(x.dtype), dweight, dbias, None, None


def _is_channels_last(x: torch.Tensor) -> bool:
    return (
        x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
    )


def normalization(channels: int) -> nn.Module:
    """Group normalisation over 32 groups of ``channels`` (a multiple of 32)."""
    return GroupNorm32(NORM_GROUPS, channels)


class _InTheInputsType:
    """A convolution that computes in its input's type, whatever the type of its parameters.

    So parameters stay float32 for the optimizer while a network computes in a shorter type.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self._conv_forward(x, self.weight.to(x.dtype), bias)


class Conv1d(_InTheInputsType, nn.Conv1d):
    """See :class:`_InTheInputsType`."""


class Conv2d(_InTheInputsType, nn.Conv2d):
    """See :class:`_InTheInputsType`."""


class Conv3d(_InTheInputsType, nn.Conv3d):
    """See :class:`_InTheInputsType`."""


def conv_nd(dims: int, *args: object, **kwargs: object) -> nn.Module:
    """A convolution over ``dims`` (1, 2 or 3) spatial dimensions."""
    layers = {1: Conv1d, 2: Conv2d, 3: Conv3d}
    if dims not in layers:
        raise ValueError(f"a convolution has 1, 2 or 3 spatial dimensions, not {dims}")
    return layers[dims](*args, **kwargs)


def avg_pool_nd(dims: int, *args: object, **kwargs: object) -> nn.Module:
    """Average pooling over ``dims`` (1, 2 or 3) spatial dimensions."""
    layers = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
    if dims not in layers:
        raise ValueError(f"pooling has 1, 2 or 3 spatial dimensions, not {dims}")
    return layers[dims](*args, **kwargs)


@torch.no_grad()
def zero_module(module: nn.Module) -> nn.Module:
    """Set every parameter of ``module`` to 0 and return it.

    A residual branch that ends in such a layer starts as the identity.
    """
    return scale_module(module, 0.0)


@torch.no_grad()
def scale_module(module: nn.Module, scale: float) -> nn.Module:
    """Multiply every parameter of ``module`` by ``scale`` and return it."""
    for parameter in module.parameters():
        parameter.mul_(scale)
    return module


def mean_flat(x: torch.Tensor) -> torch.Tensor:
    """Mean over all dimensions but the first: [N, ...] -> [N]."""
    return x.flatten(1).mean(dim=1)


@torch.no_grad()
def update_ema(
    target_params: Iterable[torch.Tensor],
    source_params: Iterable[torch.Tensor],
    rate: float = 0.99,
) -> None:
    """Move ``target_params`` in place towards ``source_params``.

    ``target = rate * target + (1 - rate) * source``: a rate closer to 1 moves more slowly.
    All parameters are updated by one multi-tensor operation.
    """
    torch._foreach_lerp_(list(target_params), list(source_params), 1.0 - rate)


def timestep_embedding(
    timesteps: torch.Tensor, dim: int, max_period: float = 10000
) -> torch.Tensor:
    """Sinusoidal embedding of (possibly fractional) timesteps, Vaswani et al. 2017, section 3.5.

    :param timesteps: [N], any real numbers.
    :param dim: width of the embedding; an odd width gets a last column of zeros.
    :param max_period: the longest period is ``2 * pi * max_period``.
    :return: [N, dim] float32: ``dim // 2`` cosines, then as many sines.
    """
    half = dim // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=timesteps.device)
        * (-math.log(max_period) / half)
    )
    angles = timesteps.float()[:, None] * frequencies[None]
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
    return nn.functional.pad(embedding, (0, dim % 2))


def checkpoint(
    func: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor],
    params: Iterable[torch.Tensor],
    flag: bool,
) -> torch.Tensor:
    """Evaluate ``func(*inputs)``, without keeping its intermediate activations if ``flag``.

    The backward pass then evaluates ``func`` a second time, with the random state of the first,
    so that dropout falls on the same units. ``params`` are found by autograd itself; the argument
    stays for the reference's call form.
    """
    if not flag:
        return func(*inputs)
    return torch_checkpoint(func, *inputs, use_reentrant=False)
