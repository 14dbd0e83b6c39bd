"""Which number of a training run ranks students as their scores do? Writes results/curves.json.

    python experiments/which_curve.py      # after miniature.py, for the students in its folder

GFD-OPD reports that the KL on a student's own states misranks students, and that the KL on the
teachers' states does not. For every student of the shipped teachers, on the same 128 training
prompts and noises:

    own      KL to each prompt's teacher at the states that the student's SDE visits
    teacher  the same at the states that the teacher's SDE visits
    mar      w (v - v_anchor)^2 at the student's own states, the term of MAR

All are means over latent dimensions, trained steps and samples. report.py compares their ranks with
those of the Average that the student's record holds.
"""

import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.gradients import NOISE, TRAINED, World
from experiments.plan import VARIANT, plan
from losses import kl_of
from sde import kl_weight
from support.files import read_json, save_json
from support.flags import TASKS, make_parser
from support.run import generator

SAMPLES = 32  # of each task
ANCHOR = "teacher_deqa"


def parse_args():
    parser = make_parser(__doc__)
    flag = parser.add_argument
    flag("--out", type=Path, default=Path("runs/miniature"), help="miniature.py's folder of runs")
    flag("--results", type=Path, default=Path("experiments/results"), help="of curves.json")
    return parser.parse_args()


def students(out):
    """{run: adapter} of the runs that learnt from all four shipped teachers, guidance off."""
    found = {}
    for job in plan(out):
        run = f"{job.name}_seed{job.seed}"
        stock = "--teacher" not in job.flags and "--guidance" not in job.flags
        adapter = out / run / "adapter"
        if job.script in ("train_opd.py", VARIANT) and stock and adapter.exists():
            found[run] = adapter
    return found


@torch.no_grad()
def distances(world, student, policy, task, prompts):
    """Sums over steps and samples of (KL to the task's teacher, MAR's term), at `policy`'s states.

    The weight of both is the KL's: w (v - v_other)^2 is the KL of the two steps."""
    generators = [generator("which_curve", task, i) for i in range(SAMPLES)]
    path, rows = world.rollout(policy, prompts, generators, NOISE), world.rows(prompts)
    kl = mar = 0.0
    for i in TRAINED:
        x, t, t_next = path.x[i], world.grid[i], world.grid[i + 1]
        v = world.backbone.predict(student, x, t, rows)
        v_teacher = world.backbone.predict(f"teacher_{task}", x, t, rows)
        mean, mean_teacher = world.step(x, v, i), world.step(x, v_teacher, i)
        kl += kl_of(mean, mean_teacher, path.std[i]).sum().item()
        v_anchor = world.backbone.predict(ANCHOR, x, t, rows)
        w = kl_weight(t, t_next, NOISE, world.grid[1])
        mar += w * (v - v_anchor).square().flatten(1).mean(1).sum().item()
    return kl, mar


def measure(world, student):
    found = {"own": 0.0, "teacher": 0.0, "mar": 0.0}
    for task in TASKS:
        prompts = world.prompts[task][:SAMPLES]
        kl, mar = distances(world, student, student, task, prompts)
        found["own"] += kl
        found["mar"] += mar
        found["teacher"] += distances(world, student, f"teacher_{task}", task, prompts)[0]
    count = len(TASKS) * SAMPLES * len(TRAINED)
    return {name: float(f"{total / count:.5g}") for name, total in found.items()}


def main(args):
    file = args.results / "curves.json"
    found = read_json(file) if file.exists() else {}
    new = {run: path for run, path in students(args.out).items() if run not in found}
    names = {run: f"student_{n}" for n, run in enumerate(new)}  # no module's name may hold a dot
    world = World({names[run]: path for run, path in new.items()})
    for run in tqdm(new, desc="students"):
        found[run] = measure(world, names[run])
        save_json(file, dict(sorted(found.items())))


if __name__ == "__main__":
    main(parse_args())
