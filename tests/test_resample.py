import numpy as np
import pytest
import torch

from improved_diffusion.resample import (
    LossSecondMomentResampler,
    UniformSampler,
    create_named_schedule_sampler,
)
from improved_diffusion.script_util import create_gaussian_diffusion


def test_loss_second_moment_equals_the_reference(golden):
    expected = golden("scalars.json")["loss_second_moment"]
    sampler = LossSecondMomentResampler(
        create_gaussian_diffusion(steps=5), history_per_term=expected["history_per_term"]
    )
    sampler.update_with_all_losses(expected["timesteps"], expected["losses"])
    np.testing.assert_allclose(sampler.weights(), expected["weights"], rtol=1e-9)


def test_history_keeps_the_newest_losses():
    sampler = LossSecondMomentResampler(
        create_gaussian_diffusion(steps=2), history_per_term=2, uniform_prob=0.1
    )
    sampler.update_with_local_losses(torch.tensor([0, 0, 0]), torch.tensor([9.0, 3.0, 4.0]))
    assert sampler.weights().tolist() == [1, 1]
    sampler.update_with_local_losses(torch.tensor([1, 1]), torch.tensor([1.0, 1.0]))
    root_mean_square = np.array([np.sqrt((9 + 16) / 2), 1.0])
    expected = 0.9 * root_mean_square / root_mean_square.sum() + 0.05
    np.testing.assert_allclose(sampler.weights(), expected)


def test_losses_of_a_batch_are_taken_one_by_one():
    """As a list for each timestep would take them, with more of one than are kept."""
    sampler = LossSecondMomentResampler(create_gaussian_diffusion(steps=6), history_per_term=3)
    lists = [[] for _ in range(6)]
    rng = np.random.default_rng(0)
    for size in (1, 4, 16, 16, 7, 30):
        steps, losses = rng.integers(0, 6, size), rng.random(size)
        sampler.update_with_local_losses(torch.from_numpy(steps), torch.from_numpy(losses))
        for step, loss in zip(steps, losses):
            lists[step] = [*lists[step], loss][-3:]
        state = sampler.state_dict()
        assert state["counts"].tolist() == [len(own) for own in lists]
        for own, kept in zip(lists, state["history"].tolist()):
            assert kept == [0.0] * (3 - len(own)) + own
    moments = [np.sqrt(np.square(own).mean()) for own in lists]
    expected = 0.999 * np.array(moments) / sum(moments) + 0.001 / 6
    np.testing.assert_allclose(sampler.weights(), expected)


def test_state_continues_and_another_process_is_refused():
    sampler = LossSecondMomentResampler(create_gaussian_diffusion(steps=3), history_per_term=2)
    sampler.update_with_all_losses([0, 0, 1, 1, 2, 2], [1, 2, 3, 4, 5, 6])
    other = LossSecondMomentResampler(create_gaussian_diffusion(steps=3), history_per_term=2)
    other.load_state_dict(sampler.state_dict())
    np.testing.assert_array_equal(other.weights(), sampler.weights())
    wrong = LossSecondMomentResampler(create_gaussian_diffusion(steps=4), history_per_term=2)
    with pytest.raises(ValueError, match="number of diffusion steps"):
        wrong.load_state_dict(sampler.state_dict())


def test_weighted_draws_are_unbiased():
    """The weighted mean over draws is the mean over all timesteps, whatever the distribution."""
    sampler = LossSecondMomentResampler(create_gaussian_diffusion(steps=4), history_per_term=1)
    losses = np.array([8.0, 1.0, 0.5, 2.5])
    sampler.update_with_all_losses(range(4), losses)
    torch.manual_seed(0)
    t, weights = sampler.sample(100_000, "cpu")
    counts = torch.bincount(t, minlength=4).numpy() / len(t)
    np.testing.assert_allclose(counts, sampler.weights(), atol=0.01)
    assert (weights.numpy() * losses[t.numpy()]).mean() == pytest.approx(losses.mean(), rel=0.02)


def test_uniform_draws_cover_every_timestep_with_weight_one():
    sampler = create_named_schedule_sampler("uniform", create_gaussian_diffusion(steps=7))
    assert isinstance(sampler, UniformSampler)
    torch.manual_seed(0)
    t, weights = sampler.sample(7000, "cpu")
    assert torch.bincount(t, minlength=7).min() > 850
    assert (weights == 1).all()


def test_unknown_sampler():
    with pytest.raises(ValueError, match="known are uniform, loss-second-moment"):
        create_named_schedule_sampler("importance", create_gaussian_diffusion())
