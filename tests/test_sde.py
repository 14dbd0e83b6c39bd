"""sde.py against outside references: diffusers' Euler step, torch's Normal and its KL, and a case with an exact answer,
data that is itself Gaussian, where the whole sampler can be followed without drawing a single sample.

    python -m pytest tests/test_sde.py
"""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from sde import kl_weight, log_prob, noise_scale, rollout, step

KINDS = ("flow", "dance", "cps")


def scheduler(steps, shift=3.0):
    s = FlowMatchEulerDiscreteScheduler(shift=shift)
    s.set_timesteps(steps)
    return s


def time_grid(steps, shift=3.0):
    return [float(s) for s in scheduler(steps, shift).sigmas]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_grid_of_sd35_is_the_documented_one():
    listed = torch.tensor([1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0.0])
    assert_close(torch.tensor(time_grid(10)), listed, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", (1.0, 3.0))
@pytest.mark.parametrize("steps", (1, 4, 10, 28))
def test_without_noise_a_step_is_the_schedulers_euler_step(steps, shift, kind):
    euler, grid = scheduler(steps, shift), time_grid(steps, shift)
    x = randn(2, 4, 3, 3).float()
    for i, (t, t_next) in enumerate(zip(grid[:-1], grid[1:])):
        v = randn(2, 4, 3, 3, seed=i + 1).float()
        mean, std = step(x, v, t, t_next, 0.0, grid[1], kind)
        x = euler.step(v, euler.timesteps[i], x).prev_sample
        assert std == 0
        assert_close(mean, x, atol=1e-5, rtol=1e-5)


def test_log_prob_is_the_normal_density_averaged_over_dimensions():
    x_next, mean, std = randn(3, 4, 5, 5), randn(3, 4, 5, 5, seed=1), 0.37
    assert_close(log_prob(x_next, mean, std), Normal(mean, std).log_prob(x_next).mean((1, 2, 3)))


def test_where_there_is_no_density_a_call_raises():
    x, grid = randn(1, 4, 2, 2), time_grid(10)
    with pytest.raises(ValueError, match="std > 0"):
        log_prob(x, x, 0.0)
    for a, kind, i in ((0.0, "flow", 3), (0.0, "dance", 3), (0.7, "cps", 9)):  # the last cps step ends without noise
        with pytest.raises(ValueError, match="std > 0"):
            kl_weight(grid[i], grid[i + 1], a, grid[1], kind)
    with pytest.raises(ValueError, match="unknown noise kind"):
        step(x, x, 0.5, 0.4, 0.7, grid[1], "floww")


def test_noise_scale_is_the_published_one():
    for t in (0.9601, 0.5, 0.0089):
        assert_close(noise_scale(t, t / 2, 0.7, 0.9601), 0.7 * math.sqrt(t / (1 - t)))
    assert_close(noise_scale(1.0, 0.9601, 0.7, 0.9601), 0.7 * math.sqrt(1 / (1 - 0.9601)))  # t = 1: finite
    assert noise_scale(0.6, 0.5, 0.3, 0.9601, "dance") == 0.3
    assert_close(step(0.0, 0.0, 0.6, 0.5, 0.7, 0.9601, "cps")[1], 0.5 * math.sin(0.35 * math.pi))  # no sqrt(dt) in it


def gaussian_result(steps, a, kind, data_mean=0.5, data_std=0.6):
    """Mean and std of the samples when the data are Normal(data_mean, data_std^2), in one dimension. No sampling.

    x_t = (1 - t) x_0 + t noise is Gaussian, so the perfect velocity E[noise - x_0 | x_t] is linear in x_t. The step's
    mean is then linear too, slope x + offset, and a Gaussian stays one: its mean and variance can be carried along."""
    grid = [3 * s / (1 + 2 * s) for s in torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()]  # shift 3
    mean, variance = 0.0, 1.0

    def velocity(x, t):
        covariance, total = t - (1 - t) * data_std**2, (1 - t) ** 2 * data_std**2 + t**2
        return -data_mean + covariance / total * (x - (1 - t) * data_mean)

    for t, t_next in zip(grid[:-1], grid[1:]):
        offset, std = step(0.0, velocity(0.0, t), t, t_next, a, grid[1], kind)
        slope = step(1.0, velocity(1.0, t), t, t_next, a, grid[1], kind)[0] - offset
        mean, variance = slope * mean + offset, slope**2 * variance + std**2
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("a, kind, figure", ((0.0, "flow", 0.5985), (0.7, "flow", 0.5999), (0.3, "dance", 0.5986)))
def test_flow_and_dance_reach_the_data_distribution(a, kind, figure):
    errors = [abs(gaussian_result(steps, a, kind)[1] - 0.6) for steps in (10, 30, 100, 300, 1000)]
    assert errors == sorted(errors, reverse=True)
    mean, std = gaussian_result(1000, a, kind)
    assert_close((mean, std), (0.5, figure), atol=5e-5, rtol=0)


def test_cps_converges_to_something_else():
    stds = [gaussian_result(steps, 0.7, "cps")[1] for steps in (100, 1000, 10000)]
    assert abs(stds[2] - stds[1]) < abs(stds[1] - stds[0]) < 0.02  # it converges ...
    assert_close(stds[2], 0.51, atol=5e-3, rtol=0)  # ... but the truth is 0.60


def test_cps_keeps_its_coefficients():
    x0, x1 = randn(100_000), randn(100_000, seed=1)  # data and noise, known
    for t, t_next in zip(time_grid(10)[:-1], time_grid(10)[1:]):
        mean, std = step((1 - t) * x0 + t * x1, x1 - x0, t, t_next, 0.7, 0.9601, "cps")
        kept = (mean - (1 - t_next) * x0) / x1  # what is left of the predicted noise: one number
        assert_close(kept, kept[:1].expand_as(kept))
        assert_close(kept[0].item() ** 2 + std**2, t_next**2)


@pytest.mark.parametrize("kind, a", (("flow", 0.7), ("flow", 0.2), ("dance", 0.3), ("cps", 0.7)))
def test_kl_weight_is_the_closed_form_kl(kind, a):
    x, v, v_teacher = randn(1, 4, 3, 3), randn(1, 4, 3, 3, seed=1), randn(1, 4, 3, 3, seed=2)
    grid = time_grid(10)
    for t, t_next in list(zip(grid[:-1], grid[1:]))[:9]:  # from t = 1, where sigma is a special case
        mean, std = step(x, v, t, t_next, a, grid[1], kind)
        mean_teacher, _ = step(x, v_teacher, t, t_next, a, grid[1], kind)
        kl = kl_divergence(Normal(mean, std), Normal(mean_teacher, std)).mean()
        assert_close(kl_weight(t, t_next, a, grid[1], kind) * (v - v_teacher).square().mean(), kl)
        if kind == "flow" and t < 1:
            derived = (1 + a**2 / 2) ** 2 * (t - t_next) * (1 - t) / (2 * a**2 * t)
            assert_close(kl_weight(t, t_next, a, grid[1]), derived)


def test_kl_weight_grows_as_documented():
    grid = time_grid(10)
    weights = [kl_weight(t, t_next, 0.7, grid[1]) for t, t_next in zip(grid[:9], grid[1:])]
    assert weights == sorted(weights)
    assert_close([weights[0], weights[8]], [0.0016, 1.1], atol=0, rtol=0.05)


def velocity(x, t):
    return x * t - x / (1 + x.square())  # any elementwise function


@pytest.mark.parametrize("kind, a", (("flow", 0.7), ("dance", 0.3), ("cps", 0.7)))
def test_rollout_records_what_it_did(kind, a):
    grid = time_grid(6)
    path = rollout(velocity, randn(3, 4, 2, 2), grid, a, kind, [torch.Generator().manual_seed(n) for n in range(3)])
    assert path.x.shape == (7, 3, 4, 2, 2) and path.mean.shape == (6, 3, 4, 2, 2)
    assert len(path.std) == 6 and path.log_prob.shape == (6, 3)
    for i in range(6):
        mean, std = step(path.x[i], velocity(path.x[i], grid[i]), grid[i], grid[i + 1], a, grid[1], kind)
        assert_close((path.mean[i], path.std[i]), (mean, std))
        if std > 0:
            assert_close(path.log_prob[i], Normal(mean, std).log_prob(path.x[i + 1]).mean((1, 2, 3)))
            assert (path.x[i + 1] != mean).all()
        else:
            assert kind == "cps" and i == 5
            assert torch.equal(path.x[i + 1], mean)
            assert path.log_prob[i].isnan().all()


def test_rollout_draws_unit_noise():
    torch.manual_seed(0)
    path = rollout(velocity, randn(500, 4, 4, 4), time_grid(6), 0.7, generators=None)
    z = torch.stack([(path.x[i + 1] - path.mean[i]) / path.std[i] for i in range(6)])  # n = 192,000
    assert abs(z.mean()) < 5 / z.numel() ** 0.5  # standard error of a mean: 1 / sqrt(n)
    assert abs(z.var() - 1) < 5 * (2 / z.numel()) ** 0.5  # of a variance: sqrt(2 / n)


def test_generators_make_samples_independent_of_their_batch():
    noise, grid = randn(5, 4, 2, 2).float(), time_grid(6)
    seeds = [torch.Generator().manual_seed(n) for n in range(5)]
    together = rollout(velocity, noise, grid, 0.7, generators=seeds).x
    for batch in ([3], [4, 0, 2]):  # other sizes, another order
        seeds = [torch.Generator().manual_seed(n) for n in batch]
        assert torch.equal(rollout(velocity, noise[batch], grid, 0.7, generators=seeds).x, together[:, batch])


def test_a_window_makes_only_its_steps_stochastic():
    noise, grid = randn(2, 4, 2, 2), time_grid(6)
    path = rollout(velocity, noise, grid, 0.7, window=[2, 3])
    assert [s > 0 for s in path.std] == [False, False, True, True, False, False]
    assert path.log_prob.isnan().all(1).tolist() == [s == 0 for s in path.std]
    assert not path.log_prob[2:4].isnan().any()
    ode = rollout(velocity, noise, grid, 0.0)
    assert set(ode.std) == {0.0} and ode.log_prob.isnan().all()
    assert torch.equal(path.x[:3], ode.x[:3])  # the same path up to the window


def test_rollout_without_noise_is_euler():
    x, grid = randn(2, 4, 2, 2), time_grid(10)
    path = rollout(velocity, x, grid, 0.0)
    for t, t_next in zip(grid[:-1], grid[1:]):
        x = x + (t_next - t) * velocity(x, t)
    assert_close(path.x[-1], x)


@pytest.mark.parametrize("grid", [[0.999, 0.5, 0.0], [0.0, 0.5, 1.0], [1000.0, 500.0, 0.0], [1.0, 0.5, 0.5], [1.0, 0.5, -0.1]])
def test_a_grid_that_does_not_fall_from_one_is_refused(grid):
    """At .999 sigma would be 22 and not 0.7: a start beside 1 is a mistake, not a finer grid."""
    with pytest.raises(ValueError, match="fall from exactly 1"):
        rollout(lambda x, t: x, torch.zeros(1, 2), grid, 0.7)


def test_rollout_wants_a_generator_for_every_sample():
    with pytest.raises(ValueError):
        rollout(lambda x, t: -x, torch.zeros(2, 3), [1.0, 0.5, 0.0], 0.7, generators=[torch.Generator()])
