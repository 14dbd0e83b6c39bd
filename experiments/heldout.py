"""Scores that no teacher was trained on, and prompts of forms that no training prompt had.

    python evaluate.py --models base --rewards experiments.heldout --tasks geneval --out runs/heldout
    python experiments/heldout.py          # results/clean.json: the same scores of clean drawings

`REWARDS` is the miniature's own plus, on the test images of every task, three measures of the pixels:

    TASK_edges     how hard edges are: 1 for a step from one pixel to the next, 0.67 for a ramp over two   (clean: about 1)
    TASK_noise     mean difference of neighbouring background pixels, in 8-bit levels; lower is better         (clean: 0)
    TASK_distance  mean squared z-score of 12 colour and gradient statistics, against those of clean drawings of the same
                   task's prompts; lower is better                                                             (clean: 1)

`variety` is the mean distance between samples of one prompt (RMS over pixels and channels, 0 to 1): a model that paints the
same picture every time gets 0. The other tasks are prompts out of distribution, scored as geneval and ocr score.
"""

import functools
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import toy
from support.files import read_prompts, save_json


def edges(images):
    """(B, 3, H, W) -> (B,). Twice the energy of differences one pixel apart over that of differences two apart: a hard step
    shows once at distance one and twice at distance two, whatever its height; a soft one has most of its rise at two."""
    one = sum((images - images.roll(1, d))[..., 2:, 2:].square().flatten(1).sum(1) for d in (2, 3))
    two = sum((images - images.roll(2, d))[..., 2:, 2:].square().flatten(1).sum(1) for d in (2, 3))
    return 2 * one / two.clamp(min=1e-6)


def noise(images):
    """(B, 3, H, W) -> (B,): mean |difference| of neighbouring pixels that both show the background, 0 to 255."""
    ground = toy.look(images)[1] == 0  # (B, H, W)
    total = count = 0
    for d in (1, 2):
        both = (ground & ground.roll(1, d)).narrow(d, 1, ground.shape[d] - 1)  # (B, H - 1, W) or (B, H, W - 1)
        step = (images - images.roll(1, d + 1)).narrow(d + 1, 1, images.shape[d + 1] - 1).abs().mean(1)
        total, count = total + (step * both).flatten(1).sum(1), count + both.flatten(1).sum(1)
    return 255 * total / count.clamp(min=1)


def statistics(images):
    """(B, 12): mean and spread of every colour channel, the background's colour, its share, and how strong gradients are."""
    background, label, _ = toy.look(images)
    flat = images.flatten(2)
    steps = [(images - images.roll(1, d)).abs().flatten(1).mean(1, keepdim=True) for d in (2, 3)]
    return torch.cat([flat.mean(2), flat.std(2), background, (label == 0).flatten(1).float().mean(1, keepdim=True), *steps], 1)


def draw(prompts, seed=0):
    """Clean drawings of prompts: (N, 3, 32, 32)."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([toy.render(p, rng) for p in prompts])).permute(0, 3, 1, 2)


@functools.cache
def clean_statistics(task):
    """Mean and standard deviation (12,) over 2048 clean drawings of the task's test prompts."""
    prompts, _ = read_prompts(f"toy/prompts/{task}_test.txt")
    values = statistics(draw(prompts * (2048 // len(prompts)), seed=1))
    return values.mean(0), values.std(0)


def distance(images, task):
    mean, std = clean_statistics(task)
    return ((statistics(images) - mean) / std).square().mean(1)


def variety(images, prompts, metadata=None):
    """(B,): each image's mean RMS distance from the others of its prompt in the batch."""
    flat = images.flatten(1)
    apart = torch.cdist(flat, flat) / flat.shape[1] ** 0.5  # (B, B)
    names = list(dict.fromkeys(prompts))
    index = torch.tensor([names.index(p) for p in prompts])
    same = (index[:, None] == index).float() - torch.eye(len(index))
    return (apart * same).sum(1) / same.sum(1).clamp(min=1)


REWARDS = dict(toy.REWARDS)
for task in toy.TASKS:
    REWARDS[f"{task}_edges"] = lambda images, prompts, metadata=None: edges(images)
    REWARDS[f"{task}_noise"] = lambda images, prompts, metadata=None: noise(images)
    REWARDS[f"{task}_distance"] = lambda images, prompts, metadata=None, task=task: distance(images, task)
REWARDS |= {"variety": variety, "counts": toy.geneval, "places": toy.geneval, "three": toy.geneval, "letters": toy.ocr}


def variety_prompts():
    """The first four test prompts of every task, eight times each."""
    return [p for task in toy.TASKS for p in read_prompts(f"toy/prompts/{task}_test.txt")[0][:4] for _ in range(8)]


def write_prompts(folder):
    """Prompt files for evaluate.py: {task: path}. Test prompts eight times over for variety; four forms that neither the
    teachers nor the base ever saw: one of the first against three of the second, places of several objects, three kinds of
    object, text under a noun that was never text's. Seven words at most: the miniature reads no more."""
    rng, things = np.random.default_rng(0), [f"{c} {s}" for c in toy.COLOURS for s in toy.SHAPES]

    def two():
        a, b = rng.permutation(things)[:2]
        return (a, b) if a.split()[1] != b.split()[1] else two()

    forms = {"variety": variety_prompts(), "counts": [], "places": [], "three": [], "letters": []}
    for n in range(64):
        (a, b), (first, second) = two(), (("two", "one"), ("one", "two"), ("two", "two"))[n % 3]
        plural = lambda count, thing: f"{count} {thing}{'s' if count != 'one' else ''}"
        relation = toy.RELATIONS[n % 4]
        forms["counts"].append(f"one {a} and three {b}s")
        forms["places"].append(f"{plural(first, a)} {relation} {plural(second, b)}")
        x, y, z = rng.permutation(toy.SHAPES)
        c, d = rng.permutation(list(toy.COLOURS))[:2]
        forms["three"].append(f"{c} {x} and {d} {y} and {z}")
        letters = rng.permutation(list(toy.GLYPHS))[:2]
        noun = ("photo", "picture", "image", "drawing")[n % 4]
        forms["letters"].append(f"{noun} reads {letters[0]} {letters[1]} in {rng.choice(list(toy.COLOURS))}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    for task, prompts in forms.items():
        (Path(folder) / f"{task}.txt").write_text("\n".join(prompts) + "\n")
    return {task: f"{folder}/{task}.txt" for task in forms}


def clean_scores():
    """What clean drawings of the test prompts get: {"edges", "noise", "distance", "variety"}, means over the four tasks."""
    out = {"edges": 0.0, "noise": 0.0, "distance": 0.0}
    for task in toy.TASKS:
        prompts, _ = read_prompts(f"toy/prompts/{task}_test.txt")
        images = draw(prompts)
        for name in out:
            out[name] += REWARDS[f"{task}_{name}"](images, prompts).mean().item() / len(toy.TASKS)
    prompts = variety_prompts()
    return out | {"variety": variety(draw(prompts), prompts).mean().item()}


if __name__ == "__main__":
    save_json("experiments/results/clean.json", clean_scores())
