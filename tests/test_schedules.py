"""Shifted schedules and schedules that end in pure noise; what the flags for them stand for."""

import numpy as np
import pytest

from improved_diffusion.schedules import (
    end_without_signal,
    get_named_beta_schedule,
    parse_snr_shift,
    shift_snr,
)
from improved_diffusion.script_util import (
    create_gaussian_diffusion,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)

SMALL = {"num_channels": 32, "num_res_blocks": 1, "num_heads": 1, "channel_mult": "1,1"}


def alpha_bar(betas):
    return np.cumprod(1 - betas)


def odds(betas):
    return alpha_bar(betas) / (1 - alpha_bar(betas))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("shift", [1e-4, 0.0625, 0.25, 4, 1e4])
def test_a_shift_multiplies_the_odds(schedule, shift):
    for steps in (10, 1000, 4000):
        betas = get_named_beta_schedule(schedule, steps)
        shifted = shift_snr(betas, shift)
        np.testing.assert_allclose(odds(shifted), shift * odds(betas), rtol=1e-7)
        assert (shifted > 0).all() and (shifted < 1).all()
        np.testing.assert_allclose(shift_snr(shifted, 1 / shift), betas, rtol=1e-5)


def test_a_shift_by_hand():
    # alpha_bar 4/5 and 1/2 have the odds 4 and 1; four times as many are 16 and 4.
    shifted = shift_snr(np.array([1 / 5, 1 - (1 / 2) / (4 / 5)]), 4.0)
    np.testing.assert_allclose(alpha_bar(shifted), [16 / 17, 4 / 5], rtol=1e-14)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_no_shift_leaves_every_bit(schedule):
    betas = get_named_beta_schedule(schedule, 1000)
    assert shift_snr(betas, 1.0) is betas
    process = create_gaussian_diffusion(noise_schedule=schedule, timestep_respacing="50")
    other = create_gaussian_diffusion(
        noise_schedule=schedule, timestep_respacing="50", snr_shift=parse_snr_shift("1.0", 256)
    )
    assert process.betas.tobytes() == other.betas.tobytes()


def test_larger_images_averaged_have_the_noise_of_smaller_ones():
    """Pixels of which 4 x 4 are averaged have a sixteenth of the noise's variance."""
    large = create_gaussian_diffusion(snr_shift=parse_snr_shift("auto", 256)).alphas_cumprod
    small = create_gaussian_diffusion().alphas_cumprod
    averaged = large / (large + (1 - large) / 16)
    np.testing.assert_allclose(averaged, small, rtol=1e-9)


@pytest.mark.parametrize(
    ("text", "size", "shift"),
    [
        ("auto", 64, 1),
        ("auto", 128, 1 / 4),
        ("auto", 256, 1 / 16),
        ("auto", 32, 4),
        ("0.5", 9, 0.5),
    ],
)
def test_what_the_flag_stands_for(text, size, shift):
    assert parse_snr_shift(text, size) == shift


def test_auto_goes_by_the_size_of_the_images_that_are_made():
    flags = {**model_and_diffusion_defaults(), **SMALL, "image_size": 128, "snr_shift": "auto"}
    _, process = create_model_and_diffusion(**flags)
    expected = create_gaussian_diffusion(snr_shift=0.25).betas
    np.testing.assert_array_equal(process.betas, expected)
    flags = {**sr_model_and_diffusion_defaults(), **SMALL, "large_size": 128, "snr_shift": "auto"}
    _, process = sr_create_model_and_diffusion(**flags)
    np.testing.assert_array_equal(process.betas, expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [2, 30, 1000])
def test_the_last_step_has_no_signal_and_the_first_its_own(schedule, steps):
    betas = get_named_beta_schedule(schedule, steps)
    ended = end_without_signal(betas)
    assert ended[-1] == 1 and alpha_bar(ended)[-1] == 0
    assert ended[0] == pytest.approx(betas[0], rel=1e-10)
    assert (ended[:-1] < 1).all()
    # Algorithm 1: sqrt(alpha_bar) falls in proportion.
    before, after = np.sqrt(alpha_bar(betas)), np.sqrt(alpha_bar(ended))
    np.testing.assert_allclose(
        np.diff(after) / np.diff(before), before[0] / (before[0] - before[-1]), rtol=1e-6
    )


def test_both_changes_of_a_schedule():
    """The shift leaves the end without signal, and the odds of all others are multiplied."""
    for schedule in ("linear", "cosine"):
        flags = {"noise_schedule": schedule, "predict_v": True, "zero_terminal_snr": True}
        ended = create_gaussian_diffusion(**flags).alphas_cumprod
        both = create_gaussian_diffusion(**flags, snr_shift=0.25).alphas_cumprod
        assert both[-1] == ended[-1] == 0
        np.testing.assert_allclose(both / (1 - both), ended / (1 - ended) / 4, rtol=1e-9)


@pytest.mark.parametrize("shift", ["", "x", "nan", "0", "-1", "inf", "1e5", "1e-5"])
def test_impossible_shifts_are_refused(shift):
    with pytest.raises(ValueError, match=r"--snr_shift .*: give a number"):
        create_gaussian_diffusion(snr_shift=parse_snr_shift(shift, 64))


def test_what_cannot_end_without_signal_is_refused():
    with pytest.raises(ValueError, match=r"--predict_v True or --predict_xstart True"):
        create_gaussian_diffusion(zero_terminal_snr=True)
    with pytest.raises(ValueError, match="--diffusion_steps 2 or more"):
        create_gaussian_diffusion(steps=1, zero_terminal_snr=True, predict_v=True)
