"""losses.py: the expected gradient of every objective, measured by Monte Carlo and compared with
that of the KL; then clipping, what has a gradient, and the GRPO parts against plain loops.

N samples of one state form a batch whose `mean` is a leaf tensor. The loss is a mean over the
batch, so N times its gradient holds the gradients of N samples: an estimate and its error.
"""

import functools
import math

import numpy as np
import pytest
import torch
from conftest import randn
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

import losses
import sde
from losses import OBJECTIVES, group_advantage, grpo

N, D, STD = 100_000, 16, 0.3
LATENT = (1, 2, 3)  # the dimensions of one sample


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def policies():
    """Means of student and teacher (D,), about 0.3 std apart, and the gradient of their KL."""
    student = randn(D).clone().requires_grad_()
    teacher = student.detach() - 0.3 * STD * (1 + 0.5 * randn(D, seed=1))
    kl = kl_divergence(Normal(student, STD), Normal(teacher, STD)).mean()
    return student.detach(), teacher, torch.autograd.grad(kl, student)[0]


def sampled_gradients(objective, now, old, teacher, **options):
    """The gradients of N single samples (N, D), and the metrics. The old student draws."""
    now, old, teacher = (m.detach().view(1, D, 1, 1) for m in (now, old, teacher))
    now, old = now.expand(N, D, 1, 1), old.expand(N, D, 1, 1)
    mean, x_next = now.clone().requires_grad_(), old + STD * randn(N, D, 1, 1, seed=2)
    loss, metrics = OBJECTIVES[objective](mean, old, teacher, x_next, STD, **options)
    loss.backward()
    return N * mean.grad.flatten(1), metrics


def errors_off(samples, truth):
    """By how many standard errors the mean of the samples misses the truth, per coordinate."""
    return (samples.mean(0) - truth).abs() / (samples.std(0) / len(samples) ** 0.5)


@pytest.mark.parametrize("objective", ("ppo", "ppo-scalar", "ppo-public-code", "ppo-published"))
def test_the_expected_gradient_is_that_of_the_kl(objective):
    """But that of the published objective is zero: it does not learn."""
    student, teacher, truth = policies()
    wrong = torch.zeros(D)
    if objective == "ppo-published":
        truth, wrong = wrong, truth
    gradients, metrics = sampled_gradients(objective, student, student, teacher)
    assert errors_off(gradients, truth).max() < 5
    assert errors_off(gradients, wrong).max() > 25  # sharp enough to show a wrong factor
    assert metrics == {"ratio_gap": 0.0, "clip_fraction": 0.0}  # before the first update


def test_later_updates_of_ppo_descend_the_difference_of_two_kls():
    """Off ratio 1 and without clipping: KL(student, teacher) - KL(student, old student)."""
    old, teacher, _ = policies()
    now = (old + 0.2 * STD * randn(D, seed=3)).requires_grad_()
    to_teacher, to_old = (kl_divergence(Normal(now, STD), Normal(m, STD)) for m in (teacher, old))
    (difference,) = torch.autograd.grad((to_teacher - to_old).mean(), now, retain_graph=True)
    (kl,) = torch.autograd.grad(to_teacher.mean(), now)
    gradients, _ = sampled_gradients("ppo", now, old, teacher, clip_range=1e9)
    assert errors_off(gradients, difference).max() < 5
    assert errors_off(gradients, kl).max() > 25


def test_the_worked_number_in_the_docstring():
    """One coordinate, u = 0.3; expectations over z by Gauss-Hermite quadrature, so exact."""
    z, weights = np.polynomial.hermite_e.hermegauss(20)
    average = functools.partial(np.average, weights=weights)
    results = {}
    for objective in ("ppo", "kl", "ppo-published"):
        rows = []
        for action in torch.tensor(0.1 + STD * z).view(-1, 1, 1):
            mean, teacher = torch.full((1, 1), 0.1, requires_grad=True), torch.full((1, 1), 0.19)
            loss, _ = OBJECTIVES[objective](mean, mean.detach(), teacher, action, STD)
            loss.backward()
            rows.append((loss.item(), mean.grad.item()))
        results[objective] = np.array(rows).T  # losses and gradients, one per z
    rewards = -results["ppo"][0]  # at ratio 1
    variance = average((rewards - average(rewards)) ** 2)
    assert_close([average(results["kl"][0]), average(rewards), variance], [0.045, -0.045, 0.09])
    gradients = [average(gradients) for _, gradients in results.values()]
    assert_close(gradients, [-0.3 / STD, -0.3 / STD, 0.0])  # descent moves the mean by u / std
    text = " ".join(losses.opd_ppo.__doc__.split())
    assert "u = 0.3 gives KL 0.045, mean reward -0.045, variance 0.09" in text


def test_the_scalar_form_has_far_more_noise():
    """With u = (mean_old - mean_teacher) / std a coordinate's reward is r = -(u z + u^2 / 2). The
    gradient of ppo is -r z / (D std). ppo-scalar sums r over all coordinates first, which adds the
    variance of the others and the square of their mean. E[z^4] = 3 gives both variances."""
    student, teacher, _ = policies()
    u = (student - teacher) / STD
    variance = {"ppo": 2 * u**2 + u**4 / 4}  # times (D STD)^2
    variance["ppo-scalar"] = u**2 + (u**2).sum() + ((u**2).sum() / 2) ** 2
    for objective, expected in variance.items():
        gradients, _ = sampled_gradients(objective, student, student, teacher)
        squares = (D * STD * (gradients - gradients.mean(0))).square()
        assert errors_off(squares, expected).max() < 5
    factor = variance["ppo-scalar"].sum() / variance["ppo"].sum()
    kl = u.square().mean() / 2
    assert_close(factor, D / 2 * (1 + D * kl / 2), rtol=0.1, atol=0)  # the table in losses.py


def test_trajectory_has_the_gradient_of_the_whole_trajectory():
    """Two steps x -> y -> z, each with the policy Normal(x + features(x) theta, STD^2): theta also
    decides at which y the second KL is taken. KL of the trajectories = KL_1(x) + E_y[KL_2(y)], the
    expectation by Gauss-Hermite quadrature, one integral per coordinate: exact."""
    features = lambda x: torch.stack([torch.tanh(x), torch.ones_like(x)], -1)  # (..., 2)
    x, theta = torch.linspace(-1.5, 1.5, D), torch.tensor([0.5, -0.2])
    theta_teacher = torch.tensor([-0.3, 0.1])
    nodes, weights = (torch.from_numpy(n) for n in np.polynomial.hermite_e.hermegauss(60))

    def kl(state, parameters):  # per coordinate
        return (features(state) @ (parameters - theta_teacher)).square() / (2 * STD**2)

    parameters = theta.clone().requires_grad_()
    y = (x + features(x) @ parameters)[:, None] + STD * nodes  # (D, nodes)
    second = kl(y, parameters) @ weights / math.sqrt(2 * math.pi)  # (D,)
    (exact,) = torch.autograd.grad((kl(x, parameters) + second).mean(), parameters)

    def sampled(future):
        """The sum of both steps' gradients of theta (N, 2)."""
        gradients, state = 0.0, x.expand(N, D)
        for number in (1, 2):
            phi = features(state)  # (N, D, 2)
            mean_old, mean_teacher = state + phi @ theta, state + phi @ theta_teacher
            mean = mean_old.clone().requires_grad_()
            action = mean_old + STD * randn(N, D, seed=number)
            kl_to_go = kl(action, theta).mean(1) if future and number == 1 else torch.zeros(N)
            rollout_of = (mean_old, mean_teacher, action, STD)
            losses.opd_trajectory(mean, *rollout_of, kl_to_go=kl_to_go)[0].backward()
            gradients = gradients + N * torch.einsum("nd,ndp->np", mean.grad, phi)
            state = action
        return gradients

    assert errors_off(sampled(future=True), exact).max() < 5
    assert errors_off(sampled(future=False), exact).max() > 25  # as kl: the steps alone


def mar(mean, mean_old, mean_teacher, x_next, std, clip_range, kl_to_go):
    return losses.mar(mean, mean_teacher, std)


@pytest.mark.parametrize("objective", [*OBJECTIVES.values(), mar])
def test_rows_of_several_steps_equal_the_mean_over_steps(objective):
    """std (B, 1, 1, 1) against a call per step. Only the student's mean has a gradient."""
    stds, clip = [0.7, 0.1, 0.4], 0.01
    std = torch.tensor(stds).repeat_interleave(2).view(6, 1, 1, 1)
    old, noise, shift, towards = randn(4, 6, 4, 2, 2)
    mean = (old + 0.1 * std * shift).requires_grad_()
    teacher = (old + std * towards).requires_grad_()
    tensors, kl_to_go = (mean, old, teacher, old + std * noise), randn(6).abs().requires_grad_()
    loss, metrics = objective(*tensors, std, clip, kl_to_go)
    expected, averages = 0.0, dict.fromkeys(metrics, 0.0)
    for number, rows in zip(stds, torch.arange(6).split(2)):
        part = [tensor[rows] for tensor in tensors]
        one, values = objective(*part, number, clip, kl_to_go[rows])
        expected = expected + one / 3
        averages = {key: averages[key] + value / 3 for key, value in values.items()}
    assert_close(loss, expected)
    assert_close(metrics, averages)
    leaves = (mean, teacher, kl_to_go)
    gradient, *others = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    assert gradient.any() and others == [None, None]
    assert_close(gradient, torch.autograd.grad(expected, mean)[0])
    assert metrics.get("clip_fraction", 1) > 0


@pytest.mark.parametrize("objective", ("ppo", "ppo-scalar", "ppo-published", "trajectory"))
def test_clipping_stops_what_the_reward_favours_and_nothing_else(objective):
    """`mean` has moved since x_next was drawn. An action whose ratio has left the range in the
    direction of its reward has no gradient; all others have that of ratio times reward."""
    old, clip = randn(64, 4, 2, 2), 0.01
    spread = {1: STD, 2: 0.03, 3: 0.1}
    x_next, mean, teacher = (old + s * randn(64, 4, 2, 2, seed=n) for n, s in spread.items())
    log_p, log_old, log_teacher = (Normal(m, STD).log_prob(x_next) for m in (mean, old, teacher))
    log_ratio, reward = log_p - log_old, log_teacher - log_old
    kl = kl_divergence(Normal(mean, STD), Normal(teacher, STD)).mean(LATENT, keepdim=True)
    if objective != "ppo":  # one action per image
        log_ratio, reward = (r.mean(LATENT, keepdim=True) for r in (log_ratio, reward))
    if objective == "ppo-published":
        reward = -kl
    if objective == "trajectory":
        reward = randn(64, 1, 1, 1, seed=4)  # minus kl_to_go; any number will do
    ratio = log_ratio.exp()
    up, down = (ratio > 1 + clip) & (reward > 0), (ratio < 1 - clip) & (reward < 0)
    assert down.any() and (up.any() or objective == "ppo-published") and not (up | down).all()

    tensors = (mean.requires_grad_(), old, teacher, x_next)
    loss, metrics = OBJECTIVES[objective](*tensors, STD, clip, -reward.flatten())
    factor = D if objective in ("ppo-scalar", "trajectory") else 1
    weight = factor * torch.where(up | down, 0.0, ratio * reward)
    direct = mean - teacher if objective == "trajectory" else 0.0  # its KL is never clipped
    expected = (direct - weight * (x_next - mean)) / STD**2 / mean.numel()
    assert_close(torch.autograd.grad(loss, mean)[0], expected)
    gap = (ratio - 1).abs()
    expected = {"ratio_gap": gap.mean(), "clip_fraction": (gap > clip).double().mean()}
    assert metrics == pytest.approx({name: value.item() for name, value in expected.items()})


def test_the_update_in_the_docstring_runs():
    """On points (B, 2) it gives the gradient of the KL, up to the noise of the actions."""
    lines = losses.__doc__[losses.__doc__.index("  path = ") :].splitlines()
    weight, grid = torch.full((), 0.5, requires_grad=True), [1.0, 0.8, 0.5, 0.2, 0.0]
    names = {"torch": torch, "sde": sde, "opd_ppo": losses.opd_ppo, "grid": grid, "a": 0.7}
    names |= {"student": lambda x, t: weight * x, "teacher": lambda x, t: 0.4 * x}
    names["noise"] = randn(20000, 2, seed=1)  # not the stream of the actions
    exec("\n".join(line[2:] for line in lines), names)
    exact = 0.0
    for x, t, t_next in zip(names["path"].x, grid[:-2], grid[1:]):
        exact += 2 * sde.kl_weight(t, t_next, 0.7, 0.8) * (0.5 - 0.4) * x.square().mean() / 3
    assert_close(weight.grad, exact, rtol=0.1, atol=0)


@pytest.mark.parametrize("global_std, clip", ((True, 5.0), (False, 5.0), (True, 1.0), (False, 1.0)))
def test_group_advantage_by_hand(global_std, clip):
    groups = [7, 2, 7, 5, 2, 7, 5, 5, 2, 7, 9]  # unequal sizes, mixed order, one single sample
    rewards, expected = randn(11, seed=5).tolist(), []
    rewards[3] = rewards[6] = rewards[7] = 0.1  # group 5: all equal
    for reward, group in zip(rewards, groups):
        members = [r for r, g in zip(rewards, groups) if g == group]
        spread = np.std(rewards if global_std else members)
        expected.append(min(max((reward - np.mean(members)) / (spread + 1e-4), -clip), clip))
    given = torch.tensor(rewards).float().requires_grad_()
    advantage = group_advantage(given, torch.tensor(groups), global_std, clip)
    assert_close(advantage, torch.tensor(expected).float())
    assert (advantage.abs() == clip).any() == (clip == 1.0) and not advantage.requires_grad
    assert not advantage[[3, 6, 7, 10]].any()  # equal rewards, or one sample: nothing to learn
    assert group_advantage(torch.eye(40)[0], torch.zeros(40).long()).max() == 5  # by default


def test_grpo_refuses_unequal_shapes():
    """They would broadcast. Its numbers are those of the slow iteration in test_iteration.py."""
    with pytest.raises(ValueError, match="one number per sample"):
        grpo(torch.zeros(4, 1), torch.zeros(4), torch.zeros(4))
