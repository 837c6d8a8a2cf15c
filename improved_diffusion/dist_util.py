"""Where the program runs: the device, and this process's place among its fellows.

One process needs neither a launcher nor a network, and the library works without
:func:`setup_dist`. That opens a group of one for code that calls ``torch.distributed`` itself.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable
from typing import Any

import torch as th
import torch.distributed as dist

# How many processes there are, as torchrun, Open MPI's and MPICH's mpiexec tell each of them.
SIZE_VARIABLES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def setup_dist() -> None:
    """Open a process group of this one process, on an in-memory store; again: nothing more.

    :raises ValueError: a launcher started several processes, which is not supported.
    """
    for variable in SIZE_VARIABLES:
        size = os.environ.get(variable, "1")
        if size.isdigit() and int(size) > 1:
            raise ValueError(
                f"started as one of {size} processes ({variable}={size}), but one process is "
                "supported: start the script without torchrun or mpiexec"
            )
    if not dist.is_available() or dist.is_initialized():
        return
    # gloo also takes CUDA tensors, and needs no GPU.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    # A group whose threads still run when the interpreter ends sometimes aborts the process.
    atexit.register(_close_group)


def _close_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, from 0; 0 without a group."""
    return dist.get_rank() if _in_group() else 0


def world_size() -> int:
    """The number of processes; 1 without a group."""
    return dist.get_world_size() if _in_group() else 1


def barrier() -> None:
    """Wait until every process of the group is here; without a group, go on."""
    if _in_group():
        dist.barrier()


def dev() -> th.device:
    """The first CUDA GPU where there is one, else the CPU."""
    return th.device("cuda:0" if th.cuda.is_available() else "cpu")


def load_state_dict(path: str, **kwargs: Any) -> Any:
    """Read a checkpoint file from a local path or one that blobfile knows.

    :param kwargs: passed on to :func:`improved_diffusion.checkpoint.load`, e.g.
        ``map_location``.
    :raises ValueError: no such file, or it is not a complete checkpoint of plain tensors.
    """
    # checkpoint stands a layer above this module, which most of the library imports.
    from improved_diffusion import checkpoint

    return checkpoint.load(path, **kwargs)


def sync_params(params: Iterable[th.Tensor]) -> None:
    """Overwrite the tensors with those of process 0; one process keeps its own."""
    if world_size() > 1:
        for param in params:
            dist.broadcast(param.detach(), src=0)
