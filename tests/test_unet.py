import zlib

import numpy as np
import pytest
import torch
from conftest import relative_error

from improved_diffusion.nn import normalization, timestep_embedding
from improved_diffusion.script_util import (
    create_gaussian_diffusion,
    create_model,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)
from improved_diffusion.unet import AttentionBlock, ResBlock, SuperResModel, UNetModel, Upsample

SMALL = {
    "in_channels": 2,
    "model_channels": 32,
    "out_channels": 4,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
    "num_heads": 2,
}
NETWORKS = ("lsun_like_2ch", "scale_shift_5ch_heads4", "class_cond_1ch_upsample_heads")


def fill(model):
    """The golden numbers' weights: a rule on each parameter's name."""
    for name, parameter in model.named_parameters():
        random = np.random.RandomState(zlib.crc32(name.encode()))
        values = random.randn(*parameter.shape) * 0.05
        if parameter.dim() == 1 and name.endswith("weight"):
            values += 1
        parameter.data = torch.from_numpy(values).float()
    return model


def inputs(golden, name):
    arrays = golden("unet.npz")
    x, t = (torch.from_numpy(arrays[f"{name}/{key}"]) for key in ("x", "t"))
    extra = {
        key: torch.from_numpy(arrays[f"{name}/{key}"])
        for key in ("y", "low_res")
        if f"{name}/{key}" in arrays
    }
    return x, t, extra


def assert_equals_the_reference(golden, name, device):
    """Output and gradients of a network on a device."""
    about, arrays = golden("unet.json")[name], golden("unet.npz")
    model = fill(UNetModel(**about["kwargs"])).to(device)
    assert sum(p.numel() for p in model.parameters()) == about["parameters"]
    x, t, extra = inputs(golden, name)
    x = x.to(device).requires_grad_()
    out = model(x, t.to(device), **{key: value.to(device) for key, value in extra.items()})
    assert relative_error(out.detach().cpu(), arrays[f"{name}/out"]) < 1e-4
    out.square().mean().backward()
    assert relative_error(x.grad.cpu(), arrays[f"{name}/grad_x"]) < 1e-4
    for key, parameter in model.named_parameters():
        expected = about["grad_norms"][key]
        assert abs(parameter.grad.norm().item() - expected) <= 1e-4 * expected + 1e-5, key


@pytest.mark.parametrize("name", NETWORKS)
def test_output_and_gradients_equal_the_reference(golden, name):
    assert_equals_the_reference(golden, name, "cpu")


def test_super_resolution_equals_the_reference(golden):
    model = fill(SuperResModel(**golden("unet.json")["super_res"]["kwargs"]))
    x, t, extra = inputs(golden, "super_res")
    out = model(x, t, **extra)
    assert relative_error(out.detach(), golden("unet.npz")["super_res/out"]) < 1e-4


@pytest.mark.parametrize("width", [32, 33])
def test_timestep_embedding_equals_the_reference(golden, width):
    arrays = golden("unet.npz")
    t = torch.from_numpy(arrays["timestep_embedding/t"])
    expected = arrays[f"timestep_embedding/dim{width}"]
    assert relative_error(timestep_embedding(t, width), expected) < 1e-6


@pytest.mark.parametrize(
    "name",
    [
        "lsun_uncond_100M",
        "imagenet64_uncond_100M",
        "imagenet64_cond_270M",
        "cifar10_uncond_50M",
        "upsample_cond",
    ],
)
def test_published_models_have_exactly_these_keys_and_shapes(golden, name):
    published = golden("state_dicts.json")[name]
    flags = published["flags"]
    create = sr_create_model_and_diffusion if "large_size" in flags else create_model_and_diffusion
    with torch.device("meta"):
        model, _ = create(**flags)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert shapes == published["state_dict"]


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_output_channels_follow_input_channels(channels, learn_sigma):
    model = create_model(
        image_size=32,
        num_channels=32,
        num_res_blocks=1,
        learn_sigma=learn_sigma,
        class_cond=False,
        use_checkpoint=False,
        attention_resolutions="8",
        num_heads=1,
        num_heads_upsample=-1,
        use_scale_shift_norm=True,
        dropout=0.0,
        in_channels=channels,
        channel_mult="1,1",
    )
    out = model(torch.randn(1, channels, 32, 32), torch.tensor([3]))
    assert out.shape == (1, channels * (2 if learn_sigma else 1), 32, 32)
    # The last convolution starts at zero.
    assert out.abs().max() == 0


@pytest.mark.parametrize(
    ("size", "levels", "attention_at"),
    [(32, 4, 16), (64, 4, 16), (128, 5, 16), (256, 6, 16), (512, 7, 16)],
)
def test_every_image_size_builds_with_attention_at_its_level(size, levels, attention_at):
    flags = {
        **model_and_diffusion_defaults(),
        "image_size": size,
        "in_channels": 2,
        "attention_resolutions": str(attention_at),
    }
    with torch.device("meta"):
        model, _ = create_model_and_diffusion(**flags)
        out = model(torch.empty(1, 2, size, size), torch.empty(1))
        features = model.get_feature_vectors(torch.empty(1, 2, size, size), torch.empty(1))
    assert out.shape == (1, 4, size, size)
    assert features["middle"].shape[-1] == size // 2 ** (levels - 1)
    sizes = {
        h.shape[-1]
        for h, block in zip(features["down"], model.input_blocks)
        if any(isinstance(layer, AttentionBlock) for layer in block)
    }
    assert sizes == {attention_at}
    assert len(features["down"]) == len(features["up"]) == len(model.input_blocks)


def test_attention_equals_softmax_written_out():
    torch.manual_seed(0)
    block = AttentionBlock(32, num_heads=4)
    torch.nn.init.normal_(block.proj_out.weight)
    x = torch.randn(2, 32, 3, 5)
    qkv = block.qkv(block.norm(x.flatten(2)))
    heads = []
    for head in qkv.chunk(4, dim=1):
        q, k, v = head.chunk(3, dim=1)
        weights = torch.softmax(q.transpose(1, 2) @ k / np.sqrt(8), dim=-1)
        heads.append(v @ weights.transpose(1, 2))
    expected = x + block.proj_out(torch.cat(heads, dim=1)).reshape(x.shape)
    assert relative_error(block(x).detach(), expected.detach()) < 1e-5


def test_checkpointing_keeps_gradients_with_dropout():
    gradients = []
    for use_checkpoint in (False, True):
        model = fill(UNetModel(**SMALL, dropout=0.3, use_checkpoint=use_checkpoint))
        x = torch.linspace(-1, 1, 2 * 2 * 16 * 16).reshape(2, 2, 16, 16)
        torch.manual_seed(5)
        model(x, torch.tensor([3.0, 700.0])).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients)
    assert gradients[0].norm() > 0


def test_averaging_instead_of_convolutions():
    model = fill(UNetModel(**SMALL, conv_resample=False))
    x = torch.randn(1, 2, 16, 16)
    assert model(x, torch.tensor([1.0])).shape == (1, 4, 16, 16)
    pooled = model.input_blocks[2][0](torch.arange(16.0).reshape(1, 1, 4, 4))
    assert pooled.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_half_precision_is_close_and_reversible():
    model = fill(UNetModel(**SMALL)).eval()
    x, t = torch.randn(2, 2, 16, 16), torch.tensor([1.0, 900.0])
    with torch.no_grad():
        expected = model(x, t)
        model.convert_to_fp16()
        assert model.inner_dtype is torch.float16
        assert model.out[2].weight.dtype is torch.float32
        half = model(x, t)
        model.convert_to_fp32()
        again = model(x, t)
    assert half.dtype is torch.float32
    assert 0 < relative_error(half, expected) < 1e-2
    assert 0 < relative_error(again, expected) < 1e-2


def test_residual_block_starts_as_identity():
    block = ResBlock(32, 16, dropout=0.0)
    x = torch.randn(1, 32, 4, 4)
    assert torch.equal(block(x, torch.randn(1, 16)), x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_channels": 48}, "multiple of 32"),
        ({"num_heads": 3}, "--num_heads 3 does not divide"),
        ({"image_size": 96}, "--image_size 96 has no default widths"),
        ({"image_size": 100, "channel_mult": "1,2,2,2"}, "multiple of 8"),
        ({"attention_resolutions": "7"}, "--attention_resolutions 7"),
        ({"attention_resolutions": "a"}, "expected numbers separated by commas"),
        ({"in_channels": 0}, "--in_channels is at least 1"),
        ({"predict_xstart": True, "predict_v": True}, "exclude each other"),
        ({"noise_schedule": "quadratic"}, "known are linear, cosine"),
        ({"timestep_respacing": "2000"}, "--timestep_respacing 2000"),
        ({"snr_shift": "half"}, "--snr_shift half: give a number above 0, or auto"),
        ({"zero_terminal_snr": True}, "add --predict_v True or --predict_xstart True"),
        ({"sigma_gradient": "none"}, "--sigma_gradient none: choose from auto, full, head"),
        (
            {"sigma_gradient": "head", "learn_sigma": False},
            "about a learned variance",
        ),
    ],
)
def test_impossible_flags_are_refused(change, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        create_model_and_diffusion(**{**model_and_diffusion_defaults(), **change})


def test_labels_are_demanded_and_refused():
    x, t = torch.randn(1, 2, 16, 16), torch.tensor([1.0])
    with pytest.raises(ValueError, match="labels"):
        UNetModel(**SMALL)(x, t, y=torch.tensor([1]))
    with pytest.raises(ValueError, match="labels"):
        UNetModel(**SMALL, num_classes=3)(x, t)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_normalisation_in_bfloat16_is_that_of_float32_rounded(layout):
    """Forward and backward, in either memory layout."""
    generator = torch.Generator().manual_seed(0)
    norm = normalization(64)
    torch.nn.init.normal_(norm.weight, generator=generator)
    torch.nn.init.normal_(norm.bias, generator=generator)
    x = torch.randn(2, 64, 8, 8, generator=generator).contiguous(memory_format=layout)
    dy = torch.randn(2, 64, 8, 8, generator=generator).contiguous(memory_format=layout)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        own = x.detach().to(dtype, copy=True).requires_grad_()
        norm.zero_grad()
        y = norm(own)
        assert y.dtype == dtype and y.stride() == x.stride()
        y.backward(dy.to(dtype))
        results.append([y, own.grad, norm.weight.grad.clone(), norm.bias.grad.clone()])
    for exact, short in zip(*results):
        error = (short.float() - exact).norm() / exact.norm()
        assert 0 < error < 2**-8


def test_upsampling_repeats_in_either_layout():
    x = torch.arange(2 * 3 * 2 * 2.0).reshape(2, 3, 2, 2)
    expected = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    for layout in (torch.contiguous_format, torch.channels_last):
        own = x.clone(memory_format=layout).requires_grad_()
        y = Upsample(3, use_conv=False)(own)
        assert torch.equal(y, expected)
        y.sum().backward()
        assert torch.equal(own.grad, torch.full_like(x, 4.0))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_detached_variance_trains_its_rows_of_the_last_layer_only(dtype):
    """The trunk's gradient is the squared error's; values and last layer are those of the other."""
    process = create_gaussian_diffusion(steps=1000, learn_sigma=True, predict_xstart=True)
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 2, 2, 8, 8, generator=generator)
    t = torch.tensor([1, 5])
    values, gradients = {}, {}
    for name in ("full", "head"):
        model = fill(UNetModel(**SMALL, detach_variance=name == "head"))
        model.compute_dtype = dtype
        terms = process.training_losses(model, x0.tanh(), t, noise=noise)
        values[name] = terms
        for loss in ("mse", "loss"):
            grads = torch.autograd.grad(
                terms[loss].mean(), model.parameters(), retain_graph=loss == "mse"
            )
            own = dict(zip((key for key, _ in model.named_parameters()), grads))
            gradients[name, loss] = own
        with torch.no_grad():
            again = process.training_losses(model, x0.tanh(), t, noise=noise)
        torch.testing.assert_close(again["loss"], terms["loss"])
    for term, value in values["full"].items():
        assert torch.equal(values["head"][term], value), term

    last = ("out.2.weight", "out.2.bias")
    head, full, mse = (
        gradients[key] for key in (("head", "loss"), ("full", "loss"), ("full", "mse"))
    )
    trunk = [key for key in head if key not in last]
    for key in trunk:
        assert relative_error(head[key], mse[key]) < (1e-4 if dtype is None else 0.02), key
    apart = [relative_error(full[key], mse[key]) for key in trunk]
    assert min(apart) > 1  # the bound's gradient is the larger part of it
    for key in last:
        mean, variance = head[key].chunk(2)
        torch.testing.assert_close(mean, mse[key].chunk(2)[0])
        torch.testing.assert_close(variance, full[key].chunk(2)[1])


@pytest.mark.parametrize(
    ("changes", "detached"),
    [
        ({}, False),
        ({"predict_v": True}, False),
        ({"predict_xstart": True}, True),
        ({"predict_xstart": True, "use_kl": True}, False),
        ({"predict_xstart": True, "learn_sigma": False}, False),
        ({"predict_xstart": True, "sigma_gradient": "full"}, False),
        ({"sigma_gradient": "head"}, True),
    ],
)
def test_what_sigma_gradient_stands_for(changes, detached):
    flags = {**model_and_diffusion_defaults(), "image_size": 32, **changes}
    sr_flags = {**sr_model_and_diffusion_defaults(), **changes}
    with torch.device("meta"):
        assert create_model_and_diffusion(**flags)[0].detach_variance is detached
        model, _ = sr_create_model_and_diffusion(**sr_flags)
        assert model.detach_variance is detached
        plain, _ = sr_create_model_and_diffusion(**{**sr_flags, "sigma_gradient": "full"})
    assert list(model.state_dict()) == list(plain.state_dict())
