"""Masks predicted by the probabilities of their labels."""

import itertools
import math

import numpy as np
import pytest
import torch
from test_unet import SMALL, fill

from improved_diffusion import sampling
from improved_diffusion.encodings import MaskEncoding
from improved_diffusion.label_posterior import WIDENING, LabelPosterior
from improved_diffusion.script_util import (
    create_gaussian_diffusion,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from improved_diffusion.unet import UNetModel

LABELS = LabelPosterior(channel=1, codes=(-1.0, 0.0, 1.0))
PRIOR = (0.6, 0.3, 0.1)
KINDS = [{"predict_v": True}, {"predict_xstart": True}, {}]


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_bayes_rule_by_hand():
    """One pixel of value 0.5 at alpha 0.8 and sigma 0.6."""
    logits = tensor(0.2, -0.1, 0.5).reshape(1, 3, 1, 1)
    pixel, alpha, sigma = (tensor(v).reshape(1, 1, 1, 1) for v in (0.5, 0.8, 0.6))
    found = LABELS.log_probabilities(logits, pixel, alpha, sigma)
    wide = 0.6 * 2  # with another number trained models would mean something else
    weights = [
        math.exp(logit - (0.5 - 0.8 * code) ** 2 / (2 * wide**2))
        for logit, code in zip((0.2, -0.1, 0.5), LABELS.codes)
    ]
    p = [weight / sum(weights) for weight in weights]
    assert found.exp().flatten().tolist() == pytest.approx(p)
    assert LABELS.mean(found).item() == pytest.approx(p[2] - p[0])
    mask = torch.full((1, 1, 1, 1), 0.45, dtype=torch.float64)  # nearest to 0
    assert LABELS.cross_entropy(found, mask).item() == pytest.approx(-math.log(p[1]))


def test_the_encoding_names_channel_and_codes():
    found = MaskEncoding("labels", ["FLAIR", "Seg", "T1"]).posterior
    assert found.channel == 1 and found.extra == 3
    assert found.codes == pytest.approx((-1, -0.6, -0.2, 0.6))
    for name in ("grey", "onehot", "bits", "sdf"):
        assert MaskEncoding(name, ["FLAIR", "Seg", "T1"]).posterior is None


def network(process, learn_sigma=False):
    """The best network for pixels that have labels of their own, and a first channel of zeros.

    Its logits are those of the prior, and what the widened likelihood leaves out.
    """
    codes = tensor(*LABELS.codes).float().reshape(1, -1, 1, 1)

    def model(x, t):
        bar = torch.from_numpy(process.alphas_cumprod).float()[t].reshape(-1, 1, 1, 1)
        alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
        ratio = ((x[:, 1:] - alpha * codes) / sigma).square()
        logits = tensor(*PRIOR).float().log().reshape(1, -1, 1, 1)
        logits = logits - 0.5 * (1 - WIDENING**-2) * ratio
        flat = x[:, :1]  # its x_0 is 0
        first = {"EPSILON": flat / sigma, "START_X": 0 * flat, "VELOCITY": alpha * flat / sigma}
        parts = [first[process.model_mean_type.name], logits[:, :1]]
        if learn_sigma:
            parts.append(torch.zeros_like(x))
        return torch.cat([*parts, logits[:, 1:]], dim=1)

    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_the_predicted_image_is_the_best_one(kind, learn_sigma):
    process = create_gaussian_diffusion(
        steps=50, noise_schedule="cosine", learn_sigma=learn_sigma, labels=LABELS, **kind
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 2, 4, 4, generator=generator)
    t = torch.tensor([1, 5, 10, 20, 30, 45])
    model = network(process, learn_sigma=learn_sigma)
    found = process.p_mean_variance(model, x, t, clip_denoised=False)
    bar = torch.from_numpy(process.alphas_cumprod)[t].reshape(-1, 1, 1)
    ratios = [
        p * torch.exp(-((x[:, 1].double() - bar.sqrt() * code) ** 2) / (2 * (1 - bar)))
        for p, code in zip(PRIOR, LABELS.codes)
    ]
    expected = (ratios[2] - ratios[0]) / sum(ratios)
    torch.testing.assert_close(found["pred_xstart"][:, 1].double(), expected, atol=2e-4, rtol=0)
    assert found["pred_xstart"][:, 0].abs().max() < 1e-4
    again = process.predict_xstart(model, x, t, clip_denoised=False)
    assert torch.equal(again, found["pred_xstart"])


CASES = [
    (kind, schedule, sampler)
    for (kind, schedule), sampler in itertools.product(
        [(KINDS[0], "cosine"), (KINDS[1], "linear"), (KINDS[2], "linear")],
        ["ancestral", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "heun"],
    )
]


@pytest.mark.parametrize(("kind", "schedule", "sampler"), CASES)
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_samplers_end_on_the_codes_in_their_shares(kind, schedule, sampler, learn_sigma):
    """3072 pixels with labels of their own: five standard errors and the steps' error."""
    process = create_gaussian_diffusion(
        steps=1000, noise_schedule=schedule, learn_sigma=learn_sigma, labels=LABELS, **kind
    )
    plan = sampling.choose_plan(process, sampler=sampler, steps=40)
    drawn = sampling.draw(
        network(process, learn_sigma=learn_sigma),
        process,
        range(3),
        (2, 32, 32),
        seed=1,
        device="cpu",
        sampler=sampler,
        timesteps=plan.timesteps,
    )[:, 1]
    off = torch.stack([(drawn - code).abs() for code in LABELS.codes]).amin(dim=0)
    assert (off > 12 / 127.5).float().mean() < 0.005
    for share, code in zip(PRIOR, LABELS.codes):
        found = ((drawn - code).abs() < 0.5).float().mean().item()
        assert found == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / 3072) + 0.01)


@pytest.mark.parametrize("weighting", ["uniform", "debiased"])
def test_the_loss_by_hand(weighting):
    process = create_gaussian_diffusion(
        steps=20, predict_v=True, labels=LABELS, loss_weighting=weighting
    )
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(3, (4, 1, 8, 8), generator=generator)
    images = torch.cat([torch.rand(4, 1, 8, 8, generator=generator), truth - 1.0], dim=1)
    noise = torch.randn(images.shape, generator=generator)
    t = torch.tensor([0, 5, 12, 19])
    output = torch.randn(4, 4, 8, 8, generator=generator, requires_grad=True)
    terms = process.training_losses(
        lambda x, t: output, images, t, noise=noise, channel_names=["T1", "Seg"]
    )
    bar = torch.from_numpy(process.alphas_cumprod)[t].float().reshape(-1, 1, 1, 1)
    x_t = bar.sqrt() * images + (1 - bar).sqrt() * noise
    target = bar.sqrt() * noise - (1 - bar).sqrt() * images
    codes = torch.tensor(LABELS.codes).reshape(1, -1, 1, 1)
    ratio = (x_t[:, 1:] - bar.sqrt() * codes) ** 2 / (2 * WIDENING**2 * (1 - bar))
    p = (output[:, 1:] - ratio).softmax(dim=1)
    ce = -p.gather(1, truth).log().mean(dim=(1, 2, 3))
    t1 = (output[:, 0] - target[:, 0]).square().mean(dim=(1, 2))
    x_0 = (p * codes).sum(dim=1)
    v = (bar[:, 0].sqrt() * x_t[:, 1] - x_0) / (1 - bar[:, 0]).sqrt()
    seg = (v - target[:, 1]).square().mean(dim=(1, 2))
    torch.testing.assert_close(terms["ce"], ce)
    torch.testing.assert_close(terms["mse_T1"], t1)
    torch.testing.assert_close(terms["mse_Seg"], seg, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["mse"], (t1 + seg) / 2, rtol=1e-4, atol=1e-5)
    weights = 1.0
    if weighting == "debiased":
        snr = (bar / (1 - bar)).flatten()
        weights = snr.sqrt() / (1 + snr)
    torch.testing.assert_close(terms["loss"], weights * (t1 + 4 * ce) / 2)
    (own,) = torch.autograd.grad(terms["loss"].sum(), output, retain_graph=True)
    (expected,) = torch.autograd.grad((weights * (t1 + 4 * ce) / 2).sum(), output)
    torch.testing.assert_close(own, expected)


def test_a_detached_variance_leaves_the_logits_to_the_trunk():
    process = create_gaussian_diffusion(
        steps=1000, learn_sigma=True, predict_xstart=True, labels=LabelPosterior(0, LABELS.codes)
    )
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 2, 2, 8, 8, generator=generator)
    values, gradients = {}, {}
    for detached in (False, True):
        shape = {**SMALL, "out_channels": SMALL["out_channels"] + 2}
        model = fill(UNetModel(**shape, label_logits=2, detach_variance=detached))
        terms = process.training_losses(model, x0.tanh(), torch.tensor([1, 5]), noise=noise)
        values[detached] = terms["loss"].detach()
        for loss in ("ce", "vb"):
            gradients[detached, loss] = torch.autograd.grad(
                terms[loss].mean(), model.input_blocks[0][0].weight, retain_graph=True
            )[0]
    assert torch.equal(values[False], values[True])
    assert torch.equal(gradients[False, "ce"], gradients[True, "ce"])
    assert gradients[True, "ce"].abs().max() > 0
    assert gradients[False, "vb"].abs().max() > 0 and gradients[True, "vb"].abs().max() == 0


@pytest.mark.parametrize(
    ("flags", "outputs"),
    [({}, 3 + 3), ({"learn_sigma": True}, 6 + 3), ({"self_condition": True}, 3 + 3)],
)
def test_the_network_has_a_logit_for_each_label(flags, outputs):
    """Three channels, four labels, of which the mask's own output is one."""
    defaults = {**model_and_diffusion_defaults(), "image_size": 32, "num_channels": 32}
    encoding = MaskEncoding("labels", ["FLAIR", "Seg", "T1"])
    model, process = create_model_and_diffusion(
        **{**defaults, "learn_sigma": False, **flags, "mask_encoding": "labels"},
        labels=encoding.posterior,
    )
    assert encoding.width == 3 and model.out_channels == outputs
    assert process.labels == encoding.posterior
    with pytest.raises(ValueError, match="mask_encoding labels and labels None do not fit"):
        create_model_and_diffusion(**{**defaults, "mask_encoding": "labels"})
    x = torch.zeros(1, 3, 32, 32)
    found = process.p_mean_variance(model, x, torch.tensor([500]))["pred_xstart"]
    # An untrained network finds all labels as likely but for the pixel's own value.
    bar = process.alphas_cumprod[500]
    wide = WIDENING**2 * (1 - bar)
    weights = np.exp([-bar * code**2 / (2 * wide) for code in encoding.posterior.codes])
    expected = (weights * encoding.posterior.codes).sum() / weights.sum()
    torch.testing.assert_close(found[:, 1], torch.full((1, 32, 32), expected).float())
