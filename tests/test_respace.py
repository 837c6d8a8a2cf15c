import numpy as np
import pytest
import torch

from improved_diffusion.respace import SpacedDiffusion, respaced, space_timesteps
from improved_diffusion.script_util import create_gaussian_diffusion


def test_space_timesteps_equals_the_reference(golden):
    for key, expected in golden("scalars.json")["space_timesteps"].items():
        steps, counts = key.split(":")
        assert sorted(space_timesteps(int(steps), counts)) == expected, key


def test_impossible_counts_are_refused_as_by_the_reference(golden):
    for key in golden("scalars.json")["space_timesteps_refused"]:
        steps, counts = key.split(":")
        with pytest.raises(ValueError, match=f"--timestep_respacing {counts}"):
            space_timesteps(int(steps), counts)


@pytest.mark.parametrize("counts", ["abc", "ddim", "0", "-3", "10,,5", "2000"])
def test_nonsense_is_refused(counts):
    with pytest.raises(ValueError, match="--timestep_respacing"):
        space_timesteps(1000, counts)


def test_respaced_process_keeps_the_noise_levels():
    whole = create_gaussian_diffusion(steps=1000)
    spaced = create_gaussian_diffusion(steps=1000, timestep_respacing="250")
    assert spaced.num_timesteps == 250
    np.testing.assert_allclose(
        spaced.alphas_cumprod, whole.alphas_cumprod[spaced.timestep_map], rtol=1e-12
    )


def test_respacing_again_starts_from_the_whole_process():
    spaced = create_gaussian_diffusion(steps=1000, timestep_respacing="250", learn_sigma=True)
    again = respaced(spaced, "ddim50")
    direct = create_gaussian_diffusion(steps=1000, timestep_respacing="ddim50", learn_sigma=True)
    assert again.timestep_map == direct.timestep_map
    np.testing.assert_array_equal(again.betas, direct.betas)
    assert again.model_var_type is direct.model_var_type


@pytest.mark.parametrize("rescale", [False, True])
def test_model_is_told_the_original_timesteps(rescale):
    spaced = SpacedDiffusion(
        [0, 7, 19],
        betas=np.linspace(0.01, 0.2, 20),
        **{
            key: getattr(create_gaussian_diffusion(), key)
            for key in ("model_mean_type", "model_var_type", "loss_type")
        },
        rescale_timesteps=rescale,
    )
    told = spaced.model_timesteps(torch.tensor([2, 0, 1]))
    assert told.tolist() == ([950.0, 0.0, 350.0] if rescale else [19, 0, 7])
