"""sde.py against diffusers' Euler step, torch's Normal and KL, the numbers of public samplers, and
a case with an exact answer: Gaussian data.
"""

import functools
import math

import pytest
import torch
from conftest import randn
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from sde import kl_weight, log_prob, noise_scale, rollout, step

KINDS = (("flow", 0.7), ("flow", 0.2), ("dance", 0.3), ("cps", 0.7))  # kind of noise, noise level


def scheduler(steps, shift=3.0):
    """That of SD3.5. diffusers applies the shift twice."""
    euler = FlowMatchEulerDiscreteScheduler(shift=shift)
    euler.set_timesteps(steps)
    return euler


def time_grid(steps, shift=3.0):
    return [float(sigma) for sigma in scheduler(steps, shift).sigmas]


def intervals(grid):
    return list(zip(grid[:-1], grid[1:]))


def column(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype).view(-1, 1, 1, 1)  # (B, 1, 1, 1)


def test_frozen_numbers_of_sd35():
    """SD3.5's ten steps at a = 0.7. The samplers of Flow-GRPO, Flow-OPD, verl-omni, Flow-Factory,
    UniRL and DanceOPD were run on this grid and have the same std to 4e-7. w is Flow-OPD v5 Eq. 15;
    the public code's KL is dt times as large, because it drops sqrt(dt) from the std."""
    grid = [1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0.0]
    std = [0.7, 0.743, 0.5362, 0.4459, 0.3918, 0.3528, 0.3191, 0.282, 0.2254, 0.0063]
    w = [0.00162, 0.00307, 0.00835, 0.01767, 0.03486, 0.06882, 0.14346, 0.34015, 1.10521]
    ours = time_grid(10)
    stds = [step(0.0, 0.0, t, t_next, 0.7, ours[1])[1] for t, t_next in intervals(ours)]
    weights = [kl_weight(t, t_next, 0.7, ours[1]) for t, t_next in intervals(ours)[:9]]
    assert_close(ours, grid, atol=5.1e-5, rtol=0)
    assert_close(stds, std, atol=5.1e-5, rtol=0)
    assert_close(weights, w, atol=5.1e-6, rtol=0)
    assert noise_scale(0.6, 0.5, 0.3, ours[1], "dance") == 0.3
    _, std = step(0.0, 0.0, 0.6, 0.5, 0.7, ours[1], "cps")
    assert_close(std, 0.5 * math.sin(0.35 * math.pi))  # no sqrt(dt) in it


@pytest.mark.parametrize("kind", ("flow", "dance", "cps"))
def test_without_noise_a_step_is_the_schedulers_euler_step(kind):
    for steps, shift in ((1, 1.0), (4, 3.0), (10, 3.0), (28, 1.0)):
        euler, grid = scheduler(steps, shift), time_grid(steps, shift)
        x = randn(2, 4, 3, 3).float()
        for i, (t, t_next) in enumerate(intervals(grid)):
            v = randn(2, 4, 3, 3, seed=i + 1).float()
            mean, std = step(x, v, t, t_next, 0.0, grid[1], kind)
            x = euler.step(v, euler.timesteps[i], x).prev_sample
            assert std == 0
            assert_close(mean, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind, a", KINDS)
def test_kl_weight_is_the_closed_form_kl(kind, a):
    x, v, v_teacher = randn(3, 1, 4, 3, 3)
    grid = time_grid(10)
    for t, t_next in intervals(grid)[:9]:  # from t = 1, where sigma is a special case
        mean, std = step(x, v, t, t_next, a, grid[1], kind)
        mean_teacher, _ = step(x, v_teacher, t, t_next, a, grid[1], kind)
        kl = kl_divergence(Normal(mean, std), Normal(mean_teacher, std)).mean()
        w = kl_weight(t, t_next, a, grid[1], kind)
        assert_close(w * (v - v_teacher).square().mean(), kl)


@pytest.mark.parametrize("kind, a", KINDS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_tensors_of_t_equal_floats_row_by_row(kind, a, dtype):
    grid = time_grid(10)
    steps = [3, 0, 8, 0, 5, 1, 2, 4, 6, 7]  # a step of each row; step 0 starts at t = 1
    x, v, x_next = randn(3, len(steps), 4, 2, 2).to(dtype)
    t, t_next = column([grid[i] for i in steps], dtype), column([grid[i + 1] for i in steps], dtype)
    error = 1e-12 if dtype == torch.float64 else 2e-5
    close = functools.partial(assert_close, rtol=error, atol=error)
    policy = (t, t_next, a, torch.tensor(grid[1], dtype=dtype), kind)
    sigma = torch.as_tensor(noise_scale(*policy), dtype=dtype).expand_as(t)  # dance: a float
    w, (mean, std) = kl_weight(*policy), step(x, v, *policy)
    density = log_prob(x_next, mean, std)
    assert std.shape == w.shape == t.shape and mean.dtype == std.dtype == w.dtype == dtype
    for n, i in enumerate(steps):
        rows, policy = slice(n, n + 1), (grid[i], grid[i + 1], a, grid[1], kind)
        row_mean, row_std = step(x[rows], v[rows], *policy)
        close(mean[rows], row_mean)
        close(density[rows], log_prob(x_next[rows], row_mean, row_std))
        scalars = (noise_scale(*policy), row_std, kl_weight(*policy))
        close((sigma[n].item(), std[n].item(), w[n].item()), scalars)


def test_without_a_density_a_call_raises():
    x, grid = randn(2, 4, 2, 2), time_grid(10)
    t, t_next = column([grid[3], grid[9]]), column([grid[4], grid[10]])
    for std in (0.0, column([0.3, 0.0])):
        with pytest.raises(ValueError, match="std > 0"):
            log_prob(x, x, std)
    for a, kind in ((0.0, "flow"), (0.0, "dance"), (0.7, "cps"), (0.7, "x")):
        for times in ((t, t_next), (grid[9], grid[10])):  # the last cps step has std 0
            with pytest.raises(ValueError, match={"x": "unknown noise kind"}.get(kind, "std > 0")):
                kl_weight(*times, a, grid[1], kind)
    with pytest.raises(ValueError, match="dimensions"):
        step(x[0], x[0], t, t_next, 0.7, grid[1])


def gaussian_result(steps, a, kind, data_mean=0.5, data_std=0.6):
    """Mean and std of the samples if the data are Normal(data_mean, data_std^2), without sampling.

    The perfect velocity E[noise - x_0 | x_t] is linear in x_t. So is the step's mean, slope x +
    offset: a Gaussian stays one, and its mean and variance are carried from step to step."""
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    grid = [3 * s / (1 + 2 * s) for s in grid]  # shift 3
    mean, variance = 0.0, 1.0

    def velocity(x, t):
        covariance, total = t - (1 - t) * data_std**2, (1 - t) ** 2 * data_std**2 + t**2
        return -data_mean + covariance / total * (x - (1 - t) * data_mean)

    for t, t_next in intervals(grid):
        offset, std = step(0.0, velocity(0.0, t), t, t_next, a, grid[1], kind)
        slope = step(1.0, velocity(1.0, t), t, t_next, a, grid[1], kind)[0] - offset
        mean, variance = slope * mean + offset, slope**2 * variance + std**2
    return mean, math.sqrt(variance)


def test_flow_and_dance_reach_the_data_distribution_and_cps_another():
    for a, kind, at_1000 in ((0, "flow", 0.5985), (0.7, "flow", 0.5999), (0.3, "dance", 0.5986)):
        stds = [gaussian_result(steps, a, kind)[1] for steps in (10, 30, 100, 300, 1000)]
        errors = [abs(std - 0.6) for std in stds]
        assert errors == sorted(errors, reverse=True)
        assert_close(gaussian_result(1000, a, kind), (0.5, at_1000), atol=5e-5, rtol=0)
    stds = [gaussian_result(steps, 0.7, "cps")[1] for steps in (1000, 10000)]
    assert_close(stds, [0.51, 0.51], atol=5e-3, rtol=0)


def test_cps_keeps_its_coefficients():
    x0, noise = randn(2, 1000)
    for t, t_next in intervals(time_grid(10)):
        x, v = (1 - t) * x0 + t * noise, noise - x0
        mean, std = step(x, v, t, t_next, 0.7, 0.9601, "cps")
        coefficient = (mean - (1 - t_next) * x0) / noise  # of the predicted noise
        assert_close(coefficient.square() + std**2, torch.full_like(x, t_next**2))


def velocity(x, t):
    return x * t - x / (1 + x.square())  # any elementwise function


def seeded(numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


@pytest.mark.parametrize("kind, a", KINDS)
def test_rollout_records_what_it_did(kind, a):
    grid = time_grid(6)
    path = rollout(velocity, randn(3, 4, 2, 2), grid, a, kind, seeded(range(3)))
    assert [len(path.x), len(path.mean), len(path.std), len(path.log_prob)] == [7, 6, 6, 6]
    for i, (t, t_next) in enumerate(intervals(grid)):
        mean, std = step(path.x[i], velocity(path.x[i], t), t, t_next, a, grid[1], kind)
        assert_close((path.mean[i], path.std[i]), (mean, std))
        if kind == "cps" and i == 5:
            assert torch.equal(path.x[i + 1], mean) and path.log_prob[i].isnan().all()
        else:
            density = Normal(mean, std).log_prob(path.x[i + 1]).mean((1, 2, 3))
            assert_close(path.log_prob[i], density)
            assert (path.x[i + 1] != mean).all()


def test_rollout_draws_unit_noise():
    path = rollout(velocity, randn(500, 4, 4, 4), time_grid(6), 0.7, generators=None)
    std = torch.tensor(path.std).view(6, 1, 1, 1, 1)
    z = (path.x[1:] - path.mean) / std  # n = 192,000
    assert abs(z.mean()) < 5 / z.numel() ** 0.5  # standard error of a mean: 1 / sqrt(n)
    assert abs(z.var() - 1) < 5 * (2 / z.numel()) ** 0.5  # of a variance: sqrt(2 / n)


def test_generators_make_samples_independent_of_their_batch():
    noise, grid = randn(5, 4, 2, 2).float(), time_grid(6)
    together = rollout(velocity, noise, grid, 0.7, generators=seeded(range(5))).x
    for batch in ([3], [4, 0, 2]):  # other sizes, another order
        alone = rollout(velocity, noise[batch], grid, 0.7, generators=seeded(batch)).x
        assert torch.equal(alone, together[:, batch])
    with pytest.raises(ValueError):  # one generator too few
        rollout(velocity, noise, grid, 0.7, generators=seeded(range(4)))


@pytest.mark.parametrize("kind, a", KINDS)
def test_a_window_makes_only_its_steps_stochastic(kind, a):
    x, grid = randn(2, 4, 2, 2), time_grid(6)
    path = rollout(velocity, x, grid, a, kind, window=torch.tensor([2, 3]))
    assert [std > 0 for std in path.std] == [False, False, True, True, False, False]
    assert path.log_prob.isnan().all(1).tolist() == [True, True, False, False, True, True]
    ode = rollout(velocity, x, grid, 0.0)
    assert set(ode.std) == {0.0} and ode.log_prob.isnan().all()
    assert torch.equal(path.x[:3], ode.x[:3])  # the same path up to the window


def test_a_grid_that_does_not_fall_from_one_is_refused():
    """At 0.999 sigma would be 22 and not 0.7: a start near 1 is a mistake, not a finer grid."""
    for grid in ([0.999, 0.5, 0], [0, 0.5, 1], [1000, 500, 0], [1, 0.5, 0.5], [1, 0.5, -0.1]):
        with pytest.raises(ValueError, match="fall from exactly 1"):
            rollout(velocity, torch.zeros(1, 2), grid, 0.7)
