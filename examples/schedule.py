"""What the schedule does: noise of a step, weight of its KL, its share of the loss. Two seconds.

    python examples/schedule.py                       # ten steps, as SD3.5's recipes train
    python examples/schedule.py --steps 40 --shift 1

diffusers shifts the times of SD3 twice: `--time_grid double`, as Flow-GRPO and Flow-OPD train.
`single` shifts once. Each point is a step t -> t_next at its t; sde.py has the formulas. The last
step is drawn hollow: train_opd.py does not train it. The last panel: if the student's velocity were
equally wrong at all t, which share of the loss would each step have?
"""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from diffusers import FlowMatchEulerDiscreteScheduler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sde import kl_weight, noise_scale

LOOKS = {  # of a time grid: colour, marker, words
    "double": ("#0072B2", "o", "double: times shifted twice"),
    "single": ("#D55E00", "s", "single: times shifted once"),
}


def time_grids(steps: int, shift: float) -> dict[str, list[float]]:
    """{name: steps + 1 times from 1 to 0}."""
    scheduler, grids = FlowMatchEulerDiscreteScheduler(shift=shift), {}
    even = [1 - i / steps for i in range(steps)]
    for name, how in {"double": {"num_inference_steps": steps}, "single": {"sigmas": even}}.items():
        scheduler.set_timesteps(**how)
        grids[name] = [float(t) for t in scheduler.sigmas]
    return grids


def main(args: argparse.Namespace) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10.5, 3.8), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    for name, grid in time_grids(args.steps, args.shift).items():
        colour, marker, words = LOOKS[name]
        times, a, t_max = grid[:-1], args.noise, grid[1]
        steps = list(zip(grid, grid[1:]))  # (t, t_next)
        sigma = [noise_scale(t, t_next, a, t_max) for t, t_next in steps]
        std = [s * (t - t_next) ** 0.5 for s, (t, t_next) in zip(sigma, steps)]
        weight = [kl_weight(t, t_next, a, t_max) for t, t_next in steps]
        for axis, y in ((left, std), (middle, weight)):
            axis.plot(times, y, color=colour)
            axis.plot(times[:-1], y[:-1], marker, color=colour)
            axis.plot(times[-1], y[-1], marker, color=colour, mfc="white")
        share = [100 * w / sum(weight[:-1]) for w in weight[:-1]]  # the last step is not trained
        places = [step + 0.4 * (name == "single") - 0.2 for step in range(len(share))]
        right.bar(places, share, 0.4, color=colour, label=words)
        print(f"{name}: t {' '.join(f'{t:.3g}' for t in grid)}")
        print(f"{name}: w(t) {' '.join(f'{w:.3g}' for w in weight)}")
        print(f"{name}: share of a trained step, % {' '.join(f'{part:.1f}' for part in share)}")
    left.set(title=f"Noise of a step, a = {args.noise:g}", ylabel="standard deviation")
    middle.set(title="Weight of its KL", ylabel="w(t)", yscale="log")
    right.set(title="Share of the loss at equal error", xlabel="step", ylabel="%")
    right.set_xticks(range(0, args.steps - 1, 1 + args.steps // 11))
    for axis in (left, middle):
        axis.set_xlabel("time t (1 = noise); hollow: not trained")
        axis.invert_xaxis()
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2)
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "schedule.png", dpi=100)
    print(f"picture: {args.out}/schedule.png")


def parse_args() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    flag = parser.add_argument
    flag("--steps", type=int, default=10, help="of the sampler (10)")
    flag("--shift", type=float, default=3.0, help="of the times (3, as SD3.5)")
    flag("--noise", type=float, default=0.7, help="level a of the SDE (0.7)")
    flag("--out", type=Path, default="runs/schedule", help="folder of the picture (runs/schedule)")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
