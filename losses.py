"""Shared maths 2: every objective of Flow-OPD side by side, MAR, flow matching, GRPO.

Copy what you need: torch only; the PPO forms and grpo also need `ppo_metrics` at the end. All are pure functions of
tensors, minimised, and return (loss, metrics): a scalar to call backward on and a dict of floats to log.

Shapes: mean, mean_old, mean_teacher, x_next, v (B, C, H, W); std, weight, dt floats; D = C H W.
  mean          the student's mean now, with gradient          x_next     the state that the rollout drew
  mean_old      the student's mean when it drew x_next         std        the step's standard deviation
  mean_teacher  the routed teacher's mean at the same state
KL and log-prob are means over the D latent dimensions, then over the batch, in float32. Gradient flows through `mean`
and `v` alone; mean_old and x_next are constants of the rollout. (Were mean_old recomputed with gradient, the ratio would be
the exponential of a difference that is always 0, with gradient 0.)

Seven forms in six functions (Flow-OPD is arXiv 2605.08063, DiffusionOPD 2605.15055). "Gradient" is the expectation over
x_next at ratio 1, which holds in the first update of a rollout; KL is the per-step KL(student, teacher), which is what one
wants to descend:

  --objective      function           gradient               noise                  source
  ppo              opd_ppo            grad KL                some: sampled reward   ours, the default
  kl               opd_kl             grad KL                none from the action   Flow-OPD v5, DiffusionOPD Eq. 11
  ppo-public-code  opd_ppo_published  grad KL                little more than kl    Flow-OPD's public code: detach=False
  ppo-published    opd_ppo_published  0: it does not learn   little, but no signal  Flow-OPD v1 as written
  ppo-scalar       opd_ppo_scalar     grad KL                D/2 times ppo's, more  the habit of language models
  trajectory       opd_trajectory     grad trajectory KL     as ppo-scalar          DiffusionOPD, derived
  ode              opd_ode            of another objective   none: none is drawn    DiffusionOPD Eq. 12, a = 0

tests/test_losses.py measures every gradient by Monte Carlo, experiments/RESULTS.md has the noise.
One update, for states of any shape (B, ...):

  path = sde.rollout(student, noise, grid, a)                    # no gradient inside; student(x, t) -> v
  for i in range(len(grid) - 2):                                 # all but the last step, as is the custom; std above 0
      times = grid[i], grid[i + 1], a, grid[1]                   # grid[1] is t_max, at every step
      with torch.no_grad():                                      # saves memory; the losses detach it anyway
          mean_teacher, _ = sde.step(path.x[i], teacher(path.x[i], grid[i]), *times)
      mean, std = sde.step(path.x[i], student(path.x[i], grid[i]), *times)  # once more, now with gradient
      loss, _ = opd_ppo(mean, path.mean[i], mean_teacher, path.x[i + 1], std)
      # with MAR: loss += mar(v, v_anchor, 0.02 * sde.kl_weight(*times))[0], v and v_anchor at path.x[i]
      (loss / (len(grid) - 2)).backward()                        # a mean over the steps
"""

import torch
from torch import Tensor


def opd_ppo(
    mean: Tensor, mean_old: Tensor, mean_teacher: Tensor, x_next: Tensor, std: float, clip_range: float = 0.2
) -> tuple[Tensor, dict]:
    """The default: PPO whose ratio and reward belong to single latent coordinates.

    The policy factorises, Normal(mean, std^2 I) = prod_d Normal(mean_d, std^2), so each coordinate is an action of
    its own. Its reward is the sampled log-ratio log pi_teacher(x_next_d) - log pi_old(x_next_d), and the gradient
    flows through its ratio alone, as Flow-OPD v1 asks. Unlike opd_ppo_published's this reward depends on the action:
    at ratio 1 the expected gradient is that of the KL, and no coordinate carries the noise of the others. In later
    updates of the same rollout it is that of KL(student, teacher) - KL(student, old student), which has no minimum at
    the teacher: the clip, and few updates, keep the student near.
    clip_range acts on ratios of single coordinates, so it has the size used for language models (0.1 to 0.2).
    """
    log_ratio = ((x_next - mean_old).square() - (x_next - mean).square()) / (2 * std**2)  # (B, C, H, W)
    reward = ((x_next - mean_old).square() - (x_next - mean_teacher).square()).detach() / (2 * std**2)  # (B, C, H, W)
    ratio = log_ratio.exp()  # (B, C, H, W), 1 at the first update
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = -torch.minimum(ratio * reward, clipped * reward).mean()  # minus: the reward is to be maximised
    return loss, ppo_metrics(ratio, clip_range)


def opd_ppo_scalar(
    mean: Tensor, mean_old: Tensor, mean_teacher: Tensor, x_next: Tensor, std: float, clip_range: float = 1e-4
) -> tuple[Tensor, dict]:
    """opd_ppo with one ratio and one reward per image, as language models have one per token.

    Unbiased too, but every coordinate's gradient is multiplied by the reward noise of all D. Ratio and reward are
    means over D, so their product is 1/D^2 of that of the sums; the mean KL is 1/D of the sum: hence the factor D. The
    clip range, 1e-4 in the public code, acts on a mean too, so on a much smaller number than opd_ppo's.
    """
    D = mean[0].numel()
    log_ratio = ((x_next - mean_old).square() - (x_next - mean).square()).flatten(1).mean(1) / (2 * std**2)  # (B,)
    reward = ((x_next - mean_old).square() - (x_next - mean_teacher).square()).flatten(1).mean(1).detach() / (2 * std**2)
    ratio = log_ratio.exp()  # (B,)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = -D * torch.minimum(ratio * reward, clipped * reward).mean()
    return loss, ppo_metrics(ratio, clip_range)


def opd_ppo_published(
    mean: Tensor,
    mean_old: Tensor,
    mean_teacher: Tensor,
    x_next: Tensor,
    std: float,
    clip_range: float = 1e-4,
    detach: bool = True,
) -> tuple[Tensor, dict]:
    """The formula of Flow-OPD v1 Eq. 11, kept because it is the published one. It does not learn.

    The reward is the analytic -KL at the visited state, detached. It does not depend on the action x_next, and
    E[grad log pi] = 0, so at ratio 1 the expected gradient is zero: all that is left is noise.
    detach=False is what the public code did: the gradient also flows through the KL itself, and that direct
    part is what learned. (The public code also dropped sqrt(dt) from the KL's variance; not repeated here.)
    """
    log_ratio = ((x_next - mean_old).square() - (x_next - mean).square()).flatten(1).mean(1) / (2 * std**2)  # (B,)
    reward = -(mean - mean_teacher.detach()).square().flatten(1).mean(1) / (2 * std**2)  # (B,) -KL, no x_next in it
    reward = reward.detach() if detach else reward
    ratio = log_ratio.exp()  # (B,)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = -torch.minimum(ratio * reward, clipped * reward).mean()
    return loss, ppo_metrics(ratio, clip_range)


def opd_kl(mean: Tensor, mean_teacher: Tensor, std: float) -> tuple[Tensor, dict]:
    """The KL itself. Flow-OPD v5 Eq. 15, DiffusionOPD Eq. 11.

    Exact gradient of the per-step KL; needs neither the action nor a ratio.
    (mean - mean_teacher)^2 / (2 std^2) = w(t) (v - v_teacher)^2 with w = sde.kl_weight.
    """
    kl = (mean - mean_teacher.detach()).square().flatten(1).mean(1) / (2 * std**2)  # (B,)
    return kl.mean(), {}


def opd_trajectory(
    mean: Tensor, mean_old: Tensor, mean_teacher: Tensor, x_next: Tensor, std: float, kl_to_go: Tensor, clip_range: float = 1e-4
) -> tuple[Tensor, dict]:
    """opd_kl plus what it leaves out: how this step's action moves the states, and so the KL, of later steps.

    kl_to_go (B,): sum over the later trained steps k of KL_k (means over dimensions), a constant; with 0 this is opd_kl.
    Summed over all steps, the two parts together are the exact gradient of the KL between whole trajectories. The
    log-ratio is a mean over D, so the second part is multiplied by D, or it would be D times too small.
    """
    D = mean[0].numel()
    kl = (mean - mean_teacher.detach()).square().flatten(1).mean(1) / (2 * std**2)  # (B,)
    log_ratio = ((x_next - mean_old).square() - (x_next - mean).square()).flatten(1).mean(1) / (2 * std**2)  # (B,)
    reward = -kl_to_go.detach()  # (B,)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = kl.mean() - D * torch.minimum(ratio * reward, clipped * reward).mean()
    return loss, ppo_metrics(ratio, clip_range)


def opd_ode(v: Tensor, v_teacher: Tensor, dt: float) -> tuple[Tensor, dict]:
    """Match the ODE step, dt^2 / 2 (v - v_teacher)^2, on states of an a = 0 rollout. DiffusionOPD Eq. 12.

    Half the squared distance between the two Euler means. Not a KL: a deterministic step has no density.
    """
    return dt**2 / 2 * (v - v_teacher.detach()).square().mean(), {}


def mar(v: Tensor, v_anchor: Tensor, weight: float) -> tuple[Tensor, dict]:
    """Manifold Anchor Regularization (Flow-OPD v1): weight mean((v - v_anchor)^2) on all data, every step.

    weight = lambda w(t), lambda 0.02 in the paper and w = sde.kl_weight (dt^2 / 2 beside `opd_ode`), so that it is
    lambda KL(student, anchor). v_anchor comes from a frozen teacher of image quality, by default the deqa teacher.
    """
    loss = weight * (v - v_anchor.detach()).square().mean()
    return loss, {"mar": loss.item()}


def flow_matching(v: Tensor, x0: Tensor, noise: Tensor) -> tuple[Tensor, dict]:
    """The loss that made the base model, and the SFT cold start: mean((v - (noise - x0))^2) at a random t."""
    return (v - (noise - x0)).square().mean(), {}


def group_advantage(rewards: Tensor, groups: Tensor, global_std: bool = True, clip: float = 5.0) -> Tensor:
    """GRPO's advantage: (reward - mean of its group) / std, clamped to +-clip. No gradient.

    rewards (N,) float, groups (N,) int: samples of one prompt share a number. global_std divides by the std of
    all N rewards (Flow-GRPO's choice: it does not blow up groups that hardly differ), else by each group's own.
    A group of equal rewards gets zeros: it says nothing about which sample was better. Returns (N,).
    """
    rewards = rewards.detach().double()
    _, index, size = torch.unique(groups, return_inverse=True, return_counts=True)
    mean = torch.zeros(len(size), dtype=rewards.dtype, device=rewards.device).index_add(0, index, rewards) / size
    centred = rewards - mean[index]  # (N,)
    if global_std:
        std = rewards.std(correction=0)
    else:
        square = torch.zeros_like(mean).index_add(0, index, centred.square()) / size
        std = square.sqrt()[index]
    return (centred / (std + 1e-4)).clamp(-clip, clip).float()  # 1e-4: equal rewards give 0, not 0/0


def grpo(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip_range: float = 1e-2) -> tuple[Tensor, dict]:
    """Flow-GRPO (arXiv 2505.05470): PPO's clipped objective at one denoising step, one ratio per image.

    log_prob, old_log_prob (B,) means over dimensions (sde.log_prob), so the ratio stays very near to 1 (on the
    miniature at most .4 % of the ratios leave 1e-2). advantage (B,) from group_advantage. The log-ratio of a mean over D
    varies as 1/sqrt(D): for a handful of dimensions take 0.2. Raises ValueError for shapes that would broadcast.
    """
    if not log_prob.shape == old_log_prob.shape == advantage.shape:
        raise ValueError(f"one number a sample: {[*log_prob.shape]}, {[*old_log_prob.shape]}, {[*advantage.shape]}")
    ratio = (log_prob - old_log_prob).exp()  # (B,)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()  # minus: advantage is to be maximised
    return loss, ppo_metrics(ratio, clip_range)


def ppo_metrics(ratio: Tensor, clip_range: float) -> dict[str, float]:
    """What to log of a ratio: how far it is from 1 (0 before the first update) and how often it leaves the clip range."""
    gap = (ratio.detach() - 1).abs()
    return {"ratio_gap": gap.mean().item(), "clip_fraction": (gap > clip_range).float().mean().item()}
