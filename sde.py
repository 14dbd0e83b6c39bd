"""Shared maths 1: sampling a flow-matching model as a stochastic differential equation (SDE).

Copy what you need: this file imports torch and math only. `noise_scale` and `log_prob` stand alone, `step`
needs `noise_scale`, `kl_weight` needs `step`, `rollout` needs `step` and `log_prob`.

Why an SDE: the usual sampler is an ODE, its next state is a function of the current one, so there is no
probability of an action, no policy gradient and no KL. Adding noise at every step, and correcting the drift so
that every x_t keeps its distribution, turns the sampler into a Gaussian policy (Flow-GRPO, arXiv 2505.05470).

Notation, here, in losses.py and in the scripts (the papers' letter behind the name in code):

  sizes         T             steps of a rollout; R = those up to the last that is trained on; S = those trained on
                G             samples of one prompt; B = samples in a batch (scripts: b on this process, c in a micro-batch)
                C, H, W       of the latents; D = C H W. For sde.py and losses.py any shape behind B will do: (B, N, C), (B, 2)
  t, t_next     t, t - dt     time, 1 = pure noise ... 0 = data; the transformer is told 1000 t       floats
  dt            dt            t - t_next > 0                                                          float
  grid          t_0 ... t_T   the scheduler's times, from t_0 = 1 to t_T = 0                          T + 1 floats
  t_max         t_1           the grid's second: the largest t at which 1 - t is not 0                float
  x, x_next     x_t           latents before and after a step, x_t = (1 - t) x_0 + t noise            (B, C, H, W)
  x0, noise     x_0, eps      data, and the start of a rollout, Normal(0, I)                          (B, C, H, W)
  v             v_theta       velocity, predicts noise - x_0; v_teacher, v_anchor: theirs, at         (B, C, H, W)
                              the states that the student visited
  a             a             noise level, --noise; 0.7 in the papers, 0 gives the ODE                float
  sigma         sigma_t       noise per square root of time; a sqrt(t / (1 - t))                      float
  mean, std     mu, s         the policy: x_next ~ Normal(mean, std^2 I), std = sigma sqrt(dt)        (B, C, H, W), float
  mean_old      mu_old        the mean when x_next was drawn; mean_teacher: where v_teacher leads     (B, C, H, W)
  log_prob      log pi        log Normal(x_next; mean, std^2), a mean over D                          (B,)
  weight        w(t)          KL(student, teacher) = w(t) mean((v - v_teacher)^2), a mean over D      float
  ratio         rho           pi_new(x_next) / pi_old(x_next): 1 before the first update              losses.py says
  reward        r             of an image (GRPO) or of an action (PPO forms of distillation)          losses.py says
  advantage     A             an image's reward against those of its group (GRPO)                     (B,)
  mar_weight    lambda        of MAR, 0.02 in the paper                                               float

Three kinds of noise, all with the same interface:
  flow   sigma = a sqrt(t / (1 - t))       Flow-GRPO, Flow-OPD
  dance  sigma = a, the same at every t    DanceGRPO (arXiv 2505.07818)
  cps    std = t_next sin(a pi / 2)        coefficients-preserving sampling (arXiv 2509.05952)
As the steps get smaller flow and dance approach the ODE's marginals (flow slowly: its first step is patched at
t = 1); cps keeps the noise level of x_next at exactly t_next for any step, but not the marginals.
tests/test_sde.py shows all three on a Gaussian.

Every scalar is a Python float (double precision); tensors keep their dtype, and callers pass float32.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch


def noise_scale(t: float, t_next: float, a: float, t_max: float, kind: str = "flow") -> float:
    """sigma of the step t -> t_next, so that the step's standard deviation is sigma sqrt(t - t_next).

    Source: Flow-GRPO, with a = 0.7 (`flow`); at t = 1, where it diverges, the 1 - t inside the root is
    replaced by 1 - t_max, as Flow-GRPO's code does. Raises ValueError for an unknown kind.
    """
    if kind == "flow":
        return a * math.sqrt(t / (1 - (t_max if t == 1 else t)))
    if kind == "dance":
        return a
    if kind == "cps":
        return t_next * math.sin(a * math.pi / 2) / math.sqrt(t - t_next)
    raise ValueError(f"unknown noise kind {kind!r}: one of flow, dance, cps")


def step(
    x: torch.Tensor | float, v: torch.Tensor | float, t: float, t_next: float, a: float, t_max: float, kind: str = "flow"
) -> tuple[torch.Tensor | float, float]:
    """The Gaussian that the next state is drawn from: (mean, std).

    x, v (B, C, H, W), or plain floats (the mean is linear in both, which `kl_weight` uses).
    Returns mean, shaped like x, and std, a float. a = 0 is the scheduler's Euler step, exactly, with std 0.
    """
    dt = t - t_next
    sigma = noise_scale(t, t_next, a, t_max, kind)
    std = sigma * math.sqrt(dt)
    if kind == "cps":  # re-mix the predicted data and noise; what noise is added is taken off the predicted noise
        x0, noise = x - t * v, x + (1 - t) * v
        return (1 - t_next) * x0 + math.sqrt(max(t_next**2 - std**2, 0.0)) * noise, std
    # Flow-GRPO: x_next = x - dt [v + sigma^2 / (2 t) (x + (1 - t) v)] + sigma sqrt(dt) noise
    # The bracket's second part is the score's pull that balances the added noise; it vanishes with sigma.
    return x - dt * (v + sigma**2 / (2 * t) * (x + (1 - t) * v)), std


def log_prob(x_next: torch.Tensor, mean: torch.Tensor, std: float) -> torch.Tensor:
    """log Normal(x_next; mean, std^2), constants included, as a MEAN over the latent dimensions: (B,).

    The mean, not the sum: all public flow-RL code does so, and its clip ranges (1e-4) only make sense with it.
    For SD3.5 at 512x512 the sum is 65,536 times larger. Raises ValueError where std is 0: no density.
    """
    if not std > 0:
        raise ValueError("log_prob needs std > 0: an ODE step (a = 0, or the last cps step) has no density")
    z = (x_next - mean) / std  # (B, C, H, W)
    return (-0.5 * z.square() - math.log(std) - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)  # (B,)


def kl_weight(t: float, t_next: float, a: float, t_max: float, kind: str = "flow") -> float:
    """w(t) with KL(student step, teacher step) = w(t) mean((v - v_teacher)^2): Flow-OPD v5 Eq. 15.

    Both policies share std, so the KL is (mean - mean_teacher)^2 / (2 std^2), and the means differ only through v:
    w = (d mean / d v)^2 / (2 std^2). For `flow` inside (0, 1) this is (1 + a^2 / 2)^2 dt (1 - t) / (2 a^2 t): small
    at high noise, large near the data. Raises ValueError where std is 0.
    """
    gain, std = step(0.0, 1.0, t, t_next, a, t_max, kind)  # the mean is linear: its value at x = 0, v = 1 is d mean / d v
    if not std > 0:
        raise ValueError("kl_weight needs std > 0: an ODE step (a = 0, or the last cps step) has no density")
    return gain**2 / (2 * std**2)


@dataclass
class Trajectory:
    """What a rollout visited. Step i goes from x[i] (before) to x[i + 1] (after), at time grid[i]."""

    x: torch.Tensor  # (T + 1, B, C, H, W); x[0] is the noise, x[-1] the sample if the grid ends at 0
    mean: torch.Tensor  # (T, B, C, H, W) the policy's mean at step i
    std: list[float]  # T floats; 0 where the step was deterministic
    log_prob: torch.Tensor  # (T, B) of the step taken, mean over dimensions; nan where std is 0


@torch.no_grad()
def rollout(
    velocity: Callable[[torch.Tensor, float], torch.Tensor],
    x: torch.Tensor,
    grid: Sequence[float],
    a: float,
    kind: str = "flow",
    generators: Sequence[torch.Generator] | None = None,
    window: Collection[int] | None = None,
) -> Trajectory:
    """Sample from x (B, C, H, W) at grid[0] = 1 down to grid[-1]: 0, or earlier where nobody needs the rest of the path.

    velocity(x, t): any callable, x (B, C, H, W) and a float -> v, shaped like x; bind prompts with a lambda. `generators`,
    one per sample, make each sample's noise its own, whatever batch it is in. `window`: the steps that get noise
    (Flow-GRPO-Fast, MixGRPO); the others are ODE steps; None = all.
    Raises ValueError for a grid that does not fall from exactly 1: sigma is patched there alone, and huge beside it.
    """
    if grid[0] != 1 or any(t <= t_next for t, t_next in zip(grid[:-1], grid[1:])) or grid[-1] < 0:
        raise ValueError(f"the grid must fall from exactly 1 (noise) towards 0 (data): {list(grid)}")
    states, means, stds, log_probs = [x], [], [], []
    for i, (t, t_next) in enumerate(zip(grid[:-1], grid[1:])):
        noisy = a > 0 and (window is None or i in window)
        # A deterministic step is the Euler step of every kind: `flow` with a = 0.
        mean, std = step(x, velocity(x, t), t, t_next, a if noisy else 0.0, grid[1], kind if noisy else "flow")
        if std > 0:
            if generators is None:
                noise = torch.randn_like(mean)
            else:
                noise = torch.stack(
                    [torch.randn(m.shape, generator=g, device=g.device) for m, g in zip(mean, generators, strict=True)]
                )
            x = mean + std * noise.to(mean)
            log_probs.append(log_prob(x, mean, std))
        else:
            x = mean
            log_probs.append(torch.full((len(x),), math.nan, device=x.device))
        states.append(x)
        means.append(mean)
        stds.append(std)
    return Trajectory(torch.stack(states), torch.stack(means), stds, torch.stack(log_probs))
