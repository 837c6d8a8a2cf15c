"""Self-conditioning: the model sees its own previous prediction (Chen et al. 2023)."""

import math

import pytest
import torch
import untrained
from torch import nn

from improved_diffusion import checkpoint, dist_util, figures, logger, sampling
from improved_diffusion.cost import sampling_memory, training_cost
from improved_diffusion.encodings import MaskEncoding
from improved_diffusion.evaluation.in_training import Evaluation
from improved_diffusion.gaussian_diffusion import GaussianDiffusion, ModelMeanType, ModelVarType
from improved_diffusion.script_util import (
    create_gaussian_diffusion,
    create_model_and_diffusion,
    load_model_and_diffusion,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)
from improved_diffusion.train_util import Preview, TrainLoop
from improved_diffusion.unet import SelfConditionedModel, UNetModel

STEPS = 20
SHAPE = (2, 4, 4)
FLAGS = {**untrained.FLAGS, "diffusion_steps": STEPS, "self_condition": True}
PARAMETRISATIONS = [{}, {"predict_xstart": True}, {"predict_v": True}]


def process(**flags):
    flags = {"steps": STEPS, "self_condition": True, **flags}
    return create_gaussian_diffusion(rescale_timesteps=False, **flags)


def network(**changes):
    """A small U-Net and its process, with random weights also in the layers that start at 0."""
    torch.manual_seed(0)
    model, diffusion = create_model_and_diffusion(**{**FLAGS, **changes})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model, diffusion


class Linear:
    """0.4 w x + 0.03 t + 0.5 y + 0.7 x_self, and what it was called with."""

    def __init__(self):
        self.w = torch.ones((), dtype=torch.float64, requires_grad=True)
        self.calls = []

    def __call__(self, x, t, y, x_self):
        self.calls.append((t.tolist(), x_self.clone(), torch.is_grad_enabled()))
        return self.value(x, t, y, x_self)

    def value(self, x, t, y, x_self):
        t, y = (own.double().reshape(-1, 1, 1, 1) for own in (t, y))
        return 0.4 * self.w * x + 0.03 * t + 0.5 * y + 0.7 * x_self


def images(n):
    generator = torch.Generator().manual_seed(3)
    x0 = torch.rand(n, *SHAPE, generator=generator, dtype=torch.float64) * 2 - 1
    return x0, torch.randn(n, *SHAPE, generator=generator, dtype=torch.float64)


# Losses


@pytest.mark.parametrize("flags", PARAMETRISATIONS)
def test_the_loss_by_hand(flags):
    """Rows 1 and 3 see what a first pass predicted; rows 0 and 2 see zeros."""
    p, model = process(**flags), Linear()
    x0, noise = images(4)
    t, y = torch.tensor([2, 7, 13, 19]), torch.tensor([0, 1, 0, 1])
    conditioned = torch.tensor([False, True, False, True])
    terms = p.training_losses(model, x0, t, {"y": y}, noise, conditioned=conditioned)

    bar = torch.from_numpy(p.alphas_cumprod)[t].reshape(-1, 1, 1, 1)
    a, s = bar.sqrt(), (1 - bar).sqrt()
    x_t = a * x0 + s * noise
    zeros = torch.zeros_like(x_t)
    first = model.value(x_t, t, y, zeros).detach()
    if p.model_mean_type is ModelMeanType.EPSILON:
        first, target = (x_t - s * first) / a, noise
    elif p.model_mean_type is ModelMeanType.VELOCITY:
        first, target = a * x_t - s * first, a * noise - s * x0
    else:
        target = x0
    x_self = torch.where(conditioned.reshape(-1, 1, 1, 1), first.clamp(-1, 1), zeros)
    assert (first[conditioned].abs() > 1).any() and (x_self[conditioned].abs() < 1).any()

    output = model.value(x_t, t, y, x_self)
    loss = (output - target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(terms["loss"], loss, rtol=1e-12, atol=1e-12)
    # The slope with the shown image held fixed: nothing comes through the first pass.
    slope = (2 * (output - target) * 0.4 * x_t).mean(dim=(1, 2, 3)).sum()
    own = torch.autograd.grad(terms["loss"].sum(), model.w)[0]
    assert own.item() == pytest.approx(slope.item(), rel=1e-12)

    (rows, seen, grad), (all_rows, shown, all_grad) = model.calls
    assert (rows, grad, all_rows, all_grad) == ([7, 19], False, t.tolist(), True)
    assert not seen.any()
    torch.testing.assert_close(shown, x_self, rtol=1e-12, atol=1e-12)
    assert not shown.requires_grad


def test_the_learned_variance_is_trained_by_the_second_pass():
    p = process(learn_sigma=True, predict_xstart=True)
    x0, noise = images(3)
    t = torch.tensor([0, 5, 19])

    def model(x, t, x_self):
        return torch.cat([0.3 * x + 0.1, x_self], dim=1)

    terms = p.training_losses(model, x0, t, noise=noise, conditioned=torch.ones(3, dtype=bool))
    shown = (0.3 * p.q_sample(x0, t, noise) + 0.1).clamp(-1, 1)
    fixed = create_gaussian_diffusion(
        steps=STEPS, learn_sigma=True, predict_xstart=True, rescale_timesteps=False
    )
    expected = fixed.training_losses(
        lambda x, t: torch.cat([0.3 * x + 0.1, shown], dim=1), x0, t, noise=noise
    )
    for name in ("loss", "mse", "vb"):
        torch.testing.assert_close(terms[name], expected[name], rtol=0, atol=0)


def test_nobody_or_everybody_sees_a_prediction():
    p, (x0, noise) = process(predict_xstart=True), images(3)
    t = y = torch.tensor([1, 2, 3])
    for conditioned, passes in ((torch.zeros(3, dtype=bool), 1), (torch.ones(3, dtype=bool), 2)):
        model = Linear()
        p.training_losses(model, x0, t, {"y": y}, noise, conditioned=conditioned)
        assert [rows for rows, *_ in model.calls] == passes * [[1, 2, 3]]
        assert model.calls[-1][1].any() == (passes == 2)


def test_half_of_the_images_see_a_prediction():
    p = process(predict_xstart=True)
    seen = []

    def model(x, t, x_self):
        seen.append(x_self.flatten())
        return torch.ones_like(x)

    p.training_losses(model, torch.zeros(10_000, 1), torch.zeros(10_000, dtype=torch.int64))
    assert set(seen[1].tolist()) == {0.0, 1.0}
    # Four standard deviations of the mean of so many coins.
    assert seen[1].mean().item() == pytest.approx(0.5, abs=0.02)
    assert len(seen[0]) == seen[1].sum()


def test_the_bound_shows_the_model_nothing():
    """Which is what it is shown at the first step of a sample: zeros."""
    model, p = network()
    x0 = torch.zeros(1, 2, 16, 16)
    own, told = (
        p.calc_bpd_loop(shown, x0, noise_fn=torch.ones_like)["vb"]
        for shown in (model, lambda x, t: model(x, t, x_self=torch.zeros_like(x)))
    )
    assert torch.equal(own, told) and own.shape == (1, STEPS)


# The training loop


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x, t, x_self):
        h = self.conv(torch.cat([x, x_self], dim=1)) + t.reshape(-1, 1, 1, 1) / 10
        return self.out(torch.sin(h))


def make(folder, model=None, diffusion=None, **changes):
    logger.configure(str(folder), ["log"])
    torch.manual_seed(0)
    settings = {"batch_size": 7, "microbatch": -1, "lr": 1e-2, "ema_rate": "0.9"}
    settings.update(log_interval=5, save_interval=0, resume_checkpoint="", precision="fp32")
    return TrainLoop(
        model=model or Net(),
        diffusion=diffusion or process(learn_sigma=True),
        data=iter(()),
        **{**settings, **changes},
    )


def seven():
    return torch.rand(7, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def gradient(loop, batch, cond=None):
    torch.manual_seed(9)
    loop.forward_backward(batch, cond or {})
    return torch.cat([p.grad.flatten() for p in loop.params])


@pytest.mark.parametrize("microbatch", [1, 2, 4, 7])
def test_any_microbatch_gives_the_gradient_written_out(tmp_path, microbatch):
    """The coins are drawn for the whole batch, behind its timesteps and noise."""
    own = gradient(make(tmp_path / "a", microbatch=microbatch), seven())
    loop = make(tmp_path / "b")
    torch.manual_seed(9)
    t, _ = loop.schedule_sampler.sample(7, "cpu")
    noise = torch.randn_like(seven())
    coins = torch.rand(7) < 0.5
    assert 2 <= coins.sum() <= 5

    def expected(conditioned):
        losses = loop.diffusion.training_losses(
            loop.model, seven(), t, noise=noise, conditioned=conditioned
        )
        grads = torch.autograd.grad(losses["loss"].mean(), loop.params)
        return torch.cat([grad.flatten() for grad in grads])

    torch.testing.assert_close(own, expected(coins), rtol=1e-4, atol=1e-6)
    assert (own - expected(~coins)).norm() > 1e-2 * own.norm()


def test_a_process_takes_its_part_of_the_coins(tmp_path, monkeypatch):
    loop = make(tmp_path)
    parts = []
    inner = loop.diffusion.training_losses

    def spy(*args, conditioned, **kwargs):
        parts.append(conditioned)
        return inner(*args, conditioned=conditioned, **kwargs)

    loop.diffusion.training_losses, loop.microbatch = spy, 2
    monkeypatch.setattr(dist_util, "gather", lambda *values: [(4,), (7,)])
    monkeypatch.setattr(dist_util, "rank", lambda: 1)
    gradient(loop, seven())
    torch.manual_seed(9)
    loop.schedule_sampler.sample(11, "cpu")
    torch.randn(11, 1, 8, 8)
    assert torch.equal(torch.cat(parts), (torch.rand(11) < 0.5)[4:])
    assert [len(part) for part in parts] == [2, 2, 2, 1]


def test_other_runs_draw_what_they_drew(tmp_path):
    """Timesteps, noise, and then nothing, whatever dropout draws after them."""

    class Plain(Net):
        def forward(self, x, t):
            return super().forward(x, t, torch.zeros_like(x))

    diffusion = create_gaussian_diffusion(steps=STEPS, learn_sigma=True)
    loop = make(tmp_path, Plain(), diffusion)
    gradient(loop, seven())
    after = torch.rand(5)
    torch.manual_seed(9)
    loop.schedule_sampler.sample(7, "cpu")
    torch.randn(7, 1, 8, 8)
    assert torch.equal(after, torch.rand(5))


def test_compiled_code_sees_whole_microbatches_only(tmp_path, monkeypatch):
    """The first pass has another number of images every time."""
    calls = []

    def compiled(model, **kwargs):
        def call(x, t, **extra):
            calls.append((len(x), torch.is_grad_enabled(), extra["x_self"].any().item()))
            return model(x, t, **extra)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    own = gradient(make(tmp_path / "a", compile="on", microbatch=4), seven())
    assert [call[:2] for call in calls] == [(4, True), (3, True)]
    assert any(call[2] for call in calls)
    assert torch.equal(own, gradient(make(tmp_path / "b", compile="off", microbatch=4), seven()))


@pytest.mark.parametrize(("precision", "bits"), [("bf16", 8), ("fp16", 11)])
def test_shorter_types_with_dropout_classes_and_checkpointing(tmp_path, precision, bits):
    """Differ from float32 by their rounding, not by what is dropped or shown."""
    x, cond = torch.rand(4, 2, 16, 16) * 2 - 1, {"y": torch.tensor([0, 1, 2, 1])}
    changes = {"dropout": 0.3, "class_cond": True, "num_classes": 3, "use_checkpoint": True}
    exact = gradient(make(tmp_path / "a", *network(**changes)), x, cond)
    loop = make(tmp_path / "b", *network(**changes), precision=precision)
    if precision == "fp16":
        loop.scaler.load_state_dict({**loop.scaler.state_dict(), "scale": 2.0**4})
    short = gradient(loop, x, cond) / loop.scaler.get_scale()
    error = ((short - exact).norm() / exact.norm()).item()
    assert 2.0 ** -(bits + 3) < error < 2.0 ** -(bits - 5), error


def test_previews_and_evaluations_are_drawn_as_any_sample(tmp_path):
    """Each evaluation of the network sees the last, which makes a difference."""
    (model, diffusion), names = network(), ["FLAIR", "Seg"]
    plan = sampling.choose_plan(diffusion)

    def levels(network, **options):
        samples = sampling.draw(
            *(network, diffusion, range(2), (2, 16, 16)), seed=5, device="cpu", **options
        )
        return sampling.to_levels(samples)

    Preview(diffusion, (2, 16, 16), names, 2, 5).write(model, str(tmp_path / "own.png"))
    figures.save_grid(figures.sample_grid(levels(model), names), str(tmp_path / "expected.png"))
    assert (tmp_path / "own.png").read_bytes() == (tmp_path / "expected.png").read_bytes()
    real = torch.randint(256, (4, 16, 16, 2), dtype=torch.uint8).numpy()
    drawn, _ = Evaluation(diffusion, MaskEncoding("grey", names), names, real, 2, seed=5)._draw(
        model, "cpu"
    )
    chosen = {"sampler": plan.sampler, "timesteps": plan.timesteps}
    assert (drawn == levels(model, **chosen)).all()
    assert (drawn != levels(lambda x, t, x_self: model(x, t), **chosen)).mean() > 0.1


# Sampling


class Recorder:
    """Predicts tanh(x) / 2 + 0.01 t + 0.3 x_self + 0.4; notes what it saw and predicted."""

    def __init__(self, limit=1.0):
        self.limit, self.seen, self.predicted = limit, [], []

    def __call__(self, x, t, x_self):
        value = torch.tanh(x) / 2 + 0.01 * t.reshape(-1, 1, 1, 1) + 0.3 * x_self + 0.4
        self.seen.append(x_self.clone())
        self.predicted.append(value.clamp(-self.limit, self.limit))
        return value

    def check(self, evaluations):
        assert len(self.seen) == evaluations
        assert not self.seen[0].any()
        for seen, predicted in zip(self.seen[1:], self.predicted):
            assert torch.equal(seen, predicted) and seen.any()


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
def test_every_sampler_hands_on_the_last_prediction(sampler, clip):
    p = process(predict_xstart=True)
    timesteps = [0, 3, 8, 14, 19]
    for _ in range(2):  # a second run begins with zeros again
        model = Recorder(1.0 if clip else math.inf)
        sampling.draw(
            *(model, p, range(3), SHAPE),
            **{"seed": 0, "device": "cpu", "sampler": sampler},
            timesteps=timesteps,
            clip_denoised=clip,
        )
        model.check(sampling.evaluations(sampler, 5))
        assert (max(own.max() for own in model.predicted) > 1) != clip


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_loops_hand_on_what_denoised_fn_made_of_it(loop):
    model = Recorder(0.5)
    p = process(predict_xstart=True, timestep_respacing="6")
    options = {"device": "cpu", "denoised_fn": lambda x: x.clamp(-0.5, 0.5)}
    getattr(p, loop)(model, (2, *SHAPE), **options)
    model.check(6)


@pytest.mark.parametrize("flags", PARAMETRISATIONS)
@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
def test_a_model_that_ignores_it_samples_what_the_ordinary_one_does(sampler, flags):
    def ordinary(x, t):
        return torch.tanh(x) + 0.01 * t.reshape(-1, 1, 1, 1)

    options = {"seed": 0, "device": "cpu", "sampler": sampler, "timesteps": [0, 4, 11, 19]}
    own = sampling.draw(
        *(lambda x, t, x_self: ordinary(x, t), process(**flags), range(3), SHAPE), **options
    )
    plain = process(**flags, self_condition=False)
    assert torch.equal(own, sampling.draw(ordinary, plain, range(3), SHAPE, **options))


@pytest.mark.parametrize("sampler", ["ancestral", "unipc"])
def test_a_sample_depends_on_seed_and_number_alone(sampler):
    p, whole = process(predict_xstart=True), None
    for size in (5, 2):
        parts = [
            sampling.draw(Recorder(), p, part, SHAPE, seed=1, device="cpu", sampler=sampler)
            for part in sampling.batches(5, size)
        ]
        whole = torch.cat(parts) if whole is None else whole
        assert torch.equal(torch.cat(parts), whole)


def test_the_process_keeps_it():
    p = process(timestep_respacing="10")
    assert p.self_condition and not create_gaussian_diffusion().self_condition
    assert not GaussianDiffusion(
        betas=[0.1],
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.FIXED_SMALL,
        loss_type=p.loss_type,
    ).self_condition


# The network


def test_the_network_is_a_unet_of_both_images():
    model, _ = network()
    plain = UNetModel(4, 32, 4, 1, (2,), channel_mult=(1, 1), use_scale_shift_norm=True)
    plain.load_state_dict(model.state_dict())
    x, x_self = torch.rand(2, 3, 2, 16, 16) * 2 - 1
    t = torch.tensor([1, 5, 9])
    with torch.no_grad():
        own, nothing = model(x, t, x_self=x_self), model(x, t)
        assert own.shape == (3, 4, 16, 16)
        assert torch.equal(own, plain(torch.cat([x, x_self], 1), t))
        assert torch.equal(nothing, plain(torch.cat([x, 0 * x], 1), t))
        assert (own - nothing).norm() > 0.01 * own.norm()
        features = model.get_feature_vectors(x, t, x_self=x_self)
        expected = plain.get_feature_vectors(torch.cat([x, x_self], 1), t)
    assert len(features["down"]) == len(expected["down"]) > 3
    for one, two in zip(features["up"], expected["up"]):
        assert torch.equal(one, two)


def test_what_it_costs():
    """Like a U-Net of both images, and half a pass forward on top in training."""
    with torch.device("meta"):
        model, _ = create_model_and_diffusion(**FLAGS)
        plain = UNetModel(4, 32, 4, 1, (2,), channel_mult=(1, 1), use_scale_shift_norm=True)
    own, other = training_cost(model, (2, 16, 16)), training_cost(plain, (4, 16, 16))
    assert (own.parameters, own.forward_flops) == (other.parameters, other.forward_flops)
    assert own.training_flops == other.training_flops + own.forward_flops // 2
    # The image, the prediction, and both side by side.
    image = 4 * 2 * 16 * 16
    assert 0 <= own.image_bytes - other.image_bytes <= 2 * image
    memory = sampling_memory(model, (2, 16, 16)) - sampling_memory(plain, (4, 16, 16))
    assert 0 <= memory <= 2 * image


# Checkpoints


def save(path, flags, model, metadata=None):
    if metadata is None:
        metadata = {"flags": flags, "channels": ["FLAIR", "Seg"], "step": 1}
    checkpoint.save(checkpoint.with_metadata(model.state_dict(), metadata), str(path))
    return str(path)


def test_the_flag_travels_and_is_not_contradicted(tmp_path):
    model, _ = network()
    path = save(tmp_path / "own.pt", FLAGS, model)
    loaded = load_model_and_diffusion(path, {"timestep_respacing": "4"})
    assert isinstance(loaded.model, SelfConditionedModel) and loaded.diffusion.self_condition
    assert (loaded.flags["self_condition"], loaded.flags["in_channels"]) == (True, 2)
    options = {"seed": 0, "device": "cpu", "sampler": "dpmpp_2m", "timesteps": [0, 9, 19]}
    draw = (range(1), (2, 16, 16))
    whole = load_model_and_diffusion(path)
    own = sampling.draw(whole.model, whole.diffusion, *draw, **options)
    assert torch.equal(own, sampling.draw(*network(), *draw, **options))
    with pytest.raises(ValueError, match=r"--self_condition False contradicts .* True; leave"):
        load_model_and_diffusion(path, {"self_condition": False})


def test_a_checkpoint_from_before_the_flag_is_an_ordinary_one(tmp_path):
    model, _ = network(self_condition=False)
    old = {name: value for name, value in FLAGS.items() if name != "self_condition"}
    path = save(tmp_path / "old.pt", old, model)
    for given in ({}, {"self_condition": False}):
        loaded = load_model_and_diffusion(path, given)
        assert type(loaded.model) is UNetModel and not loaded.diffusion.self_condition
        assert loaded.flags["self_condition"] is False
    with pytest.raises(ValueError, match=r"--self_condition True contradicts .* False; leave"):
        load_model_and_diffusion(path, {"self_condition": True})


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_a_file_without_flags(tmp_path, learn_sigma):
    """Its shapes may be those of another kind of network, so that it must be said."""
    flags = {**FLAGS, "learn_sigma": learn_sigma}
    model, _ = network(learn_sigma=learn_sigma)
    path = save(tmp_path / "bare.pt", flags, model, metadata={})
    untold = ("image_size", "num_heads", "diffusion_steps", "noise_schedule", "rescale_timesteps")
    given = {name: flags[name] for name in untold}
    loaded = load_model_and_diffusion(path, {**given, "self_condition": True})
    assert loaded.flags == flags and isinstance(loaded.model, SelfConditionedModel)
    for value, own in zip(loaded.model.parameters(), model.parameters()):
        assert torch.equal(value, own)
    with pytest.raises(ValueError, match="--self_condition True"):
        load_model_and_diffusion(path, given)
    plain, _ = network(self_condition=False, in_channels=3)
    path = save(tmp_path / "plain.pt", flags, plain, metadata={})
    with pytest.raises(ValueError, match="3 input and 6 output channels, which no self-cond"):
        load_model_and_diffusion(path, {**given, "self_condition": True})


def test_super_resolution_knows_no_such_flag():
    assert "self_condition" not in sr_model_and_diffusion_defaults()
    flags = {**sr_model_and_diffusion_defaults(), "num_channels": 32, "large_size": 64}
    with torch.device("meta"):
        _, diffusion = sr_create_model_and_diffusion(**flags)
    assert not diffusion.self_condition
