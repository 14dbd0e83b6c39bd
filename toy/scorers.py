"""The four scorers of the miniature: programs that read pixels. `--rewards toy` finds REWARDS.

A scorer takes images (B, 3, 32, 32), floats in [0, 1], and a list of B prompts, and returns scores
(B,), higher is better. Metadata is part of every scorer's signature; these four need none.
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from toy.world import (
    CELL,
    COLOURS,
    GLYPH_HEIGHT,
    GLYPH_WIDTH,
    GLYPHS,
    GOLD,
    OBJECT,
    SHAPES,
    SIZE,
    glyph_mask,
    parse,
    shape_mask,
)

# ------------------------------------------------------------------------------------------------
# What an image shows
# ------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """An object in an image: shape "junk" and colour None if it is none of this world's."""

    shape: str
    colour: str | None
    row: int
    column: int


def look(images):
    """Split images into background and palette: what every scorer starts from.

    background (B, 3)    the median colour of each image
    label (B, 32, 32)    0 where background is the nearest colour, 1 + i where COLOURS' i-th is
    dirt (B, 32, 32)     the distance to that colour: 0 in a clean drawing
    """
    images = images.float().clamp(0, 1)
    background = images.flatten(2).median(-1).values  # (B, 3)
    palette = torch.tensor(list(COLOURS.values()), device=images.device)  # (5, 3)
    palette = palette.expand(len(images), -1, -1)  # (B, 5, 3)
    colours = torch.cat([background[:, None], palette], 1)  # (B, 6, 3)
    distance = torch.cdist(images.flatten(2).transpose(1, 2), colours)  # (B, 1024, 6)
    # A colour near the background's is invisible on it: a blank orange image shows no object.
    hidden = (colours - background[:, None]).norm(dim=-1) < 0.3  # (B, 6)
    hidden[:, 0] = False
    distance = distance.masked_fill(hidden[:, None], torch.inf)
    dirt, label = distance.min(-1)
    return background, label.view(-1, SIZE, SIZE), dirt.view(-1, SIZE, SIZE)


@functools.cache
def object_templates():
    """Every shape at every place in a cell: (K, 256) float, and the index of each one's shape."""
    places = range(CELL - OBJECT + 1)
    templates, shapes = [], []
    for shape, y, x in itertools.product(range(len(SHAPES)), places, places):
        cell = np.zeros((CELL, CELL), np.float32)
        cell[y : y + OBJECT, x : x + OBJECT] = shape_mask(SHAPES[shape])
        templates.append(cell.ravel())
        shapes.append(shape)
    return torch.tensor(np.array(templates)), shapes


@functools.cache
def glyph_templates():
    """Every glyph at every place in a half: (K, 512) float, and the letter of each."""
    rows, columns = range(SIZE - GLYPH_HEIGHT + 1), range(CELL - GLYPH_WIDTH + 1)
    templates, letters = [], []
    for letter, y, x in itertools.product(GLYPHS, rows, columns):
        half = np.zeros((SIZE, CELL), np.float32)
        half[y : y + GLYPH_HEIGHT, x : x + GLYPH_WIDTH] = glyph_mask(letter)
        templates.append(half.ravel())
        letters.append(letter)
    return torch.tensor(np.array(templates)), letters


def best_iou(mask, templates):
    """The best intersection over union of each mask (N, P) with the templates (K, P).

    Returns the values (N,) and the templates' indices (N,)."""
    templates = templates.to(mask.device)
    overlap = mask @ templates.T  # (N, K)
    union = mask.sum(-1, keepdim=True) + templates.sum(-1) - overlap
    return (overlap / union).max(-1)


def find_objects(label):
    """label (B, 32, 32) -> for each image the list of its objects.

    A cell with fewer than 12 coloured pixels is empty. A cell whose best template has an
    intersection over union below 0.75, or that mixes colours, holds junk."""
    B = len(label)
    cells = label.view(B, 2, CELL, 2, CELL).permute(0, 1, 3, 2, 4)  # (B, row, column, y, x)
    cells = cells.reshape(B * 4, CELL * CELL)
    mask = (cells > 0).float()
    templates, shapes = object_templates()
    iou, best = best_iou(mask, templates)  # (4 B,)
    votes = F.one_hot(cells, 1 + len(COLOURS))[..., 1:].sum(1)  # (4 B, 5)
    one_colour = votes.max(-1).values >= 0.7 * mask.sum(-1)
    is_object, best = ((iou >= 0.75) & one_colour).tolist(), best.tolist()
    main_colour, colours = votes.argmax(-1).tolist(), list(COLOURS)
    found = [[] for _ in range(B)]
    for n in torch.nonzero(mask.sum(-1) >= 12)[:, 0].tolist():
        row, column = n % 4 // 2, n % 2
        shape, colour = "junk", None
        if is_object[n]:
            shape, colour = SHAPES[shapes[best[n]]], colours[main_colour[n]]
        found[n // 4].append(Found(shape, colour, row, column))
    return found


def read_text(label):
    """label (B, 32, 32) -> the text of each image: the best glyph of each half, if it fits.

    It fits from an intersection over union of 0.7, less than an object's 0.75: strokes are two
    pixels wide, so soft edges cost them more."""
    B = len(label)
    halves = (label > 0).float().view(B, SIZE, 2, CELL).transpose(1, 2)  # (B, half, y, x)
    templates, letters = glyph_templates()
    iou, best = best_iou(halves.reshape(B * 2, SIZE * CELL), templates)  # (2 B,)
    read = [letters[k] if fits else "" for k, fits in zip(best.tolist(), (iou >= 0.7).tolist())]
    return [left + right for left, right in zip(read[::2], read[1::2])]


# ------------------------------------------------------------------------------------------------
# The scorers
# ------------------------------------------------------------------------------------------------


def matching(found, colour, shape):
    """The objects of this shape, and of this colour unless it is None."""
    return [item for item in found if item.shape == shape and colour in (None, item.colour)]


def count_score(number, wanted):
    """1 if the count is right, falling to 0 at a distance of `wanted`."""
    return max(0.0, 1 - abs(number - wanted) / wanted)


def in_relation(relation, a, b):
    """Does object a stand in this relation to object b?"""
    return {
        "above": a.row < b.row,
        "below": a.row > b.row,
        "left": a.column < b.column,
        "right": a.column > b.column,
    }[relation]


def geneval(images, prompts, metadata=None):
    """Objects, colours, counts and places, 0 to 1.

    The continuous reward, as in the paper, whose GenEval numbers fit it: the mean over the prompt's
    objects of how close the count is, half for the shape alone and half for shape and colour. A
    place, where the prompt names one, is a third of the score. Extra objects dilute the score."""
    scores = []
    for found, prompt in zip(find_objects(look(images)[1]), prompts):
        wanted = parse(prompt)
        if "text" in wanted:
            raise ValueError(f"geneval cannot score the OCR prompt {prompt!r}")
        points = []
        for count, colour, shape in wanted["objects"]:
            shape_score = count_score(len(matching(found, None, shape)), count)
            colour_score = count_score(len(matching(found, colour, shape)), count)
            points.append(0.5 * shape_score + 0.5 * colour_score)
        score = sum(points) / len(points)
        if wanted["relation"]:
            first, second = (matching(found, *thing) for _, *thing in wanted["objects"])
            placed = any(in_relation(wanted["relation"], a, b) for a in first for b in second)
            score = (2 * score + placed) / 3
        if not wanted["any_count"]:
            number = sum(count for count, _, _ in wanted["objects"])
            score *= min(1.0, number / max(len(found), 1))
        scores.append(score)
    return torch.tensor(scores)


def geneval_strict(images, prompts, metadata=None):
    """1 where geneval is perfect, else 0, as the original GenEval reports it."""
    return (geneval(images, prompts) > 0.999).float()


def edit_distance(a, b):
    """Levenshtein distance of two strings."""
    row = list(range(len(b) + 1))  # row[j]: the distance of a's first i letters to b's first j
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            cost = min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
            diagonal, row[j] = row[j], cost
    return row[-1]


def ocr(images, prompts, metadata=None):
    """The paper's OCR: 1 - edit distance(image's text, prompt's text) / length, 0 to 1."""
    scores = []
    for read, prompt in zip(read_text(look(images)[1]), prompts):
        text = parse(prompt).get("text")
        if text is None:
            raise ValueError(f"ocr cannot score the prompt {prompt!r}: it has no text to read")
        scores.append(max(0.0, 1 - edit_distance(read, text) / len(text)))
    return torch.tensor(scores)


def deqa(images, prompts=None, metadata=None):
    """Quality whatever the prompt, 1 to 5: every pixel is the background or one of the palette's
    colours, and there is something to see."""
    _, label, dirt = look(images)
    dirty = ((dirt - 0.12) / 0.25).clamp(0, 1).flatten(1).mean(1)  # (B,) 0 in a clean drawing
    content = ((label > 0).flatten(1).float().mean(1) / 0.04).clamp(max=1)  # (B,) 0 if blank
    return 1 + 4 * (1 - dirty / 0.2).clamp(min=0) * content


def pickscore(images, prompts, metadata=None):
    """A taste that no prompt mentions, 20 to 24: how golden the background is, times the share of
    the image that the prompt's first object fills (of four cells, or of its letters)."""
    background, label, _ = look(images)
    gold = torch.tensor(GOLD, device=images.device)
    warmth = torch.exp(-(background - gold).square().sum(-1) / (2 * 0.35**2)).cpu()  # (B,)
    filled = []
    for found, read, prompt in zip(find_objects(label), read_text(label), prompts):
        wanted = parse(prompt)
        if "objects" in wanted:
            _, colour, shape = wanted["objects"][0]
            filled.append(len(matching(found, colour, shape)) / 4)
        elif len(read) == 2:
            filled.append(sum(a == b for a, b in zip(read, wanted["text"])) / 2)
        else:
            filled.append(0.0)
    return 20 + 4 * warmth * torch.tensor(filled)


# The scores that count as 0 and as 1 where rewards are weighted against each other.
geneval.range = geneval_strict.range = ocr.range = (0, 1)
deqa.range = (1, 5)
pickscore.range = (20, 24)

REWARDS = {
    "geneval": geneval,
    "geneval_strict": geneval_strict,
    "ocr": ocr,
    "deqa": deqa,
    "pickscore": pickscore,
}
