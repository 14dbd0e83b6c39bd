"""losses.py: the expected gradient of every objective, measured by Monte Carlo against the KL's own gradient; then
clipping, what gets a gradient and what does not, and the GRPO parts against plain Python loops.

    python -m pytest tests/test_losses.py

How a gradient is measured: N samples of one state form a batch whose `mean` is a leaf tensor. The loss is an average
over the batch, so N times its gradient holds the N single-sample gradients: their mean is the estimate, their spread
gives its standard error. A test may be 5 standard errors off; nothing is fitted. (The gradient with respect to the
mean is all there is to know: that of a network's parameters follows by the chain rule.)
"""

import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

import losses
import sde
from losses import group_advantage, grpo, opd_kl, opd_ppo, opd_ppo_published, opd_ppo_scalar, opd_trajectory

N, D, STD = 200_000, 16, 0.3


def public_code(mean, mean_old, mean_teacher, x_next, std):
    return opd_ppo_published(mean, mean_old, mean_teacher, x_next, std, detach=False)


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def policies():
    """Student's and teacher's mean (D,), some 0.3 std apart, and the gradient of their KL by autograd."""
    student = randn(D).requires_grad_()
    teacher = student.detach() - 0.3 * STD * (1 + 0.5 * randn(D, seed=1))
    kl = kl_divergence(Normal(student, STD), Normal(teacher, STD)).mean()
    return student.detach(), teacher, torch.autograd.grad(kl, student)[0]


def sampled_gradients(objective, student, teacher):
    """The N single-sample gradients (N, D) at ratio 1, and the objective's metrics."""
    mean_old, mean_teacher = (m.view(1, D, 1, 1).expand(N, D, 1, 1) for m in (student, teacher))
    mean = mean_old.clone().requires_grad_()
    loss, metrics = objective(mean, mean_old, mean_teacher, mean_old + STD * randn(N, D, 1, 1, seed=2), STD)
    loss.backward()
    return N * mean.grad.flatten(1), metrics


def errors_off(samples, truth):
    """By how many standard errors the samples' mean misses the truth, for every coordinate."""
    return (samples.mean(0) - truth).abs() / (samples.std(0) / len(samples) ** 0.5)


@pytest.mark.parametrize("objective", (opd_ppo, opd_ppo_scalar, public_code))
def test_the_expected_gradient_is_that_of_the_kl(objective):
    student, teacher, gradient = policies()
    gradients, metrics = sampled_gradients(objective, student, teacher)
    assert errors_off(gradients, gradient).max() < 5
    assert errors_off(gradients, 0.0).max() > 25  # sharp enough that a wrong factor would show
    assert metrics == {"ratio_gap": 0.0, "clip_fraction": 0.0}  # nothing has been updated yet: exactly 1


def test_in_later_updates_ppo_descends_the_difference_of_two_kls():
    """Off ratio 1 and unclipped: KL(student, teacher) - KL(student, old student)."""
    old, teacher, _ = policies()
    now = (old + 0.2 * STD * randn(D, seed=3)).requires_grad_()
    kls = [kl_divergence(Normal(now, STD), Normal(other, STD)).mean() for other in (teacher, old)]
    gradient, of_kl = (torch.autograd.grad(f, now, retain_graph=True)[0] for f in (kls[0] - kls[1], kls[0]))
    mean_old, mean_teacher, mean = (m.detach().view(1, D, 1, 1).expand(N, D, 1, 1) for m in (old, teacher, now))
    mean = mean.clone().requires_grad_()
    opd_ppo(mean, mean_old, mean_teacher, mean_old + STD * randn(N, D, 1, 1, seed=2), STD, clip_range=1e9)[0].backward()
    assert errors_off(N * mean.grad.flatten(1), gradient).max() < 5
    assert errors_off(N * mean.grad.flatten(1), of_kl).max() > 25  # the KL's own it is not


def test_the_published_objective_does_not_learn():
    student, teacher, gradient = policies()
    gradients, _ = sampled_gradients(opd_ppo_published, student, teacher)
    assert errors_off(gradients, 0.0).max() < 5  # nothing is expected of it ...
    assert errors_off(gradients, gradient).max() > 25  # ... where the KL does have a gradient ...
    assert (gradients.std(0) > 0).all()  # ... and what is left is noise


def test_coordinates_apart_have_far_less_noise():
    """With z = (x_next - mean_old) / std and u = (mean_old - mean_teacher) / std a coordinate's reward is
    r = -(u z + u^2 / 2). The gradient of opd_ppo is -r z / (D std); opd_ppo_scalar sums r over all coordinates first, and
    so adds the variance of the others and the square of their mean. E[z^2] = 1 and E[z^4] = 3 give both variances."""
    student, teacher, _ = policies()
    u = (student - teacher) / STD
    apart = (2 * u**2 + u**4 / 4) / (D * STD) ** 2
    together = (u**2 + u.square().sum() + (u.square().sum() / 2) ** 2) / (D * STD) ** 2
    for objective, variance in ((opd_ppo, apart), (opd_ppo_scalar, together)):
        gradients, _ = sampled_gradients(objective, student, teacher)
        assert errors_off((gradients - gradients.mean(0)).square(), variance).max() < 5
    assert together.sum() > 8 * apart.sum()  # (D + 1) / 2 = 8.5 where u is small, more where it is not


def features(x):
    return torch.stack([torch.tanh(x), torch.ones_like(x)], -1)  # (..., 2)


def test_opd_trajectory_has_the_gradient_of_the_whole_trajectory():  # E
    """Two steps x -> y -> z, each with the policy Normal(x + features(x) theta, STD^2): theta also decides at which y
    the second KL is asked. KL of the trajectories = KL_1(x) + E_y[KL_2(y)], the expectation by Gauss-Hermite
    quadrature, one integral per coordinate: exact, and differentiable in theta."""
    x, theta, theta_teacher = torch.linspace(-1.5, 1.5, D), torch.tensor([0.5, -0.2]), torch.tensor([-0.3, 0.1])
    nodes, weights = (torch.from_numpy(n) for n in np.polynomial.hermite_e.hermegauss(60))

    def kl(state, parameters):  # of every coordinate
        return (features(state) @ (parameters - theta_teacher)).square() / (2 * STD**2)

    parameters = theta.clone().requires_grad_()
    y = (x + features(x) @ parameters)[:, None] + STD * nodes  # (D, nodes)
    total = kl(x, parameters).mean() + (kl(y, parameters) @ weights / math.sqrt(2 * math.pi)).mean()
    (exact,) = torch.autograd.grad(total, parameters)

    def sampled(future):  # the sum of both steps' gradients with respect to theta: (N, 2)
        gradients, state = 0.0, x.expand(N, D)
        for number in (1, 2):
            mean_old, mean_teacher = state + features(state) @ theta, state + features(state) @ theta_teacher
            mean, action = mean_old.clone().requires_grad_(), mean_old + STD * randn(N, D, seed=number)
            kl_to_go = kl(action, theta).mean(1) if future and number == 1 else torch.zeros(N)
            arguments = (m.view(N, D, 1, 1) for m in (mean, mean_old, mean_teacher, action))
            opd_trajectory(*arguments, STD, kl_to_go)[0].backward()
            gradients = gradients + N * torch.einsum("nd,ndp->np", mean.grad, features(state))
            state = action
        return gradients

    assert errors_off(sampled(future=True), exact).max() < 5
    per_step = sampled(future=False)  # that is D: the sum of the steps' own gradients leaves something out
    assert errors_off(per_step, exact).max() > 25
    assert ((per_step.mean(0) - exact) / exact).abs().max() > 0.05


def test_the_direct_losses_equal_their_closed_forms():  # D, F, MAR, flow matching
    (x, v, v_teacher), times = randn(3, 2, 4, 3, 3), (0.7, 0.55)  # t, t_next
    v.requires_grad_()
    (mean, std), (mean_teacher, _) = (sde.step(x, u, *times, a=0.7, t_max=0.96) for u in (v, v_teacher))
    euler, euler_teacher = (sde.step(x, u, *times, a=0.0, t_max=0.96)[0] for u in (v, v_teacher))
    kl, w = kl_divergence(Normal(mean, std), Normal(mean_teacher, std)).mean(), sde.kl_weight(*times, a=0.7, t_max=0.96)
    anchored, metrics = losses.mar(v, v_teacher, 0.02 * w)
    for loss, truth in (
        (opd_kl(mean, mean_teacher, std)[0], kl),
        (anchored, 0.02 * kl),
        (losses.opd_ode(v, v_teacher, 0.7 - 0.55)[0], F.mse_loss(euler, euler_teacher) / 2),
        (losses.flow_matching(v, x, v_teacher)[0], F.mse_loss(v, v_teacher - x)),
    ):
        assert_close(loss, truth)
        assert_close(*(torch.autograd.grad(value, v, retain_graph=True)[0] for value in (loss, truth)))
    assert metrics == {"mar": anchored.item()}


@pytest.mark.parametrize("objective", (opd_ppo, opd_ppo_scalar, opd_ppo_published, opd_trajectory))
def test_clipping_stops_what_the_reward_favours_and_nothing_else(objective):
    """`mean` has moved since x_next was drawn. An action whose ratio has left the range on the side that its reward
    asks for gets no gradient; every other one gets that of ratio times reward."""
    mean_old, clip = randn(64, 4, 2, 2), 0.01
    x_next, mean, mean_teacher = (mean_old + s * randn(64, 4, 2, 2, seed=i + 1) for i, s in enumerate((STD, 0.03, 0.1)))
    log_p, log_old, log_teacher = (Normal(m, STD).log_prob(x_next) for m in (mean, mean_old, mean_teacher))
    log_ratio, reward = log_p - log_old, log_teacher - log_old
    if objective is not opd_ppo:  # one action per image
        log_ratio, reward = (r.mean((1, 2, 3), keepdim=True) for r in (log_ratio, reward))
    if objective is opd_ppo_published:
        reward = -kl_divergence(Normal(mean, STD), Normal(mean_teacher, STD)).mean((1, 2, 3), keepdim=True)
    if objective is opd_trajectory:
        reward = randn(64, 1, 1, 1, seed=4)  # minus kl_to_go; any number will do
    ratio = log_ratio.exp()
    up, down = (ratio > 1 + clip) & (reward > 0), (ratio < 1 - clip) & (reward < 0)
    assert down.any() and (up.any() or objective is opd_ppo_published) and not (up | down).all()

    mean.requires_grad_()
    options = {"kl_to_go": -reward.flatten()} if objective is opd_trajectory else {}
    loss, metrics = objective(mean, mean_old, mean_teacher, x_next, STD, clip_range=clip, **options)
    weight = torch.where(up | down, 0.0, ratio * reward) * (D if objective in (opd_ppo_scalar, opd_trajectory) else 1)
    direct = mean - mean_teacher if objective is opd_trajectory else 0.0  # its KL, which nothing clips
    assert_close(torch.autograd.grad(loss, mean)[0], (direct - weight * (x_next - mean)) / STD**2 / mean.numel())
    outside = ((ratio - 1).abs() > clip).double().mean().item()
    assert_close(metrics, {"ratio_gap": (ratio - 1).abs().mean().item(), "clip_fraction": outside})


@pytest.mark.parametrize(
    "objective",
    (opd_ppo, opd_ppo_scalar, opd_ppo_published, public_code, opd_kl, opd_trajectory, losses.opd_ode, losses.mar),
)
def test_only_the_student_gets_a_gradient(objective):
    student, teacher, x_next = (randn(2, 4, 3, 3, seed=i) for i in range(3))
    known = dict.fromkeys(("mean_teacher", "v_teacher", "v_anchor"), teacher.requires_grad_())
    known |= {"mean_old": student.clone(), "x_next": x_next, "std": STD, "dt": 0.1, "weight": 0.1}
    known |= {"mean": student.requires_grad_(), "v": student, "kl_to_go": randn(2).requires_grad_()}
    loss, _ = objective(**{k: known[k] for k in inspect.signature(objective).parameters if k in known})
    loss.backward()
    assert student.grad.any() and teacher.grad is None and known["kl_to_go"].grad is None


@pytest.mark.parametrize("global_std, clip", ((True, 5.0), (False, 5.0), (True, 1.0), (False, 1.0)))
def test_group_advantage_by_hand(global_std, clip):
    groups = [7, 2, 7, 5, 2, 7, 5, 5, 2, 7, 9]  # unequal sizes, mixed order, one prompt with a single sample
    rewards = [0.1 if group == 5 else r for group, r in zip(groups, randn(11, seed=5).tolist())]  # 5: all the same
    expected = []
    for reward, group in zip(rewards, groups):
        members = [r for r, g in zip(rewards, groups) if g == group]
        spread = np.std(rewards if global_std else members)
        expected.append(min(max((reward - np.mean(members)) / (spread + 1e-4), -clip), clip))
    advantage = group_advantage(torch.tensor(rewards).float(), torch.tensor(groups), global_std, clip)
    assert_close(advantage, torch.tensor(expected).float())
    assert (advantage.abs() == clip).any() == (clip == 1.0)
    assert not advantage[[3, 6, 7, 10]].any()  # equal rewards, or one alone: exactly nothing to learn


def test_grpo_by_hand():
    new, old, advantage, clip = 0.02 * randn(40).requires_grad_(), 0.02 * randn(40, seed=1), randn(40, seed=2), 0.01
    loss, metrics = grpo(new, old, advantage, clip)
    ratios, values, gradient = (new - old).exp().tolist(), [], []
    for ratio, a in zip(ratios, advantage.tolist()):
        values.append(-min(ratio * a, min(max(ratio, 1 - clip), 1 + clip) * a))
        frozen = (a > 0 and ratio > 1 + clip) or (a < 0 and ratio < 1 - clip)
        gradient.append(0.0 if frozen else -ratio * a / 40)
    assert_close(loss.item(), float(np.mean(values)))
    assert_close(torch.autograd.grad(loss, new)[0], torch.tensor(gradient))
    outside = sum(abs(ratio - 1) > clip for ratio in ratios)
    assert 0 < gradient.count(0.0) < outside < 40 and metrics["clip_fraction"] == outside / 40
    assert grpo(new, new.detach(), advantage)[1] == {"ratio_gap": 0.0, "clip_fraction": 0.0}


def test_advantages_carry_no_gradient():
    assert not group_advantage(randn(6).requires_grad_(), torch.arange(6) // 3).requires_grad


def test_the_update_in_the_docstring_runs():
    """As it stands there, on points (B, 2): it fills the gradient of the direct KL, up to the noise of the actions."""
    lines = losses.__doc__[losses.__doc__.index("  path = ") :].splitlines()
    weight = torch.full((), 0.5, requires_grad=True)
    names = {"torch": torch, "sde": sde, "opd_ppo": losses.opd_ppo, "grid": [1.0, 0.8, 0.5, 0.2, 0.0], "a": 0.7}
    names |= {"student": lambda x, t: weight * x, "teacher": lambda x, t: 0.4 * x}
    names["noise"] = torch.randn(20000, 2, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)  # not the stream of `noise`
    exec("\n".join(line[2:] for line in lines), names)
    x, times = names["path"].x, [(t, t_next, 0.7, 0.8) for t, t_next in zip(names["grid"][:-2], names["grid"][1:-1])]
    exact = sum(2 * sde.kl_weight(*step) * (0.5 - 0.4) * x[i].square().mean() for i, step in enumerate(times)) / 3
    torch.testing.assert_close(weight.grad, exact, rtol=0.1, atol=0)


def test_grpo_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match="one number a sample"):
        grpo(torch.zeros(4, 1), torch.zeros(4), torch.zeros(4))
