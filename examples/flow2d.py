"""Flow-OPD on a plane: two teachers, one student, under a minute on one core.

    python examples/flow2d.py                                    # the default, and ppo-published
    python examples/flow2d.py --objectives kl ode trajectory     # other objectives of losses.py

An "image" is a point in the plane, and the model is a small network that gets a task instead of a
prompt. Task 0 wants points at six spots on a ring, task 1 at five spots of a cross. Each teacher
was trained on its own task by flow matching, and is wrong about the other. The student starts as
the base, which knows neither task, and never sees a data point. It generates its own training
states with the SDE. At every state the task's teacher gives its velocity, and the student learns to
follow it.

The function `distil` is the loop of train_opd.py in short: without MAR, groups of samples, a
gradient per task, second updates, the average of the weights, samples and checkpoints. It also
trains the last step, and its learning rate falls.

Of this project the script uses sde.py and losses.py alone. An action has only D = 2 coordinates
here, so the gradient noise of ppo-scalar, which grows with D, is small.
"""

import argparse
import copy
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import SubFigure
from torch import Tensor
from torch.nn import Module
from tqdm import tqdm

# Needed only as long as sde.py and losses.py lie in the folder above this one.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import losses
from sde import kl_weight, rollout, step

NOISE = 0.7  # the noise level a of the SDE
TASKS = ("ring", "cross")
RING = [[2 * math.cos(k * math.pi / 3), 2 * math.sin(k * math.pi / 3)] for k in range(6)]
CROSS = [[0.0, 0.0], [1.5, 0.0], [-1.5, 0.0], [0.0, 1.5], [0.0, -1.5]]
SPOTS = torch.tensor(RING), torch.tensor(CROSS)
WIDTH = 0.15  # a task's data: equal Gaussians of this standard deviation around its spots
# Safe for colour-blind eyes. An objective has the colour that it has in experiments/RESULTS.md.
GREY, WINE = "#777777", "#882255"  # the base, the teachers
COLOURS = {"ppo": "#0072B2", "kl": "#D55E00", "ode": "#56B4E9", "trajectory": "#009E73"}
COLOURS |= {"ppo-public-code": "#CC79A7", "ppo-scalar": "#E69F00", "ppo-published": "black"}


def data(task: int, number: int) -> Tensor:
    """Points of a task: (number, 2)."""
    centres = SPOTS[task][torch.randint(len(SPOTS[task]), (number,))]
    return centres + WIDTH * torch.randn(number, 2)


def velocity(net: Module, x: Tensor, t: Tensor | float, task: Tensor) -> Tensor:
    """The model: v like x (..., 2). t is a float or (..., 1); task is broadcast to (...)."""
    t = torch.as_tensor(t, dtype=torch.float32).expand(*x.shape[:-1], 1)
    task = torch.nn.functional.one_hot(task, 2).expand(*x.shape[:-1], 2)
    return net(torch.cat([x, t, t.square(), task], dim=-1))


def flow_matching(net: Module, points: Tensor, tasks: Tensor, steps: int, name: str) -> Module:
    """Train base and teachers: regress noise - data at random times. points (M, 2), tasks (M,)."""
    optimizer = torch.optim.Adam(net.requires_grad_(True).parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), f"{name:24}"):
        batch = torch.randint(len(points), (512,))
        x0, noise, t = points[batch], torch.randn(512, 2), torch.rand(512)[:, None]
        x = (1 - t) * x0 + t * noise
        loss, _ = losses.flow_matching(velocity(net, x, t, tasks[batch]), x0, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.requires_grad_(False)


def distil(
    base: Module,
    teachers: list[Module],
    objective: str,
    grid: list[float],
    iterations: int,
    samples: int,
) -> tuple[Module, list[float]]:
    """Flow-OPD. Returns the student, and the mean KL to its teachers in every iteration."""
    student = copy.deepcopy(base).requires_grad_(True)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    a = 0.0 if objective == "ode" else NOISE

    # A visited state is a row: step step_of[n] of sample sample_of[n]. N = T B rows.
    steps, times = len(grid) - 1, torch.tensor(grid)
    step_of = torch.arange(steps).repeat_interleave(samples)  # (N,)
    sample_of = torch.arange(samples).repeat(steps)  # (N,)
    t, t_next = times[step_of][:, None], times[step_of + 1][:, None]  # (N, 1)
    # For the log and `trajectory`. `ode` logs the KL of SDE steps at its states: its own have none.
    weight = kl_weight(t, t_next, NOISE, grid[1])  # (N, 1)

    curve = []
    for _ in (bar := tqdm(range(iterations), f"student, {objective:15}")):
        # 1. Prompts: here only a task for every sample.
        task = torch.arange(samples) % 2  # (B,)
        task_of = task[sample_of]  # (N,)

        # 2. Rollout (no gradient): the student samples with its own SDE.
        noise = torch.randn(samples, 2)
        path = rollout(lambda x, t: velocity(student, x, t, task), noise, grid, a)
        x, x_next = path.x[:-1].flatten(0, 1), path.x[1:].flatten(0, 1)  # (N, 2)
        mean_old = path.mean.flatten(0, 1)  # (N, 2)

        # 3. Labels (no gradient): each task's teacher at the states of its own samples.
        v_teacher = torch.empty_like(x)
        for k, teacher in enumerate(teachers):
            rows = torch.nonzero(task_of == k).flatten()
            v_teacher[rows] = velocity(teacher, x[rows], t[rows], task_of[rows])
        mean_teacher, std = step(x, v_teacher, t, t_next, a, grid[1])  # (N, 2), (N, 1)

        # 4. Update: one per rollout, so PPO's ratio is 1. Its gradient is not 0.
        v = velocity(student, x, t, task_of)  # (N, 2), with gradient
        mean, _ = step(x, v, t, t_next, a, grid[1])
        kl = (weight * (v.detach() - v_teacher).square()).mean(1).view(steps, samples)
        kl_to_go = kl.flip(0).cumsum(0).flip(0) - kl  # of later steps, for `trajectory`
        inputs = mean, mean_old, mean_teacher, x_next, std
        loss, _ = losses.OBJECTIVES[objective](*inputs, kl_to_go=kl_to_go.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()

        # 5. Log.
        curve.append(kl.mean().item())
        bar.set_postfix(kl=f"{curve[-1]:.3g}")
    return student.requires_grad_(False), curve


@torch.no_grad()
def sample(net: Module, task: int) -> tuple[Tensor, float]:
    """Sample 5000 points of a task without noise: all states (21, 5000, 2), and the filled share.

    That is the share of points within three standard deviations of a spot. No spot counts for more
    than its fair part, so 1 needs all spots equally full."""
    noise = torch.randn(5000, 2, generator=torch.Generator().manual_seed(1))
    grid = torch.linspace(1, 0, 21).tolist()
    path = rollout(lambda x, t: velocity(net, x, t, torch.tensor(task)), noise, grid, a=0.0).x
    near = torch.cdist(SPOTS[task], path[-1]) < 3 * WIDTH  # (spots, 5000)
    return path, near.float().mean(1).clamp(max=1 / len(near)).sum().item()


def draw_top(
    figure: SubFigure,
    base: Module,
    teachers: list[Module],
    students: dict[str, tuple],
    grid: list[float],
) -> None:
    """What the first iteration sees of one sample, and the KL of all iterations."""
    left, right = figure.subplots(1, 2)
    torch.manual_seed(60)  # a path whose arrows lie apart
    noise, task, t = torch.randn(1, 2), torch.tensor(0), torch.tensor(grid[:-1])[:, None]
    path = rollout(lambda x, t: velocity(base, x, t, task), noise, grid, NOISE)
    x = path.x[:, 0]  # (T + 1, 2)
    left.plot(*x.T, "-o", color="0.75", ms=7, label="states, by the SDE")
    left.plot(*x[0], "s", color="black", ms=9, label="start: noise")
    arrows = {"angles": "xy", "scale_units": "xy", "scale": 4, "width": 0.009, "zorder": 3}
    models = {"the student": (base, GREY), "its teacher": (teachers[0], WINE)}
    for name, (net, colour) in models.items():
        v = velocity(net, x[:-1], t, task)
        style = {"color": colour, "label": f"direction of {name}", **arrows}
        left.quiver(*x[:-1].T, *-v.T, **style)  # -v: sampling goes from t = 1 to 0
    frame(left, 0)
    left.set_title("One sample of the first iteration (ring)", fontsize=13)
    low, high = (x.amin(0) - 0.7).tolist(), (x.amax(0) + 0.4).tolist()
    left.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    left.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, frameon=False)
    for (name, (_, curve)), style in zip(students.items(), ["-", "--", ":", "-."] * 2):
        right.semilogy(curve, style, color=COLOURS[name], lw=2, label=name)
    right.set_title("KL(student, teacher), cut off at 10", fontsize=13)
    right.set(xlabel="iteration", ylim=(None, 10))
    right.grid(alpha=0.3)
    right.legend()


def draw_bottom(
    figure: SubFigure, base: Module, teachers: list[Module], students: dict[str, tuple]
) -> None:
    """What every model samples for both tasks."""
    title = "Samples without noise: 500 points, 60 paths, and how far the dotted spots are filled"
    figure.suptitle(title, fontsize=13)
    columns = {  # {title: (network for task 0, network for task 1, colour)}
        "own teacher": (*teachers, WINE),
        "other teacher": (*teachers[::-1], WINE),
        "student before": (base, base, GREY),
    }
    for name, (student, _) in students.items():
        columns[f"student, {name}"] = (student, student, COLOURS[name])
    for task, row in enumerate(figure.subplots(2, len(columns))):
        for axis, (title, (*nets, colour)) in zip(row, columns.items()):
            path, filled = sample(nets[task], task)
            axis.plot(*path[:, :60].movedim(2, 0), color=colour, lw=0.6, alpha=0.5)
            axis.scatter(*path[-1, :500].T, s=5, color=colour, linewidths=0, zorder=3)
            frame(axis, task)
            axis.set_xlabel(f"{filled:.0%} filled", fontsize=12)
            if task == 0:
                axis.set_title(title, fontsize=11)
        row[0].set_ylabel(f"task {task}: {TASKS[task]}", fontsize=12)


def frame(axis: plt.Axes, task: int) -> None:
    """Limits and the task's spots."""
    for spot in SPOTS[task].tolist():
        circle = plt.Circle(spot, 3 * WIDTH, fill=False, color="black", lw=0.9, ls=":", zorder=4)
        axis.add_patch(circle)
    axis.set(xlim=(-2.8, 2.8), ylim=(-2.8, 2.8), aspect="equal", xticks=[], yticks=[])


def main(args):
    torch.manual_seed(args.seed)
    grid = torch.linspace(1, 0, 11).tolist()  # T = 10 steps, all trained, as the paper has it

    # The base knows a broad cloud for both tasks. A teacher is a copy trained further on one task.
    layers, sizes = [], (6, 96, 96, 96, 2)
    for inputs, outputs in zip(sizes, sizes[1:]):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.SiLU()]
    net = torch.nn.Sequential(*layers[:-1])
    points, tasks = 1.3 * torch.randn(20000, 2), torch.arange(20000) % 2
    base = flow_matching(net, points, tasks, args.teacher_steps // 4, "base")
    teachers = []
    for k in range(2):
        net, points, tasks = copy.deepcopy(base), data(k, 20000), torch.full((20000,), k)
        teachers.append(flow_matching(net, points, tasks, args.teacher_steps, f"teacher {k}"))
    students = {}  # {objective: (student, curve)}
    for name in args.objectives:
        students[name] = distil(base, teachers, name, grid, args.iterations, args.samples)

    figure = plt.figure(figsize=(2.1 * (3 + len(students)), 8.8), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    top, bottom = figure.subfigures(2, 1, height_ratios=(4, 5))
    draw_top(top, base, teachers, students, grid)
    draw_bottom(bottom, base, teachers, students)
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "flow2d.png", dpi=100)

    for name, (student, curve) in students.items():
        filled = []
        for k, task in enumerate(TASKS):
            before, after, teacher = (sample(net, k)[1] for net in (base, student, teachers[k]))
            filled.append(f"{task} {before:.0%} -> {after:.0%} (teacher {teacher:.0%})")
        kl = f"KL to the teachers {curve[0]:.2e} -> {curve[-1]:.2e}"
        print(f"{name:15} {kl}, spots filled: {', '.join(filled)}")
    print(f"picture: {args.out}/flow2d.png")


def parse_args() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    flag = parser.add_argument
    flag("--objectives", nargs="+", choices=losses.OBJECTIVES, default=["ppo", "ppo-published"])
    flag("--iterations", type=int, default=450, help="of each student (450)")
    flag("--samples", type=int, default=512, help="points per iteration (512)")
    flag("--teacher_steps", type=int, default=2000, help="of flow matching (2000)")
    flag("--seed", type=int, default=0)
    flag("--out", type=Path, default="runs/flow2d", help="folder of the picture (runs/flow2d)")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
