"""Scores that no teacher was trained on, and prompts of forms that no training prompt has.

    python evaluate.py --rewards experiments.heldout --tasks geneval --out runs/heldout
    python experiments/heldout.py      # results/clean.json: the same scores of clean drawings

REWARDS holds the miniature's own scorers and, for the test images of every task, three measures of
the pixels:

    TASK_edges     how hard edges are: 1 for a step from one pixel to the next, 0.67 for a ramp over
                   two pixels (clean drawings: about 1)
    TASK_noise     mean difference of neighbouring background pixels, in 8-bit levels; lower is
                   better (clean drawings: 0)
    TASK_distance  mean squared z-score of 12 colour and gradient statistics, against those of clean
                   drawings of the same task's prompts; lower is better (clean drawings: 1)

`variety` is the mean distance between samples of one prompt (RMS over pixels and channels, 0 to 1).
A model that always makes the same picture gets 0. `ocr_strict` is 1 where every letter is right.
The other tasks are prompts out of distribution, scored as geneval and ocr score.
"""

import functools
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.strict_rewards import ocr_strict
from support.files import read_prompts, save_json
from toy.scorers import REWARDS as TOY_REWARDS
from toy.scorers import geneval, look, ocr
from toy.world import COLOURS, GLYPHS, RELATIONS, SHAPES, TASKS, render

ROOT = Path(__file__).resolve().parents[1]

# ---- Measures of the pixels


def edges(images):
    """(B, 3, H, W) -> (B,): twice the energy of differences one pixel apart over that of
    differences two apart.

    A hard step counts once at distance one and twice at distance two, whatever its height. A soft
    step has most of its rise at distance two."""
    energy = {}
    for distance in (1, 2):
        energy[distance] = 0
        for axis in (2, 3):
            difference = (images - images.roll(distance, axis))[..., 2:, 2:]
            energy[distance] = energy[distance] + difference.square().flatten(1).sum(1)
    return 2 * energy[1] / energy[2].clamp(min=1e-6)


def noise(images):
    """(B, 3, H, W) -> (B,): mean |difference| of neighbouring background pixels, 0 to 255."""
    background = look(images)[1] == 0  # (B, H, W)
    total = count = 0
    for axis in (1, 2):
        size = background.shape[axis] - 1
        both = (background & background.roll(1, axis)).narrow(axis, 1, size)
        difference = (images - images.roll(1, axis + 1)).narrow(axis + 1, 1, size).abs().mean(1)
        total = total + (difference * both).flatten(1).sum(1)
        count = count + both.flatten(1).sum(1)
    return 255 * total / count.clamp(min=1)


def statistics(images):
    """(B, 12): mean and spread of every colour channel, the background's colour and share, and how
    strong the gradients are along both axes."""
    background, label, _ = look(images)
    flat = images.flatten(2)
    share = (label == 0).flatten(1).float().mean(1, keepdim=True)
    parts = [flat.mean(2), flat.std(2), background, share]
    for axis in (2, 3):
        parts.append((images - images.roll(1, axis)).abs().flatten(1).mean(1, keepdim=True))
    return torch.cat(parts, 1)


def draw(prompts, seed=0):
    """Clean drawings of prompts: (N, 3, 32, 32)."""
    rng = np.random.default_rng(seed)
    drawings = np.stack([render(prompt, rng) for prompt in prompts])
    return torch.from_numpy(drawings).permute(0, 3, 1, 2)


def prompts_of(task):
    prompts, _ = read_prompts(ROOT / "toy" / "prompts" / f"{task}_test.txt")
    return prompts


@functools.cache
def clean_statistics(task):
    """Mean and standard deviation (12,) over 2048 clean drawings of the task's test prompts."""
    prompts = prompts_of(task)
    values = statistics(draw(prompts * (2048 // len(prompts)), seed=1))
    return values.mean(0), values.std(0)


def distance(images, task):
    mean, std = clean_statistics(task)
    return ((statistics(images) - mean) / std).square().mean(1)


def variety(images, prompts, metadata=None):
    """(B,): each image's mean RMS distance from the others of its prompt in the batch."""
    flat = images.flatten(1)
    apart = torch.cdist(flat, flat) / flat.shape[1] ** 0.5  # (B, B)
    distinct = list(dict.fromkeys(prompts))
    index = torch.tensor([distinct.index(prompt) for prompt in prompts])
    same = (index[:, None] == index).float() - torch.eye(len(index))
    return (apart * same).sum(1) / same.sum(1).clamp(min=1)


def scorer_of(measure, **given):
    """A measure of images alone as a scorer of (images, prompts, metadata)."""
    return lambda images, prompts, metadata=None: measure(images, **given)


REWARDS = TOY_REWARDS | {"ocr_strict": ocr_strict}
for task in TASKS:
    REWARDS[f"{task}_edges"] = scorer_of(edges)
    REWARDS[f"{task}_noise"] = scorer_of(noise)
    REWARDS[f"{task}_distance"] = scorer_of(distance, task=task)
REWARDS |= {"variety": variety}
REWARDS |= {"counts": geneval, "places": geneval, "three": geneval, "letters": ocr}


# ---- Prompts


def variety_prompts():
    """The first four test prompts of every task, eight times each."""
    return [prompt for task in TASKS for prompt in prompts_of(task)[:4] for _ in range(8)]


def two_things(rng, things):
    """Two coloured shapes that differ in shape."""
    while True:
        a, b = rng.permutation(things)[:2]
        if a.split()[1] != b.split()[1]:
            return a, b


def plural(count, thing):
    return f"{count} {thing}" if count == "one" else f"{count} {thing}s"


def write_prompts(folder):
    """Write prompt files for evaluate.py: {task: path}.

    variety: test prompts, eight times each. The others are forms that neither the teachers nor the
    base ever saw: one of the first against three of the second, places of several objects, three
    kinds of object, text under a noun that never had text. Seven words at most: the miniature reads
    no more."""
    rng = np.random.default_rng(0)
    things = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    counts = (("two", "one"), ("one", "two"), ("two", "two"))
    nouns = ("photo", "picture", "image", "drawing")
    forms = {"variety": variety_prompts(), "counts": [], "places": [], "three": [], "letters": []}
    for n in range(64):
        a, b = two_things(rng, things)
        first, second = counts[n % 3]
        forms["counts"].append(f"one {a} and three {b}s")
        forms["places"].append(f"{plural(first, a)} {RELATIONS[n % 4]} {plural(second, b)}")
        x, y, z = rng.permutation(SHAPES)
        c, d = rng.permutation(list(COLOURS))[:2]
        forms["three"].append(f"{c} {x} and {d} {y} and {z}")
        letters = rng.permutation(list(GLYPHS))[:2]
        colour = rng.choice(list(COLOURS))
        forms["letters"].append(f"{nouns[n % 4]} reads {letters[0]} {letters[1]} in {colour}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    for task, prompts in forms.items():
        (Path(folder) / f"{task}.txt").write_text("\n".join(prompts) + "\n")
    return {task: f"{folder}/{task}.txt" for task in forms}


def clean_scores():
    """The scores of clean drawings of the test prompts: {"edges", "noise", "distance", "variety"},
    means over the four tasks."""
    scores = {"edges": 0.0, "noise": 0.0, "distance": 0.0}
    for task in TASKS:
        prompts = prompts_of(task)
        images = draw(prompts)
        for name in scores:
            own = REWARDS[f"{task}_{name}"](images, prompts)
            scores[name] += own.mean().item() / len(TASKS)
    prompts = variety_prompts()
    return scores | {"variety": variety(draw(prompts), prompts).mean().item()}


if __name__ == "__main__":
    save_json(ROOT / "experiments" / "results" / "clean.json", clean_scores())
