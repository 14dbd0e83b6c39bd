"""Shared maths 2: every objective of Flow-OPD side by side, MAR, flow matching and GRPO.

Copy what you need: torch only; most also need `ppo`, `log_ratio_of` or `kl_of` at the end. All are
pure functions of tensors. A loss returns (loss, metrics): a scalar to minimise, floats to log.

Shapes (B is any number of visited states; a training script passes rows of several steps):
  mean          the student's mean now, with gradient                        (B, C, H, W)
  mean_old      the student's mean when it drew x_next                       (B, C, H, W)
  mean_teacher  the routed teacher's mean at the same state                  (B, C, H, W)
  x_next        the state that the rollout drew                              (B, C, H, W)
  std           the step's, above 0; 0 for ode       float, or (B, 1, ..., 1)
KL and log-prob are means over the D = C H W latent dimensions, then over the batch, in float32.
Gradient flows through `mean` and `v` alone; the rest are constants of the rollout. (If mean_old
were recomputed with gradient, the log-ratio would be 0 with gradient 0 for every parameter.)

Flow-OPD is arXiv 2605.08063, DiffusionOPD 2605.15055. KL is KL(student, teacher) of one step, which
distillation should descend. The gradient in the table is the expectation over x_next at ratio 1,
that is, in the first update of a rollout.

  --objective      function           gradient            its variance            source
  ppo              opd_ppo            grad KL             some: a sampled reward  ours, default
  kl               opd_kl             grad KL             none from the action    Flow-OPD v5
  ppo-public-code  opd_ppo_public     grad KL             little more than kl     Flow-OPD's code
  ppo-published    opd_ppo_published  0: does not learn   little, and no signal   Flow-OPD v1
  ppo-scalar       opd_ppo_scalar     grad KL             D/2 (1 + D KL/2) x ppo  language models
  trajectory       opd_trajectory     grad trajectory KL  as ppo-scalar           DiffusionOPD
  ode              opd_ode            another distance    none: nothing is drawn  DiffusionOPD

tests/test_losses.py measures every gradient by Monte Carlo; experiments/RESULTS.md compares runs.
One update with these functions, where teacher is that of the prompts' own task:

  path = sde.rollout(student, noise, grid, a)          # no gradient inside; student(x, t) -> v
  for i in range(len(grid) - 2):                       # all but the last step
      times = grid[i], grid[i + 1], a, grid[1]
      with torch.no_grad():
          mean_teacher, _ = sde.step(path.x[i], teacher(path.x[i], grid[i]), *times)
      mean, std = sde.step(path.x[i], student(path.x[i], grid[i]), *times)  # with gradient
      loss, _ = opd_ppo(mean, path.mean[i], mean_teacher, path.x[i + 1], std)
      (loss / (len(grid) - 2)).backward()              # a mean over the steps
"""

import torch
from torch import Tensor

Number = float | Tensor


def opd_ppo(
    mean: Tensor,
    mean_old: Tensor,
    mean_teacher: Tensor,
    x_next: Tensor,
    std: Number,
    clip_range: float = 0.2,
    kl_to_go: Tensor | None = None,
) -> tuple[Tensor, dict]:
    """The default: PPO with one ratio and one reward per latent coordinate.

    It corrects the paper's form (v1: PPO, all gradient through the ratio). The policy factorises
    over coordinates, so each coordinate is an action of its own. Its reward is the sampled
    log-ratio log pi_teacher(x_next) - log pi_old(x_next), which depends on the action. Why it
    learns, for one coordinate at ratio 1, with u = (mean_teacher - mean) / std and drawn noise z:

      reward r = u z - u^2 / 2, so E[r] = -u^2 / 2 = -KL and Var[r] = u^2 = 2 KL
      grad log pi = z / std (with respect to the mean)
      E[r grad log pi] = u / std = -grad KL: ascent on the reward is descent on the KL

    Example: u = 0.3 gives KL 0.045, mean reward -0.045, variance 0.09. The published reward is
    the analytic -KL, which has no z: E[-KL z / std] = 0, no gradient (`opd_ppo_published`).

    Prefer `opd_kl` for many updates of one rollout: it has less variance. From the second update
    on, the expected gradient here is that of KL(student, teacher) - KL(student, old student), which
    has no minimum at the teacher. The clip and few updates keep the student near the old one.
    clip_range limits the ratio of a single coordinate: 0.1 to 0.2, as for language models.
    """
    log_ratio = log_ratio_of(x_next, mean, mean_old, std)  # (B, C, H, W)
    reward = log_ratio_of(x_next, mean_teacher, mean_old, std).detach()  # (B, C, H, W)
    return ppo(log_ratio, reward, clip_range)


def opd_ppo_scalar(
    mean, mean_old, mean_teacher, x_next, std, clip_range=1e-4, kl_to_go=None
) -> tuple[Tensor, dict]:
    """`opd_ppo` with one ratio and one reward per image, as language models have one per token.

    Unbiased too, but each coordinate's gradient is multiplied by the reward noise of all D. Ratio
    and reward are means over D, so their product is 1/D^2 of that of the sums, while the mean KL is
    1/D of the sum: hence the factor D. clip_range acts on a mean: 1e-4 in the public code.
    """
    D = mean[0].numel()
    log_ratio = log_ratio_of(x_next, mean, mean_old, std).flatten(1).mean(1)  # (B,)
    reward = log_ratio_of(x_next, mean_teacher, mean_old, std).flatten(1).mean(1).detach()  # (B,)
    loss, metrics = ppo(log_ratio, reward, clip_range)
    return D * loss, metrics


def opd_ppo_published(
    mean, mean_old, mean_teacher, x_next, std, clip_range=1e-4, kl_to_go=None, detach=True
) -> tuple[Tensor, dict]:
    """Flow-OPD v1 Eq. 11 as written, kept because it was published. It drifts and the KL grows.

    The reward is the analytic -KL at the visited state, detached. It does not depend on the action
    x_next, and E[grad log pi] = 0: at ratio 1 the expected gradient is zero.
    """
    log_ratio = log_ratio_of(x_next, mean, mean_old, std).flatten(1).mean(1)  # (B,)
    reward = -kl_of(mean, mean_teacher, std)  # (B,), no x_next in it
    return ppo(log_ratio, reward.detach() if detach else reward, clip_range)


def opd_ppo_public(
    mean, mean_old, mean_teacher, x_next, std, clip_range=1e-4, kl_to_go=None
) -> tuple[Tensor, dict]:
    """Flow-OPD's public code: opd_ppo_published without detach. It learns by the KL's own gradient.

    (That code also left sqrt(dt) out of the KL's std. This function keeps it.)
    """
    return opd_ppo_published(
        mean, mean_old, mean_teacher, x_next, std, clip_range, kl_to_go, detach=False
    )


def opd_kl(
    mean, mean_old, mean_teacher, x_next, std, clip_range=0.0, kl_to_go=None
) -> tuple[Tensor, dict]:
    """The KL itself: Flow-OPD v5 Eq. 15, DiffusionOPD Eq. 11. Uses mean, mean_teacher and std.

    Exact gradient of the per-step KL; equal to sde.kl_weight times the mean of (v - v_teacher)^2.
    """
    return kl_of(mean, mean_teacher, std).mean(), {}


def opd_trajectory(
    mean, mean_old, mean_teacher, x_next, std, clip_range=1e-4, kl_to_go=None
) -> tuple[Tensor, dict]:
    """`opd_kl` plus what it leaves out: this step's action also moves the states of later steps.

    kl_to_go (B,): sum of the KL (a mean over dimensions) of the later trained steps, a constant.
    Summed over all steps the two parts are the exact gradient of the KL between whole trajectories.
    The log-ratio is a mean over D, so the second part needs the factor D.
    """
    D = mean[0].numel()
    log_ratio = log_ratio_of(x_next, mean, mean_old, std).flatten(1).mean(1)  # (B,)
    future, metrics = ppo(log_ratio, -kl_to_go.detach(), clip_range)
    return kl_of(mean, mean_teacher, std).mean() + D * future, metrics


def opd_ode(
    mean, mean_old, mean_teacher, x_next, std, clip_range=0.0, kl_to_go=None
) -> tuple[Tensor, dict]:
    """Half the squared distance of two Euler steps (a = 0): DiffusionOPD Eq. 12. Not a KL.

    Equal to dt^2 / 2 times the mean of (v - v_teacher)^2. Uses mean and mean_teacher alone.
    """
    return 0.5 * (mean - mean_teacher.detach()).square().mean(), {}


OBJECTIVES = {
    "ppo": opd_ppo,
    "kl": opd_kl,
    "ode": opd_ode,
    "trajectory": opd_trajectory,
    "ppo-scalar": opd_ppo_scalar,
    "ppo-published": opd_ppo_published,
    "ppo-public-code": opd_ppo_public,
}


def mar(v: Tensor, v_anchor: Tensor, weight: Number) -> tuple[Tensor, dict]:
    """Manifold Anchor Regularization (Flow-OPD v1): mean of weight (v - v_anchor)^2.

    weight = lambda w(t), lambda 0.02 in the paper and w = `sde.kl_weight` (dt^2 / 2 beside
    `opd_ode`): then it is lambda KL(student, anchor). The paper writes "on all data, every step";
    here it acts at the trained steps, as the objective does. v_anchor is the velocity of a frozen
    teacher of image quality. v, v_anchor (B, C, H, W), weight a float or (B, 1, 1, 1).
    """
    loss = (weight * (v - v_anchor.detach()).square()).mean()
    return loss, {"mar": loss.item()}


def flow_matching(v: Tensor, x0: Tensor, noise: Tensor) -> tuple[Tensor, dict]:
    """mean((v - (noise - x0))^2) at a random t: the loss of pretraining and the SFT cold start."""
    return (v - (noise - x0)).square().mean(), {}


def group_advantage(
    rewards: Tensor, groups: Tensor, global_std: bool = True, clip: float = 5.0
) -> Tensor:
    """GRPO's advantage (reward - mean of its group) / std, clamped to +-clip: (B,), no gradient.

    rewards (B,) float; groups (B,) int, equal for samples of one prompt. global_std: divide by the
    std of all B rewards, else by that of the group. Flow-GRPO takes the first, which does not blow
    up groups whose rewards hardly differ. A group of equal rewards gets zeros: no sample is better.
    """
    rewards = rewards.detach().double()  # so that the mean of equal rewards is exactly their value
    _, index, size = torch.unique(groups, return_inverse=True, return_counts=True)
    zeros = rewards.new_zeros(len(size))  # (groups,)
    mean = zeros.index_add(0, index, rewards) / size  # (groups,)
    centred = rewards - mean[index]  # (B,)
    if global_std:
        std = rewards.std(correction=0)
    else:
        variance = zeros.index_add(0, index, centred.square()) / size  # (groups,)
        std = variance.sqrt()[index]  # (B,)
    return (centred / (std + 1e-4)).clamp(-clip, clip).float()  # 1e-4: 0 / 0 would be nan


def grpo(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip_range: float = 1e-2
) -> tuple[Tensor, dict]:
    """Flow-GRPO (arXiv 2505.05470): PPO's clipped objective with one ratio per image and step.

    log_prob, old_log_prob (B,) are means over dimensions (`sde.log_prob`), so the ratio stays near
    1: the log-ratio of a mean over D varies as 1 / sqrt(D). For a handful of dimensions take
    clip_range 0.2. advantage (B,) from `group_advantage`. Raises ValueError for unequal shapes.
    """
    shapes = [tuple(tensor.shape) for tensor in (log_prob, old_log_prob, advantage)]
    if len(set(shapes)) > 1:
        raise ValueError(f"one number per sample: the shapes {shapes} differ")
    return ppo(log_prob - old_log_prob, advantage, clip_range)


def ppo(log_ratio: Tensor, reward: Tensor, clip_range: float) -> tuple[Tensor, dict]:
    """Minus PPO's objective (arXiv 1707.06347 Eq. 7): the mean of min(ratio r, clip(ratio) r)."""
    ratio = log_ratio.exp()  # 1 before the first update of a rollout
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = -torch.minimum(ratio * reward, clipped * reward).mean()
    gap = (ratio.detach() - 1).abs()
    clip_fraction = (gap > clip_range).float().mean().item()
    return loss, {"ratio_gap": gap.mean().item(), "clip_fraction": clip_fraction}


def log_ratio_of(x_next: Tensor, mean: Tensor, mean_old: Tensor, std: Number) -> Tensor:
    """log Normal(x_next; mean, std^2) - log Normal(x_next; mean_old, std^2), per coordinate."""
    return ((x_next - mean_old).square() - (x_next - mean).square()) / (2 * std**2)


def kl_of(mean: Tensor, mean_teacher: Tensor, std: Number) -> Tensor:
    """KL of two Gaussians of one width, (mean - mean_teacher)^2 / (2 std^2), mean over D: (B,)."""
    return ((mean - mean_teacher.detach()).square() / (2 * std**2)).flatten(1).mean(1)
