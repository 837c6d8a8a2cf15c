"""Where the program runs: the device, and this process's place among its fellows.

One process needs neither a launcher nor a network, and the library works without
:func:`setup_dist`. That opens a group of one for code that calls ``torch.distributed`` itself, or
joins the group of the processes that torchrun or mpiexec started.
"""

from __future__ import annotations

import atexit
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch as th
import torch.distributed as dist

T = TypeVar("T")

# How many processes there are, as torchrun, Open MPI's and MPICH's mpiexec tell each of them.
SIZE_VARIABLES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")

# Processes start together, but may get done days apart.
_START, _WORK = timedelta(minutes=5), timedelta(days=30)
# What gloo and NCCL say of a process that has gone.
_LOST_PEER = re.compile("peer|gloo|NCCL|Broken pipe|Socket|Connection")
# Through which the processes find each other; None without a launcher.
_store: dist.Store | None = None


def setup_dist(several: bool = False) -> None:
    """Open a process group, once: of this one process on an in-memory store, or the launcher's.

    :param several: the program can share its work with other processes.
    :raises ValueError: a launcher started several processes, which the program does not support,
        or mpiexec did and there is no MPI library.
    :raises OSError: the processes don't find each other.
    """
    if dist.is_available() and dist.is_initialized():
        return
    for variable in SIZE_VARIABLES:
        size = os.environ.get(variable, "1")
        if size.isdigit() and int(size) > 1:
            if not several:
                raise ValueError(
                    f"started as one of {size} processes ({variable}={size}), but one process is "
                    "supported: start the script without torchrun or mpiexec"
                )
            _join(variable, int(size))
            return
    if not dist.is_available():
        return
    # gloo also takes CUDA tensors, and needs no GPU.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    # A group whose threads still run when the interpreter ends sometimes aborts the process.
    atexit.register(_close_group)


def _join(variable: str, size: int) -> None:
    """Open the group of the launcher's processes."""
    global _store
    if variable != "WORLD_SIZE" or "MASTER_ADDR" not in os.environ:
        _meet_by_mpi(variable, size)
    address = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '')}"
    try:
        store, own, count = next(dist.rendezvous("env://", timeout=_START))
        _store = _fresh(store, own, count)
    except (RuntimeError, ValueError, TimeoutError) as error:
        raise OSError(
            f"the {size} processes don't find each other at {address}; start them with "
            f"torchrun --standalone --nproc_per_node={size}, or mpiexec -n {size}"
        ) from error
    # gloo also takes CUDA tensors.
    dist.init_process_group("gloo", store=_store, rank=own, world_size=count, timeout=_WORK)
    atexit.register(_close_group)


def _fresh(store: dist.Store, own: int, count: int) -> dist.Store:
    """A part of the store that holds nothing of processes that torchrun has started again.

    Its store outlives them, and a group that opened with their addresses would wait for the dead.
    So each process shows a new token, process 0 a new name with the tokens that it sees, and that
    name counts for a process as soon as its own token stands there.

    :raises TimeoutError: not all processes came.
    """
    token = secrets.token_hex(8)
    until = time.monotonic() + _START.total_seconds()

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    while time.monotonic() < until:
        if own == 0:
            others = [read(f"token {rank}") for rank in range(1, count)]
            store.set("name", " ".join([token, *others]))
            if all(read(f"known {rank}") == token for rank in range(1, count)):
                return dist.PrefixStore(token, store)
        else:
            store.set(f"token {own}", token)
            name, *known = read("name").split(" ")
            if token in known:
                store.set(f"known {own}", name)
                return dist.PrefixStore(name, store)
        time.sleep(0.02)
    raise TimeoutError("not all processes came")


def _meet_by_mpi(variable: str, size: int) -> None:
    """Tell all processes of mpiexec where the first one listens, in torchrun's variables.

    MPI is used for this alone and left at once: a process that fails later then ends as any
    other, and does not wait for its fellows.
    """
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # what mpi4py makes of a missing library
        raise ValueError(
            f"started as one of {size} processes ({variable}={size}) by mpiexec, but mpi4py finds "
            "no MPI library: pip install mpich (whose mpiexec must start the script), or use "
            f"torchrun --nproc_per_node={size}"
        ) from error
    MPI.Init()
    world = MPI.COMM_WORLD
    rank, found = world.Get_rank(), world.Get_size()
    here = world.Split_type(MPI.COMM_TYPE_SHARED)
    local = here.Get_rank(), here.Get_size()
    address = _free_address(local_only=local[1] == found) if rank == 0 else None
    host, port = world.bcast(address)
    MPI.Finalize()
    if found != size:
        raise ValueError(
            f"mpiexec started {size} processes, but mpi4py's MPI library sees {found}: mpiexec "
            "must be the one of that library (pip install mpich installs both)"
        )
    os.environ.update(
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(local[0]),
        LOCAL_WORLD_SIZE=str(local[1]),
    )


def _free_address(local_only: bool) -> tuple[str, int]:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return "127.0.0.1" if local_only else socket.gethostname(), port


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


def launcher() -> list[str]:
    """The words before a script's name that start as many processes of it on one machine."""
    if world_size() == 1:
        return ["python"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return ["torchrun", "--standalone", f"--nproc_per_node={world_size()}"]
    return ["mpiexec", "-n", str(world_size()), "python"]


def barrier() -> None:
    """Wait until every process of the group is here; alone, go on.

    :raises OSError: another process has ended.
    """
    if world_size() > 1:
        _wait_for(dist.barrier(async_op=True))


def _wait_for(work: dist.Work) -> None:
    pause = 0.0001
    with ending_together():
        while not work.is_completed():  # wait() alone would hear no signal meanwhile
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        work.wait()


@contextmanager
def ending_together() -> Iterator[None]:
    """Tell the failure of a collective operation, because another process has ended, from others.

    :raises OSError: for that failure.
    """
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or not _LOST_PEER.search(str(error)):
            raise
        raise OSError("another process of this run has ended, and so does this one") from error


def gather(*numbers: int) -> list[tuple[int, ...]]:
    """Every process's numbers, by rank."""
    if world_size() == 1:
        return [numbers]
    own = th.tensor(numbers, dtype=th.int64)
    every = [th.empty_like(own) for _ in range(world_size())]
    _wait_for(dist.all_gather(every, own, async_op=True))
    return [tuple(row.tolist()) for row in every]


def gather_rows(values: th.Tensor) -> th.Tensor:
    """Every process's ``values`` [N, ...] below each other, by rank; N may differ."""
    if world_size() == 1:
        return values
    counts = [count for (count,) in gather(len(values))]
    own = values.new_zeros(max(counts), *values.shape[1:], device="cpu")
    own[: len(values)] = values
    every = [th.empty_like(own) for _ in counts]
    _wait_for(dist.all_gather(every, own, async_op=True))
    return th.cat([rows[:count] for rows, count in zip(every, counts)]).to(values.device)


def gradient_group(device: th.device) -> dist.ProcessGroup | None:
    """The processes with the fastest way to add up their gradients; None: the ordinary group.

    That is NCCL where every process has a GPU of its own.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    alone = device.type == "cuda" and local <= th.cuda.device_count()
    if not dist.is_nccl_available() or not all(own for (own,) in gather(int(alone))):
        return None
    th.cuda.set_device(device)
    return dist.new_group(backend="nccl", timeout=_WORK)


@contextmanager
def one_of_several() -> Iterator[None]:
    """Run a program that may be one of several processes.

    An error that the user can mend is told by one of them alone; the others end with status 2.
    When all are done, several end at once with status 0: the threads of a group sometimes abort an
    interpreter that takes its time to end.
    """
    try:
        yield
        barrier()
    except (ValueError, OSError):
        told = 0
        if _store is not None:
            with suppress(RuntimeError):  # the store may have ended with its process
                told = _store.add("told", 1)
        if told > 1:
            sys.exit(2)
        raise
    if world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def on_first(action: Callable[[], T]) -> T:
    """Let process 0 do something, and give its result to all.

    Where it fails, all processes end: process 0 by the exception, the others because it has ended.
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
