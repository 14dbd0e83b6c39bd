"""The world of the miniature: its prompts, and how to draw them.

An image has 32 x 32 pixels. It shows up to four objects, one in each cell of a 2 x 2 grid, or two
letters, one in each half. A prompt has at most seven words. All of it is made by rule.
"""

import functools
import itertools
import random

import numpy as np

TASKS = ("geneval", "ocr", "deqa", "pickscore")

SIZE, CELL = 32, 16  # the side of an image, and of one cell of its 2 x 2 grid
OBJECT = 11  # the side of an object; four still leave most of the image to the background
OBJECT_OFFSETS = (1, 4)  # where an object may start in its cell, down and across
GLYPH_HEIGHT, GLYPH_WIDTH = 14, 10
GLYPH_Y, GLYPH_X = (7, 11), (2, 4)  # where a glyph may start in its half

COLOURS = {
    "red": (0.85, 0.10, 0.15),
    "green": (0.10, 0.55, 0.20),
    "blue": (0.15, 0.20, 0.85),
    "orange": (0.95, 0.50, 0.05),
    "purple": (0.55, 0.10, 0.65),
}
GOLD = (1.0, 0.82, 0.45)  # the background that pickscore likes best
SHAPES = ("circle", "square", "triangle")
COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4}
RELATIONS = ("above", "below", "left", "right")  # "red circle left blue square": the circle is left
GLYPHS = {  # bitmaps of 5 x 7, drawn at twice the size
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "J": "00111 00010 00010 00010 00010 10010 01100",
    "K": "10001 10010 10100 11000 10100 10010 10001",
    "L": "10000 10000 10000 10000 10000 10000 11111",
    "O": "01110 10001 10001 10001 10001 10001 01110",
    "T": "11111 00100 00100 00100 00100 00100 00100",
    "X": "10001 10001 01010 00100 01010 10001 10001",
    "Z": "11111 00001 00010 00100 01000 10000 11111",
}


# ------------------------------------------------------------------------------------------------
# Prompts
# ------------------------------------------------------------------------------------------------


def all_prompts():
    """{task: every prompt of the task}, in a fixed order."""
    things = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]  # 15
    open_things = [*SHAPES, *things]  # 18, the first three of any colour
    pairs = itertools.permutations(open_things, 2)
    pairs = [(a, b) for a, b in pairs if a.split()[-1] != b.split()[-1]]  # 216 of different shapes

    geneval = list(open_things)  # a single object, with or without its colour
    for count in ("two", "three", "four"):  # counting
        geneval += [f"{count} {thing}s" for thing in open_things]
    for count_a, count_b in (("two", "one"), ("one", "two"), ("two", "two"), ("three", "one")):
        end_a = "" if count_a == "one" else "s"
        end_b = "" if count_b == "one" else "s"
        geneval += [f"{count_a} {a}{end_a} and {count_b} {b}{end_b}" for a, b in pairs]
    geneval += [f"{a} and {b}" for a, b in pairs]  # two objects, which colour belongs to which
    geneval += [f"{a} {relation} {b}" for a, b in pairs for relation in RELATIONS]  # position

    nouns = ("sign", "label", "poster", "card")
    texts = itertools.product(nouns, GLYPHS, GLYPHS, COLOURS)
    ocr = [f"{noun} reads {a} {b} in {colour}" for noun, a, b, colour in texts]

    deqa = []
    adjectives = "clean sharp clear plain neat crisp tidy pure".split()
    nouns = "photo image frame print shot still".split()
    for adjective, noun, thing in itertools.product(adjectives, nouns, things):
        photo = f"{adjective} {noun} of {thing}"
        deqa.append(photo)
        deqa += [f"{photo} and {shape}" for shape in SHAPES if shape not in thing]

    adjectives = "lovely pretty nice fine cute great sweet rich warm grand dreamy cosy".split()
    nouns = "picture scene view poster painting drawing sketch mural collage fresco".split()
    scenes = itertools.product(adjectives, nouns, open_things)
    pickscore = [f"{adjective} {noun} of {thing}s" for adjective, noun, thing in scenes]
    return {"geneval": geneval, "ocr": ocr, "deqa": deqa, "pickscore": pickscore}


def split_prompts(tests=256, seed=0):
    """{(task, "train" | "test"): prompts}: shuffled with a fixed seed, no prompt in both."""
    splits = {}
    for task, prompts in all_prompts().items():
        random.Random(seed).shuffle(prompts)
        splits[task, "test"], splits[task, "train"] = prompts[:tests], prompts[tests:]
    return splits


@functools.cache
def parse(prompt):
    """What a prompt wants to see.

    Of a text prompt: {"text": "KT", "colour": "red"}. Of any other:
    objects      [(count, colour or None, shape), …]
    relation     one of RELATIONS, or None
    any_count    True if the prompt leaves the number of objects open
    Raises ValueError for a prompt from outside this world.
    """
    words = prompt.split()
    if "reads" in words:
        i = words.index("reads")
        return {"text": "".join(words[i + 1 : i + 3]), "colour": words[-1]}
    objects, relation, any_count = [], None, False
    if "of" in words:  # "lovely picture of green squares"
        any_count = words[-1].endswith("s")
        words = words[words.index("of") + 1 :]
    count, colour = 1, None
    for word in words:
        if word in COUNTS:
            count = COUNTS[word]
        elif word in COLOURS:
            colour = word
        elif word.rstrip("s") in SHAPES:
            objects.append((count, colour, word.rstrip("s")))
            count, colour = 1, None
        elif word in RELATIONS:
            relation = word
        elif word != "and":
            raise ValueError(f"the miniature has no word {word!r}: prompt {prompt!r}")
    if not objects:
        raise ValueError(f"the prompt {prompt!r} names no object of the miniature's world")
    return {"objects": objects, "relation": relation, "any_count": any_count}


# ------------------------------------------------------------------------------------------------
# Images: (32, 32, 3) float32 in [0, 1], from a numpy generator `rng`
# ------------------------------------------------------------------------------------------------


def shape_mask(shape):
    """The pixels of one object: (11, 11) bool."""
    y, x = np.mgrid[0:OBJECT, 0:OBJECT] + 0.5
    middle = OBJECT / 2
    if shape == "circle":
        return (x - middle) ** 2 + (y - middle) ** 2 <= middle**2
    if shape == "triangle":
        return np.abs(x - middle) <= y / 2
    return np.ones((OBJECT, OBJECT), bool)


def glyph_mask(letter):
    """The pixels of one glyph: (14, 10) bool."""
    bitmap = [list(map(int, row)) for row in GLYPHS[letter].split()]
    return np.array(bitmap, bool).repeat(2, 0).repeat(2, 1)


def render(prompt, rng, ideal=False):
    """Draw a prompt. Whatever the prompt leaves open is random; `ideal` settles it as pickscore
    likes it best: a golden background and four objects."""
    wanted = parse(prompt)
    background = [rng.uniform(0.55, 1), rng.uniform(0.55, 1), rng.uniform(0.4, 1)]
    if ideal:
        background = GOLD
    image = np.tile(np.array(background, np.float32), (SIZE, SIZE, 1))
    if "text" in wanted:
        for half, letter in enumerate(wanted["text"]):
            y, x = rng.choice(GLYPH_Y), rng.choice(GLYPH_X) + CELL * half
            glyph = image[y : y + GLYPH_HEIGHT, x : x + GLYPH_WIDTH]
            glyph[glyph_mask(letter)] = COLOURS[wanted["colour"]]
        return image

    objects = [(colour, shape) for n, colour, shape in wanted["objects"] for _ in range(n)]
    if wanted["any_count"]:
        objects = objects[:1] * (4 if ideal else rng.integers(1, 5))
    places = sorted(rng.permutation(4)[: len(objects)])  # in reading order, as in the prompt
    cells = [(n // 2, n % 2) for n in places]
    if wanted["relation"]:
        rng.integers(2)  # unused, but the shipped weights were trained on images of three draws
        i, j = rng.integers(2), rng.integers(2)
        cells = {
            "above": [(0, i), (1, j)],
            "below": [(1, i), (0, j)],
            "left": [(i, 0), (j, 1)],
            "right": [(i, 1), (j, 0)],
        }[wanted["relation"]]
    colour_of = {}  # objects of one shape without a colour in the prompt share a random one
    for (colour, shape), (row, column) in zip(objects, cells):
        if colour is None:
            colour = colour_of.setdefault(shape, rng.choice(list(COLOURS)))
        y, x = CELL * row + rng.choice(OBJECT_OFFSETS), CELL * column + rng.choice(OBJECT_OFFSETS)
        image[y : y + OBJECT, x : x + OBJECT][shape_mask(shape)] = COLOURS[colour]
    return image


def spoil(image, rng):
    """Add one of four flaws that deqa sees: blur, haze, blotches, stripes."""
    flaw = rng.integers(4)
    if flaw == 0:  # a box blur of 3 x 3, twice
        for _ in range(2):
            padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
            shifts = itertools.product(range(3), repeat=2)
            image = sum(padded[i : i + SIZE, j : j + SIZE] for i, j in shifts) / 9
    elif flaw == 1:  # haze: colours fade towards grey
        image = 0.55 * image + 0.45 * 0.65
    elif flaw == 2:  # three dark blotches
        y, x = np.mgrid[0:SIZE, 0:SIZE]
        for _ in range(3):
            centre_y, centre_x = rng.uniform(0, SIZE, 2)
            square_distance = (y - centre_y) ** 2 + (x - centre_x) ** 2
            image = image * (1 - 0.5 * np.exp(-square_distance / 18))[..., None]
    else:  # dark stripes, two pixels wide, one every eight
        image = image.copy()
        offset = rng.integers(8)
        for i in range(2):
            image[(offset + i) % 8 :: 8] *= 0.7
    return image.astype(np.float32)
