"""train_opd.py with one change: what later papers propose, and what else RESULTS.md compares.

    python experiments/variants.py velocity --objective kl --lr 3e-3 --out runs/velocity

The first word names the change; the flags are those of train_opd.py. Each change replaces a
function that train_opd.py calls, so the loop itself is the same.

    velocity      plain velocity errors in place of the KL's weights, as --step_weights equal
    noisy, clean  velocity errors times t, times 1 - t (FlowCTS, arXiv 2607.24522, weights them by
                  time; its weights are not these two)
    extrapolate   teachers go 1.25 times as far from the base as they do (GFD-OPD)
    beta          with --train_steps random:1: one step of a trajectory, mostly a late one, by
                  Beta(5, 2), and plain velocity errors (DanceOPD, arXiv 2606.27377). The step is
                  drawn for an iteration, not for a sample
    branches      with guidance, match v(prompt) and v(prompt) - v(empty), not their guided sum
                  (PDM, arXiv 2607.24731)
    decay         the learning rate falls to 0 along half a cosine
    warmup        the learning rate rises over the first tenth of the updates
    rewards       finish every trajectory, decode it and score it, as the public code does for its
                  log. Nothing is learnt from the score
"""

import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_opd
from losses import kl_of
from rewards.pictures import decode
from sde import kl_weight, rollout, step
from support import metrics, model, run
from toy.scorers import REWARDS

EXTRAPOLATE = 1.25


def weigh(weight_of):
    """The objective becomes weight_of(t) (v - v_teacher)^2: weight_of takes and returns (n,)."""
    last = {}

    def remember(x, v, t, t_next, noise, *rest):
        last["t"] = t.flatten()  # (n,)
        w = kl_weight(t, t_next, noise, *rest) if noise else (t - t_next) ** 2 / 2
        last["w"] = w.flatten()  # (n,): kl_of is w (v - v_teacher)^2
        return step(x, v, t, t_next, noise, *rest)

    def objective(mean, mean_old, mean_teacher, x_next, std, clip_range, kl_to_go):
        width = torch.where(std > 0, std, 1)
        error = kl_of(mean, mean_teacher, width) / last["w"]  # (n,)
        return (weight_of(last["t"]) * error).mean(), {}

    train_opd.step = remember
    for name in train_opd.OBJECTIVES:
        train_opd.OBJECTIVES[name] = objective


def velocity():
    weigh(torch.ones_like)


def noisy():
    weigh(lambda t: t)


def clean():
    weigh(lambda t: 1 - t)


def extrapolate():
    predict = model.Backbone.predict

    def further(self, name, x, t, prompt):
        v = predict(self, name, x, t, prompt)
        if str(name).startswith("teacher_"):
            v_base = predict(self, None, x, t, prompt)
            v = v_base + EXTRAPOLATE * (v - v_base)
        return v

    model.Backbone.predict = further


def beta():
    def draw(args, iteration):
        own = run.generator(args.seed, "steps", iteration)
        # The fifth smallest of six uniform numbers is distributed as Beta(5, 2).
        late = torch.rand(6, generator=own).sort().values[4]
        return torch.tensor([args.eligible_steps[int(late * len(args.eligible_steps))]])

    train_opd.draw_steps = draw
    velocity()


def branches():
    """A state is doubled along its height. Its upper half gets v(prompt), its lower half
    v(prompt) - v(empty), and every line of the loop works on both."""
    velocity_of = model.Backbone.velocity

    def both(self, name, x, t, prompt):
        height = self.transformer.config.sample_size
        if x.shape[-2] == height:  # the rollout's
            return velocity_of(self, name, x, t, prompt)
        state, guidance = x[..., :height, :], self.guidance
        self.guidance = dict.fromkeys(guidance, 1.0)
        v = velocity_of(self, name, state, t, prompt)
        v_empty = velocity_of(self, name, state, t, 0 * prompt)  # row 0 is the empty prompt
        self.guidance = guidance
        return torch.cat([v, v - v_empty], -2)

    def doubled(policy, noise, *given):
        path = rollout(policy, noise, *given)
        double = lambda states: torch.cat([states, states], -2)
        return replace(path, x=double(path.x), mean=double(path.mean))

    model.Backbone.velocity, train_opd.rollout = both, doubled


def scheduled(factor):
    """AdamW whose rate is multiplied by factor(the part of the updates that are done)."""
    parse_args, total = train_opd.parse_args, {}

    def parse():
        args = parse_args()
        total["updates"] = args.iterations * args.updates
        return args

    class Scheduled(torch.optim.AdamW):
        def __init__(self, *given, **named):
            super().__init__(*given, **named)
            self.schedule = LambdaLR(self, lambda done: factor(done / total["updates"]))

        def step(self):
            super().step()
            self.schedule.step()

    train_opd.parse_args, torch.optim.AdamW = parse, Scheduled


def decay():
    scheduled(lambda done: 0.5 + 0.5 * math.cos(math.pi * done))


def warmup():
    scheduled(lambda done: min(1.0, 10 * done + 0.1))


def rewards():
    seen = {}

    def to_the_end(policy, noise, grid, *given):
        path = rollout(policy, noise, grid, *given)
        x = path.x[-1]
        seen["x"] = x - grid[-1] * policy(x, grid[-1])  # the last step, to 0, has no noise
        return path

    def load_pipeline(*given):
        seen["pipe"] = load(*given)
        return seen["pipe"]

    def draw_schedule(*given):
        seen["schedule"] = draw(*given)
        return seen["schedule"]

    def log_line(folder, iteration, log):
        images, slots = decode(seen["pipe"].vae, seen["x"]), seen["schedule"][iteration]
        each = len(images) // len(slots)  # samples of a prompt
        for n, (task, prompt, _) in enumerate(slots):
            own = images[n * each : (n + 1) * each]
            log[f"reward/{task}"] = REWARDS[task](own, [prompt] * each).mean().item()
        return write(folder, iteration, log)

    load, draw, write = model.load_pipeline, run.draw_schedule, metrics.log_line
    model.load_pipeline, run.draw_schedule = load_pipeline, draw_schedule
    metrics.log_line = log_line
    train_opd.rollout = to_the_end


CHANGES = (velocity, noisy, clean, extrapolate, beta, branches, decay, warmup, rewards)

if __name__ == "__main__":
    names = [change.__name__ for change in CHANGES]
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        print(__doc__)
        sys.exit(f"name a change first: {', '.join(names)}")
    CHANGES[names.index(sys.argv.pop(1))]()
    train_opd.main(train_opd.parse_args())
