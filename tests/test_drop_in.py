"""Programs written for openai/improved-diffusion: the names and call forms that they use."""

import argparse
import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from improved_diffusion import (
    dist_util,
    fp16_util,
    gaussian_diffusion,
    image_datasets,
    logger,
    losses,
    nn,
    resample,
    respace,
    script_util,
    train_util,
    unet,
)

ROOT = Path(__file__).parent.parent

# Module: name and leading parameters, in the order in which callers may give them by position.
CONTRACT = {
    dist_util: {
        "setup_dist": (),
        "dev": (),
        "load_state_dict": ("path",),
        "sync_params": ("params",),
    },
    fp16_util: {
        "convert_module_to_f16": ("module",),
        "convert_module_to_f32": ("module",),
        "make_master_params": ("model_params",),
        "model_grads_to_master_grads": ("model_params", "master_params"),
        "master_params_to_model_params": ("model_params", "master_params"),
        "unflatten_master_params": ("model_params", "master_params"),
        "zero_grad": ("model_params",),
    },
    gaussian_diffusion: {
        "get_named_beta_schedule": ("schedule_name", "num_diffusion_timesteps"),
        "betas_for_alpha_bar": ("num_diffusion_timesteps", "alpha_bar", "max_beta"),
    },
    image_datasets: {
        "load_data": ("data_dir", "batch_size", "image_size", "class_cond", "deterministic"),
        "ImageDataset": ("resolution", "image_paths", "classes", "shard", "num_shards"),
    },
    logger: {
        "configure": ("dir", "format_strs", "comm", "log_suffix"),
        "log": (),
        "logkv": ("key", "val"),
        "logkv_mean": ("key", "val"),
        "logkvs": ("d",),
        "dumpkvs": (),
        "getkvs": (),
        "get_dir": (),
        "debug": (),
        "info": (),
        "warn": (),
        "error": (),
        "set_level": ("level",),
        "set_comm": ("comm",),
        "profile_kv": ("scopename",),
        "profile": ("n",),
        "reset": (),
        "scoped_configure": ("dir", "format_strs", "comm"),
    },
    losses: {
        "normal_kl": ("mean1", "logvar1", "mean2", "logvar2"),
        "approx_standard_normal_cdf": ("x",),
        "discretized_gaussian_log_likelihood": ("x", "means", "log_scales"),
    },
    nn: {
        "conv_nd": ("dims",),
        "linear": ("in_features", "out_features"),
        "avg_pool_nd": ("dims",),
        "update_ema": ("target_params", "source_params", "rate"),
        "zero_module": ("module",),
        "scale_module": ("module", "scale"),
        "mean_flat": (),
        "normalization": ("channels",),
        "timestep_embedding": ("timesteps", "dim", "max_period"),
        "checkpoint": ("func", "inputs", "params", "flag"),
    },
    resample: {
        "create_named_schedule_sampler": ("name", "diffusion"),
        "UniformSampler": ("diffusion",),
        "LossSecondMomentResampler": ("diffusion", "history_per_term", "uniform_prob"),
    },
    respace: {
        "space_timesteps": ("num_timesteps", "section_counts"),
        "SpacedDiffusion": ("use_timesteps",),
    },
    script_util: {
        "model_and_diffusion_defaults": (),
        "sr_model_and_diffusion_defaults": (),
        "add_dict_to_argparser": ("parser", "default_dict"),
        "args_to_dict": ("args", "keys"),
        "str2bool": ("v",),
        "create_model_and_diffusion": (
            *("image_size", "class_cond", "learn_sigma", "sigma_small", "num_channels"),
            *("num_res_blocks", "num_heads", "num_heads_upsample", "attention_resolutions"),
            *("dropout", "diffusion_steps", "noise_schedule", "timestep_respacing", "use_kl"),
            *("predict_xstart", "rescale_timesteps", "rescale_learned_sigmas"),
            *("use_checkpoint", "use_scale_shift_norm"),
        ),
        "create_model": ("image_size", "num_channels", "num_res_blocks"),
        "sr_create_model": ("large_size", "small_size", "num_channels", "num_res_blocks"),
        "sr_create_model_and_diffusion": ("large_size", "small_size", "class_cond"),
        "create_gaussian_diffusion": (
            *("steps", "learn_sigma", "sigma_small", "noise_schedule", "use_kl"),
            *("predict_xstart", "rescale_timesteps", "rescale_learned_sigmas"),
            "timestep_respacing",
        ),
    },
    train_util: {"get_blob_logdir": ()},
    unet: {
        "UNetModel": (
            *("in_channels", "model_channels", "out_channels", "num_res_blocks"),
            *("attention_resolutions", "dropout", "channel_mult", "conv_resample", "dims"),
            *("num_classes", "use_checkpoint", "num_heads", "num_heads_upsample"),
            "use_scale_shift_norm",
        ),
        "SuperResModel": ("in_channels",),
    },
}
METHODS = {
    train_util.TrainLoop: ("run_loop", "run_step", "forward_backward", "save"),
    unet.UNetModel: ("convert_to_fp16", "convert_to_fp32", "get_feature_vectors"),
    gaussian_diffusion.GaussianDiffusion: (
        *("q_sample", "q_mean_variance", "q_posterior_mean_variance", "p_mean_variance"),
        *("p_sample", "p_sample_loop", "p_sample_loop_progressive", "ddim_sample"),
        *("ddim_reverse_sample", "ddim_sample_loop", "ddim_sample_loop_progressive"),
        *("training_losses", "calc_bpd_loop"),
    ),
}


@pytest.mark.parametrize("module", CONTRACT, ids=lambda module: module.__name__.split(".")[1])
def test_names_and_parameters(module):
    for name, expected in CONTRACT[module].items():
        own = [
            parameter.name
            for parameter in inspect.signature(getattr(module, name)).parameters.values()
            if parameter.kind is not parameter.VAR_POSITIONAL
        ]
        assert own[: len(expected)] == list(expected), name


@pytest.mark.parametrize("owner", METHODS, ids=lambda owner: owner.__name__)
def test_methods(owner):
    for name in METHODS[owner]:
        assert callable(getattr(owner, name)), name


def test_the_loops_arguments():
    parameters = inspect.signature(train_util.TrainLoop).parameters
    needed = [name for name, own in parameters.items() if own.default is own.empty]
    assert needed == [
        *("model", "diffusion", "data", "batch_size", "microbatch", "lr", "ema_rate"),
        *("log_interval", "save_interval", "resume_checkpoint"),
    ]
    optional = ("use_fp16", "fp16_scale_growth", "schedule_sampler", "weight_decay")
    assert set(optional) | {"lr_anneal_steps"} <= set(parameters)


def test_flags_reach_the_builders():
    """A program adds the defaults to its parser and passes all of them on."""
    for defaults, create in (
        (script_util.model_and_diffusion_defaults(), script_util.create_model_and_diffusion),
        (script_util.sr_model_and_diffusion_defaults(), script_util.sr_create_model_and_diffusion),
    ):
        parameters = inspect.signature(create).parameters
        # What depends on the channels' names is no flag.
        assert set(defaults) == set(parameters) - {"labels"}
        assert "labels" not in parameters or parameters["labels"].default is None
        parser = argparse.ArgumentParser()
        script_util.add_dict_to_argparser(parser, {"lr": 1e-4, "name": None, **defaults})
        args = parser.parse_args(["--num_channels", "32", "--class_cond", "True"])
        chosen = script_util.args_to_dict(args, defaults.keys())
        with torch.device("meta"):
            model, _ = create(**chosen)
        assert (model.model_channels, model.num_classes) == (32, script_util.NUM_CLASSES)


# A program as users of improved-diffusion have them, in its own words: it trains, samples and
# evaluates an ordinary and a super-resolution model, calls torch.distributed itself, and cannot
# import MPI.
PROGRAM = """
import sys
sys.modules["mpi4py"] = None

import torch
import torch.distributed as dist
import torch.nn.functional as F
from improved_diffusion import dist_util, logger
from improved_diffusion.image_datasets import load_data
from improved_diffusion.resample import create_named_schedule_sampler
from improved_diffusion.script_util import (
    NUM_CLASSES, create_model_and_diffusion, model_and_diffusion_defaults,
    sr_create_model_and_diffusion, sr_model_and_diffusion_defaults,
)
from improved_diffusion.train_util import TrainLoop

small = dict(num_channels=32, num_res_blocks=1, channel_mult="1,1", diffusion_steps=8,
             learn_sigma=True, class_cond=True)
dist_util.setup_dist()
logger.configure()
assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
kind = sys.argv[1]
if kind == "image":
    flags = {**model_and_diffusion_defaults(), **small, "image_size": 32}
    model, diffusion = create_model_and_diffusion(**flags)
    data = load_data(data_dir="pictures", batch_size=3, image_size=32, class_cond=True)
else:
    flags = {**sr_model_and_diffusion_defaults(), **small, "large_size": 32, "small_size": 16}
    model, diffusion = sr_create_model_and_diffusion(**flags)

    def with_low_res():
        pictures = load_data(data_dir="pictures", batch_size=3, image_size=32, class_cond=True)
        for large, cond in pictures:
            cond["low_res"] = F.interpolate(large, 16, mode="area")
            yield large, cond

    data = with_low_res()
model.to(dist_util.dev())
TrainLoop(
    model=model, diffusion=diffusion, data=data, batch_size=3, microbatch=2, lr=1e-4,
    ema_rate="0.9", log_interval=1, save_interval=2, resume_checkpoint="", use_fp16=False,
    fp16_scale_growth=1e-3, schedule_sampler=create_named_schedule_sampler("uniform", diffusion),
    weight_decay=0.0, lr_anneal_steps=0,
).run_loop()

path = logger.get_dir() + "/ema_0.9_000002.pt"
model.load_state_dict(dist_util.load_state_dict(path, map_location="cpu"))
model.eval()
kwargs = {"y": torch.randint(0, NUM_CLASSES, (2,), device=dist_util.dev())}
if kind != "image":
    kwargs["low_res"] = torch.rand(2, 3, 16, 16) * 2 - 1
sample = diffusion.p_sample_loop(model, (2, 3, 32, 32), clip_denoised=True, model_kwargs=kwargs)
sample = ((sample + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
gathered = [torch.zeros_like(sample) for _ in range(dist.get_world_size())]
dist.all_gather(gathered, sample)
assert torch.equal(gathered[0], sample)

if kind == "image":
    batch, cond = next(load_data(data_dir="pictures", batch_size=2, image_size=32,
                                 class_cond=True, deterministic=True))
    bits = diffusion.calc_bpd_loop(model, batch, clip_denoised=True, model_kwargs=cond)
    total = bits["total_bpd"].mean() / dist.get_world_size()
    dist.all_reduce(total)
    assert bits["vb"].shape == bits["mse"].shape == bits["xstart_mse"].shape == (2, 8)
    torch.testing.assert_close(total, (bits["vb"].sum(1) + bits["prior_bpd"]).mean())
dist.barrier()
logger.log("complete")
"""


@pytest.mark.parametrize("kind", ["image", "super_res"])
def test_a_program_for_the_reference(tmp_path, kind):
    (tmp_path / "pictures").mkdir()
    for i, name in enumerate(("cat", "dog", "cat", "ape")):
        levels = np.random.default_rng(i).integers(0, 256, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(levels).save(tmp_path / "pictures" / f"{name}_{i}.png")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OPENAI_LOGDIR": str(tmp_path / "logs"),
        "DIFFUSION_TRAINING_TEST": "1",
    }
    command = [sys.executable, "-c", PROGRAM, kind]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("complete\n")
    names = sorted(path.name for path in (tmp_path / "logs").glob("*.pt"))
    assert names == ["ema_0.9_000002.pt", "model000002.pt", "opt000002.pt"]
    # A second start would write over the run.
    again = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert "already holds a run" in again.stderr
