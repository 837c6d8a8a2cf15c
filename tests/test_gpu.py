"""What a CUDA GPU computes, against the reference's golden numbers and against the CPU."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_execution import inputs as three_images
from test_execution import network
from test_train_util import batch_of_four, gradient, unet_loop
from test_unet import NETWORKS, assert_equals_the_reference

from improved_diffusion import execution, sampling
from improved_diffusion.cost import training_cost
from improved_diffusion.fp16_util import allow_tf32
from improved_diffusion.script_util import (
    create_gaussian_diffusion,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
GPU = torch.device("cuda")
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _full_precision():
    allow_tf32(False)
    yield
    allow_tf32(True)


@pytest.fixture
def no_gpu(monkeypatch):
    """Lets a test choose the CPU for a while."""
    return lambda: monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("name", NETWORKS)
def test_output_and_gradients_equal_the_reference(golden, name):
    assert_equals_the_reference(golden, name, GPU)


@pytest.mark.parametrize(("name", "error"), [("float32", 1e-4), ("bfloat16", 0.03)])
@pytest.mark.parametrize("compile", ["off", "on"])
def test_sampling_computes_what_the_cpu_does(name, error, compile):
    x, t = three_images()
    expected = network().eval()(x, t).detach()
    ready = execution.for_sampling(network(), getattr(torch, name), compile, GPU, evaluations=1)
    with torch.no_grad():
        output = ready(x.to(GPU), t.to(GPU))
        other = ready(x.to(GPU).flip(0), t.to(GPU).flip(0))
    assert (output.cpu() - expected).norm() < error * expected.norm()
    # A recorded graph writes to one place; an earlier answer must not change with a later call.
    assert (other.flip(0).cpu() - expected).norm() < error * expected.norm()


@pytest.mark.parametrize(
    ("precision", "compile", "error"),
    [("fp32", "off", 1e-3), ("fp32", "on", 1e-3), ("bf16", "off", 0.1), ("bf16", "on", 0.1)],
)
def test_gradients_are_those_of_the_cpu(tmp_path, no_gpu, precision, compile, error):
    """Timesteps and noise are given: each device would draw its own."""
    found = []
    for device in (GPU, torch.device("cpu")):
        if device.type == "cpu":
            no_gpu()
        on_gpu = device.type == "cuda"
        loop = unet_loop(
            tmp_path / device.type,
            precision=precision if on_gpu else "fp32",
            compile=compile if on_gpu else "off",
        )
        assert loop.device.type == device.type
        noise = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(3))
        losses = loop.diffusion.training_losses(
            loop._forward,
            batch_of_four().to(device),
            torch.tensor([0, 5, 12, 19], device=device),
            noise=noise.to(device),
        )
        losses["loss"].mean().backward()
        found.append(torch.cat([p.grad.flatten().cpu() for p in loop.params]))
    own, exact = found
    assert (own - exact).norm() < error * exact.norm()


def test_steps_in_every_precision_learn_and_keep_single_weights(tmp_path):
    for precision in ("fp32", "bf16", "fp16"):
        loop = unet_loop(tmp_path / precision, precision=precision, compile="on")
        before = [p.detach().clone() for p in loop.params]
        loop.model.train()
        for _ in range(4):
            loop.run_step(batch_of_four(), {})
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in loop.params)
        assert any(not torch.equal(p, old) for p, old in zip(loop.params, before))
        assert "failed" not in (tmp_path / precision / "log.txt").read_text()


def test_memory_that_is_really_too_small_halves_the_microbatch(tmp_path):
    """The estimate is told that all fits; the GPU says otherwise."""
    whole = gradient(unet_loop(tmp_path / "a", compile="off"), batch_of_four())
    loop = unet_loop(tmp_path / "b", microbatch="auto", compile="off")
    inner = loop.diffusion.training_losses
    free, _ = torch.cuda.mem_get_info()

    def hungry(model, x, *args, **kwargs):
        # As much for each image as lets two fit and three not.
        torch.empty(len(x), int(0.35 * free), dtype=torch.uint8, device=GPU)
        return inner(model, x, *args, **kwargs)

    loop.diffusion.training_losses = hungry
    own = gradient(loop, batch_of_four())
    assert loop.microbatch == 2
    torch.testing.assert_close(own.cpu(), whole.cpu(), rtol=1e-3, atol=1e-6)


def test_counted_memory_is_what_an_image_takes():
    """What a process takes grows with the batch as the count says."""
    flags = {**model_and_diffusion_defaults(), "image_size": 64, "num_channels": 64}
    model, _ = create_model_and_diffusion(**{**flags, "attention_resolutions": "16"})
    counted = training_cost(model, (3, 64, 64), dtype=torch.float32).image_bytes
    model.to(GPU)
    peaks = []
    for size in (4, 12):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        x, t = torch.randn(size, 3, 64, 64, device=GPU), torch.zeros(size, device=GPU)
        model(x, t).sum().backward()
        model.zero_grad()
        peaks.append(torch.cuda.max_memory_allocated())
    assert (peaks[1] - peaks[0]) / 8 == pytest.approx(counted, rel=0.25)


@pytest.mark.parametrize("sampler", ["ancestral", *sampling.SAMPLERS[2:]])
def test_samplers_draw_the_known_gaussian(sampler):
    """Data N(0.2, 0.3^2) per pixel, whose exact prediction stands in for a network."""
    diffusion = create_gaussian_diffusion(noise_schedule="cosine", predict_xstart=True)
    alphas = torch.tensor(diffusion.alphas_cumprod, dtype=torch.float32, device=GPU)

    def exact(x, t, **kwargs):
        bar = alphas[t.long()].reshape(-1, 1, 1, 1)
        gain = bar.sqrt() * 0.09 / (bar * 0.09 + 1 - bar)
        return 0.2 + gain * (x - bar.sqrt() * 0.2)

    plan = sampling.choose_plan(diffusion, sampler=sampler, steps=100)
    samples = sampling.draw(
        exact,
        diffusion,
        range(16),
        (1, 64, 64),
        seed=0,
        device=GPU,
        sampler=plan.sampler,
        timesteps=plan.timesteps,
        clip_denoised=False,
    )
    assert samples.mean().item() == pytest.approx(0.2, abs=0.01)
    assert samples.std().item() == pytest.approx(0.3, rel=0.05)


def test_scripts_train_continue_and_sample_on_the_gpu(tmp_path):
    """In bfloat16 and compiled, as they do by default."""
    data = tmp_path / "pictures"
    data.mkdir()
    for i in range(8):
        levels = np.full((32, 32, 3), 20 * i, np.uint8)
        Image.fromarray(levels).save(data / f"{i}.png")

    def run(script, *words):
        command = [sys.executable, str(ROOT / "scripts" / script), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    network = "--image_size 32 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2"
    network += " --attention_resolutions 16 --num_heads 1 --batch_size 6 --microbatch 4"
    train = ["image_train.py", "--data_dir", data, "--out_dir", tmp_path / "run"]
    train += [*network.split(), "--save_interval", 4, "--log_interval", 2, "--num_workers", 0]
    said = run(*train, "--max_steps", 4)
    assert "bf16" in said and "failed" not in said
    said = run(*train, "--max_steps", 8, "--resume_checkpoint", "latest")
    model = tmp_path / "run" / "ema_0.9999_000008.pt"
    assert model.exists() and "failed" not in said
    sample = ["image_sample.py", "--model_path", model, "--num_samples", 5]
    sample += ["--sample_dir", tmp_path / "samples", "--compile", "on"]
    assert "failed" not in run(*sample)
    (found,) = (tmp_path / "samples").glob("samples*.npz")
    with np.load(found) as arrays:
        assert arrays[arrays.files[0]].shape == (5, 32, 32, 3)
