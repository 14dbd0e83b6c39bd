"""Shared maths 1: sampling a flow-matching model as a stochastic differential equation (SDE).

Why an SDE: the usual sampler solves an ODE and is deterministic. A step has no probability, so
there is no policy gradient and no KL. Flow-GRPO (arXiv 2505.05470) adds noise at every step and
corrects the drift so that x_t keeps its distribution. The sampler is then a Gaussian policy: state
(x, t, prompt), action x_next.

Notation of the whole project (the papers' letter in the second column):

  B, b          samples: of an iteration, or of a function's input; b of them on this process
  G             samples of one prompt (a group)
  T, S          steps of a rollout, and how many of them are trained
  N             S b rows: every trained (step, sample) pair is one row
  C, H, W; D    latent dimensions; D = C H W. Here and in losses.py any shape after B works
  t, t_next     time: 1 = pure noise, 0 = data. The transformer receives 1000 t
  dt            t - t_next, above 0
  t_max         the grid's second time, the largest below 1
  x, x_next     latents before and after a step; x_t = (1 - t) x_0 + t noise         (B, C, H, W)
  v             velocity, predicts noise - x_0; likewise v_teacher and v_anchor      (B, C, H, W)
  a             noise level; 0.7 in the papers, 0 is the ODE
  sigma         noise per square root of time, a sqrt(t / (1 - t))
  mean    mu    the policy is x_next ~ Normal(mean, std^2 I)                         (B, C, H, W)
  std     s     sigma sqrt(dt)
  weight  w(t)  KL(student, teacher) = w(t) mean((v - v_teacher)^2)

t, t_next and t_max are floats, or tensors that broadcast against x, such as (B, 1, 1, 1): a batch
may hold states of different steps. Floats are computed in double precision, tensors in float32.
Copy what you need: this file imports torch and the standard library only.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Number = float | Tensor


def noise_scale(t: Number, t_next: Number, a: float, t_max: Number, kind: str = "flow") -> Number:
    """sigma of the step t -> t_next: the step's standard deviation is sigma sqrt(t - t_next).

    flow   a sqrt(t / (1 - t)): Flow-GRPO and Flow-OPD, a = 0.7. It diverges at t = 1. There 1 - t
           is replaced by 1 - t_max, as in Flow-GRPO's code.
    dance  a at every t: DanceGRPO (arXiv 2505.07818).
    cps    std = t_next sin(a pi / 2): coefficients-preserving sampling (arXiv 2509.05952).
    In the limit of small steps, flow and dance have the ODE's marginals. cps does not, but it
    keeps x_next's noise level at exactly t_next for any step size. ValueError for another kind.
    """
    if kind == "flow":
        one_minus_t = 1 - t + (t == 1) * (1 - t_max)  # the second term is 0 except at t = 1
        return a * (t / one_minus_t) ** 0.5
    if kind == "dance":
        return a
    if kind == "cps":
        return t_next * math.sin(a * math.pi / 2) / (t - t_next) ** 0.5
    raise ValueError(f"unknown noise kind {kind!r}: one of flow, dance, cps")


def step(
    x: Number, v: Number, t: Number, t_next: Number, a: float, t_max: Number, kind: str = "flow"
) -> tuple[Number, Number]:
    """The Gaussian policy at one state: (mean, std).

    x, v (B, C, H, W), or floats: the mean is linear in both, which `kl_weight` uses. ValueError if
    x and t differ in dimensions. Returns (mean like x, std like t). a = 0: Euler's step, std 0.
    """
    if torch.is_tensor(x) and torch.is_tensor(t) and t.dim() not in (0, x.dim()):
        raise ValueError(f"t {tuple(t.shape)} needs as many dimensions as x {tuple(x.shape)}")
    dt = t - t_next
    sigma = noise_scale(t, t_next, a, t_max, kind)
    std = sigma * dt**0.5
    if kind == "cps":
        # Predict data and noise, mix them for t_next. Fresh noise replaces a part of the predicted.
        x0, noise = x - t * v, x + (1 - t) * v
        remaining = t_next * abs(math.cos(a * math.pi / 2))  # sqrt(t_next^2 - std^2)
        return (1 - t_next) * x0 + remaining * noise, std
    # Flow-GRPO Eq. 9: mean = x - dt [v + sigma^2 / (2 t) (x + (1 - t) v)].
    # The second term balances the added noise: it pulls x along the score.
    return x - dt * (v + sigma**2 / (2 * t) * (x + (1 - t) * v)), std


def log_prob(x_next: Tensor, mean: Tensor, std: Number) -> Tensor:
    """log Normal(x_next; mean, std^2), constants included, as a MEAN over latent dimensions: (B,).

    The mean, not the sum: all public flow-RL code does so, and its clip ranges (1e-4) only make
    sense with it. For SD3.5 at 512 pixels the sum is 65,536 times larger.
    x_next, mean (B, C, H, W). Raises ValueError where std is 0: such a step has no density.
    """
    check_std(std)
    log_std = std.log() if torch.is_tensor(std) else math.log(std)
    z = (x_next - mean) / std  # (B, C, H, W)
    return (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)  # (B,)


def kl_weight(t: Number, t_next: Number, a: float, t_max: Number, kind: str = "flow") -> Number:
    """w(t) with KL(student step, teacher step) = w(t) mean((v - v_teacher)^2), shaped like t.

    Flow-OPD v5 Eq. 15. Both have one std, so KL = (mean - mean_teacher)^2 / (2 std^2). The means
    differ through v alone: w = (d mean / d v)^2 / (2 std^2). For `flow` at 0 < t < 1 it is
    (1 + a^2 / 2)^2 dt (1 - t) / (2 a^2 t), small near t = 1, large near 0. ValueError if std is 0.
    """
    d_mean_d_v, std = step(0.0, 1.0, t, t_next, a, t_max, kind)  # linear: its value at x = 0, v = 1
    check_std(std)
    return d_mean_d_v**2 / (2 * std**2)


def check_std(std: Number) -> None:
    """ValueError unless std is above 0 everywhere."""
    if not torch.as_tensor(std > 0).all():
        raise ValueError("needs std > 0: an ODE step (a = 0, or the last cps step) has no density")


@dataclass
class Trajectory:
    """What a rollout visited. Step i goes from x[i] to x[i + 1], at time grid[i]."""

    x: Tensor  # (T + 1, B, C, H, W); x[0] is the noise, x[-1] the sample if the grid ends at 0
    mean: Tensor  # (T, B, C, H, W), the policy's mean at step i
    std: list[float]  # T floats; 0 where the step was deterministic
    log_prob: Tensor  # (T, B) of the step taken, mean over dimensions; nan where std is 0


@torch.no_grad()
def rollout(
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    grid: Sequence[float],
    a: float,
    kind: str = "flow",
    generators: Sequence[torch.Generator] | None = None,
    window: Collection[int] | None = None,
) -> Trajectory:
    """Sample from x (B, C, H, W) at grid[0] = 1 down to grid[-1]: 0, or above 0 to stop midway.

    velocity    any callable (x (B, C, H, W), t float) -> v like x; bind prompts with a lambda
    generators  one per sample, so that its noise does not depend on the batch it is in
    window      the steps that get noise (Flow-GRPO-Fast, MixGRPO); the others are ODE steps
    Raises ValueError unless the grid falls from exactly 1, where sigma is patched (noise_scale).
    """
    falls = all(t > t_next for t, t_next in zip(grid[:-1], grid[1:]))
    if grid[0] != 1 or not falls or grid[-1] < 0:
        raise ValueError(f"the grid must fall from exactly 1 (noise) to 0 (data): {list(grid)}")
    states, means, stds, log_probs = [x], [], [], []
    for i, (t, t_next) in enumerate(zip(grid[:-1], grid[1:])):
        v = velocity(x, t)  # (B, C, H, W)
        if window is None or i in window:
            mean, std = step(x, v, t, t_next, a, grid[1], kind)
        else:
            mean, std = step(x, v, t, t_next, 0.0, grid[1])  # an Euler step
        if std > 0:
            x = mean + std * draw_noise(mean, generators)  # the action
            log_probs.append(log_prob(x, mean, std))  # (B,)
        else:
            x = mean
            log_probs.append(torch.full((len(x),), math.nan, device=x.device))
        states.append(x)
        means.append(mean)
        stds.append(std)
    return Trajectory(torch.stack(states), torch.stack(means), stds, torch.stack(log_probs))


def draw_noise(x: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
    """Standard normal noise shaped like x (B, C, H, W); with generators, sample i from the i-th."""
    if generators is None:
        return torch.randn_like(x)
    pairs = zip(x, generators, strict=True)
    noise = [torch.randn(sample.shape, generator=g, device=g.device) for sample, g in pairs]
    return torch.stack(noise).to(x)  # (B, C, H, W)
