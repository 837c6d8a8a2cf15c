"""What a training step costs, found without running it: operations and memory.

The network runs once on torch's ``meta`` device, where tensors have shapes and no contents.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from improved_diffusion.gaussian_diffusion import SELF_CONDITIONED_SHARE
from improved_diffusion.unet import SelfConditionedModel

# AdamW's two moments and the gradient, beside the parameter itself.
FLOATS_PER_PARAMETER = 4
# What stays free for the library's own buffers and for fragments.
USABLE_SHARE = 0.85


@dataclass(frozen=True)
class Cost:
    """Of one training step of a network.

    :param parameters: how many there are.
    :param forward_flops: floating-point operations per image, forward; a multiplication and an
        addition are two.
    :param training_flops: the same, forward and backward; a self-conditioned network's also hold
        the first pass that a share of the images takes.
    :param state_bytes: parameters, gradients, AdamW's moments and the moving averages, float32,
        and the short copies of the parameters that a shorter type needs.
    :param image_bytes: activations at their peak, for each image of a microbatch.
    """

    parameters: int
    forward_flops: int
    training_flops: int
    state_bytes: int
    image_bytes: int


class _PeakOfTensors(TorchDispatchMode):
    """Bytes of the tensors that were made inside of it and live at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def training_cost(
    model: torch.nn.Module,
    image_shape: tuple[int, int, int],
    *,
    dtype: torch.dtype = torch.float32,
    averages: int = 1,
    model_kwargs: dict[str, tuple[int, ...]] | None = None,
) -> Cost:
    """The cost of training a network, whose parameters are neither read nor changed.

    :param model: a network that computes in ``dtype``.
    :param image_shape: (C, H, W).
    :param averages: how many moving averages are kept.
    :param model_kwargs: shapes of further arguments without the batch: ``low_res`` (C, h, w), and
        ``y`` ().
    """
    step = _StepOnMeta(model, image_shape, model_kwargs or {})
    # At batches that outweigh the gradients, which else hide part of the activations' peak.
    image_bytes = (step.peak(batch=16) - step.peak(batch=8)) // 8
    with FlopCounterMode(display=False) as forward:
        step.run(batch=1, backward=False)
    with FlopCounterMode(display=False) as both:
        step.run(batch=1)
    training_flops = both.get_total_flops()
    if isinstance(model, SelfConditionedModel):
        training_flops += int(SELF_CONDITIONED_SHARE * forward.get_total_flops())
    parameters = sum(p.numel() for p in model.parameters())
    per_parameter = 4 * (FLOATS_PER_PARAMETER + averages)
    if dtype != torch.float32:
        per_parameter += dtype.itemsize
    return Cost(
        parameters,
        forward.get_total_flops(),
        training_flops,
        parameters * per_parameter,
        image_bytes,
    )


def sampling_memory(
    model: torch.nn.Module,
    image_shape: tuple[int, int, int],
    *,
    model_kwargs: dict[str, tuple[int, ...]] | None = None,
) -> int:
    """Bytes of activations at their peak, for each image of a batch, without gradients.

    Arguments as of :func:`training_cost`; the parameters come on top.
    """
    step = _StepOnMeta(model, image_shape, model_kwargs or {})
    return (step.peak(batch=16, backward=False) - step.peak(batch=8, backward=False)) // 8


class _StepOnMeta(torch.nn.Module):
    """A network's forward and backward pass on parameters and arguments that have shapes only."""

    def __init__(
        self,
        model: torch.nn.Module,
        image_shape: tuple[int, int, int],
        model_kwargs: dict[str, tuple[int, ...]],
    ) -> None:
        super().__init__()
        self.model = model
        self.image_shape = image_shape
        self.model_kwargs = model_kwargs

    def forward(self, batch: int, backward: bool) -> None:
        with torch.device("meta"):
            kwargs = {
                name: torch.zeros(
                    batch, *shape, dtype=torch.int64 if name == "y" else torch.float32
                )
                for name, shape in self.model_kwargs.items()
            }
            x, t = torch.zeros(batch, *self.image_shape), torch.zeros(batch)
        with torch.set_grad_enabled(backward):
            output = self.model(x, t, **kwargs)
        if backward:
            output.sum().backward()

    def run(self, batch: int, backward: bool = True) -> None:
        # The whole step inside, because activation checkpointing uses the parameters again.
        parameters = {
            name: torch.empty_like(p, device="meta", requires_grad=backward)
            for name, p in self.named_parameters()
        }
        functional_call(self, parameters, (batch, backward))

    def peak(self, batch: int, backward: bool = True) -> int:
        with _PeakOfTensors() as tensors:
            self.run(batch, backward)
        return tensors.peak


def largest_microbatch(image_bytes: int, reserved_bytes: int, free_bytes: int, most: int) -> int:
    """How many images fit at once: 1 to ``most``.

    :param image_bytes: for each image.
    :param reserved_bytes: needed beside the images.
    :param free_bytes: what there is; a part of it stays unused.
    """
    usable = int(free_bytes * USABLE_SHARE) - reserved_bytes
    return max(1, min(most, usable // image_bytes))


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, or available to a process on a CPU."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + held
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a GPU's or the machine's memory was too small."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
