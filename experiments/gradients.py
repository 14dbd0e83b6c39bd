"""Gradients of the objectives and of the tasks, measured at fixed weights: writes results/gradients.json.

    python experiments/gradients.py                  # after miniature.py's first runs; some minutes on one core

1. `objectives`: every objective's gradient at the merged start, per denoising step, beside the exact gradient of the KL, which
   is opd_kl over other samples, as many as here are measured. `cosine` by batch size; `variance` of one image's gradient, and
   `length`, the mean gradient's part along the exact one, both in units of the exact gradient (unbiased: length 1).
2. `tasks`: do the four tasks' gradients agree, for distillation and for GRPO, along both trainings? `reliability` is the cosine
   of one task's gradient with itself on other samples: near 0, a cosine with another task says nothing.
3. `routing`: the KL to a teacher drawn at random and the KL to the average velocity of all have the same gradient, as
   E |v - v_k|^2 = |v - mean v_k|^2 + a constant says: the relative difference of the two.
"""

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import support.lora as adapters
import support.run as common
import losses
from support.files import check_adapter, read_prompts, save_json
from support.flags import TASKS, Help, Parser, at_least
from evaluate import load_rewards
from support.model import decode, embed_prompts, initial_noise, load_pipeline, time_grid, velocity
from sde import log_prob, rollout, step
from train_teacher import make_reward

STEPS, NOISE, UNIT = 6, 0.7, 16  # as in training; gradients are kept for units of 16 images, four of each task
BATCHES = (16, 64, 256, 512)  # images
OBJECTIVES = ("kl", "ppo", "ppo-public-code", "trajectory", "ode", "ppo-scalar", "ppo-published")


def load(paths):
    """The pipeline with the four teachers and {name: path} on it, every prompt embedded, the time grid."""
    pipe = load_pipeline("toy", torch.device("cpu"))
    for name, path in {f"teacher_{task}": f"toy/adapters/{task}" for task in TASKS}.items() | paths.items():
        adapters.add_adapter(pipe.transformer, name, adapters.read_adapter(path, name), path=path)
    prompts = {task: read_prompts(f"toy/prompts/{task}_train.txt")[0] for task in TASKS}
    text = embed_prompts(pipe, [p for some in prompts.values() for p in some[:256]])
    return SimpleNamespace(pipe=pipe, transformer=pipe.transformer, text=text, prompts=prompts, grid=time_grid(pipe, STEPS))


@torch.no_grad()
def sample(world, student, tasks, key, noise=NOISE, window=None):
    """An SDE rollout of `student` for one image per entry of `tasks`: trajectory, and the prompts' rows of the table."""
    draws = [common.generator("gradients", key, i) for i in range(len(tasks))]
    chosen = [world.prompts[task][int(torch.randint(256, (), generator=g))] for task, g in zip(tasks, draws)]
    rows = torch.tensor([world.text["rows"][p] for p in chosen])
    with adapters.adapter(world.transformer, student):
        move = lambda x, t: velocity(world.transformer, x, t, world.text, rows, 1.0)
        path = rollout(move, initial_noise(world.pipe, draws), world.grid, noise, generators=draws, window=window)
    return path, rows, chosen


@torch.no_grad()
def teacher_velocity(world, x, t, rows, tasks):
    """Each sample's velocity by its own task's teacher."""
    v = torch.empty_like(x)
    for task in set(tasks):
        members = torch.tensor([n for n, other in enumerate(tasks) if other == task])
        with adapters.adapter(world.transformer, f"teacher_{task}"):
            v[members] = velocity(world.transformer, x[members], t, world.text, rows[members], 1.0)
    return v


def gradient(loss, parameters, keep=False):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=keep)])


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, 0).item()


def unit_gradients(world, student, key, names):
    """Gradients of one unit of 16 images: {(objective, step): (P,)}."""
    parameters = list(adapters.adapter_parameters(world.transformer, student).values())
    tasks, out = [TASKS[i % 4] for i in range(UNIT)], {}
    path, rows, _ = sample(world, student, tasks, key)
    ode = sample(world, student, tasks, key, noise=0.0)[0] if "ode" in names else None
    trained = range(STEPS - 1)
    means, kl = [], []
    for i in trained:
        v = teacher_velocity(world, path.x[i], world.grid[i], rows, tasks)
        means.append(step(path.x[i], v, world.grid[i], world.grid[i + 1], NOISE, world.grid[1])[0])
    kl = torch.stack(
        [(path.mean[i] - means[i]).square().flatten(1).mean(1) / (2 * path.std[i] ** 2) for i in trained]
    )  # (S, B)
    to_go = kl.flip(0).cumsum(0).flip(0) - kl
    for i in trained:
        t, t_next, std = world.grid[i], world.grid[i + 1], path.std[i]
        with adapters.adapter(world.transformer, student):
            v = velocity(world.transformer, path.x[i], t, world.text, rows, 1.0)
            mean, _ = step(path.x[i], v, t, t_next, NOISE, world.grid[1])
            ppo = (mean, path.mean[i], means[i], path.x[i + 1], std)
            forms = {
                "kl": lambda: losses.opd_kl(mean, means[i], std),
                "ppo": lambda: losses.opd_ppo(*ppo),
                "ppo-scalar": lambda: losses.opd_ppo_scalar(*ppo),
                "ppo-published": lambda: losses.opd_ppo_published(*ppo, 1e-4),
                "ppo-public-code": lambda: losses.opd_ppo_published(*ppo, 1e-4, detach=False),
                "trajectory": lambda: losses.opd_trajectory(*ppo, to_go[i], 1e-4),
            }
            for name in names:
                if name != "ode":
                    out[name, i] = gradient(forms[name]()[0], parameters, keep=True)
        if ode is not None:
            v_teacher = teacher_velocity(world, ode.x[i], t, rows, tasks)
            with adapters.adapter(world.transformer, student):
                v = velocity(world.transformer, ode.x[i], t, world.text, rows, 1.0)
                out["ode", i] = gradient(losses.opd_ode(v, v_teacher, t - t_next)[0], parameters)
    return out


def measure_objectives(world, student, units):
    """-> {objective: [{"t", "cosine": {batch: mean}, "variance", "length"} per step, and the last entry for all steps]}."""
    exact, found = {}, {}
    for n in tqdm(range(units), desc="exact gradient"):
        for (_, i), g in unit_gradients(world, student, ("exact", n), ("kl",)).items():
            exact[i] = exact.get(i, 0) + g / units
    exact["all"] = sum(exact[i] for i in range(STEPS - 1))
    for n in tqdm(range(units), desc="objectives"):
        unit = unit_gradients(world, student, ("measured", n), OBJECTIVES)
        unit |= {(name, "all"): sum(unit[name, i] for i in range(STEPS - 1)) for name in OBJECTIVES}
        for name, i in unit:
            found.setdefault((name, i), []).append(unit[name, i].bfloat16())  # half the memory; sums are taken in float32
    out = {name: [] for name in OBJECTIVES}
    for name, i in found:
        grads, target = torch.stack(found[name, i]).float(), exact[i]  # (units, P)
        entry = {"t": round(world.grid[i], 4) if i != "all" else "all", "cosine": {}}
        for batch in BATCHES:
            size = batch // UNIT
            if size <= units:
                parts = grads.view(units // size, size, -1).mean(1)
                entry["cosine"][batch] = round(sum(cosine(p, target) for p in parts) / len(parts), 4)
        mean, norm2 = grads.mean(0), target.square().sum()
        entry["variance"] = float(f"{UNIT * (grads - mean).square().sum() / max(units - 1, 1) / norm2:.4g}")
        entry["length"] = float(f"{(mean @ target / norm2):.4g}")
        out[name].append(entry)
    return out


def task_gradients(world, student, kind, images, key):
    """Each task's gradient in two halves of `images` images: {task: (2, P)}. kind: distillation (KL, all steps but the last)
    or grpo (reward 0.8 own + 0.2 deqa as --mix, the first three steps)."""
    parameters = list(adapters.adapter_parameters(world.transformer, student).values())
    reward = make_reward(SimpleNamespace(reward=None, tasks=list(TASKS), mix_quality=0.2), load_rewards("toy"))
    out, G = {}, 16
    for task in TASKS:
        halves = []
        for half in (0, 1):
            total = 0
            groups = [sample_group(world, student, task, (key, kind, task, half, n), kind, G) for n in range(images // 2 // G)]
            if kind == "grpo":
                scores = torch.cat([reward(decode(world.pipe.vae, p.x[-1]), task, c, [{}] * G) for p, _, c in groups])
                advantage = losses.group_advantage(scores, torch.arange(len(scores)) // G).split(G)
            for n, (path, rows, _) in enumerate(groups):
                for i in range(3 if kind == "grpo" else STEPS - 1):
                    t, t_next, std = world.grid[i], world.grid[i + 1], path.std[i]
                    v_teacher = teacher_velocity(world, path.x[i], t, rows, [task] * G) if kind != "grpo" else None
                    with adapters.adapter(world.transformer, student):
                        v = velocity(world.transformer, path.x[i], t, world.text, rows, 1.0)
                        mean, _ = step(path.x[i], v, t, t_next, NOISE, world.grid[1])
                        if kind == "grpo":
                            old = log_prob(path.x[i + 1], path.mean[i], std)
                            loss, _ = losses.grpo(log_prob(path.x[i + 1], mean, std), old, advantage[n])
                        else:
                            loss, _ = losses.opd_kl(mean, step(path.x[i], v_teacher, t, t_next, NOISE, world.grid[1])[0], std)
                        total = total + gradient(loss, parameters)
            halves.append(total)
        out[task] = torch.stack(halves)
    return out


def sample_group(world, student, task, key, kind, G):
    """G images: of one prompt for GRPO, of any prompts of the task for distillation."""
    if kind != "grpo":
        return sample(world, student, [task] * G, key)
    draws = [common.generator("gradients", key, i) for i in range(G)]
    prompt = world.prompts[task][int(torch.randint(256, (), generator=common.generator("gradients", key)))]
    rows = torch.full((G,), world.text["rows"][prompt])
    with torch.no_grad(), adapters.adapter(world.transformer, student):
        move = lambda x, t: velocity(world.transformer, x, t, world.text, rows, 1.0)
        path = rollout(move, initial_noise(world.pipe, draws), world.grid, NOISE, generators=draws, window=range(3))
    return path, rows, [prompt] * G


def measure_tasks(world, student, kind, images):
    """-> {"cosine": {"a-b": …}, "reliability": {task: …}}; a cosine of two tasks is the mean over their halves."""
    halves = task_gradients(world, student, kind, images, student)
    between = {
        f"{a}-{b}": sum(cosine(x, y) for x in halves[a] for y in halves[b]) / 4 for a, b in itertools.combinations(TASKS, 2)
    }
    within = {task: cosine(*halves[task]) for task in TASKS}
    return {"cosine": {k: round(v, 3) for k, v in between.items()}, "reliability": {k: round(v, 3) for k, v in within.items()}}


def measure_routing(world, student):
    """The relative difference of two gradients over one unit: mean over teachers of the KL, and KL to the mean teacher."""
    parameters = list(adapters.adapter_parameters(world.transformer, student).values())
    path, rows, _ = sample(world, student, [TASKS[i % 4] for i in range(UNIT)], "routing")
    i, t, t_next = 2, world.grid[2], world.grid[3]
    vs = [teacher_velocity(world, path.x[i], t, rows, [task] * UNIT) for task in TASKS]
    means = [step(path.x[i], v, t, t_next, NOISE, world.grid[1])[0] for v in vs]
    with adapters.adapter(world.transformer, student):
        mean, _ = step(
            path.x[i], velocity(world.transformer, path.x[i], t, world.text, rows, 1.0), t, t_next, NOISE, world.grid[1]
        )
        drawn = gradient(sum(losses.opd_kl(mean, m, path.std[i])[0] for m in means) / 4, parameters, keep=True)
        averaged = gradient(losses.opd_kl(mean, sum(means) / 4, path.std[i])[0], parameters)
    return ((drawn - averaged).norm() / averaged.norm()).item()


def main(distilled, mixed, results, units, images):
    stages = {"merged start": "toy/adapters/merged"}
    stages |= {f"Flow-OPD, iteration {n}": f"{distilled}/{n}" for n in (10, 40, 80)}
    stages |= {f"merge + GRPO-Mix, iteration {n}": f"{mixed}/{n}" for n in (10, 30, 54)}
    for path in stages.values():
        check_adapter(path, "stage")
    paths = {name.replace(" ", "_").replace(",", ""): path for name, path in stages.items()}
    world = load(paths)
    for name in paths:
        for parameter in adapters.adapter_parameters(world.transformer, name).values():
            parameter.requires_grad_(True)
    found = {"routing": measure_routing(world, "merged_start"), "tasks": {}}
    print(f"routing: relative difference {found['routing']:.1e}", flush=True)
    for shown, name in tqdm(zip(stages, paths), desc="tasks", total=len(paths)):
        for kind in ("distillation", "grpo"):
            if (kind == "grpo") == ("GRPO" in shown) or shown == "merged start":
                found["tasks"][f"{kind}: {shown}"] = measure_tasks(world, name, kind, images * (2 if kind == "grpo" else 1))
    found["objectives"] = measure_objectives(world, "merged_start", units)
    save_json(Path(results) / "gradients.json", found | {"units": units, "unit": UNIT, "images_per_task": images})


if __name__ == "__main__":
    parser = Parser(description=__doc__, formatter_class=Help)
    flag = parser.add_argument
    stages = "folder of the stages of a training from the merged start, which miniature.py keeps"
    flag("distilled", nargs="?", default="runs/miniature/opd_merge_seed2.stages", help=f"{stages}: Flow-OPD")
    flag("mixed", nargs="?", default="runs/miniature/merge_mix_seed0.stages", help=f"{stages}: GRPO-Mix")
    flag("--results", default="experiments/results", help="folder of gradients.json")
    flag("--units", type=at_least(1), default=32, help="units of 16 images for each of the two measures")
    flag("--images", type=at_least(64), default=128, help="images per task for the tasks' gradients, twice as many for GRPO")
    main(**vars(parser.parse_args()))
