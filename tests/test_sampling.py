import numpy as np
import pytest
import torch

from improved_diffusion import sampling
from improved_diffusion.respace import space_timesteps
from improved_diffusion.sampling import SampleNoise
from improved_diffusion.script_util import create_gaussian_diffusion
from improved_diffusion.seeds import derive_seed
from improved_diffusion.solvers import choose_timesteps

SHAPE = (2, 4, 4)


def model(x, t):
    """Every sample by itself, so that batches cannot differ by rounding."""
    return torch.tanh(x) + 0.001 * t.reshape(-1, 1, 1, 1)


def draw_all(batch_size, sampler="ancestral", seed=3, num_samples=7):
    process = create_gaussian_diffusion(steps=20)
    return np.concatenate(
        [
            sampling.to_levels(
                sampling.draw(
                    model, process, indices, SHAPE, seed=seed, device="cpu", sampler=sampler
                )
            )
            for indices in sampling.batches(num_samples, batch_size)
        ]
    )


@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
def test_a_sample_depends_on_seed_and_number_alone(sampler):
    whole = draw_all(7, sampler)
    assert whole.shape == (7, 4, 4, 2)
    for batch_size in (1, 3, 100):
        np.testing.assert_array_equal(draw_all(batch_size, sampler), whole)
    np.testing.assert_array_equal(draw_all(2, sampler, num_samples=3), whole[:3])
    assert (draw_all(7, sampler, seed=4) != whole).any(axis=(1, 2, 3)).all()
    assert len(np.unique(whole.reshape(7, -1), axis=0)) == 7


@pytest.mark.parametrize(("sampler", "loop"), [("ancestral", "p"), ("ddim", "ddim")])
def test_chosen_timesteps_are_a_respaced_process(sampler, loop):
    """--sampling_steps 5 and --timestep_respacing 5 are the same samples."""
    whole = create_gaussian_diffusion(steps=20)
    spaced = create_gaussian_diffusion(steps=20, timestep_respacing="5")
    options = {"seed": 0, "device": "cpu", "sampler": sampler}
    timesteps = choose_timesteps(whole, 5, "uniform")
    assert timesteps == spaced.timestep_map
    chosen = sampling.draw(model, whole, range(3), SHAPE, timesteps=timesteps, **options)
    assert torch.equal(chosen, sampling.draw(model, spaced, range(3), SHAPE, **options))
    # Of a process that is respaced already, its own are chosen from.
    again = sampling.draw(model, spaced, range(3), SHAPE, timesteps=[0, 2, 4], **options)
    third = create_gaussian_diffusion(steps=20, timestep_respacing="3")
    assert [spaced.timestep_map[i] for i in (0, 2, 4)] == third.timestep_map
    assert torch.equal(again, sampling.draw(model, third, range(3), SHAPE, **options))
    noise = SampleNoise(0, range(3), "cpu")
    run = getattr(third, f"{loop}_sample_loop")
    assert torch.equal(again, run(model, (3, *SHAPE), device="cpu", noise_fn=noise))


@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
def test_evaluations_are_counted(sampler):
    calls = []

    def counting(x, t):
        calls.append(t[0].item())
        return model(x, t)

    process = create_gaussian_diffusion(steps=20, rescale_timesteps=False)
    plan = sampling.choose_plan(process, sampler=sampler, steps=6, spacing="karras")
    sampling.draw(
        counting,
        process,
        range(2),
        SHAPE,
        seed=0,
        device="cpu",
        sampler=plan.sampler,
        timesteps=plan.timesteps,
    )
    assert len(calls) == plan.evaluations == (11 if sampler == "heun" else 6)
    assert sorted(set(calls)) == plan.timesteps
    assert (calls[0], calls[-1]) == (19, 0)


def test_clipping_limits_every_prediction():
    process = create_gaussian_diffusion(steps=20, predict_xstart=True)

    def bright(x, t):
        return torch.full_like(x, 3.0)

    for sampler in sampling.SAMPLERS:
        options = {"seed": 0, "device": "cpu", "sampler": sampler}
        clipped = sampling.draw(bright, process, range(2), SHAPE, clip_denoised=True, **options)
        free = sampling.draw(bright, process, range(2), SHAPE, clip_denoised=False, **options)
        assert clipped.max().item() == pytest.approx(1, abs=1e-3)
        assert free.max().item() == pytest.approx(3, abs=1e-3)


def test_auto_clips_where_noise_outweighs_the_signal():
    process = create_gaussian_diffusion(steps=20, predict_xstart=True, self_condition=True)
    seen = {}

    def bright(x, t, x_self):
        seen[int(t[0])] = x_self.max().item()  # the prediction at the timestep before
        return torch.full_like(x, 3.0)

    for sampler in sampling.SAMPLERS:
        seen.clear()
        options = {"seed": 0, "device": "cpu", "sampler": sampler}
        last = sampling.draw(bright, process, range(2), SHAPE, **options).max().item()
        classic = sampler in ("ancestral", "ddim")
        assert last == pytest.approx(1 if classic else 3, abs=1e-3)
        for t in range(19):
            clipped = classic or process.alphas_cumprod[t + 1] < 0.5
            # Heun's second evaluation in a step sees the step's first.
            assert sampler == "heun" or seen[t] == (1 if clipped else 3)
    assert 2 < sum(process.alphas_cumprod < 0.5) < 18


DEFAULT = (sampling.DEFAULT_SAMPLER, sampling.DEFAULT_STEPS)


@pytest.mark.parametrize(
    ("flags", "respacing", "expected"),
    [
        ({}, "", DEFAULT),
        ({"steps": 12}, "", (sampling.DEFAULT_SAMPLER, 12)),
        ({"sampler": "heun"}, "", ("heun", sampling.DEFAULT_STEPS)),
        # What the reference's flags mean to it.
        ({}, "250", ("ancestral", 250)),
        ({}, "1000", ("ancestral", 1000)),
        ({"use_ddim": True}, "", ("ddim", 1000)),
        ({"use_ddim": True}, "ddim50", ("ddim", 50)),
        ({"sampler": "ancestral"}, "", ("ancestral", 1000)),
        ({"sampler": "unipc"}, "25", ("unipc", 25)),
        ({"sampler": "ddim", "use_ddim": True, "steps": 30}, "", ("ddim", 30)),
    ],
)
def test_what_the_flags_stand_for(flags, respacing, expected):
    process = create_gaussian_diffusion(steps=1000, timestep_respacing=respacing)
    plan = sampling.choose_plan(process, respaced=bool(respacing), **flags)
    assert (plan.sampler, len(plan.timesteps)) == expected
    if plan.sampler in ("ancestral", "ddim"):
        visited = {process.timestep_map[t] for t in plan.timesteps}
        assert visited == space_timesteps(1000, respacing or [expected[1]])


def test_a_short_process_needs_no_flag():
    plan = sampling.choose_plan(create_gaussian_diffusion(steps=8))
    assert plan.timesteps == list(range(8))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"sampler": "euler"}, "--sampler euler: choose from ancestral, ddim, heun"),
        ({"sampler": "heun", "use_ddim": True}, "--use_ddim True contradicts --sampler heun"),
        ({"steps": -1}, "--sampling_steps -1"),
        ({"spacing": "even"}, "--timestep_spacing even"),
    ],
)
def test_flags_that_stand_for_nothing(flags, message):
    with pytest.raises(ValueError, match=message):
        sampling.choose_plan(create_gaussian_diffusion(steps=20), **flags)


def test_noise_is_standard_normal_and_new_at_every_step():
    noise = SampleNoise(0, range(500), "cpu")
    first, second = (noise(torch.empty(500, 2, 8, 8)) for _ in range(2))
    for draw in (first, second):
        assert draw.mean().abs() < 0.02
        assert draw.std().item() == pytest.approx(1, abs=0.02)
    correlation = np.corrcoef(first.flatten(), second.flatten())[0, 1]
    assert abs(correlation) < 0.02
    neighbours = np.corrcoef(first[:-1].flatten(), first[1:].flatten())[0, 1]
    assert abs(neighbours) < 0.02


def test_seeds_of_a_stream_are_distinct_in_the_32_bits_that_count():
    seeds = {derive_seed(7, "sample", i) for i in range(100_000)}
    assert len(seeds) == 100_000
    assert max(seeds) < 2**32
    assert derive_seed(7, "sample", 0) != derive_seed(7, "train", 0) != derive_seed(8, "train", 0)


def test_levels_are_the_inverse_of_the_data_scaling():
    levels = torch.arange(256)
    scaled = (levels / 127.5 - 1).reshape(1, 1, 16, 16)
    assert sampling.to_levels(scaled).flatten().tolist() == list(range(256))
    assert sampling.to_levels(torch.tensor([[[[-3.0, 3.0]]]])).flatten().tolist() == [0, 255]
