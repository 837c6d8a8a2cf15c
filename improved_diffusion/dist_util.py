"""Where the program runs: the device, and this process's place among its fellows.

One process needs neither a launcher nor a network, and the library works without
:func:`setup_dist`. That opens a group of one for code that calls ``torch.distributed`` itself, or
joins the group of the processes that torchrun started.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch as th
import torch.distributed as dist

T = TypeVar("T")

# How many processes there are, as torchrun, Open MPI's and MPICH's mpiexec tell each of them.
SIZE_VARIABLES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")

# torchrun's processes start together, but may get done days apart.
_START, _WORK = timedelta(minutes=5), timedelta(days=30)
# Through which the processes find each other; None without torchrun.
_store: dist.Store | None = None


def setup_dist(several: bool = False) -> None:
    """Open a process group, once: of this one process on an in-memory store, or torchrun's.

    :param several: the program can share its work with other processes.
    :raises ValueError: a launcher started several processes, which the program or, for other
        launchers than torchrun, this package does not support.
    :raises OSError: torchrun's processes don't find each other.
    """
    global _store
    if dist.is_available() and dist.is_initialized():
        return
    for variable in SIZE_VARIABLES:
        size = os.environ.get(variable, "1")
        if not size.isdigit() or int(size) <= 1:
            continue
        if not several:
            raise ValueError(
                f"started as one of {size} processes ({variable}={size}), but one process is "
                "supported: start the script without torchrun or mpiexec"
            )
        if variable != "WORLD_SIZE" or "MASTER_ADDR" not in os.environ:
            raise ValueError(
                f"started as one of {size} processes ({variable}={size}) by something else than "
                f"torchrun: start the script with torchrun --nproc_per_node={size}"
            )
        address = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '')}"
        try:
            _store, own, count = next(dist.rendezvous("env://", timeout=_START))
        except RuntimeError as error:
            raise OSError(
                f"the {size} processes don't find each other at {address}; start them with "
                f"torchrun --standalone --nproc_per_node={size}"
            ) from error
        # gloo also takes CUDA tensors.
        dist.init_process_group("gloo", store=_store, rank=own, world_size=count, timeout=_WORK)
        atexit.register(_close_group)
        return
    if not dist.is_available():
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
    """Wait until every process of the group is here; without a group, go on.

    Where one has ended, so does this one, with status 2: the other tells why.
    """
    if not _in_group():
        return
    try:
        work = dist.barrier(async_op=True)
        while not work.is_completed():  # wait() alone would hear no signal meanwhile
            time.sleep(0.02)
        work.wait()
    except RuntimeError:
        sys.exit(2)


@contextmanager
def told_once() -> Iterator[None]:
    """Let one process alone tell an error that the user can mend; others end with status 2."""
    try:
        yield
    except (ValueError, OSError):
        if _store is not None and _store.add("told", 1) > 1:
            sys.exit(2)
        raise


def on_first(action: Callable[[], T]) -> T:
    """Let process 0 do something, and give its result to all.

    Where it fails, all processes end: process 0 by the exception, the others by exit status 2.
    """
    if world_size() == 1:
        return action()
    outcome = [action() if rank() == 0 else None]
    barrier()  # which, unlike the broadcast, hears signals while process 0 is at work
    dist.broadcast_object_list(outcome, src=0)
    return outcome[0]


def dev() -> th.device:
    """This process's CUDA GPU, the first where there is one process; the CPU without any."""
    if not th.cuda.is_available():
        return th.device("cpu")
    if world_size() == 1:
        return th.device("cuda:0")
    local = int(os.environ.get("LOCAL_RANK", rank()))
    return th.device(f"cuda:{local % th.cuda.device_count()}")


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
