import math
import os
import signal

import pytest
import torch
from torch import nn

from improved_diffusion import checkpoint, logger, train_util
from improved_diffusion.cost import training_cost
from improved_diffusion.meters import LossMeter
from improved_diffusion.resample import LossSecondMomentResampler
from improved_diffusion.script_util import (
    create_gaussian_diffusion,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from improved_diffusion.train_util import TrainLoop, parse_ema_rates, parse_microbatch

STEPS = 20


class Net(nn.Module):
    """A network small enough to train hundreds of steps in a second."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.out = nn.Conv2d(4, 2, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, t):
        h = self.dropout(torch.sin(self.conv(x) + t.reshape(-1, 1, 1, 1) / 1000))
        return self.out(h)


def batches(size=6, start=0):
    step = start
    while True:
        generator = torch.Generator().manual_seed(step)
        yield torch.rand(size, 1, 8, 8, generator=generator) * 2 - 1, {}
        step += 1


def make(folder, *, dropout=0.0, sampler=None, size=6, start=0, data=None, **changes):
    logger.configure(str(folder), ["csv"])
    torch.manual_seed(0)
    model = Net(dropout)
    diffusion = create_gaussian_diffusion(steps=STEPS, learn_sigma=True)
    settings = {
        "batch_size": size,
        "microbatch": -1,
        "lr": 1e-2,
        "ema_rate": "0.9,0.5",
        "log_interval": 5,
        "save_interval": 0,
        "resume_checkpoint": "",
    }
    return TrainLoop(
        model=model,
        diffusion=diffusion,
        data=data or batches(size, start),
        schedule_sampler=sampler(diffusion) if sampler else None,
        **{**settings, **changes},
    )


def warm_sampler(diffusion):
    sampler = LossSecondMomentResampler(diffusion, history_per_term=1)
    sampler.update_with_all_losses(range(STEPS), torch.linspace(0.1, 5, STEPS).tolist())
    return sampler


def gradient(loop, batch):
    torch.manual_seed(9)
    loop.forward_backward(batch, {})
    return torch.cat([p.grad.flatten() for p in loop.params])


@pytest.mark.parametrize("sampler", [None, warm_sampler])
@pytest.mark.parametrize("microbatch", [1, 4, 6, 7, 100])
def test_any_microbatch_gives_the_gradient_of_the_whole_batch(tmp_path, microbatch, sampler):
    """Seven samples in fours leave an uneven last microbatch of three."""
    batch = next(batches(7))[0]
    whole = gradient(make(tmp_path, size=7, sampler=sampler), batch)
    parts = gradient(make(tmp_path, size=7, sampler=sampler, microbatch=microbatch), batch)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    assert whole.norm() > 0


def test_gradient_is_that_of_the_weighted_mean_written_out(tmp_path):
    loop = make(tmp_path, sampler=warm_sampler)
    batch = next(loop.data)[0]
    own = gradient(loop, batch)
    torch.manual_seed(9)
    t, weights = warm_sampler(loop.diffusion).sample(6, "cpu")
    noise = torch.randn_like(batch)
    assert weights.unique().numel() > 1
    losses = loop.diffusion.training_losses(loop.model, batch, t, noise=noise)["loss"]
    expected = torch.autograd.grad((losses * weights).mean(), loop.params)
    torch.testing.assert_close(own, torch.cat([g.flatten() for g in expected]))


def test_first_step_by_hand(tmp_path):
    """AdamW's first step moves by the learning rate against the sign; then the averages follow."""
    loop = make(tmp_path, ema_warmup=False)
    before = [p.detach().clone() for p in loop.params]
    loop.run_step(*next(loop.data))
    for parameter, old, slow, fast in zip(loop.params, before, *loop.ema_params):
        step = 1e-2 * parameter.grad / (parameter.grad.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), old - step, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(slow, 0.9 * old + 0.1 * parameter.detach())
        torch.testing.assert_close(fast, 0.5 * old + 0.5 * parameter.detach())


def test_warmup_limits_the_averages(tmp_path):
    """Rates at updates 0, 1, 2: 1/10, 2/11, 3/12, all below 0.9 and 0.5."""
    loop = make(tmp_path)
    expected = [p.detach().clone() for p in loop.params]
    for n in range(12):
        loop.run_step(*next(loop.data))
        rate = min(0.5, (1 + n) / (10 + n))
        expected = [rate * e + (1 - rate) * p.detach() for e, p in zip(expected, loop.params)]
    for average, value in zip(loop.ema_params[1], expected):
        torch.testing.assert_close(average, value)


def test_linear_annealing_ends_the_run(tmp_path):
    loop = make(tmp_path, lr_anneal_steps=4)
    rates = []
    for _ in range(4):
        loop.run_step(*next(loop.data))
        rates.append(loop.opt.param_groups[0]["lr"])
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert make(tmp_path / "b", lr_anneal_steps=4).run_loop() is False
    assert checkpoint.complete_steps(str(tmp_path / "b")) == [4]


def test_log_holds_the_reports_columns_and_means(tmp_path):
    loop = make(tmp_path, max_steps=10)
    seen = []
    inner = loop.diffusion.training_losses

    def spy(*args, **kwargs):
        losses = inner(*args, **kwargs)
        seen.append((args[2], {k: v.detach() for k, v in losses.items()}))
        return losses

    loop.diffusion.training_losses = spy
    loop.run_loop()
    rows = logger.read_progress(str(tmp_path / "progress.csv"))
    assert [(row["step"], row["samples"]) for row in rows] == [(5, 30), (10, 60)]
    quartiles = [f"{name}_q{i}" for name in ("loss", "mse", "vb") for i in range(4)]
    assert set(rows[0]) == {"grad_norm", "loss", "mse", "vb", "samples", "step", *quartiles}
    for row, part in zip(rows, (seen[:5], seen[5:])):
        t = torch.cat([t for t, _ in part])
        for name in ("loss", "mse", "vb"):
            values = torch.cat([losses[name] for _, losses in part])
            assert row[name] == pytest.approx(values.mean().item(), rel=1e-5)
            for i in range(4):
                own = values[(t >= i * 5) & (t < (i + 1) * 5)]
                assert row[f"{name}_q{i}"] == pytest.approx(own.mean().item(), rel=1e-5)


def test_channels_and_classes_are_logged(tmp_path):
    """By the means of the squared errors, channel by channel and label by label."""

    def data():
        generator = torch.Generator().manual_seed(3)
        while True:
            batch = torch.rand(6, 2, 8, 8, generator=generator)
            yield batch, {"y": torch.randint(3, (6,), generator=generator)}

    class TwoChannels(Net):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3, padding=1)
            self.out = nn.Conv2d(4, 4, 1)

        def forward(self, x, t, y):
            return super().forward(x, t)

    logger.configure(str(tmp_path), ["csv"])
    loop = TrainLoop(
        model=TwoChannels(),
        diffusion=create_gaussian_diffusion(steps=STEPS, learn_sigma=True),
        data=data(),
        batch_size=6,
        microbatch=4,
        lr=1e-2,
        ema_rate=0.9,
        log_interval=2,
        save_interval=0,
        resume_checkpoint="",
        max_steps=2,
        channels=["Seg", "T1CE"],
        classes=["ape", "cat", "dog"],
    )
    errors, labels = [], []
    inner = loop.diffusion.training_losses

    def spy(model, x, t, model_kwargs, noise, **kwargs):
        x_t = loop.diffusion.q_sample(x, t, noise)
        with torch.no_grad():
            output = loop.model(x_t, loop.diffusion.model_timesteps(t), **model_kwargs)
        errors.append((output[:, :2] - noise).square().mean(dim=(2, 3)))  # [N, C]
        labels.append(model_kwargs["y"])
        return inner(model, x, t, model_kwargs=model_kwargs, noise=noise, **kwargs)

    loop.diffusion.training_losses = spy
    loop.run_loop()
    (row,) = logger.read_progress(str(tmp_path / "progress.csv"))
    errors, labels = torch.cat(errors), torch.cat(labels)
    assert row["mse_Seg"] == pytest.approx(errors[:, 0].mean().item(), rel=1e-5)
    assert row["mse_T1CE"] == pytest.approx(errors[:, 1].mean().item(), rel=1e-5)
    assert row["mse"] == pytest.approx(errors.mean().item(), rel=1e-5)
    for number, name in enumerate(("ape", "cat", "dog")):
        own = errors[labels == number]
        assert len(own) and row[f"mse_class_{name}"] == pytest.approx(own.mean().item(), rel=1e-5)
    assert "mse_Seg_q0" not in row


def test_many_classes_are_not_logged(tmp_path):
    assert make(tmp_path, classes=[str(i) for i in range(11)]).meter.classes == []


def test_half_precision_agrees_with_single_and_keeps_single_weights(tmp_path):
    batch = next(batches())[0]
    single = gradient(make(tmp_path / "single"), batch)
    loop = make(tmp_path / "half", use_fp16=True)
    assert loop.scaler.get_scale() == 2**20  # the reference's; too large for so small a network
    loop.scaler.load_state_dict({**loop.scaler.state_dict(), "scale": 2.0**12})
    half = gradient(loop, batch) / 2**12
    assert half.dtype == torch.float32
    assert 0 < (half - single).norm() / single.norm() < 5e-3  # float16 has 11 bits
    loop.run_step(batch, {})
    states = [*loop.params, *loop.ema_params[0], *(s["exp_avg"] for s in loop.opt.state.values())]
    assert {value.dtype for value in states} == {torch.float32}
    assert loop.scaler.get_scale() == pytest.approx(2**12.001, rel=1e-6)
    path = str(tmp_path / "half" / "model000001.pt")
    loop.save()
    assert {value.dtype for value in checkpoint.load_weights(path).values()} == {torch.float32}


def test_a_gradient_that_overflows_skips_the_step(tmp_path):
    loop = make(tmp_path, use_fp16=True, fp16_scale_growth=0.25, log_interval=1, max_steps=2)
    loop.scaler.load_state_dict({**loop.scaler.state_dict(), "scale": 2.0**60})
    before = [p.detach().clone() for p in loop.params]
    loop.run_step(*next(loop.data))
    assert all(torch.equal(p, old) for p, old in zip(loop.params, before))
    assert (loop.step, loop.scaler.get_scale()) == (1, 2.0**59)
    loop.scaler.load_state_dict({**loop.scaler.state_dict(), "scale": 2.0**16})
    loop.run_step(*next(loop.data))
    assert any(not torch.equal(p, old) for p, old in zip(loop.params, before))
    loop.log_step()
    (row,) = logger.read_progress(str(tmp_path / "progress.csv"))
    assert row["lg_loss_scale"] == pytest.approx(16.25)
    assert 0 < row["grad_norm"] < 1e3  # of the step that counted


def unet_loop(folder, **changes):
    logger.configure(str(folder), ["csv", "log"])
    torch.manual_seed(0)
    flags = {**model_and_diffusion_defaults(), "image_size": 16, "num_channels": 32}
    flags.update(num_res_blocks=1, channel_mult="1,2", attention_resolutions="8", num_heads=2)
    flags.update(in_channels=1, diffusion_steps=STEPS, use_checkpoint=changes.pop("check", False))
    flags.update(dropout=changes.pop("dropout", 0.0), **changes.pop("network", {}))
    model, diffusion = create_model_and_diffusion(**flags)
    for p in model.parameters():  # zero layers would hide what lies before them
        torch.nn.init.normal_(p, std=0.05)
    settings = {"batch_size": 4, "microbatch": -1, "lr": 1e-3, "ema_rate": 0.9}
    settings.update(log_interval=2, save_interval=0, resume_checkpoint="", precision="fp32")
    data = ((torch.rand(4, 1, 16, 16) * 2 - 1, {}) for _ in iter(int, 1))
    return TrainLoop(model=model, diffusion=diffusion, data=data, **{**settings, **changes})


def batch_of_four():
    return torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1


@pytest.mark.parametrize(("precision", "bits"), [("bf16", 8), ("fp16", 11)])
def test_gradients_in_a_shorter_type_differ_by_its_rounding(tmp_path, precision, bits):
    exact = gradient(unet_loop(tmp_path / "a"), batch_of_four())
    loop = unet_loop(tmp_path / "b", precision=precision)
    if precision == "fp16":
        loop.scaler.load_state_dict({**loop.scaler.state_dict(), "scale": 2.0**10})
    short = gradient(loop, batch_of_four()) / loop.scaler.get_scale()
    assert loop.precision == precision and short.dtype == torch.float32
    error = ((short - exact).norm() / exact.norm()).item()
    # Each rounding is half a unit of the last bit; a dozen layers' add up like noise.
    assert 2.0 ** -(bits + 3) < error < 2.0 ** -(bits - 4), error


def test_the_blocks_compute_in_the_shorter_type_and_the_ends_do_not(tmp_path):
    loop = unet_loop(tmp_path, precision="bf16")
    seen = {}

    def note(name):
        return lambda module, inputs, output: seen.update({name: (inputs[0].dtype, output.dtype)})

    for name, module in loop.model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.GroupNorm)):
            module.register_forward_hook(note(name))
    loop.run_step(batch_of_four(), {})
    ends = {name: seen.pop(name) for name in ("input_blocks.0.0", "out.2")}
    assert set(ends.values()) == {(torch.float32, torch.float32)}
    assert set(seen.values()) == {(torch.bfloat16, torch.bfloat16)}
    assert len(seen) > 20
    assert {p.dtype for p in loop.model.parameters()} == {torch.float32}


def test_checkpointing_recomputes_the_same_with_dropout(tmp_path):
    """The random state of the first pass is that of the second."""
    plain = gradient(unet_loop(tmp_path / "a", dropout=0.5), batch_of_four())
    again = gradient(unet_loop(tmp_path / "b", dropout=0.5, check=True), batch_of_four())
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-7)


def test_a_step_that_is_not_finite_changes_nothing(tmp_path):
    loop = unet_loop(tmp_path)
    loop.run_step(batch_of_four(), {})
    before = [p.detach().clone() for p in loop.params]
    moments = [s["exp_avg_sq"].clone() for s in loop.opt.state.values()]
    bad = batch_of_four()
    bad[0, 0, 0, 0] = math.nan
    loop.run_step(bad, {})
    assert all(torch.equal(p, old) for p, old in zip(loop.params, before))
    assert all(
        torch.equal(s["exp_avg_sq"], old) for s, old in zip(loop.opt.state.values(), moments)
    )
    assert all(torch.isfinite(average).all() for average in loop.ema_params[0])
    loop.log_step()
    assert loop.step == 2
    (row,) = logger.read_progress(str(tmp_path / "progress.csv"))
    assert all(math.isfinite(value) for value in row.values())
    assert "skipped 1 of 2 steps, whose gradient is not finite" in (
        (tmp_path / "log.txt").read_text()
    )
    loop.run_step(batch_of_four(), {})
    assert any(not torch.equal(p, old) for p, old in zip(loop.params, before))


@pytest.mark.parametrize("fits", [4, 3, 1])
def test_microbatches_shrink_until_they_fit(tmp_path, fits):
    """And the step comes out as if they had fitted at once."""
    expected = gradient(unet_loop(tmp_path / "a"), batch_of_four())
    loop = unet_loop(tmp_path / "b", microbatch="auto")
    inner = loop.diffusion.training_losses

    def limited(model, x, *args, **kwargs):
        losses = inner(model, x, *args, **kwargs)
        if len(x) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses

    loop.diffusion.training_losses = limited
    own = gradient(loop, batch_of_four())
    assert loop.microbatch == {4: 4, 3: 2, 1: 1}[fits]
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-7)
    text = (tmp_path / "b" / "log.txt").read_text()
    assert "microbatch 4 of 4: " in text and "an image needs about" in text
    assert ("microbatch 4 does not fit into memory: going on with 2" in text) == (fits < 4)


def test_memory_that_holds_not_even_one_image_ends_the_run(tmp_path):
    loop = unet_loop(tmp_path, microbatch="auto")

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    loop.diffusion.training_losses = full
    with pytest.raises(torch.OutOfMemoryError):
        loop.run_step(batch_of_four(), {})


def test_the_automatic_microbatch_follows_the_free_memory(tmp_path, monkeypatch):
    loop = unet_loop(tmp_path, microbatch="auto", batch_size=4)
    shape = (1, 16, 16)
    cost = training_cost(loop.model, shape)
    reserved = 3 * 4 * cost.parameters  # gradients and moments
    free = int((reserved + 2.5 * cost.image_bytes) / 0.85)
    monkeypatch.setattr(train_util, "free_memory", lambda device: free)
    loop.run_step(batch_of_four(), {})
    assert loop.microbatch == 2


@pytest.mark.parametrize(("value", "expected"), [(7, 7), ("7", 7), (-1, -1), ("0", -1)])
def test_microbatch_numbers(value, expected):
    assert parse_microbatch(value) == expected


def test_settings_that_are_unknown(tmp_path):
    with pytest.raises(ValueError, match="--microbatch some: give a number of images, or auto"):
        unet_loop(tmp_path, microbatch="some")
    with pytest.raises(ValueError, match="--precision fp8: choose from auto, fp32, bf16, fp16"):
        unet_loop(tmp_path, precision="fp8")
    with pytest.raises(ValueError, match="--compile maybe: choose from auto, on, off"):
        unet_loop(tmp_path, compile="maybe")


def test_compiling_that_fails_is_said_and_done_without(tmp_path, monkeypatch):
    def broken(model, **kwargs):
        def call(*args, **kwargs):
            raise RuntimeError("no compiler found\nlong explanation")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    loop = unet_loop(tmp_path, compile="on")
    expected = gradient(unet_loop(tmp_path / "plain"), batch_of_four())
    logger.configure(str(tmp_path), ["log"])
    torch.testing.assert_close(gradient(loop, batch_of_four()), expected)
    text = (tmp_path / "log.txt").read_text()
    assert "torch.compile failed, going on without it: no compiler found\n" in text


def test_whole_levels_are_scaled_on_the_device(tmp_path):
    levels = torch.randint(256, (4, 1, 16, 16), dtype=torch.uint8)
    scaled = (levels.double() / 127.5 - 1).float()
    one = gradient(unet_loop(tmp_path / "a"), levels)
    two = gradient(unet_loop(tmp_path / "b"), scaled)
    assert torch.equal(one, two) and one.norm() > 0


def test_the_loss_scale_is_continued(tmp_path):
    settings = {"use_fp16": True, "lr_anneal_steps": 40}
    make(tmp_path / "whole", max_steps=10, **settings).run_loop()
    make(tmp_path / "parts", max_steps=7, **settings).run_loop()
    path = str(tmp_path / "parts" / checkpoint.model_name(7))
    make(tmp_path / "parts", max_steps=10, start=7, resume_checkpoint=path, **settings).run_loop()
    assert_equal(states(tmp_path / "parts", 10), states(tmp_path / "whole", 10))
    scale = checkpoint.load(str(tmp_path / "whole" / "opt000010.pt"))["training"]["loss_scale"]
    # Four gradients overflowed and halved 2^20; six did not.
    assert math.log2(scale) == pytest.approx(16.006)


def test_half_precision_state_of_the_reference_is_read(tmp_path):
    """It keeps the moments of all parameters in one flat vector."""
    loop = make(tmp_path, max_steps=5)
    loop.run_loop()
    other = tmp_path / "reference"
    other.mkdir()
    for name, state in states(tmp_path, 5).items():
        if name.startswith("opt"):
            own = state["state"]
            flat = {
                key: torch.cat([own[i][key].flatten() for i in range(len(own))])
                for key in ("exp_avg", "exp_avg_sq")
            }
            groups = [{"lr": 1.0, "params": [0]}]
            state = {"state": {0: {"step": 5, **flat}}, "param_groups": groups}
        torch.save(dict(state), other / name)
    resumed = make(tmp_path / "new", resume_checkpoint=str(other / "model000005.pt"))
    assert_equal(resumed.opt.state_dict()["state"], loop.opt.state_dict()["state"])
    assert resumed.opt.param_groups[0]["lr"] == 1e-2


def test_the_state_of_another_network_is_refused(tmp_path):
    make(tmp_path, max_steps=5).run_loop()
    path = tmp_path / "opt000005.pt"
    state = checkpoint.load(str(path))
    state["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"opt000005\.pt holds no optimizer state"):
        make(tmp_path, resume_checkpoint=str(tmp_path / "model000005.pt"))


def test_a_run_is_not_written_over(tmp_path):
    make(tmp_path, max_steps=5).run_loop()
    with pytest.raises(ValueError, match="already holds a run"):
        make(tmp_path)


def test_variables_of_the_reference(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_TRAINING_TEST", "1")
    monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", str(tmp_path / "elsewhere"))
    loop = make(tmp_path / "log", save_interval=3)
    assert loop.run_loop() is False
    assert loop.step == 3
    assert checkpoint.complete_steps(str(tmp_path / "elsewhere")) == [3]
    assert checkpoint.complete_steps(str(tmp_path / "log")) == []


def test_meter_leaves_out_empty_quartiles():
    meter = LossMeter(8)
    meter.add(torch.tensor([0, 1, 7]), {"loss": torch.tensor([1.0, 2.0, 6.0])})
    meter.add(torch.tensor([6]), {"loss": torch.tensor([4.0])})
    assert meter.read() == {"loss": 3.25, "loss_q0": 1.5, "loss_q3": 5.0}
    assert meter.read() == {}


def states(folder, step):
    names = [checkpoint.model_name(step), checkpoint.opt_name(step)]
    names += [checkpoint.ema_name(rate, step) for rate in (0.9, 0.5)]
    return {name: checkpoint.load(str(folder / name)) for name in names}


def assert_equal(a, b):
    """Equal to the last bit, at any depth."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for left, right in zip(a, b):
            assert_equal(left, right)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize("stop", [5, 7, 13])
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path, stop):
    """Dropout, the loss-aware sampler, annealing and the log's means included."""
    settings = {
        "dropout": 0.3,
        "sampler": lambda d: LossSecondMomentResampler(d, history_per_term=1),
        "lr_anneal_steps": 40,
        "microbatch": 4,
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    make(whole, max_steps=20, **settings).run_loop()
    make(parts, max_steps=stop, **settings).run_loop()
    path = str(parts / checkpoint.model_name(stop))
    # The seed of the global generator must not matter.
    loop = make(parts, max_steps=20, start=stop, resume_checkpoint=path, **settings)
    assert loop.step == stop
    loop.run_loop()
    assert_equal(states(parts, 20), states(whole, 20))
    assert (parts / "progress.csv").read_bytes() == (whole / "progress.csv").read_bytes()
    assert (
        checkpoint.load(str(whole / "opt000020.pt"))["training"]["schedule_sampler"]["counts"].sum()
        > STEPS / 2
    )


def test_resuming_an_older_checkpoint_moves_the_newer_ones(tmp_path):
    make(tmp_path, max_steps=15, save_interval=5).run_loop()
    loop = make(tmp_path, start=5, resume_checkpoint=str(tmp_path / "model000005.pt"), max_steps=7)
    assert loop.step == 5
    assert checkpoint.complete_steps(str(tmp_path)) == [5]
    assert len(os.listdir(tmp_path / "superseded")) == 8
    rows = logger.read_progress(str(tmp_path / "progress.csv"))
    assert [row["step"] for row in rows] == [5]


@pytest.mark.parametrize("name", ["ema_0.5_000005.pt", "opt000005.pt"])
def test_resuming_needs_all_files_of_a_checkpoint(tmp_path, name):
    make(tmp_path, max_steps=5).run_loop()
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=name):
        make(tmp_path, resume_checkpoint=str(tmp_path / "model000005.pt"))


def test_files_of_different_steps_are_not_mixed(tmp_path):
    make(tmp_path, max_steps=10, save_interval=5).run_loop()
    os.replace(tmp_path / "opt000010.pt", tmp_path / "opt000005.pt")
    with pytest.raises(ValueError, match=r"is of step 10 and .* of step 5"):
        make(tmp_path, resume_checkpoint=str(tmp_path / "model000005.pt"))


def test_optimizer_state_of_the_reference_is_read(tmp_path):
    """It is a plain AdamW state dict, and the weights hold no metadata."""
    loop = make(tmp_path, max_steps=5)
    loop.run_loop()
    other = tmp_path / "reference"
    other.mkdir()
    for name, state in states(tmp_path, 5).items():
        state.pop("training", None)
        torch.save(dict(state), other / name)
    resumed = make(tmp_path / "new", resume_checkpoint=str(other / "model000005.pt"))
    assert resumed.step == 5
    assert_equal(resumed.opt.state_dict()["state"], loop.opt.state_dict()["state"])


def test_a_checkpoint_of_the_first_version_is_continued(tmp_path):
    """Its sums between two rows of the log were those of the one process, and no skips counted."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    make(whole, max_steps=10).run_loop()
    make(parts, max_steps=7).run_loop()
    path = str(parts / checkpoint.opt_name(7))
    state = checkpoint.load(path)
    training = state["training"]
    log = training["log"]
    log["losses"] = {name: sums[0] for name, sums in log["losses"].items()}
    state["training"] = {"step": 7, "flags": training["flags"], "log": log}
    torch.save(state, path)
    model = str(parts / checkpoint.model_name(7))
    make(parts, max_steps=10, start=7, resume_checkpoint=model).run_loop()
    assert_equal(states(parts, 10), states(whole, 10))
    assert (parts / "progress.csv").read_bytes() == (whole / "progress.csv").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_finishes_the_step_and_saves(tmp_path, number):
    def data():
        for i, batch in enumerate(batches()):
            if i == 3:
                os.kill(os.getpid(), number)
            yield batch

    def handler(*_):
        raise AssertionError("not while training")

    before = signal.signal(number, handler)  # nohup and & ignore some
    try:
        loop = make(tmp_path, data=data(), max_steps=100)
        assert loop.run_loop() is True
        assert loop.step == 4
        assert checkpoint.complete_steps(str(tmp_path)) == [4]
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)


def test_a_hangup_that_is_ignored_stays_ignored(tmp_path):
    """As under nohup, when the terminal is closed."""

    def data():
        for i, batch in enumerate(batches()):
            if i == 3:
                os.kill(os.getpid(), signal.SIGHUP)
            yield batch

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        loop = make(tmp_path, data=data(), max_steps=6)
        assert loop.run_loop() is False
        assert loop.step == 6
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def rates_of(loop, steps):
    rates = []
    for _ in range(steps):
        loop.run_step(*next(loop.data))
        rates.append(loop.opt.param_groups[0]["lr"])
    return rates


def test_the_learning_rate_warms_up(tmp_path):
    rates = rates_of(make(tmp_path / "a", warmup_steps=4), 6)
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])
    rates = rates_of(make(tmp_path / "b", warmup_steps=2, lr_anneal_steps=4), 4)
    assert rates == pytest.approx([0.005, 0.0075, 0.005, 0.0025])


def test_gradients_are_clipped_to_the_norm(tmp_path):
    """A fifth of the norm: a fifth of every gradient; twice the norm: nothing changes."""
    plain = make(tmp_path / "a")
    plain.run_step(*next(plain.data))
    gradients = [p.grad.clone() for p in plain.params]
    norm = torch.cat([g.flatten() for g in gradients]).norm().item()
    for share in (0.2, 2.0):
        loop = make(tmp_path / str(share), grad_clip=share * norm)
        loop.run_step(*next(loop.data))
        for parameter, gradient in zip(loop.params, gradients):
            torch.testing.assert_close(parameter.grad, min(share, 1) * gradient, rtol=1e-4, atol=0)
        loop.log_step()
        (row,) = logger.read_progress(str(tmp_path / str(share) / "progress.csv"))
        assert row["grad_norm"] == pytest.approx(norm)  # before the clipping


def spoilt(steps, start=0):
    """Batches of which those of some steps hold a NaN."""
    for step, (batch, cond) in enumerate(batches(start=start), start):
        if step in steps:
            batch[2, 0, 1, 1] = math.nan
        yield batch, cond


def test_too_many_skipped_steps_end_the_run(tmp_path):
    """The state is that of before, and saved; the message names the last step and its images."""
    loop = make(
        tmp_path,
        data=spoilt({2, 4, 5, 6, 7}),
        max_skipped_steps=4,
        files_at=lambda begin, end: [f"{i}.png" for i in range(begin, end)],
    )
    with pytest.raises(ValueError, match=r"4 steps in a row .* not finite, up to step 8") as caught:
        loop.run_loop()
    assert "its images: 42.png, 43.png, 44.png, 45.png and 2 more" in str(caught.value)
    assert "The state of step 8 is saved; lower --lr" in str(caught.value)
    assert checkpoint.complete_steps(str(tmp_path)) == [8]
    good = make(tmp_path / "good", data=spoilt({2}), max_steps=4)
    good.run_loop()
    own, expected = states(tmp_path, 8), states(tmp_path / "good", 4)
    assert_equal(own["model000008.pt"], expected["model000004.pt"])
    assert own["opt000008.pt"]["training"]["skipped"] == [5, 4]


def test_skipped_steps_are_counted_in_the_log_and_over_a_continuation(tmp_path):
    """Also a row of them that a continuation cuts in two."""
    bad = {1, 3, 4, 5}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    make(whole, data=spoilt(bad), max_steps=10).run_loop()
    make(parts, data=spoilt(bad), max_steps=5).run_loop()
    path = str(parts / "model000005.pt")
    settings = {"resume_checkpoint": path, "max_steps": 10}
    with pytest.raises(ValueError, match="3 steps in a row"):
        make(parts, data=spoilt(bad, 5), max_skipped_steps=3, **settings).run_loop()
    make(parts, data=spoilt(bad, 5), max_skipped_steps=4, **settings).run_loop()
    rows = logger.read_progress(str(parts / "progress.csv"))
    assert [(row["step"], row["skipped"]) for row in rows] == [(5, 3), (10, 4)]
    assert (parts / "progress.csv").read_bytes() == (whole / "progress.csv").read_bytes()
    assert_equal(states(parts, 10), states(whole, 10))


def test_a_loss_that_is_not_finite_skips_the_step_too(tmp_path):
    """Though its gradient is finite: the loss of one image is infinite by a constant."""
    loop = make(tmp_path)
    inner = loop.diffusion.training_losses

    def infinite(*args, **kwargs):
        losses = inner(*args, **kwargs)
        shift = torch.zeros(len(losses["loss"]))
        shift[0] = math.inf
        return {**losses, "loss": losses["loss"] + shift}

    before = [p.detach().clone() for p in loop.params]
    loop.diffusion.training_losses = infinite
    loop.run_step(*next(loop.data))
    assert all(torch.equal(p, old) for p, old in zip(loop.params, before))
    assert loop._skipped.total == 1


def test_the_sampler_leaves_out_losses_that_are_not_finite(tmp_path):
    loop = make(tmp_path, sampler=warm_sampler, data=spoilt({0}))
    before = loop.schedule_sampler.state_dict()
    loop.run_step(*next(loop.data))
    assert_equal(loop.schedule_sampler.state_dict(), before)
    loop.run_step(*next(loop.data))
    assert not torch.equal(loop.schedule_sampler.state_dict()["history"], before["history"])


def test_the_loss_scale_does_not_fall_below_1(tmp_path):
    loop = make(tmp_path, use_fp16=True, data=spoilt(range(3, 20)), max_steps=12)
    loop.scaler.load_state_dict({**loop.scaler.state_dict(), "scale": 8.0})
    loop.run_loop()
    state = checkpoint.load(str(tmp_path / "opt000012.pt"))["training"]
    assert state["loss_scale"] == 1
    assert state["skipped"] == [9, 9]


def full_disk(monkeypatch, steps):
    """No checkpoint can be written at these steps."""
    save = checkpoint.save

    def limited(content, path):
        if any(path.endswith(f"model{step:06d}.pt") for step in steps):
            raise OSError(f"cannot write {path}: No space left on device")
        return save(content, path)

    monkeypatch.setattr(checkpoint, "save", limited)


def test_a_checkpoint_that_cannot_be_written_is_tried_again(tmp_path, monkeypatch):
    """A tenth of the interval later; the run goes on."""
    full_disk(monkeypatch, {20, 22})
    make(tmp_path / "a", save_interval=20, max_steps=45, log_interval=100).run_loop()
    assert checkpoint.complete_steps(str(tmp_path / "a")) == [24, 40, 45]
    monkeypatch.undo()
    make(tmp_path / "b", max_steps=45, log_interval=100).run_loop()
    assert_equal(states(tmp_path / "a", 45), states(tmp_path / "b", 45))


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    full_disk(monkeypatch, {7})
    message = r"cannot write .*model000007\.pt: No space left on device \(the newest .* step 5\)"
    with pytest.raises(OSError, match=message):
        make(tmp_path, save_interval=5, max_steps=7).run_loop()
    assert checkpoint.complete_steps(str(tmp_path)) == [5]
    assert not list(tmp_path.glob("*7.pt"))


def test_a_folder_that_vanishes_for_a_while(tmp_path, monkeypatch):
    """As a network drive does: nothing is written in its place, and no step or row is lost."""
    run, hidden = tmp_path / "run", tmp_path / "hidden"
    written = []

    class Picture:
        def write(self, model, path):
            written.append(path)

    def data():
        for i, batch in enumerate(batches()):
            if i == 17:
                run.rename(hidden)
            if i == 23:
                assert not run.exists()
                hidden.rename(run)
            yield batch

    settings = {"save_interval": 20, "max_steps": 30, "log_interval": 5}
    make(run, data=data(), preview=Picture(), sample_interval=10, **settings).run_loop()
    assert checkpoint.complete_steps(str(run)) == [24, 30]
    assert [os.path.basename(path) for path in written] == ["step000010.png", "step000030.png"]
    make(tmp_path / "b", **settings).run_loop()
    assert (run / "progress.csv").read_bytes() == (tmp_path / "b/progress.csv").read_bytes()
    assert_equal(states(run, 30), states(tmp_path / "b", 30))


def test_old_checkpoints_are_thinned_out(tmp_path):
    make(tmp_path, save_interval=2, max_steps=16, keep_checkpoints=4).run_loop()
    assert checkpoint.complete_steps(str(tmp_path)) == [4, 8, 14, 16]
    assert len(list(tmp_path.glob("*.pt"))) == 4 * 4
    for keep in (-1, 1):
        with pytest.raises(ValueError, match=f"--keep_checkpoints {keep}: give 0"):
            make(tmp_path / "new", keep_checkpoints=keep)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    settings = {"max_steps": 12, "save_interval": 10}
    make(tmp_path / "whole", **settings).run_loop()
    run = tmp_path / "run"
    loop = make(run, **settings)
    for _ in range(5):
        loop.run_step(*next(loop.data))
    loop.log_step()
    for name in ("opt000010.pt", "model000010.pt.partial"):
        (run / name).write_text("half")
    with pytest.raises(ValueError, match="already holds a run"):
        make(run, **settings)
    make(run, restart=True, **settings).run_loop()
    assert_equal(states(run, 12), states(tmp_path / "whole", 12))
    assert (run / "progress.csv").read_bytes() == (tmp_path / "whole/progress.csv").read_bytes()
    assert sorted(os.listdir(run / "superseded")) == ["opt000010.pt", "progress.csv"]
    assert not list(run.glob("*.partial"))


def test_equal_runs_write_equal_files(tmp_path):
    """To the last byte, also one that was continued."""
    settings = {"flags": {"a": "uniform", "b": "uniform"}, "metadata": {"c": ["Seg", "Seg"]}}
    make(tmp_path / "whole", max_steps=9, **settings).run_loop()
    make(tmp_path / "parts", max_steps=4, **settings).run_loop()
    path = str(tmp_path / "parts/model000004.pt")
    text = "".join(["uni", "form"])
    settings["flags"] = {"a": text, "b": text}
    make(tmp_path / "parts", start=4, max_steps=9, resume_checkpoint=path, **settings).run_loop()
    for name in states(tmp_path / "whole", 9):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_file_that_goes_bad_costs_nothing(tmp_path):
    def data():
        yield from (next(batches(start=i)) for i in range(3))
        raise ValueError("slice.png cannot be read")

    with pytest.raises(ValueError, match=r"slice\.png"):
        make(tmp_path, data=data()).run_loop()
    assert checkpoint.complete_steps(str(tmp_path)) == [3]


def test_a_killed_worker_of_the_loader_costs_nothing(tmp_path):
    def data():
        yield from (next(batches(start=i)) for i in range(3))
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    with pytest.raises(OSError, match="a process that decodes images was killed: DataLoader worke"):
        make(tmp_path, data=data()).run_loop()
    assert checkpoint.complete_steps(str(tmp_path)) == [3]


def test_memory_that_runs_out_costs_nothing(tmp_path):
    loop = make(tmp_path, max_steps=9)
    inner = loop.diffusion.training_losses

    def limited(*args, **kwargs):
        if loop.step == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(*args, **kwargs)

    loop.diffusion.training_losses = limited
    with pytest.raises(torch.OutOfMemoryError):
        loop.run_loop()
    make(tmp_path / "b", max_steps=4).run_loop()
    assert_equal(states(tmp_path, 4), states(tmp_path / "b", 4))


def test_a_preview_that_cannot_be_written_is_left_out(tmp_path, capsys):
    class Full:
        def write(self, model, path):
            raise OSError(f"cannot write {path}: No space left on device")

    loop = make(tmp_path, max_steps=3, preview=Full(), sample_interval=2)
    logger.configure(str(tmp_path), ["stdout"])
    assert loop.run_loop() is False
    assert "the preview is left out: cannot write" in capsys.readouterr().out


def test_data_that_ends(tmp_path):
    loop = make(tmp_path, data=iter([next(batches()) for _ in range(2)]))
    assert loop.run_loop() is False
    assert checkpoint.complete_steps(str(tmp_path)) == [2]


def test_training_lowers_the_loss(tmp_path):
    """Constant images are easy: the mean squared error falls well below that of predicting 0."""

    def data():
        while True:
            yield torch.full((16, 1, 8, 8), 0.5), {}

    make(tmp_path, data=data(), size=16, max_steps=300, log_interval=50, lr=2e-2).run_loop()
    rows = logger.read_progress(str(tmp_path / "progress.csv"))
    assert rows[0]["mse"] > 2 * rows[-1]["mse"]
    assert rows[-1]["mse"] < 0.4
    assert all(math.isfinite(value) for row in rows for value in row.values())


@pytest.mark.parametrize("text", ["", "a", "1", "0.9,0.9", "-0.1", "0.9,"])
def test_impossible_rates(text):
    with pytest.raises(ValueError, match="--ema_rate"):
        parse_ema_rates(text)


def test_rates():
    assert parse_ema_rates("0.9999, 0.99") == [0.9999, 0.99]
    assert parse_ema_rates(0.9) == [0.9]
