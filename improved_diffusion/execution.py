"""How a network is run: the type it computes in, its memory layout, compiled or not."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable

import torch
from torch.nn.parallel import DistributedDataParallel

from improved_diffusion import dist_util, logger
from improved_diffusion.fp16_util import CONVOLUTIONS
from improved_diffusion.unet import UNetModel

COMPILE_MODES = ("auto", "on", "off")
# Fewer evaluations than these are over before compiling has paid.
WORTH_COMPILING = 2000

# Of the C library's mallopt.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def check_compile_mode(mode: str) -> None:
    """:raises ValueError: an unknown mode."""
    if mode not in COMPILE_MODES:
        raise ValueError(f"--compile {mode}: choose from {', '.join(COMPILE_MODES)}")


class Compiled:
    """A network through ``torch.compile``, or as it is where the first call shows that to fail.

    :param reduce_overhead: also record the kernels of a call as a CUDA graph, which suits networks
        that are called with one shape again and again, without gradients.
    """

    def __init__(self, model: torch.nn.Module, reduce_overhead: bool = False) -> None:
        self.model = model
        self.reduce_overhead = reduce_overhead
        # Each shape gets code of its own: a run has two, that of the last microbatch included.
        mode = "reduce-overhead" if reduce_overhead else None
        self.call: Callable[..., torch.Tensor] = torch.compile(model, dynamic=False, mode=mode)
        self.worked = False

    def __call__(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        if self.worked:
            return self._run(*args, **kwargs)
        try:
            output = self._run(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a missing compiler, an unsupported GPU, a bug in torch
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            logger.log(f"torch.compile failed, going on without it: {reason}")
            self.call = self.model
            output = self.model(*args, **kwargs)
        self.worked = True
        return output

    def _run(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        if not self.reduce_overhead:
            return self.call(*args, **kwargs)
        torch.compiler.cudagraph_mark_step_begin()
        # The next call overwrites a graph's output.
        return self.call(*args, **kwargs).clone()


def for_training(
    model: torch.nn.Module, dtype: torch.dtype, compile: str, device: torch.device
) -> tuple[Callable[..., torch.Tensor], DistributedDataParallel | None]:
    """The network as training steps call it; parameters keep their type.

    :param compile: ``on``, ``off``, or ``auto``: on a GPU.
    :return: the network, and under several processes the wrapper in it that adds up gradients.
    :raises ValueError: an unknown mode.
    """
    check_compile_mode(compile)
    if isinstance(model, UNetModel):
        model.compute_dtype = dtype
    compiles = _is_compiled(compile, device, worth=True)
    _lay_out(model, dtype, device, compiles)
    parallel = None
    if dist_util.world_size() > 1:
        group = dist_util.gradient_group(device)
        parallel = DistributedDataParallel(model, process_group=group)
    network = model if parallel is None else parallel
    return Compiled(network) if compiles else network, parallel


def for_sampling(
    model: UNetModel,
    dtype: torch.dtype,
    compile: str,
    device: torch.device,
    *,
    evaluations: int,
) -> Callable[..., torch.Tensor]:
    """The network as samplers call it: on the device, without gradients or dropout.

    The convolutions between the first and the last one are converted to ``dtype``, so that no
    call does it again.

    :param compile: ``on``, ``off``, or ``auto``: on a GPU, where it is worth its time.
    :param evaluations: how often the network will be called.
    :raises ValueError: an unknown mode.
    """
    check_compile_mode(compile)
    model.to(device).eval().requires_grad_(False)
    model.compute_dtype = dtype
    _, *others = model.input_blocks  # the first computes in float32
    for block in (*others, model.middle_block, *model.output_blocks):
        for layer in block.modules():
            if isinstance(layer, CONVOLUTIONS):
                layer.to(dtype)
    compiles = _is_compiled(compile, device, worth=evaluations >= WORTH_COMPILING)
    _lay_out(model, dtype, device, compiles)
    return Compiled(model, reduce_overhead=device.type == "cuda") if compiles else model


def _is_compiled(compile: str, device: torch.device, *, worth: bool) -> bool:
    """Whether to compile; ``auto`` does on a GPU where that is ``worth`` it."""
    return compile == "on" or (compile == "auto" and device.type == "cuda" and worth)


def _lay_out(
    model: torch.nn.Module, dtype: torch.dtype, device: torch.device, compiles: bool
) -> None:
    """Give the weights the memory layout in which the device's convolutions are fastest."""
    if device.type == "cpu" and isinstance(model, UNetModel):
        model.to(memory_format=torch.channels_last)
        _keep_freed_memory()
    elif device.type == "cuda" and compiles and dtype != torch.float32:
        # Compiled code keeps this layout through every layer; layers one by one do not.
        model.to(memory_format=torch.channels_last)


def _keep_freed_memory() -> None:
    """Let the C library keep memory that was freed, instead of fetching it anew in every layer.

    Large activations would else be mapped, and their pages cleared, each time.
    """
    with contextlib.suppress(AttributeError, OSError):  # glibc only
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
