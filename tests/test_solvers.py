"""Solvers against processes whose solution is known: Gaussian data, where all is linear."""

import itertools
import math

import numpy as np
import pytest
import torch

from improved_diffusion import sampling, solvers
from improved_diffusion.gaussian_diffusion import (
    LEARNED_VARIANCES,
    LossType,
    ModelMeanType,
    ModelVarType,
)
from improved_diffusion.respace import SpacedDiffusion, on_timesteps, space_timesteps
from improved_diffusion.schedules import get_named_beta_schedule
from improved_diffusion.script_util import create_gaussian_diffusion

MEAN, STD = -0.3, 0.4  # of the data


def gaussian_path(points):
    """Evenly spread in lambda, from sigma / alpha 20 to 0.02."""
    noise = np.exp(np.linspace(math.log(20), math.log(0.02), points))
    return solvers.Path(1 / (1 + noise**2))


def posterior_mean(x, alpha, sigma):
    """E[x_0 | x] of Gaussian data."""
    return (STD**2 * alpha * x + sigma**2 * MEAN) / (alpha**2 * STD**2 + sigma**2)


def marginal_std(alpha, sigma):
    return np.sqrt(alpha**2 * STD**2 + sigma**2)


def run(name, path, x, noise_fn=torch.randn_like):
    """What a solver makes of x: at the path's last point before the image, and the image."""
    seen = []

    def denoise(x, i):
        seen.append(x)
        return posterior_mean(x, path.alpha[i], path.sigma[i])

    return seen, solvers.solve(name, denoise, x, path, noise_fn)


def error(name, points):
    """At most, over the path, from the probability-flow equation's exact solution

    x = alpha mean + sqrt(alpha^2 std^2 + sigma^2) z, with one z all along.
    """
    path = gaussian_path(points)
    z = torch.tensor([[-1.5], [0.7], [2.0]], dtype=torch.float64)
    exact = [a * MEAN + marginal_std(a, s) * z for a, s in zip(path.alpha, path.sigma)]
    seen, _ = run(name, path, exact[0])
    # Heun evaluates a second time at each point but the first: the states are the later ones.
    states = seen if name != "heun" else [seen[0], *seen[2::2]]
    # UniPC predicts its first point and its last ones at lower order.
    compared = list(zip(states, exact))[2:-2]
    return max((x - y).abs().max().item() for x, y in compared)


@pytest.mark.parametrize(("name", "order"), [("heun", 2), ("dpmpp_2m", 2), ("unipc", 4)])
def test_order_of_convergence_on_gaussian_data(name, order):
    errors = [error(name, points) for points in (33, 65, 129)]
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    assert orders == pytest.approx([order, order], abs=0.1)
    assert errors[-1] < 4e-4


def test_first_order_step_is_ddims():
    path = gaussian_path(9)
    process = SpacedDiffusion(
        range(9),
        betas=1 - path.alpha[8::-1] ** 2 / np.append(1.0, path.alpha[8:0:-1] ** 2),
        model_mean_type=ModelMeanType.START_X,
        model_var_type=ModelVarType.FIXED_SMALL,
        loss_type=LossType.MSE,
    )
    x, d = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    for i in range(9):
        t = torch.full((3,), 8 - i)
        expected = process.ddim_sample(lambda x, t: d, x, t, clip_denoised=False)["sample"]
        torch.testing.assert_close(solvers._euler(path, i, x, d), expected, rtol=1e-9, atol=1e-9)


def moments(path):
    """Mean and standard deviation of what the stochastic solver makes of N(0, 1) noise, exactly.

    The solver is linear in its noise here: a row of the batch for each draw, in which that draw
    alone is 1, shows what it weighs.
    """
    draws = len(path)
    count = itertools.count(1)

    def impulse(like):
        row = next(count)
        return (torch.arange(draws + 1) == row).to(like.dtype).reshape(-1, 1)

    start = impulse(torch.zeros(1, dtype=torch.float64))
    path_start = path.alpha[0] * MEAN + marginal_std(path.alpha[0], path.sigma[0]) * start
    seen, _ = run("dpmpp_2m_sde", path, path_start, impulse)
    last = seen[-1].squeeze(1)
    return last[0].item(), (last[1:] - last[0]).norm().item()


def test_stochastic_solver_keeps_the_distribution_to_second_order():
    errors = []
    for points in (33, 65, 129):
        path = gaussian_path(points)
        mean, std = moments(path)
        alpha, sigma = path.alpha[-2], path.sigma[-2]
        assert mean == pytest.approx(alpha * MEAN, abs=1e-12)
        errors.append(abs(std - marginal_std(alpha, sigma)))
    assert np.log2(np.divide(errors[:-1], errors[1:])) == pytest.approx([2, 2], abs=0.1)
    assert errors[-1] < 3e-4


def exact_network(process):
    """What a perfect network puts out for Gaussian data, in the process's own parametrisation."""

    def network(x, model_t):
        t = model_t
        if process.rescale_timesteps:
            t = (model_t * process.original_num_steps / 1000).round().long()
        bar = torch.from_numpy(np.cumprod(1 - process.original_betas))[t].reshape(-1, 1, 1, 1)
        alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
        x_start = posterior_mean(x.double(), alpha, sigma)
        eps = (x - alpha * x_start) / sigma
        if process.model_mean_type is ModelMeanType.PREVIOUS_X:
            output = process.q_posterior_mean_variance(x_start, x.double(), t)[0]
        else:
            output = {
                ModelMeanType.START_X: x_start,
                ModelMeanType.EPSILON: eps,
                ModelMeanType.VELOCITY: alpha * eps - sigma * x_start,
            }[process.model_mean_type]
        if process.model_var_type in LEARNED_VARIANCES:
            output = torch.cat([output, torch.full_like(output, 0.3)], dim=1)
        return output.to(x.dtype)

    return network


@pytest.mark.parametrize("sampler", ["ddim", *solvers.SOLVERS])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("mean_type", ModelMeanType)
def test_every_process_of_gaussian_data(sampler, schedule, mean_type):
    """Each sample ends where the exact solution takes its noise; with noise, in distribution."""
    numbers = range(400)
    respacings = ("",) if mean_type is ModelMeanType.PREVIOUS_X else ("", "250")
    for var_type, rescale, respacing in itertools.product(
        (ModelVarType.FIXED_LARGE, ModelVarType.LEARNED_RANGE), (True, False), respacings
    ):
        process = SpacedDiffusion(
            space_timesteps(1000, respacing or [1000]),
            betas=get_named_beta_schedule(schedule, 1000),
            model_mean_type=mean_type,
            model_var_type=var_type,
            loss_type=LossType.MSE,
            rescale_timesteps=rescale,
        )
        timesteps = solvers.choose_timesteps(process, 40, "logsnr")
        if mean_type is ModelMeanType.PREVIOUS_X and sampler == "ddim":
            timesteps = None  # a step's mean is that of the process it was trained for
        samples = sampling.draw(
            exact_network(process),
            process,
            numbers,
            (1, 2, 2),
            seed=1,
            device="cpu",
            sampler=sampler,
            timesteps=timesteps,
            clip_denoised=False,
        )
        if sampler == "dpmpp_2m_sde":
            assert samples.mean().item() == pytest.approx(MEAN, abs=0.03)
            assert samples.std().item() == pytest.approx(STD, abs=0.03)
            continue
        noise = sampling.SampleNoise(1, numbers, "cpu")(torch.empty(400, 1, 2, 2))
        bar = process.alphas_cumprod[-1]
        z = (noise - math.sqrt(bar) * MEAN) / marginal_std(math.sqrt(bar), math.sqrt(1 - bar))
        tolerance = {"ddim": 0.15, "unipc": 0.005}.get(sampler, 0.03)
        torch.testing.assert_close(samples, MEAN + STD * z, rtol=0, atol=tolerance)


PARAMETRISATIONS = {"noise": {}, "image": {"predict_xstart": True}, "velocity": {"predict_v": True}}
VARIANCES = {"small": {"sigma_small": True}, "large": {}, "learned": {"learn_sigma": True}}
SCHEDULES = {
    f"{base} {name}": {"noise_schedule": base, **changes}
    for base in ("linear", "cosine")
    for name, changes in {
        "as it is": {},
        "shifted down": {"snr_shift": 0.25},
        "shifted up": {"snr_shift": 4.0},
        "without signal": {"zero_terminal_snr": True},
    }.items()
}


def optimal_network(process):
    """What the best network puts out for Gaussian data, the variance included."""
    bar, before = (
        torch.from_numpy(p) for p in (process.alphas_cumprod, process.alphas_cumprod_prev)
    )
    alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
    # Bayes' rule for x_{t-1} given x_t, of which x_{t-1} is Gaussian too.
    own, noisier = before * STD**2 + 1 - before, bar * STD**2 + 1 - bar
    variance = own * (1 - bar / before * own / noisier)
    small, large = (
        torch.from_numpy(p) for p in (process.posterior_log_variance_clipped, process.log_betas)
    )
    share = 2 * (variance.log() - small) / (large - small).clamp(min=1e-12) - 1
    index = {model_t: t for t, model_t in enumerate(process.timestep_map)}

    def network(x, model_t):
        t = index[model_t[0].item()]
        a, s = alpha[t], sigma[t]
        x_start = posterior_mean(x, a, s)
        noise = (x - a * x_start) / s
        output = {
            ModelMeanType.START_X: x_start,
            ModelMeanType.EPSILON: noise,
            ModelMeanType.VELOCITY: a * noise - s * x_start,
        }[process.model_mean_type]
        if process.model_var_type is ModelVarType.LEARNED_RANGE:
            output = torch.cat([output, share[t].expand_as(output)], dim=1)
        return output

    return network


class Impulses:
    """In place of noise: draw k is 1 in row k and else 0.

    Here all is linear, so the last row but the first tell what each draw weighs in the result, and
    with that its mean and standard deviation, exactly.
    """

    def __init__(self, *_):
        self.drawn = 0

    def __call__(self, like):
        self.drawn += 1
        rows = torch.arange(len(like)) == self.drawn
        return rows.double().reshape(-1, *[1] * (like.dim() - 1))


def exact_moments(process, sampler, steps, spacing):
    timesteps = solvers.choose_timesteps(process, steps, spacing)
    if sampler in ("ancestral", "ddim"):
        process, timesteps = on_timesteps(process, timesteps), None
    rows = sampling.draw(
        optimal_network(process),
        process,
        range(steps + 2),
        (1, 1, 1),
        seed=0,
        device="cpu",
        sampler=sampler,
        timesteps=timesteps,
        clip_denoised=False,
    ).flatten()
    return rows[0].item(), (rows[1:] - rows[0]).norm().item()


# How far 20 steps, even in the signal-to-noise ratio, are from the standard deviation of the data.
WITHIN = {"ddim": 0.06, "heun": 0.02, "dpmpp_2m": 0.01, "dpmpp_2m_sde": 0.02, "unipc": 0.002}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
def test_every_combination_draws_gaussian_data(sampler, schedule, monkeypatch):
    monkeypatch.setattr(sampling, "SampleNoise", Impulses)
    results = {}
    for (mean_name, mean), (name, variance) in itertools.product(
        PARAMETRISATIONS.items(), VARIANCES.items()
    ):
        flags = {**SCHEDULES[schedule], **mean, **variance}
        if mean_name == "noise" and "zero_terminal_snr" in flags:
            continue
        process = create_gaussian_diffusion(steps=1000, **flags)
        results[mean_name, name] = exact_moments(process, sampler, 20, "logsnr")
    by_variance = {name: results["velocity", name] for name in VARIANCES}
    for (_, name), moments in results.items():
        assert moments == pytest.approx(by_variance[name], abs=1e-9)
    for name, (mean, std) in by_variance.items():
        # x_T is taken to be pure noise, of which all but the last schedule are a little short.
        assert mean == pytest.approx(MEAN, abs=1e-9 if "without" in schedule else 2e-3)
        if sampler != "ancestral":
            assert std == pytest.approx(STD, abs=WITHIN[sampler])
        elif name == "learned":  # which is right for any number of steps
            assert std == pytest.approx(STD, abs=1e-3)
        else:  # the best variance lies between the two
            assert 0 < (std - STD) * (1 if name == "large" else -1) < 0.1


@pytest.mark.parametrize(("spacing", "steps"), [("uniform", 100), ("trailing", 50), ("karras", 25)])
@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
def test_every_spacing_of_a_process_without_signal(sampler, spacing, steps, monkeypatch):
    monkeypatch.setattr(sampling, "SampleNoise", Impulses)
    process = create_gaussian_diffusion(
        steps=1000,
        noise_schedule="cosine",
        zero_terminal_snr=True,
        predict_v=True,
        learn_sigma=True,
    )
    mean, std = exact_moments(process, sampler, steps, spacing)
    assert mean == pytest.approx(MEAN, abs=1e-9)
    assert std == pytest.approx(STD, abs=0.06)


def eps_network(x, t):
    """Not linear in x, and different at every timestep."""
    return torch.tanh(1.5 * x) * (0.8 + 0.2 * t.reshape(-1, 1, 1, 1) / 1000)


def peers(diffusers):
    common = {
        "num_train_timesteps": 1000,
        "beta_schedule": "linear",
        "timestep_spacing": "linspace",
    }
    multistep = {**common, "final_sigmas_type": "zero", "solver_order": 2}
    dpm = diffusers.DPMSolverMultistepScheduler
    return {
        "dpmpp_2m": dpm(algorithm_type="dpmsolver++", euler_at_final=True, **multistep),
        "dpmpp_2m_sde": dpm(algorithm_type="sde-dpmsolver++", euler_at_final=True, **multistep),
        "unipc": diffusers.UniPCMultistepScheduler(**{**multistep, "solver_order": 3}),
        "heun": diffusers.HeunDiscreteScheduler(beta_start=1e-4, beta_end=0.02, **common),
    }


@pytest.mark.parametrize("name", list(solvers.SOLVERS))
def test_equals_diffusers(name):
    """The same network, timesteps and noise through the scheduler of a well-kept library."""
    scheduler = peers(pytest.importorskip("diffusers"))[name]
    process = create_gaussian_diffusion(steps=1000)
    if name == "heun":  # steps that are short enough for the second evaluation's whole weight
        scheduler.set_timesteps(timesteps=solvers.choose_timesteps(process, 30, "karras")[::-1])
    else:
        scheduler.set_timesteps(12)
    visited = [round(t) for t in dict.fromkeys(scheduler.timesteps.tolist())]
    noise = torch.randn(40, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    draws = iter(noise)
    x = next(draws) * (float(scheduler.init_noise_sigma) if name == "heun" else 1)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        output = eps_network(scaled, torch.full((2,), float(t)))
        kwargs = {"variance_noise": next(draws)} if name == "dpmpp_2m_sde" else {}
        x = scheduler.step(output, t, x, **kwargs).prev_sample

    draws = iter(noise)
    path = solvers.Path(process.alphas_cumprod[visited])

    def denoise(x, i):
        t = torch.full((2,), visited[i])
        return process.predict_xstart(eps_network, x, t, clip_denoised=False)

    own = solvers.solve(name, denoise, next(draws), path, lambda like: next(draws))
    # The library counts in float32, and in sigma / alpha up to 157.
    torch.testing.assert_close(own, x, rtol=0, atol=5e-5 * x.abs().max().item())


def test_timesteps():
    linear = create_gaussian_diffusion(steps=1000)
    ended = create_gaussian_diffusion(steps=1000, zero_terminal_snr=True, predict_v=True)
    assert solvers.choose_timesteps(linear, 250, "uniform") == sorted(space_timesteps(1000, "250"))
    assert solvers.choose_timesteps(linear, 5, "trailing") == [199, 399, 599, 799, 999]
    for spacing in solvers.SPACINGS:
        for process in (linear, ended):
            assert solvers.choose_timesteps(process, 1, spacing) == [999]
            assert solvers.choose_timesteps(process, 1000, spacing) == list(range(1000))
        assert solvers.choose_timesteps(on_timesteps(ended, [999]), 1, spacing) == [0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("changes", [{}, {"zero_terminal_snr": True, "predict_v": True}])
@pytest.mark.parametrize("steps", [2, 10, 20, 50, 400])
@pytest.mark.parametrize("spacing", ["logsnr", "karras"])
def test_timesteps_spread_in_noise(schedule, changes, steps, spacing):
    process = create_gaussian_diffusion(steps=1000, noise_schedule=schedule, **changes)
    chosen = solvers.choose_timesteps(process, steps, spacing)
    assert len(chosen) == steps
    assert sorted(set(chosen)) == chosen
    assert (chosen[0], chosen[-1]) == (0, 999)
    if steps in (10, 20):
        bar = process.alphas_cumprod[chosen[1:-1]]
        noise = np.sqrt((1 - bar) / bar)
        assert noise.max() < 81
        places = np.log(noise) if spacing == "logsnr" else noise ** (1 / 7)
        gaps = np.diff(places)
        # Even, to the rounding to whole timesteps, which is coarse near the image.
        assert gaps[2:].min() > 0.85 * np.median(gaps)
        assert gaps[2:].max() < 1.15 * np.median(gaps)


def test_a_process_that_ends_without_signal():
    """Zero terminal signal: lambda is endless at the start, and nothing becomes infinite."""
    noise = np.exp(np.linspace(math.log(20), math.log(0.02), 20))
    path = solvers.Path([0.0, *(1 / (1 + noise**2))])
    x = torch.randn(500, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = x  # pure noise
    for name in solvers.SOLVERS:
        _, image = run(name, path, x)
        if name == "dpmpp_2m_sde":
            assert image.std().item() == pytest.approx(STD, abs=0.05)
        else:
            torch.testing.assert_close(image, MEAN + STD * z, rtol=0, atol=0.06)


@pytest.mark.parametrize(
    ("steps", "spacing", "message"),
    [
        (0, "uniform", "--sampling_steps 0: the process has 1000"),
        (1001, "karras", "--sampling_steps 1001"),
        (10, "even", "--timestep_spacing even: choose from uniform, trailing, logsnr, karras"),
    ],
)
def test_impossible_timesteps_are_refused(steps, spacing, message):
    with pytest.raises(ValueError, match=message):
        solvers.choose_timesteps(create_gaussian_diffusion(steps=1000), steps, spacing)
