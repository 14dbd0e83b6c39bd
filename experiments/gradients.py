"""Gradients of the objectives and of the tasks at fixed weights: writes results/gradients.json.

    python experiments/gradients.py      # after miniature.py's first runs; minutes on one core

1. `objectives`: the gradient of every objective at the merged start, per step of the sampler,
   beside the exact gradient of the KL. The latter is opd_kl over other samples, as many again.
   `cosine` by batch size; `variance` of one image's gradient; `length`, the part of the mean
   gradient along the exact one. Both are in units of the exact gradient (unbiased: length 1).
2. `tasks`: do the gradients of the four tasks agree, for distillation and for GRPO, along both
   trainings? `reliability` is the cosine of a task's gradient with itself on other samples: where
   it is near 0, a cosine with another task says nothing.
3. `routing`: the KL to a random teacher and the KL to the mean velocity of all teachers have the
   same gradient, because E |v - v_k|^2 = |v - mean v_k|^2 + a constant. The relative difference of
   the two is measured.
"""

import argparse
import itertools
import statistics
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from losses import OBJECTIVES, group_advantage, grpo, kl_of, opd_kl
from rewards.pictures import decode
from rewards.scoring import make_reward
from sde import log_prob, rollout, step
from support import lora, model
from support.files import check_adapter, read_prompts, save_json
from support.flags import TASKS, at_least, make_parser, model_flags, positive, reward_flags
from support.run import generator

T, NOISE, G = 6, 0.7, 16  # steps, noise level and group size, as in training
TRAINED = range(T - 1)  # the steps that distillation trains
EARLY = range(3)  # the steps that GRPO samples with noise and trains
UNIT = 16  # gradients are kept for units of 16 images, four of each task
BATCHES = (16, 64, 256, 512)  # images
NAMES = ("kl", "ppo", "ppo-public-code", "trajectory", "ode", "ppo-scalar", "ppo-published")


class World:
    """The miniature with the four teachers, the students {name: path}, and embedded prompts."""

    def __init__(self, students):
        parser = make_parser(None)
        model_flags(parser)
        reward_flags(parser.add_argument)
        args, device = parser.parse_args([]), torch.device("cpu")
        self.pipe = model.load_pipeline(args, device)
        paths = {f"teacher_{task}": f"toy/adapters/{task}" for task in TASKS} | students
        for name, path in paths.items():
            lora.load_adapter(self.pipe.transformer, name, path, name)
        for name in students:
            for parameter in self.parameters(name):
                parameter.requires_grad_(True)
        self.prompts = {}
        for task in TASKS:
            self.prompts[task] = read_prompts(f"toy/prompts/{task}_train.txt")[0][:256]
        self.text = model.embed_prompts(self.pipe, sum(self.prompts.values(), []), args)
        self.backbone = model.Backbone(
            self.pipe.transformer, self.text, dict.fromkeys(paths, 1.0), UNIT
        )
        self.grid = model.time_grid(self.pipe, T)
        mixed = {"reward": None, "mix": dict.fromkeys(TASKS, 1), "tasks": list(TASKS)}
        mixed |= {"mix_quality": 0.2, "on_reward_error": "stop", "prompts": {}, "test_prompts": {}}
        self.reward_of = make_reward(argparse.Namespace(**vars(args) | mixed), device, {}, {})

    def parameters(self, name):
        return list(lora.adapter_parameters(self.pipe.transformer, name).values())

    def rows(self, prompts):
        return torch.tensor([self.text["rows"][prompt] for prompt in prompts])

    def any_prompt(self, task, own):
        return self.prompts[task][int(torch.randint(256, (), generator=own))]

    def sample(self, student, tasks, key, noise=NOISE):
        """An SDE rollout, one sample per entry of `tasks`, each of any prompt: (path, prompts)."""
        generators = [generator("gradients", key, i) for i in range(len(tasks))]
        prompts = [self.any_prompt(task, own) for task, own in zip(tasks, generators)]
        return self.rollout(student, prompts, generators, noise), prompts

    def sample_group(self, student, task, key):
        """An SDE rollout of a GRPO group, G samples of one prompt: (path, prompts)."""
        prompts = [self.any_prompt(task, generator("gradients", key))] * G
        generators = [generator("gradients", key, i) for i in range(G)]
        return self.rollout(student, prompts, generators, NOISE, EARLY), prompts

    def rollout(self, student, prompts, generators, noise, window=None):
        rows = self.rows(prompts)
        policy = lambda x, t: self.backbone.predict(student, x, t, rows)
        start = model.initial_noise(self.pipe, generators)
        return rollout(policy, start, self.grid, noise, generators=generators, window=window)

    def step(self, x, v, i, noise=NOISE):
        return step(x, v, self.grid[i], self.grid[i + 1], noise, self.grid[1])[0]

    def student_mean(self, student, path, i, prompts, noise=NOISE):
        """The student's mean at step i, with gradient."""
        x = path.x[i]
        v = self.backbone.velocity(student, x, self.grid[i], self.rows(prompts))
        return self.step(x, v, i, noise)

    def teacher_mean(self, path, i, prompts, tasks, noise=NOISE):
        """The mean of each sample's own teacher at step i."""
        x, rows = path.x[i], self.rows(prompts)
        v = torch.empty_like(x)
        for task in set(tasks):
            own = torch.tensor([n for n, other in enumerate(tasks) if other == task])
            name = f"teacher_{task}"
            v[own] = self.backbone.predict(name, x[own], self.grid[i], rows[own])
        return self.step(x, v, i, noise)


def gradient(loss, parameters, keep=False):
    gradients = torch.autograd.grad(loss, parameters, retain_graph=keep)
    return torch.cat([part.flatten() for part in gradients])  # (P,)


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, 0).item()


# ---- 1. Objectives


def unit_gradients(world, student, key, names):
    """Gradients of one unit of 16 images: {(objective, step): (P,)}."""
    parameters, tasks = world.parameters(student), [TASKS[i % 4] for i in range(UNIT)]
    path, prompts = world.sample(student, tasks, key)
    teachers = [world.teacher_mean(path, i, prompts, tasks) for i in TRAINED]
    kl = torch.stack([kl_of(path.mean[i], teachers[i], path.std[i]) for i in TRAINED])  # (S, B)
    kl_to_go = kl.flip(0).cumsum(0).flip(0) - kl
    found = {}
    for i in TRAINED:
        mean = world.student_mean(student, path, i, prompts)
        rollout_of = (path.mean[i], teachers[i], path.x[i + 1], path.std[i])
        for name in names:
            if name == "ode":
                continue
            clip_range = 0.2 if name == "ppo" else 1e-4
            loss, _ = OBJECTIVES[name](mean, *rollout_of, clip_range, kl_to_go[i])
            found[name, i] = gradient(loss, parameters, keep=True)
    if "ode" in names:
        path, _ = world.sample(student, tasks, key, noise=0.0)  # the same prompts and start
        for i in TRAINED:
            mean_teacher = world.teacher_mean(path, i, prompts, tasks, noise=0.0)
            mean = world.student_mean(student, path, i, prompts, noise=0.0)
            loss, _ = OBJECTIVES["ode"](mean, path.mean[i], mean_teacher, path.x[i + 1], 0.0)
            found["ode", i] = gradient(loss, parameters)
    return found


def measure_objectives(world, student, units):
    """{objective: [{"t", "cosine": {batch: mean}, "variance", "length"} per step, then of all]}"""
    exact, found = {}, {}
    for n in tqdm(range(units), desc="exact gradient"):
        for (_, i), g in unit_gradients(world, student, ("exact", n), ("kl",)).items():
            exact[i] = exact.get(i, 0) + g / units
    exact["all"] = sum(exact[i] for i in TRAINED)
    for n in tqdm(range(units), desc="objectives"):
        unit = unit_gradients(world, student, ("measured", n), NAMES)
        for name in NAMES:
            unit[name, "all"] = sum(unit[name, i] for i in TRAINED)
        for key, g in unit.items():
            found.setdefault(key, []).append(g.bfloat16())  # half the memory; sums are in float32
    results = {name: [] for name in NAMES}
    for name, i in found:
        entry = {"t": "all" if i == "all" else round(world.grid[i], 4)}
        gradients = torch.stack(found[name, i]).float()  # (units, P)
        results[name].append(entry | compare(gradients, exact[i]))
    return results


def compare(gradients, exact):
    """Gradients of units (units, P) beside the exact one (P,)."""
    units, cosines = len(gradients), {}
    for batch in BATCHES:
        size = batch // UNIT
        if size <= units:
            means = gradients.view(units // size, size, -1).mean(1)
            cosines[batch] = round(statistics.fmean(cosine(mean, exact) for mean in means), 4)
    mean, square = gradients.mean(0), exact.square().sum()
    spread = (gradients - mean).square().sum() / max(units - 1, 1)
    variance, length = UNIT * spread / square, mean @ exact / square
    return {
        "cosine": cosines,
        "variance": float(f"{variance:.4g}"),
        "length": float(f"{length:.4g}"),
    }


# ---- 2. Tasks


def distillation_gradient(world, student, task, images, key):
    """The gradient of the KL (P,), summed over all trained steps and groups of 16 images."""
    parameters, total = world.parameters(student), 0
    for n in range(images // G):
        path, prompts = world.sample(student, [task] * G, (*key, n))
        for i in TRAINED:
            mean_teacher = world.teacher_mean(path, i, prompts, [task] * G)
            mean = world.student_mean(student, path, i, prompts)
            loss, _ = opd_kl(mean, path.mean[i], mean_teacher, path.x[i + 1], path.std[i])
            total = total + gradient(loss, parameters)
    return total


def grpo_gradient(world, student, task, images, key):
    """The gradient of GRPO (P,): reward 0.8 own + 0.2 deqa, as --mix; the first three steps."""
    parameters, total, rewards = world.parameters(student), 0, []
    groups = [world.sample_group(student, task, (*key, n)) for n in range(images // G)]
    for path, prompts in groups:
        pictures = decode(world.pipe.vae, path.x[-1])
        rewards.append(world.reward_of(pictures, [(task, prompt, {}) for prompt in prompts]))
    rewards = torch.cat(rewards)
    advantages = group_advantage(rewards, torch.arange(len(rewards)) // G).split(G)
    for (path, prompts), advantage in zip(groups, advantages):
        for i in EARLY:
            mean = world.student_mean(student, path, i, prompts)
            new = log_prob(path.x[i + 1], mean, path.std[i])
            old = log_prob(path.x[i + 1], path.mean[i], path.std[i])
            loss, _ = grpo(new, old, advantage)
            total = total + gradient(loss, parameters)
    return total


def measure_tasks(world, student, kind, images):
    """{"cosine": {"a-b": ...}, "reliability": {task: ...}}; each task's gradient is measured in two
    halves of the images, and a cosine of two tasks is the mean over their halves."""
    measure = {"distillation": distillation_gradient, "grpo": grpo_gradient}[kind]
    halves = {}
    for task in TASKS:
        keys = [(student, kind, task, half) for half in (0, 1)]
        halves[task] = [measure(world, student, task, images // 2, key) for key in keys]
    cosines = {}
    for a, b in itertools.combinations(TASKS, 2):
        pairs = itertools.product(halves[a], halves[b])
        cosines[f"{a}-{b}"] = round(statistics.fmean(cosine(x, y) for x, y in pairs), 3)
    reliability = {task: round(cosine(*halves[task]), 3) for task in TASKS}
    return {"cosine": cosines, "reliability": reliability}


# ---- 3. Routing


def measure_routing(world, student):
    """The relative difference of two gradients over one unit, at the third step: the mean over
    teachers of the KL, and the KL to the mean of the teachers."""
    i, parameters = 2, world.parameters(student)
    path, prompts = world.sample(student, [TASKS[n % 4] for n in range(UNIT)], "routing")
    teachers = [world.teacher_mean(path, i, prompts, [task] * UNIT) for task in TASKS]
    mean = world.student_mean(student, path, i, prompts)
    loss_of = lambda teacher: kl_of(mean, teacher, path.std[i]).mean()
    random = gradient(sum(map(loss_of, teachers)) / 4, parameters, keep=True)
    averaged = gradient(loss_of(sum(teachers) / 4), parameters)
    return ((random - averaged).norm() / averaged.norm()).item()


def parse_args():
    parser = make_parser(__doc__)
    flag = parser.add_argument
    opd, mix = "runs/miniature/opd_merge_seed2.stages", "runs/miniature/merge_mix_seed0.stages"
    stages = "miniature.py's folder of the stages of a training from the merged start"
    flag("distilled", nargs="?", default=opd, help=f"{stages}: Flow-OPD")
    flag("mixed", nargs="?", default=mix, help=f"{stages}: GRPO-Mix")
    flag("--results", type=Path, default=Path("experiments/results"), help="of gradients.json")
    flag("--units", type=positive, default=32, help="units of 16 images for each of two measures")
    flag("--images", type=at_least(64), default=128, help="images per task; for GRPO twice as many")
    return parser.parse_args()


def main(args):
    start = "merged start"
    stages = {start: "toy/adapters/merged"}
    stages |= {f"Flow-OPD, iteration {n}": f"{args.distilled}/{n}" for n in (10, 40, 80)}
    mixed = {f"merge + GRPO-Mix, iteration {n}": f"{args.mixed}/{n}" for n in (10, 30, 54)}
    stages |= mixed
    for path in stages.values():
        check_adapter(path, "stage")
    name_of = {stage: stage.replace(" ", "_").replace(",", "") for stage in stages}
    world = World({name_of[stage]: path for stage, path in stages.items()})
    found = {"routing": measure_routing(world, name_of[start]), "tasks": {}}
    print(f"routing: relative difference {found['routing']:.1e}", flush=True)
    for stage in tqdm(stages, desc="tasks"):
        if stage not in mixed:
            measured = measure_tasks(world, name_of[stage], "distillation", args.images)
            found["tasks"][f"distillation: {stage}"] = measured
        if stage in mixed or stage == start:
            measured = measure_tasks(world, name_of[stage], "grpo", 2 * args.images)
            found["tasks"][f"grpo: {stage}"] = measured
    found["objectives"] = measure_objectives(world, name_of[start], args.units)
    found |= {"units": args.units, "unit": UNIT, "images_per_task": args.images}
    save_json(args.results / "gradients.json", found)


if __name__ == "__main__":
    main(parse_args())
