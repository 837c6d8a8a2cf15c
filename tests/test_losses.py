"""Weights of the squared error over the timesteps."""

import math

import numpy as np
import pytest
import torch

from improved_diffusion.losses import WEIGHTINGS, xstart_weights
from improved_diffusion.respace import on_timesteps
from improved_diffusion.script_util import create_gaussian_diffusion

WEIGHTED = WEIGHTINGS[1:]
PARAMETRISATIONS = ({}, {"predict_xstart": True}, {"predict_v": True})
SNR = [0.0, 0.01, 1.0, 4.0, 9.0, 10_000.0]


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("min_snr", [0, 0.01, 1, 4, 5, 5]),
        ("truncated_snr", [1, 1, 1, 4, 9, 10_000]),
        ("p2", [0, 0.01 / 1.01, 1 / 2, 4 / 5, 9 / 10, 10_000 / 10_001]),
        # snr * sigmoid(-1 - log snr) = snr / (1 + e snr)
        ("sigmoid", [s / (1 + math.e * s) for s in SNR]),
        ("debiased", [0, 0.1, 1, 2, 3, 100]),
    ],
)
def test_weights_by_hand(weighting, expected):
    np.testing.assert_allclose(xstart_weights(weighting, np.array(SNR)), expected, rtol=1e-14)


def test_gamma_and_bias_by_hand():
    snr = np.array([1.0, 3.0, 7.0])
    assert xstart_weights("min_snr", snr, gamma=2).tolist() == [1, 2, 2]
    # At the bias the noise's error weighs half.
    weight = xstart_weights("sigmoid", snr, sigmoid_bias=math.log(3))[1] / snr[1]
    assert weight == pytest.approx(0.5)


@pytest.mark.parametrize("weighting", WEIGHTED)
@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("snr_shift", [1.0, 0.25])
def test_a_weighting_is_the_same_objective_whatever_is_predicted(weighting, learn_sigma, snr_shift):
    """Networks that make the same error of x_0, each in its own parametrisation."""
    generator = torch.Generator().manual_seed(0)
    x0, noise, error = torch.randn(3, 5, 1, 4, 4, dtype=torch.float64, generator=generator)
    t = torch.tensor([0, 100, 400, 700, 999])
    weighted = []
    for flags in PARAMETRISATIONS:
        process = create_gaussian_diffusion(
            loss_weighting=weighting, learn_sigma=learn_sigma, snr_shift=snr_shift, **flags
        )
        x_t = process.q_sample(x0, t, noise)
        eps = process.predict_eps_from_xstart(x_t, t, x0 + error)
        output = process._training_target(x0 + error, x_t, t, eps)
        if learn_sigma:
            output = torch.cat([output, torch.zeros_like(output)], dim=1)
        terms = process.training_losses(lambda x, t, output=output: output, x0, t, noise=noise)
        weighted.append(terms["loss"] - terms.get("vb", 0))
    bar = process.alphas_cumprod[t]
    own = xstart_weights(weighting, bar / (1 - bar), sigmoid_bias=-1 + math.log(snr_shift))
    own = own * error.square().flatten(1).mean(dim=1).numpy()
    for loss in weighted:
        np.testing.assert_allclose(loss, own, rtol=1e-7)


@pytest.mark.parametrize("flags", PARAMETRISATIONS)
def test_what_is_logged_stays_the_plain_squared_error(flags):
    x0, noise = torch.randn(2, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 5, 12, 19])
    model = lambda x, t: torch.cat([torch.sin(x), torch.cos(x)], dim=1)  # noqa: E731
    plain = create_gaussian_diffusion(steps=20, learn_sigma=True, **flags)
    weighted = create_gaussian_diffusion(
        steps=20, learn_sigma=True, loss_weighting="min_snr", min_snr_gamma=2.0, **flags
    )
    names = ("T1CE", "Seg")
    terms = plain.training_losses(model, x0, t, noise=noise, channel_names=names)
    other = weighted.training_losses(model, x0, t, noise=noise, channel_names=names)
    for name in ("mse", "vb", "mse_T1CE", "mse_Seg"):
        assert torch.equal(terms[name], other[name])
    assert torch.equal(terms["loss"], terms["mse"] + terms["vb"])
    own = torch.from_numpy(weighted.loss_weights)[t].float()
    assert torch.equal(other["loss"], own * terms["mse"] + terms["vb"])
    assert not torch.equal(other["loss"], terms["loss"])


@pytest.mark.parametrize("weighting", WEIGHTED)
@pytest.mark.parametrize("flags", PARAMETRISATIONS[1:])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_last_timestep_is_trained_without_signal_too(weighting, flags, schedule):
    process = create_gaussian_diffusion(
        noise_schedule=schedule, zero_terminal_snr=True, loss_weighting=weighting, **flags
    )
    weights = process.loss_weights
    assert np.isfinite(weights).all() and (weights > 0).all()
    # That of the timestep before it, as of x_0's error, which is the velocity's here.
    snr = process.alphas_cumprod[-2] / (1 - process.alphas_cumprod[-2])
    own = 1.0 if weighting == "truncated_snr" else xstart_weights(weighting, np.array([snr]))[0]
    assert weights[-1] == pytest.approx(own, rel=1e-12)


def test_other_timesteps_keep_the_weights_of_their_noise():
    whole = create_gaussian_diffusion(loss_weighting="min_snr", min_snr_gamma=3.0, snr_shift=0.25)
    some = on_timesteps(whole, [0, 10, 500, 999])
    np.testing.assert_allclose(some.loss_weights, whole.loss_weights[some.timestep_map], rtol=1e-9)
    again = on_timesteps(some, range(1000))
    np.testing.assert_allclose(again.loss_weights, whole.loss_weights, rtol=1e-9)
    assert whole.loss_weights[0] == pytest.approx(3 * (1 / whole.alphas_cumprod[0] - 1))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"loss_weighting": "snr"}, "--loss_weighting snr: choose from uniform, min_snr, "),
        ({"loss_weighting": "min_snr", "min_snr_gamma": 0.0}, "--min_snr_gamma 0: give"),
        ({"loss_weighting": "p2", "use_kl": True}, "--loss_weighting p2 .* --use_kl True"),
    ],
)
def test_impossible_weightings_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        create_gaussian_diffusion(**flags)
