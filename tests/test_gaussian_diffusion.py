import math

import numpy as np
import pytest
import torch
from conftest import relative_error

from improved_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
)
from improved_diffusion.losses import discretized_gaussian_log_likelihood, normal_kl
from improved_diffusion.respace import on_timesteps
from improved_diffusion.schedules import get_named_beta_schedule
from improved_diffusion.script_util import create_gaussian_diffusion

PROCESSES = (
    "seed_brats",
    "seed_brats_respaced250",
    "cosine4000_rescaled",
    "fixed_large_eps",
    "fixed_small_xstart",
    "kl_ddim25",
)


class Case:
    """A golden process with its inputs, its numbers and the analytic stand-in network."""

    def __init__(self, golden, name):
        self.arguments = golden("diffusion.json")[name]
        self.process = create_gaussian_diffusion(**self.arguments)
        self.arrays, self.name = golden("diffusion.npz"), name
        self.x0, self.noise, self.t = (torch.from_numpy(self[key]) for key in ("x0", "noise", "t"))
        self.x_t = self.process.q_sample(self.x0, self.t, self.noise)

    def __getitem__(self, key):
        return self.arrays[f"{self.name}/{key}"]

    def __contains__(self, key):
        return f"{self.name}/{key}" in self.arrays

    def model(self, x, t):
        t = t.float().reshape(-1, 1, 1, 1)
        a = torch.sin(0.7 * x + 0.001 * t)
        if not self.arguments["learn_sigma"]:
            return a
        return torch.cat([a, torch.cos(0.3 * x - 0.002 * t)], dim=1)

    def check(self, key, value, tolerance=1e-4):
        assert relative_error(value, self[key]) < tolerance, key


@pytest.fixture(params=PROCESSES)
def case(golden, request):
    return Case(golden, request.param)


def test_schedule(case):
    np.testing.assert_allclose(case.process.betas, case["betas"], rtol=1e-9)
    assert list(case.process.timestep_map) == list(case["timestep_map"])


def test_forward_and_posterior(case):
    case.check("q_sample", case.x_t)
    mean, variance, log_variance = case.process.q_posterior_mean_variance(case.x0, case.x_t, case.t)
    case.check("q_posterior_mean", mean)
    case.check("q_posterior_variance", variance)
    case.check("q_posterior_log_variance", log_variance)


@pytest.mark.parametrize("clip", [True, False])
def test_reverse_distribution(case, clip):
    out = case.process.p_mean_variance(case.model, case.x_t, case.t, clip_denoised=clip)
    prefix = "p_clip_" if clip else "p_raw_"
    for key in ("mean", "variance", "log_variance", "pred_xstart"):
        case.check(prefix + key, out[key])


def test_losses(case):
    terms = case.process.training_losses(case.model, case.x0, case.t, noise=case.noise)
    expected = {key for key in ("loss", "mse", "vb") if f"loss_{key}" in case}
    assert set(terms) == expected
    for key in expected:
        case.check(f"loss_{key}", terms[key])


def test_ddim_steps_and_loop(case):
    step = case.process.ddim_sample(case.model, case.x_t, case.t)
    case.check("ddim_eta0", step["sample"])
    step = case.process.ddim_reverse_sample(case.model, case.x_t, case.t)
    case.check("ddim_reverse", step["sample"])
    if case["ddim_loop"].size:
        noise = case.noise[:2]
        out = case.process.ddim_sample_loop(case.model, noise.shape, noise=noise)
        case.check("ddim_loop", out)


def test_bound(case):
    out = case.process.vb_terms_bpd(case.model, case.x0, case.x_t, case.t)
    case.check("vb_bpd", out["output"])
    case.check("prior_bpd", case.process.prior_bpd(case.x0))


def test_kl_and_likelihood(golden):
    scalars = golden("scalars.json")
    mean1, mean2, logvar1, logvar2 = (
        torch.from_numpy(np.random.RandomState(seed).randn(3, 4)).float()
        for seed in (500, 501, 502, 503)
    )
    assert (
        relative_error(
            normal_kl(mean1, mean2=mean2, logvar1=logvar1, logvar2=logvar2), scalars["normal_kl"]
        )
        < 1e-5
    )
    likelihood = discretized_gaussian_log_likelihood(
        torch.tensor(scalars["likelihood_x"]), means=mean1.tanh(), log_scales=logvar1
    )
    # Differences of a distribution function: processors round them differently.
    assert relative_error(likelihood, scalars["discretized_gaussian_log_likelihood"]) < 1e-4


def test_kl_by_hand():
    # Two unit Gaussians, two apart: half the squared distance.
    zero = torch.zeros(1, dtype=torch.float64)
    assert normal_kl(zero, 0.0, 2.0, 0.0).item() == pytest.approx(2.0)
    # Equal means, variances 1 and 4: (1/4 - 1 + ln 4) / 2.
    expected = (0.25 - 1 + math.log(4)) / 2
    assert normal_kl(zero, 0.0, 0.0, math.log(4)).item() == pytest.approx(expected)


def test_likelihood_of_all_levels_sums_to_one():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    mean, log_scale = torch.full_like(levels, 0.3), torch.full_like(levels, -1.0)
    log_p = discretized_gaussian_log_likelihood(levels, means=mean, log_scales=log_scale)
    assert log_p.exp().sum().item() == pytest.approx(1.0, abs=1e-9)


def process(mean_type=ModelMeanType.EPSILON, var_type=ModelVarType.FIXED_SMALL, steps=50, **kwargs):
    return GaussianDiffusion(
        betas=get_named_beta_schedule("cosine", steps),
        model_mean_type=mean_type,
        model_var_type=var_type,
        loss_type=LossType.MSE,
        **kwargs,
    )


def test_linear_schedule_by_hand():
    betas = get_named_beta_schedule("linear", 1000)
    assert (betas[0], betas[-1]) == (1e-4, 0.02)
    assert betas[1] - betas[0] == pytest.approx((0.02 - 1e-4) / 999)
    assert get_named_beta_schedule("linear", 10).max() == 0.999


def test_cosine_schedule_follows_equation_17():
    betas = get_named_beta_schedule("cosine", 1000)
    u = (np.arange(1000) + 1) / 1000
    f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    f0 = np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(np.cumprod(1 - betas)[:-1], (f / f0)[:-1], rtol=1e-9)
    assert betas[-1] == 0.999


@pytest.mark.parametrize("mean_type", list(ModelMeanType))
def test_every_parametrisation_returns_the_image_it_was_made_from(mean_type):
    """A model that predicts exactly what it is trained to predict gives back x_0."""
    p = process(mean_type)
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64).tanh()
    t = torch.tensor([0, 1, 20, 40, 48])
    x_t = p.q_sample(x0, t, noise)
    target = p._training_target(x0, x_t, t, noise)
    out = p.p_mean_variance(lambda x, t: target, x_t, t)
    torch.testing.assert_close(out["pred_xstart"], x0, rtol=0, atol=1e-9)
    losses = p.training_losses(lambda x, t: target, x0, t, noise=noise)
    assert losses["loss"].abs().max() == 0


def test_velocity_is_the_tangent_of_the_circle():
    """With x_t = cos(a) x_0 + sin(a) noise, v is the derivative by the angle a."""
    p = process()
    x0, noise = torch.randn(2, 1, 1, 2, 2, dtype=torch.float64)
    t = torch.tensor([20])
    angle = math.acos(math.sqrt(p.alphas_cumprod[20]))
    h = 1e-6
    x = [math.cos(a) * x0 + math.sin(a) * noise for a in (angle - h, angle + h)]
    torch.testing.assert_close(
        p.velocity(x0, t, noise), (x[1] - x[0]) / (2 * h), rtol=1e-6, atol=1e-8
    )


def test_posterior_is_bayes_rule():
    """q(x_{t-1} | x_t, x_0) from the product of the two Gaussians that define it."""
    p = process()
    t = 30
    x0, x_t = torch.tensor([[0.4]]).double(), torch.tensor([[-0.7]]).double()
    bar, alpha, beta = p.alphas_cumprod[t - 1], 1 - p.betas[t], p.betas[t]
    precision = 1 / (1 - bar) + alpha / beta
    mean = (math.sqrt(bar) * 0.4 / (1 - bar) + math.sqrt(alpha) * -0.7 / beta) / precision
    out = p.q_posterior_mean_variance(x0, x_t, torch.tensor([t]))
    assert out[0].item() == pytest.approx(mean)
    assert out[1].item() == pytest.approx(1 / precision)


def gaussian_data_model(p, mean, std):
    """The exact prediction of x_0 for data N(mean, std^2), by Bayes' rule."""

    def model(x, t):
        bar = torch.from_numpy(p.alphas_cumprod)[t].reshape(-1, 1).to(x)
        gain = bar.sqrt() * std**2 / (bar * std**2 + 1 - bar)
        return mean + gain * (x - bar.sqrt() * mean)

    return model


def test_ancestral_sampling_reproduces_gaussian_data():
    p = process(ModelMeanType.START_X, steps=400)
    torch.manual_seed(1)
    model = gaussian_data_model(p, 0.2, 0.1)
    samples = p.p_sample_loop(model, (20_000, 1), device="cpu", clip_denoised=False)
    assert samples.mean().item() == pytest.approx(0.2, abs=0.005)
    assert samples.std().item() == pytest.approx(0.1, rel=0.05)


def test_ddim_follows_the_probability_flow_of_gaussian_data():
    """Its exact solution keeps (x - sqrt(bar) mean) / sqrt(bar std^2 + 1 - bar) constant."""
    mean, std = 0.2, 0.5
    errors = []
    for steps in (100, 200):
        p = process(ModelMeanType.START_X, steps=steps)
        x = torch.tensor([[-1.5], [0.0], [2.0]], dtype=torch.float64)
        bar = p.alphas_cumprod[-1]
        z = (x - math.sqrt(bar) * mean) / math.sqrt(bar * std**2 + 1 - bar)
        model = gaussian_data_model(p, mean, std)
        out = p.ddim_sample_loop(model, x.shape, noise=x, clip_denoised=False)
        errors.append((out - (mean + std * z)).abs().max().item())
    assert errors[1] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.25)


def test_ddim_with_eta_one_has_the_ancestral_variance():
    p = process(ModelMeanType.START_X)
    t = torch.full((50_000,), 25)
    x = torch.zeros(50_000, 1, dtype=torch.float64)
    torch.manual_seed(0)
    out = p.ddim_sample(lambda x, t: torch.zeros_like(x), x, t, eta=1.0)
    assert out["sample"].var().item() == pytest.approx(p.posterior_variance[25], rel=0.03)


def test_ddim_reverse_undoes_a_small_step():
    p = process(ModelMeanType.EPSILON, steps=1000)
    t = torch.tensor([500])
    x = torch.tensor([[[[0.3]]]], dtype=torch.float64)
    model = lambda x, t: torch.full_like(x, 0.25)  # noqa: E731
    noisier = p.ddim_reverse_sample(model, x, t, clip_denoised=False)["sample"]
    back = p.ddim_sample(model, noisier, t + 1, clip_denoised=False)["sample"]
    assert back.item() == pytest.approx(0.3, abs=1e-12)


def test_learned_range_lies_between_the_two_fixed_variances():
    p = process(var_type=ModelVarType.LEARNED_RANGE)
    x, t = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.tensor([10])
    ends = []
    for v in (-1.0, 1.0):
        model = lambda x, t, v=v: torch.cat([x, torch.full_like(x, v)], dim=1)  # noqa: E731
        ends.append(p.p_mean_variance(model, x, t)["variance"].item())
    assert ends == pytest.approx([p.posterior_variance[10], p.betas[10]])


@pytest.mark.parametrize("v", [-30.0, 0.0, 30.0])
def test_noise_beyond_the_range_is_not_drawn_with_image_prediction(v):
    """The bound counts the variance as it is predicted, and so does what predicts the noise."""
    x, t = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.tensor([10])
    model = lambda x, t: torch.cat([x, torch.full_like(x, v)], dim=1)  # noqa: E731
    for mean_type in (ModelMeanType.START_X, ModelMeanType.EPSILON):
        p = process(mean_type, ModelVarType.LEARNED_RANGE)
        small, large = p.posterior_log_variance_clipped[10], p.log_betas[10]
        predicted = small + (v + 1) / 2 * (large - small)
        drawn = p.p_sample(model, x, t, noise_fn=torch.ones_like)["sample"].item()
        if mean_type is ModelMeanType.START_X:
            assert drawn == pytest.approx(math.exp(np.clip(predicted, small, large) / 2))
        else:
            assert drawn == pytest.approx(math.exp(predicted / 2))
        assert p.p_mean_variance(model, x, t)["log_variance"].item() == pytest.approx(predicted)


def test_learned_variance_is_taken_as_predicted():
    p = process(var_type=ModelVarType.LEARNED)
    x, t = torch.zeros(1, 1, 1, 1), torch.tensor([10])
    model = lambda x, t: torch.cat([x, torch.full_like(x, -3.0)], dim=1)  # noqa: E731
    assert p.p_mean_variance(model, x, t)["variance"].item() == pytest.approx(math.exp(-3))


@pytest.mark.parametrize("mean_type", list(ModelMeanType))
def test_the_bound_trains_the_variance_only(mean_type):
    p = process(mean_type, ModelVarType.LEARNED_RANGE)
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    model = lambda x, t: torch.cat([x * weight[0], x * weight[1]], dim=1)  # noqa: E731
    x0, noise = torch.randn(2, 4, 1, 4, 4, dtype=torch.float64)
    terms = p.training_losses(model, x0, torch.tensor([0, 3, 20, 49]), noise=noise)
    gradient = torch.autograd.grad(terms["vb"].sum(), weight)[0]
    assert gradient[0] == 0
    assert gradient[1] != 0


def test_single_step_process():
    p = create_gaussian_diffusion(steps=100, timestep_respacing="1", learn_sigma=True)
    model = lambda x, t: torch.cat([x, x], dim=1)  # noqa: E731
    out = p.p_sample_loop(model, (2, 1, 4, 4), device="cpu")
    assert out.isfinite().all()


def test_bound_of_the_exact_model_is_the_data_entropy():
    """For Gaussian data the reverse steps are Gaussian, so a model that knows them is exact."""
    std, mean = 0.2, 0.0
    p = process(ModelMeanType.START_X, ModelVarType.LEARNED, steps=200)
    before = torch.from_numpy(p.alphas_cumprod_prev * std**2 + 1 - p.alphas_cumprod_prev)
    betas = torch.from_numpy(p.betas)
    variance = before * betas / ((1 - betas) * before + betas)
    predict = gaussian_data_model(p, mean, std)

    def model(x, t):
        log_variance = variance[t].log().reshape(-1, 1).expand_as(x)
        return torch.cat([predict(x, t), log_variance], dim=1)

    torch.manual_seed(0)
    levels = ((torch.randn(5000, 1, dtype=torch.float64) * std + mean + 1) * 127.5).round()
    x0 = levels.clamp(0, 255) / 127.5 - 1
    out = p.calc_bpd_loop(model, x0, clip_denoised=False)
    assert out["vb"].shape == (5000, 200)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * std**2) + math.log2(127.5)
    assert out["total_bpd"].mean().item() == pytest.approx(entropy, abs=0.03)
    torch.testing.assert_close(out["total_bpd"], out["vb"].sum(1) + out["prior_bpd"])


@pytest.mark.parametrize("betas", [[], [0.1, 1.5], [0.0, 0.1], [[0.1]]])
def test_impossible_betas_are_refused(betas):
    with pytest.raises(ValueError, match="betas"):
        GaussianDiffusion(
            betas=betas,
            model_mean_type=ModelMeanType.EPSILON,
            model_var_type=ModelVarType.FIXED_SMALL,
            loss_type=LossType.MSE,
        )


WITHOUT_SIGNAL = {
    "respaced": {"timestep_respacing": "6"},
    "two steps": {"timestep_respacing": "2"},
    "one step": {},
    "shifted": {"snr_shift": 0.25},
    "cosine": {"noise_schedule": "cosine"},
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", WITHOUT_SIGNAL)
@pytest.mark.parametrize("mean", ["predict_xstart", "predict_v"])
@pytest.mark.parametrize("variance", [{}, {"sigma_small": True}, {"learn_sigma": True}])
def test_a_process_that_ends_without_signal(mean, variance, kind):
    """All its numbers are finite, and at x_T they are those of an x_0 that x_T tells nothing of."""
    p = create_gaussian_diffusion(
        steps=20, zero_terminal_snr=True, **{mean: True}, **variance, **WITHOUT_SIGNAL[kind]
    )
    if kind == "one step":
        p = on_timesteps(p, [19])
    last = p.num_timesteps - 1
    assert (p.betas[last], p.alphas_cumprod[last]) == (1, 0)
    generator = torch.Generator().manual_seed(0)
    x0, x, noise = torch.randn(3, 4, 1, 2, 2, generator=generator, dtype=torch.float64).tanh()
    t = torch.full((4,), last)
    assert torch.equal(p.q_sample(x0, t, noise), noise)

    def model(x, t):
        """Predicts the x_0 above."""
        prediction = x0 if mean == "predict_xstart" else -x0
        return torch.cat([prediction, 0 * x0], dim=1) if "learn_sigma" in variance else prediction

    signal = p.alphas_cumprod_prev[last]  # in x_{T-1}; 1 where that is the image
    out = p.p_mean_variance(model, x, t)
    torch.testing.assert_close(out["pred_xstart"], x0)
    torch.testing.assert_close(out["mean"], math.sqrt(signal) * x0)
    assert all(value.isfinite().all() for value in out.values())
    if variance.get("sigma_small"):
        assert out["variance"].unique().item() == pytest.approx(1 - signal)
    torch.testing.assert_close(p.predict_eps_from_xstart(x, t, x0), x)
    for eta, from_noise, from_x in ((0.0, 0, 1), (1.0, 1, 0)):
        step = p.ddim_sample(model, x, t, eta=eta, noise_fn=lambda like: noise)["sample"]
        expected = math.sqrt(signal) * x0
        expected = expected + math.sqrt(1 - signal) * (from_noise * noise + from_x * x)
        torch.testing.assert_close(step, expected)
    single = p.ddim_sample(lambda x, t: model(x, t).float(), x.float(), t, eta=1.0)
    assert single["sample"].isfinite().all()
    torch.testing.assert_close(p.ddim_reverse_sample(model, x, t)["sample"], x)

    bound = p.calc_bpd_loop(model, x0)
    assert bound["prior_bpd"].abs().max() == 0
    assert all(value.isfinite().all() for value in bound.values())
    losses = p.training_losses(model, x0, t, noise=noise)
    assert losses["mse"].abs().max() == 0
    assert all(value.isfinite().all() for value in losses.values())


def test_ddim_reverse_goes_all_the_way_to_noise():
    p = create_gaussian_diffusion(steps=20, zero_terminal_snr=True, predict_xstart=True)
    x0, noise = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64).tanh()
    t = torch.full((3,), 18)
    step = p.ddim_reverse_sample(lambda x, t: x0, p.q_sample(x0, t, noise), t)
    torch.testing.assert_close(step["sample"], noise)


def test_betas_of_one_belong_to_the_end_and_to_no_noise_prediction():
    settings = {"model_var_type": ModelVarType.FIXED_SMALL, "loss_type": LossType.MSE}
    with pytest.raises(ValueError, match="only the last may be 1"):
        GaussianDiffusion(betas=[0.1, 1, 0.1], model_mean_type=ModelMeanType.START_X, **settings)
    with pytest.raises(ValueError, match=r"--predict_v True or --predict_xstart True"):
        GaussianDiffusion(betas=[0.1, 1], model_mean_type=ModelMeanType.EPSILON, **settings)
    p = GaussianDiffusion(betas=[0.1, 1], model_mean_type=ModelMeanType.PREVIOUS_X, **settings)
    x0, x = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64)
    t = torch.ones(3, dtype=torch.int64)
    mean = p.q_posterior_mean_variance(x0, x, t)[0]
    torch.testing.assert_close(p.predict_xstart_from_xprev(x, t, mean), x0)
