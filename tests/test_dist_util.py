import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from improved_diffusion import dist_util

CALLS_OF_A_REFERENCE_SCRIPT = """
import socket, sys

def refuse(*args):
    raise OSError("no network here")

socket.socket.connect = socket.socket.bind = refuse

import torch as th
import torch.distributed as dist
from improved_diffusion import dist_util

assert (dist_util.rank(), dist_util.world_size()) == (0, 1)
dist_util.barrier()
dist_util.setup_dist()
dist_util.setup_dist()
assert (dist_util.rank(), dist_util.world_size()) == (0, 1)
assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
x = th.arange(3.0)
copies = [th.zeros_like(x)]
dist.all_gather(copies, x)
dist.all_reduce(x)
dist.barrier()
dist_util.barrier()
dist_util.sync_params([x])
assert copies[0].tolist() == x.tolist() == [0.0, 1.0, 2.0]
assert "mpi4py" not in sys.modules
"""

LAUNCHER_VARIABLES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if dist.is_initialized():  # by a script that another test ran in this process
        dist.destroy_process_group()


def test_one_process_has_a_group_of_one():
    # In a process of its own, because a group is a global of the process.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", CALLS_OF_A_REFERENCE_SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", LAUNCHER_VARIABLES)
def test_several_processes_are_refused(monkeypatch, name):
    monkeypatch.setenv(name, "4")
    with pytest.raises(ValueError, match=rf"4 processes \({name}=4\), but one process"):
        dist_util.setup_dist()
    assert not dist.is_initialized()


def test_the_device_is_the_first_gpu_or_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dist_util.dev() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert dist_util.dev() == torch.device("cuda:0")


def test_load_state_dict_reads_and_refuses(tmp_path):
    path = str(tmp_path / "model.pt")
    weight = torch.arange(6.0).reshape(2, 3)
    torch.save({"weight": weight}, path)
    loaded = dist_util.load_state_dict(path, map_location="cpu")
    assert list(loaded) == ["weight"]
    assert torch.equal(loaded["weight"], weight)
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) // 2)
    with pytest.raises(ValueError, match=r"model\.pt"):
        dist_util.load_state_dict(path)


def test_sync_params_leaves_a_single_process_alone():
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    dist_util.sync_params(iter([parameter]))
    assert parameter.tolist() == [1.0, 2.0]
