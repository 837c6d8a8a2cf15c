"""One side of a comparison, in a process of its own: ``python -m benchmarks.workers SIDE``.

Both sides' packages have one name, so they cannot share a process. A worker reads its settings as
a line of JSON, gets ready, and then runs as many steps as each further line says, while the other
workers wait. It answers every line with a line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

Step = Callable[[], None]

SLOW_PRODUCT = 0.2  # seconds


def main() -> None:
    side = sys.argv[1]
    settings = json.loads(sys.stdin.readline())
    # What a side prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    step, about = SIDES[side](settings, device)

    def answer(values: dict[str, Any]) -> None:
        print(json.dumps(values), file=answers, flush=True)

    start = time.perf_counter()
    step()
    _wait(device)
    answer({"first_step": time.perf_counter() - start, **about})
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        _wait(device)
        answer({"seconds": time.perf_counter() - start, "peak_bytes": _peak_bytes(device)})


def ours(settings: dict[str, Any], device: torch.device) -> tuple[Step, dict[str, Any]]:
    """This package's training step."""
    from improved_diffusion import logger, script_util
    from improved_diffusion.brats import MASK_CHANNEL
    from improved_diffusion.cost import training_cost
    from improved_diffusion.encodings import MaskEncoding
    from improved_diffusion.fp16_util import allow_tf32
    from improved_diffusion.train_util import TrainLoop

    allow_tf32(settings["tf32"])
    flags = {**script_util.model_and_diffusion_defaults(), **settings["model"]}
    # The first of the random channels stands for the mask.
    names = [MASK_CHANNEL] + ["T1"] * (flags["in_channels"] - 1)
    labels = MaskEncoding(flags["mask_encoding"], names).posterior
    model, diffusion = script_util.create_model_and_diffusion(**flags, labels=labels)
    _load_or_save(model, settings["weights"])
    logger.configure(tempfile.mkdtemp(), [])
    loop = TrainLoop(
        model=model,
        diffusion=diffusion,
        data=_batches(settings),
        precision=settings["precision"],
        compile=settings["compile"],
        **_loop_settings(settings),
    )
    size = settings["model"]["image_size"]
    shape = (settings["model"]["in_channels"], size, size)
    more = {"x_self": shape} if settings["model"].get("self_condition") else {}
    cost = training_cost(loop.model, shape, dtype=loop.dtype, model_kwargs=more)
    about = {
        "parameters": cost.parameters,
        "training_flops": cost.training_flops,
        "precision": loop.precision,
        "matrix_flops": _matrix_flops(loop.dtype, device),
    }
    return lambda: loop.run_step(*next(loop.data)), about


def ours_sampling(settings: dict[str, Any], device: torch.device) -> tuple[Step, dict[str, Any]]:
    """A batch drawn by this package."""
    from improved_diffusion import execution, sampling, script_util, solvers
    from improved_diffusion.fp16_util import allow_tf32, choose_precision, precision_name

    allow_tf32(settings["tf32"])
    model, diffusion = script_util.create_model_and_diffusion(
        **{**script_util.model_and_diffusion_defaults(), **settings["model"]}
    )
    _load_or_save(model, settings["weights"])
    dtype, _ = choose_precision(settings["precision"], device)
    network = execution.for_sampling(model, dtype, settings["compile"], device, evaluations=10**6)
    timesteps = solvers.choose_timesteps(diffusion, settings["sampling_steps"], "uniform")
    indices = range(settings["batch_size"])
    size = settings["model"]["image_size"]

    def step() -> None:
        sampling.draw(
            network,
            diffusion,
            indices,
            (settings["model"]["in_channels"], size, size),
            seed=0,
            device=device,
            sampler=settings["sampler"],
            timesteps=timesteps,
        )

    steps = settings["sampling_steps"]
    about = {"parameters": _count(model), "precision": precision_name(dtype)}
    return step, {**about, "evaluations": sampling.evaluations(settings["sampler"], steps)}


def reference(settings: dict[str, Any], device: torch.device) -> tuple[Step, dict[str, Any]]:
    """The training step of a copy of openai/improved-diffusion, as it stands."""
    model, diffusion = _reference_model(settings, device)
    from improved_diffusion import logger
    from improved_diffusion.train_util import TrainLoop

    logger.configure(tempfile.mkdtemp(), [])
    loop = TrainLoop(
        model=model, diffusion=diffusion, data=_batches(settings), **_loop_settings(settings)
    )
    return lambda: loop.run_step(*next(loop.data)), {"parameters": _count(model)}


def reference_sampling(
    settings: dict[str, Any], device: torch.device
) -> tuple[Step, dict[str, Any]]:
    """A batch drawn by that copy, by ancestral steps."""
    steps = settings["reference_steps"]
    model, diffusion = _reference_model(settings, device, timestep_respacing=str(steps))
    model.eval()
    size = settings["model"]["image_size"]
    shape = (settings["batch_size"], settings["model"]["in_channels"], size, size)
    about = {"parameters": _count(model), "evaluations": steps}
    return lambda: diffusion.p_sample_loop(model, shape), about


def _reference_model(
    settings: dict[str, Any], device: torch.device, **changed: str
) -> tuple[torch.nn.Module, Any]:
    """Its network, with the common weights, and its process."""
    sys.path.insert(0, settings["reference"])
    _without_mpi()
    import numpy as np

    from improved_diffusion import dist_util, script_util

    assert script_util.__file__.startswith(os.path.abspath(settings["reference"]))
    np.int = int  # which numpy has dropped and the reference still names
    dist_util.setup_dist()
    flags = {**script_util.model_and_diffusion_defaults()}
    flags.update({name: value for name, value in settings["model"].items() if name in flags})
    flags.update(changed)
    # The reference builds networks of three channels only.
    channels, create = settings["model"]["in_channels"], script_util.UNetModel

    def with_channels(**kwargs: Any) -> torch.nn.Module:
        kwargs.update(in_channels=channels, out_channels=channels * (1 + flags["learn_sigma"]))
        return create(**kwargs)

    script_util.UNetModel = with_channels
    model, diffusion = script_util.create_model_and_diffusion(**flags)
    model.load_state_dict(torch.load(settings["weights"], weights_only=True))
    model.to(device)
    if not settings["reference_tf32"]:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    return model, diffusion


def diffusers(settings: dict[str, Any], device: torch.device) -> tuple[Step, dict[str, Any]]:
    """A step of diffusers' UNet2DModel of the same shape, with torch's AdamW and no average."""
    from diffusers import DDPMScheduler

    flags, model = settings["model"], _diffusers_model(settings["model"], device)
    scheduler = DDPMScheduler(flags["diffusion_steps"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batches, size_of_part = _batches(settings), settings["microbatch"] or settings["batch_size"]
    short = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings["precision"])

    def step() -> None:
        batch, _ = next(batches)
        optimizer.zero_grad()
        for part in batch.to(device).split(size_of_part):
            noise = torch.randn_like(part)
            t = torch.randint(flags["diffusion_steps"], (len(part),), device=device)
            noisy = scheduler.add_noise(part, noise, t)
            with torch.autocast(device.type, short, enabled=short is not None):
                output = model(noisy, t).sample[:, : part.shape[1]].float()
            loss = torch.nn.functional.mse_loss(output, noise)
            (loss * len(part) / len(batch)).backward()
        optimizer.step()

    return step, {"parameters": _count(model)}


def diffusers_sampling(
    settings: dict[str, Any], device: torch.device
) -> tuple[Step, dict[str, Any]]:
    """A batch drawn by that network through diffusers' DPM-Solver++(2M), of a fixed variance."""
    from diffusers import DPMSolverMultistepScheduler

    flags, steps = settings["model"], settings["sampling_steps"]
    model = _diffusers_model({**flags, "learn_sigma": False}, device).eval()
    scheduler = DPMSolverMultistepScheduler(flags["diffusion_steps"])
    short = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings["precision"])
    size = flags["image_size"]
    shape = (settings["batch_size"], flags["in_channels"], size, size)

    @torch.no_grad()
    def step() -> None:
        scheduler.set_timesteps(steps)
        x = torch.randn(shape, device=device)
        for t in scheduler.timesteps:
            with torch.autocast(device.type, short, enabled=short is not None):
                output = model(x, t).sample.float()
            x = scheduler.step(output, t, x).prev_sample

    return step, {"parameters": _count(model), "evaluations": steps}


def _diffusers_model(flags: dict[str, Any], device: torch.device) -> torch.nn.Module:
    """UNet2DModel of the flags' shape."""
    from diffusers import UNet2DModel

    from improved_diffusion.architecture import CHANNEL_MULT, parse_numbers

    size, width = flags["image_size"], flags["num_channels"]
    text = flags.get("channel_mult", "")
    mult = parse_numbers("channel_mult", text, float) if text else CHANNEL_MULT[size]
    attention = parse_numbers("attention_resolutions", str(flags["attention_resolutions"]), int)
    has_attention = [size // 2**level in attention for level in range(len(mult))]
    widths = tuple(int(own * width) for own in mult)
    return UNet2DModel(
        sample_size=size,
        in_channels=flags["in_channels"],
        out_channels=flags["in_channels"] * (2 if flags["learn_sigma"] else 1),
        layers_per_block=flags["num_res_blocks"],
        block_out_channels=widths,
        down_block_types=tuple(
            "AttnDownBlock2D" if own else "DownBlock2D" for own in has_attention
        ),
        up_block_types=tuple(
            "AttnUpBlock2D" if own else "UpBlock2D" for own in reversed(has_attention)
        ),
        attention_head_dim=None,  # one head
    ).to(device)


SIDES = {
    "ours": ours,
    "reference": reference,
    "diffusers": diffusers,
    "ours_sampling": ours_sampling,
    "reference_sampling": reference_sampling,
    "diffusers_sampling": diffusers_sampling,
}


def _loop_settings(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "batch_size": settings["batch_size"],
        "microbatch": settings["microbatch"] or -1,
        "lr": 1e-4,
        "ema_rate": "0.9999",
        "log_interval": 10,
        "save_interval": 10**9,
        "resume_checkpoint": "",
    }


def _batches(settings: dict[str, Any]) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """The same images again and again, so that nobody waits for data."""
    flags = settings["model"]
    size = flags["image_size"]
    generator = torch.Generator().manual_seed(1)
    shape = (settings["batch_size"], flags["in_channels"], size, size)
    batch = torch.rand(shape, generator=generator) * 2 - 1
    while True:
        yield batch, {}


def _load_or_save(model: torch.nn.Module, path: str) -> None:
    """Give all sides the same weights: the first that gets there writes its own."""
    if os.path.exists(path):
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        torch.save(model.state_dict(), path)


def _without_mpi() -> None:
    """Stand in for mpi4py: one process, no MPI library."""

    class World:
        rank, size = 0, 1

        def Get_rank(self) -> int:  # noqa: N802
            return 0

        def Get_size(self) -> int:  # noqa: N802
            return 1

        def bcast(self, value: Any, root: int = 0) -> Any:
            return value

    module = types.ModuleType("mpi4py")
    module.MPI = types.SimpleNamespace(COMM_WORLD=World())
    sys.modules["mpi4py"] = module


def _matrix_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of the best of ten square matrix products in ``dtype``.

    Of fewer where they take long, as in a type that a CPU lacks.
    """
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    with contextlib.suppress(RuntimeError):
        for _ in range(10):
            _wait(device)
            start = time.perf_counter()
            a @ b
            _wait(device)
            best = min(best, time.perf_counter() - start)
            if best > SLOW_PRODUCT:
                break
    return 2 * n**3 / best


def _count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_bytes(device: torch.device) -> int:
    """GPU memory at its peak; on a CPU the process's, program and libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
