"""Flow-OPD on a plane, the whole method in one picture: two teachers, one student, under a minute on one core.

    python examples/flow2d.py                                    # the default objective, and the one published first
    python examples/flow2d.py --objectives kl ode trajectory     # others of losses.py

An "image" is a point, the model a small network that is told the task: 0 wants points in six spots on a ring, 1 in a
cross. Each teacher has learnt its own task by flow matching; asked for the other one it is wrong. The student starts as
the base, which knows neither. It never sees a data point: it paints with the SDE, each task's teacher says what its
velocity would have been at every state that the student visited, and the student follows. Of this project it uses
sde.py and losses.py alone. An action has D = 2 coordinates here, so the noise of ppo-scalar, which grows with D, is small.
"""

import argparse
import copy
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # not needed once sde.py and losses.py are copied beside this

import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

import losses
from sde import kl_weight, rollout, step

A = 0.7  # the noise level of the SDE
OBJECTIVES = ("ppo", "ppo-scalar", "ppo-published", "ppo-public-code", "kl", "trajectory", "ode")
NAMES, WIDTH = ("ring", "cross"), 0.15  # each task is a mixture of Gaussians of this standard deviation, around its spots:
ring = [[2 * math.cos(k * math.pi / 3), 2 * math.sin(k * math.pi / 3)] for k in range(6)]
SPOTS = torch.tensor(ring), torch.tensor([[0.0, 0.0], [1.5, 0.0], [-1.5, 0.0], [0.0, 1.5], [0.0, -1.5]])
ORANGE, BLUE, GREY, PINK = "#D55E00", "#0072B2", "#666666", "#CC79A7"  # Okabe and Ito: told apart by everyone


def data(task: int, number: int) -> torch.Tensor:
    """Points as the task wants them: (number, 2)."""
    return SPOTS[task][torch.randint(len(SPOTS[task]), (number,))] + WIDTH * torch.randn(number, 2)


def velocity(net: torch.nn.Module, x: torch.Tensor, t: torch.Tensor | float, task: torch.Tensor) -> torch.Tensor:
    """The model: v (..., 2) at x (..., 2); time t and task are broadcast to the leading dimensions."""
    t = torch.as_tensor(t, dtype=torch.float32).expand(x.shape[:-1])[..., None]  # (..., 1)
    task = torch.nn.functional.one_hot(task, 2).expand(*x.shape[:-1], 2)
    return net(torch.cat([x, t, t.square(), task], dim=-1))


def flow_matching(net: torch.nn.Module, points: torch.Tensor, tasks: torch.Tensor, steps: int, name: str) -> torch.nn.Module:
    """Pre-training and teachers: regress noise - data at a random time. points (N, 2), tasks (N,)."""
    optimizer = torch.optim.Adam(net.requires_grad_(True).parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), f"{name:24}"):
        some = torch.randint(len(points), (512,))
        x0, noise, t = points[some], torch.randn(512, 2), torch.rand(512)
        x = (1 - t)[:, None] * x0 + t[:, None] * noise  # x_t = (1 - t) x_0 + t noise
        loss, _ = losses.flow_matching(velocity(net, x, t, tasks[some]), x0, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.requires_grad_(False)


def distil(
    base: torch.nn.Module, teachers: list[torch.nn.Module], objective: str, grid: list[float], iterations: int, samples: int
) -> tuple[torch.nn.Module, list[float]]:
    """Flow-OPD. Returns the student and its KL to the teachers (a mean over steps and samples) in every iteration."""
    student, curve = copy.deepcopy(base).requires_grad_(True), []
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    noise, t = (0.0 if objective == "ode" else A), torch.tensor(grid[:-1])[:, None]  # t (T, 1)
    times = list(zip(grid[:-1], grid[1:]))
    weight = torch.tensor([kl_weight(t, t_next, A, grid[1]) for t, t_next in times])[:, None]  # (T, 1)
    for _ in (bar := tqdm(range(iterations), f"student, {objective:15}")):
        # 1. Prompts: here only a task for each of the B samples.
        task = torch.arange(samples) % 2  # (B,)
        # 2. Rollout: the student paints. path.x (T + 1, B, 2)
        path = rollout(lambda x, t: velocity(student, x, t, task), torch.randn(samples, 2), grid, noise)
        # 3. Labels: the velocity that each task's own teacher would have had at every state that the student visited.
        with torch.no_grad():
            v_teacher = torch.where(task[:, None] == 0, *[velocity(net, path.x[:-1], t, task) for net in teachers])  # (T, B, 2)
        # 4. Update: one for each rollout, so PPO's ratio is 1; its gradient is not 0.
        v = velocity(student, path.x[:-1], t, task)  # (T, B, 2), the only tensor with gradient
        kl = weight * (v.detach() - v_teacher).square().mean(2)  # (T, B)
        total = 0.0
        for i, (t_i, t_next) in enumerate(times):
            mean, std = step(path.x[i], v[i], t_i, t_next, noise, grid[1])  # (B, 2), a float
            mean_teacher, _ = step(path.x[i], v_teacher[i], t_i, t_next, noise, grid[1])
            ppo = (mean, path.mean[i], mean_teacher, path.x[i + 1], std)
            loss, _ = {
                "ppo": lambda: losses.opd_ppo(*ppo),
                "ppo-scalar": lambda: losses.opd_ppo_scalar(*ppo),
                "ppo-published": lambda: losses.opd_ppo_published(*ppo),
                "ppo-public-code": lambda: losses.opd_ppo_published(*ppo, detach=False),
                "kl": lambda: losses.opd_kl(mean, mean_teacher, std),
                "trajectory": lambda: losses.opd_trajectory(*ppo, kl[i + 1 :].sum(0)),
                "ode": lambda: losses.opd_ode(v[i], v_teacher[i], t_i - t_next),
            }[objective]()
            total = total + loss / len(times)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        # 5. Log.
        curve.append(kl.mean().item())
        bar.set_postfix(kl=f"{curve[-1]:.3g}")
    return student.requires_grad_(False), curve


@torch.no_grad()
def paint(net: torch.nn.Module, task: int) -> tuple[torch.Tensor, float]:
    """500 points of one task, without noise: all states (21, 500, 2), and how well they fill the spots, 0 to 1: the share
    of points within three standard deviations of a spot, where a spot counts no more than its part of all."""
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(1))
    path = rollout(lambda x, t: velocity(net, x, t, torch.tensor(task)), x, torch.linspace(1, 0, 21).tolist(), a=0.0).x
    near = torch.cdist(SPOTS[task], path[-1]) < 3 * WIDTH  # (spots, 500)
    return path, near.float().mean(1).clamp(max=1 / len(near)).sum().item()


def draw(
    file: Path, base: torch.nn.Module, teachers: list[torch.nn.Module], students: dict[str, tuple], grid: list[float]
) -> None:
    """Above: what one iteration sees, and the KL. Below: what every model makes of both tasks."""
    figure = plt.figure(figsize=(3.1 * (3 + len(students)), 11.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.2, 2))
    how = "One iteration: the student paints (grey, from the squares on), and its teacher labels every state that it visits"
    top.suptitle(how, fontsize=13)
    *panels, right = top.subplots(1, 3, width_ratios=(1, 1, 1.25))
    for task, axis in enumerate(panels):
        x = torch.tensor([[-1.6, 1.3], [1.7, 0.9], [0.2, -1.9]])
        torch.manual_seed(3)
        path = rollout(lambda x, t: velocity(base, x, t, torch.tensor(task)), x, grid, A).x  # (T + 1, 3, 2)
        axis.plot(*path.movedim(2, 0), "-o", color="0.6", ms=3, lw=1, zorder=1)
        axis.plot(*path[0].T, "s", color="0.4", zorder=3)
        arrows(axis, teachers[task], path[:-1], torch.tensor(grid[:-1])[:, None], task, ORANGE, width=0.005, scale=30)
        arrows(axis, base, path[:-1], torch.tensor(grid[:-1])[:, None], task, BLUE, width=0.005, scale=30)
        frame(axis, task, f"task {task}, {NAMES[task]}: the first iteration")
    panels[1].plot([], [], color=BLUE, lw=3, label="the student's velocity")
    panels[1].plot([], [], color=ORANGE, lw=3, label="its teacher's")
    panels[1].legend(loc="lower left", fontsize=8)
    colours = dict(zip(students, [BLUE, PINK, "#009E73", "#E69F00", "#56B4E9", "black", "0.4"]))
    for (name, (_, curve)), style in zip(students.items(), ["-", "--", ":", "-."] * 2):
        right.semilogy(curve, style, color=colours[name], label=name)
    right.set(title="KL(student, teacher) at the visited states, cut off at 10", xlabel="iteration", ylim=(None, 10))
    right.grid(alpha=0.3)
    right.legend()

    how = "All paint without noise: velocity at t = 0.5 (arrows), 60 paths, 500 points"
    bottom.suptitle(f"{how}; dotted: where the task wants its share of them", fontsize=13)
    columns = {"its own teacher": (*teachers, ORANGE), "the other task's teacher": (*teachers[::-1], ORANGE)}
    columns["the student before"] = (base, base, GREY)
    columns |= {f"the student after, {name}": (net, net, colours[name]) for name, (net, _) in students.items()}
    lattice = torch.linspace(-2.6, 2.6, 15)
    where = torch.cartesian_prod(lattice, lattice)  # (225, 2)
    for task, row in enumerate(bottom.subplots(2, len(columns))):
        for axis, (title, (*nets, colour)) in zip(row, columns.items()):
            path, filled = paint(nets[task], task)
            arrows(axis, nets[task], where, 0.5, task, "0.75", width=0.004, scale=45)
            axis.plot(*path[:, :60].movedim(2, 0), color=colour, lw=0.6, alpha=0.5)
            axis.scatter(*path[-1].T, s=5, color=colour, linewidths=0, zorder=3)
            frame(axis, task, f"{title}\nspots filled: {filled:.0%}")
        row[0].set_ylabel(f"task {task}: {NAMES[task]}", fontsize=12)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def arrows(
    axis: plt.Axes, net: torch.nn.Module, x: torch.Tensor, t: torch.Tensor | float, task: int, colour: str, **how
) -> None:
    """-v at x: painting goes from t = 1 to 0."""
    with torch.no_grad():
        v = velocity(net, x, t, torch.tensor(task))
    axis.quiver(*x.reshape(-1, 2).T, *-v.reshape(-1, 2).T, color=colour, zorder=2, **how)


def frame(axis: plt.Axes, task: int, title: str) -> None:
    for spot in SPOTS[task].tolist():
        axis.add_patch(plt.Circle(spot, 3 * WIDTH, fill=False, color="black", lw=0.9, ls=":", zorder=4))
    axis.set(xlim=(-2.8, 2.8), ylim=(-2.8, 2.8), aspect="equal", xticks=[], yticks=[])
    axis.set_title(title, fontsize=10)


def main(args):
    torch.manual_seed(args.seed)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    grid = torch.linspace(1, 0, 11).tolist()  # T = 10 steps

    # The base knows a broad cloud, whatever it is told; each teacher is a copy of it that went on with its own task alone.
    layers = [torch.nn.Linear(6, 96), torch.nn.SiLU(), torch.nn.Linear(96, 96), torch.nn.SiLU(), torch.nn.Linear(96, 96)]
    base = torch.nn.Sequential(*layers, torch.nn.SiLU(), torch.nn.Linear(96, 2))
    flow_matching(base, 1.3 * torch.randn(20000, 2), torch.arange(20000) % 2, args.teacher_steps // 4, "base")
    teachers = []
    for k in range(2):
        task = torch.full((20000,), k)
        teachers.append(flow_matching(copy.deepcopy(base), data(k, 20000), task, args.teacher_steps, f"teacher {k}"))
    students = {name: distil(base, teachers, name, grid, args.iterations, args.samples) for name in args.objectives}

    draw(out / "flow2d.png", base, teachers, students, grid)
    for name, (student, curve) in students.items():
        filled = [[paint(net, k)[1] for net in (base, student, teachers[k])] for k in range(2)]
        words = [f"{NAMES[k]} {filled[k][0]:.0%} -> {filled[k][1]:.0%} (teacher {filled[k][2]:.0%})" for k in range(2)]
        print(f"{name:15} KL to the teachers {curve[0]:.2e} -> {curve[-1]:.2e}, spots filled: {', '.join(words)}")
    print(f"picture: {out}/flow2d.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=["ppo", "ppo-published"])
    parser.add_argument("--iterations", type=int, default=450, help="of each student (450)")
    parser.add_argument("--samples", type=int, default=512, help="points that a student paints in an iteration (512)")
    parser.add_argument("--teacher_steps", type=int, default=2000, help="of flow matching (2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/flow2d", help="folder of the picture (runs/flow2d)")
    main(parser.parse_args())
