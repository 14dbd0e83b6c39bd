"""The embedded default: a miniature of Stable Diffusion 3.5, four tasks, four scorers.

    python toy.py                 # rebuild everything in toy/ from nothing (resumable; base 44, adapters 43 minutes on 2 cores)
    python toy.py --stage base    # the base pipeline alone (tokenizers, text encoders, VAE, transformer)

What it makes is committed, so nobody has to run it. `toy/` is a directory that stock diffusers loads:

    pipe = StableDiffusion3Pipeline.from_pretrained("toy")
    pipe("two red circles and one blue square", max_sequence_length=8, guidance_scale=1.0, height=32, width=32)

Four tasks stand in for the paper's four metrics. Each has prompts made by rule (disjoint train and test
files in toy/prompts/) and a scorer that is a program, `(images, prompts, metadata) -> scores (B,)`:

    geneval    "red circle above blue square"          0 to 1    right objects, colours, counts, places
    ocr        "sign reads K T in red"                 0 to 1    1 - edit distance / length, glyphs read by template
    deqa       "clean photo of red circle and square"  1 to 5    crisp and clean pixels, whatever they show
    pickscore  "lovely picture of green squares"       20 to 24  a taste the prompt does not mention: golden
                                                                 backgrounds, and as many of the subject as fit

The tasks pull against each other on purpose, as the paper's do: pickscore wants four objects on gold where
geneval counts. `FLAWED` of the base's images are spoilt, and late in its training `WRONG` of the captions of every
second batch are wrong, so that reinforcement learning has something to mend.
"""

import functools
import itertools
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.flags import make_parser, positive


def parse_args():
    parser = make_parser(__doc__)
    flag = parser.add_argument
    flag("--stage", choices=("all", "base", "adapters"), default="all", help="the base pipeline, its adapters, or both")
    flag("--out", type=Path, default=Path("toy"), help="what is built")
    flag("--work", type=Path, default=Path("runs/toy"), help="half-done parts, so that it can be interrupted")
    flag("--steps", type=positive, default=7200, help="training steps of the transformer, 128 images each")
    flag("--vae_steps", type=positive, default=1500, help="training steps of the VAE, 64 images each")
    flag("--images", type=positive, default=60_000, help="training images")
    return parser.parse_args()


if __name__ == "__main__":
    ARGS = parse_args()  # before torch is imported: --help and a mistyped flag answer at once

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------
# The world: what an image can show, and how a prompt says it
# ----------------------------------------------------------------------------------------------------------

SIZE, CELL = 32, 16  # an image is 32x32 pixels: a 2x2 grid of cells, at most one object in each
COLOURS = {
    "red": (0.85, 0.10, 0.15),
    "green": (0.10, 0.55, 0.20),
    "blue": (0.15, 0.20, 0.85),
    "orange": (0.95, 0.50, 0.05),
    "purple": (0.55, 0.10, 0.65),
}
SHAPES = ("circle", "square", "triangle")
COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4}
RELATIONS = ("above", "below", "left", "right")  # "red circle left blue square": the circle is on the left
GOLD = (1.0, 0.82, 0.45)  # the background that the pickscore of this world likes best
WRONG, FLAWED = 0.4, 0.25  # shares of the base's data; wrong captions come late, see train_transformer

GLYPHS = {  # 5x7 bitmaps, drawn at twice the size
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


def shape_mask(shape, size):
    """(size, size) bool: the pixels of one object."""
    y, x = np.mgrid[0:size, 0:size] + 0.5
    if shape == "circle":
        return (x - size / 2) ** 2 + (y - size / 2) ** 2 <= (size / 2) ** 2
    if shape == "triangle":
        return np.abs(x - size / 2) <= y / 2
    return np.ones((size, size), bool)


def glyph_mask(letter):
    """(14, 10) bool: the pixels of one glyph."""
    rows = np.array([[int(bit) for bit in row] for row in GLYPHS[letter].split()], bool)
    return rows.repeat(2, 0).repeat(2, 1)


OBJECT = 11  # an object's width in pixels; four still leave most of the image to the background
OFFSETS = (1, 4)  # where it may start in its cell, in both directions


@functools.cache
def object_templates():
    """Every shape at every place inside a cell: (K, 256) float, and the shape index of each (K,)."""
    templates, kinds = [], []
    for kind, shape in enumerate(SHAPES):
        for y, x in itertools.product(range(CELL - OBJECT + 1), repeat=2):
            cell = np.zeros((CELL, CELL), np.float32)
            cell[y : y + OBJECT, x : x + OBJECT] = shape_mask(shape, OBJECT)
            templates.append(cell.ravel())
            kinds.append(kind)
    return torch.tensor(np.array(templates)), torch.tensor(kinds)


GLYPH_Y, GLYPH_X = (7, 11), (2, 4)  # where a glyph's top left corner may be in its half


@functools.cache
def glyph_templates():
    """Every glyph at every place inside a half: (K, 512) float, and the letter index of each (K,)."""
    templates, kinds = [], []
    for kind, letter in enumerate(GLYPHS):
        for y, x in itertools.product(range(SIZE - 14 + 1), range(CELL - 10 + 1)):
            half = np.zeros((SIZE, CELL), np.float32)
            half[y : y + 14, x : x + 10] = glyph_mask(letter)
            templates.append(half.ravel())
            kinds.append(kind)
    return torch.tensor(np.array(templates)), torch.tensor(kinds)


@functools.cache
def parse(prompt):
    """What a prompt asks for: {"text": "KT", "colour"} or {"objects": [(count, colour, shape), …], "relation",
    "free": True where the number of objects is left open}. Raises ValueError on a prompt from outside this world."""
    words = prompt.split()
    if "reads" in words:
        i = words.index("reads")
        return {"text": "".join(words[i + 1 : i + 3]), "colour": words[-1]}
    spec = {"objects": [], "relation": None, "free": "of" in words and words[-1].endswith("s")}
    count, colour = 1, None
    for word in words[words.index("of") + 1 :] if "of" in words else words:
        if word in COUNTS:
            count = COUNTS[word]
        elif word in COLOURS:
            colour = word
        elif word.rstrip("s") in SHAPES:
            spec["objects"].append((count, colour, word.rstrip("s")))
            count, colour = 1, None
        elif word in RELATIONS:
            spec["relation"] = word
        elif word != "and":
            raise ValueError(f"the miniature does not know the word {word!r} in the prompt {prompt!r}")
    if not spec["objects"]:
        raise ValueError(f"the prompt {prompt!r} names no object of the miniature's world")
    return spec


def all_prompts():
    """{task: every prompt of that task}, made by rule, in a fixed order."""
    things = [f"{c} {s}" for c in COLOURS for s in SHAPES]  # 15 coloured objects
    open_things = [*SHAPES, *things]  # 18, the first three of any colour
    pairs = [(a, b) for a, b in itertools.permutations(open_things, 2) if a.split()[-1] != b.split()[-1]]  # 216
    geneval = list(open_things)  # single object, colours
    geneval += [f"{n} {thing}s" for n in ("two", "three", "four") for thing in open_things]  # counting
    for some, others in (("two", "one"), ("one", "two"), ("two", "two"), ("three", "one")):
        ends = ["" if n == "one" else "s" for n in (some, others)]
        geneval += [f"{some} {a}{ends[0]} and {others} {b}{ends[1]}" for a, b in pairs]
    geneval += [f"{a} and {b}" for a, b in pairs]  # two objects, attribute binding
    geneval += [f"{a} {r} {b}" for a, b in pairs for r in RELATIONS]  # position
    ocr = [
        f"{noun} reads {a} {b} in {c}"
        for noun in ("sign", "label", "poster", "card")
        for a, b in itertools.product(GLYPHS, repeat=2)
        for c in COLOURS
    ]
    deqa = [
        f"{adjective} {noun} of {thing}{other}"
        for adjective in "clean sharp clear plain neat crisp tidy pure".split()
        for noun in "photo image frame print shot still".split()
        for thing in things
        for other in ["", *(f" and {s}" for s in SHAPES if s not in thing)]
    ]
    pickscore = [
        f"{adjective} {noun} of {colour}{shape}s"
        for adjective in "lovely pretty nice fine cute great sweet rich warm grand dreamy cosy".split()
        for noun in "picture scene view poster painting drawing sketch mural collage fresco".split()
        for colour in ["", *(c + " " for c in COLOURS)]
        for shape in SHAPES
    ]
    return {"geneval": geneval, "ocr": ocr, "deqa": deqa, "pickscore": pickscore}


TASKS = ("geneval", "ocr", "deqa", "pickscore")


def kind(prompt):
    """Which of GenEval's sub-tasks a prompt is of; the base's data holds each equally often."""
    if "reads" in prompt or " of " in prompt:
        return "other"
    spec = parse(prompt)
    counts = [count for count, _, _ in spec["objects"]]
    return (len(counts), max(counts) > 1, spec["relation"] is not None)


def split_prompts(tests=256, seed=0):
    """{(task, "train" | "test"): prompts}: disjoint, shuffled with a fixed seed, 256 tests a task."""
    out = {}
    for task, prompts in all_prompts().items():
        prompts = list(prompts)
        random.Random(seed).shuffle(prompts)
        out[task, "test"], out[task, "train"] = prompts[:tests], prompts[tests:]
    return out


def render(prompt, rng, ideal=False):
    """Draw a prompt: (32, 32, 3) float32 in [0, 1]. What the prompt leaves open is drawn at random;
    `ideal` settles it the way the scorers like it best."""
    spec = parse(prompt)
    background = np.array([rng.uniform(0.55, 1), rng.uniform(0.55, 1), rng.uniform(0.4, 1)], np.float32)
    if ideal:
        background = np.array(GOLD, np.float32)
    image = np.tile(background, (SIZE, SIZE, 1))
    if "text" in spec:
        for half, letter in enumerate(spec["text"]):
            y, x = rng.choice(GLYPH_Y), rng.choice(GLYPH_X) + CELL * half
            image[y : y + 14, x : x + 10][glyph_mask(letter)] = COLOURS[spec["colour"]]
        return image
    objects = [(colour, shape) for count, colour, shape in spec["objects"] for _ in range(count)]
    if spec["free"]:
        objects = objects[:1] * (4 if ideal else rng.integers(1, 5))
    cells = [(n // 2, n % 2) for n in sorted(rng.permutation(4)[: len(objects)])]  # in reading order, as they are named
    if spec["relation"]:
        _, i, j = rng.integers(2), rng.integers(2), rng.integers(2)
        first, second = {"above": ((0, i), (1, j)), "below": ((1, i), (0, j)),
                         "left": ((i, 0), (j, 1)), "right": ((i, 1), (j, 0))}[spec["relation"]]  # fmt: skip
        cells = [first, second]
    chosen = {}  # objects that share a clause and name no colour get one colour
    for (colour, shape), (row, column) in zip(objects, cells):
        colour = colour or chosen.setdefault(shape, rng.choice(list(COLOURS)))
        y, x = CELL * row + rng.choice(OFFSETS), CELL * column + rng.choice(OFFSETS)
        image[y : y + OBJECT, x : x + OBJECT][shape_mask(shape, OBJECT)] = COLOURS[colour]
    return image


def spoil(image, rng):
    """One of four flaws that deqa sees: blur, haze, blotches, stripes."""
    flaw = rng.integers(4)
    if flaw == 0:  # 3x3 box blur, twice
        for _ in range(2):
            padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
            image = sum(padded[i : i + SIZE, j : j + SIZE] for i in range(3) for j in range(3)) / 9
    elif flaw == 1:  # haze: colours washed out towards grey
        image = 0.55 * image + 0.45 * 0.65
    elif flaw == 2:  # three dark blotches
        y, x = np.mgrid[0:SIZE, 0:SIZE]
        for _ in range(3):
            cy, cx = rng.uniform(0, SIZE, 2)
            image = image * (1 - 0.5 * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 18))[..., None]
    else:  # dark stripes, two pixels wide, eight apart
        image = image.copy()
        offset = rng.integers(8)
        for i in range(2):
            image[(offset + i) % 8 :: 8] *= 0.7
    return image.astype(np.float32)


# ----------------------------------------------------------------------------------------------------------
# The scorers. images (B, 3, 32, 32) float in [0, 1], prompts list of B, metadata unused -> (B,) float
# ----------------------------------------------------------------------------------------------------------


def look(images):
    """What every scorer starts from.

    background (B, 3): the median colour of each image. label (B, 32, 32): 0 for background, 1 + i for the
    i-th colour of COLOURS, whichever is nearest. dirt (B, 32, 32): the distance to that colour, so 0 on a
    clean drawing."""
    images = images.float().clamp(0, 1)
    background = images.flatten(2).median(-1).values  # (B, 3)
    palette = torch.tensor(list(COLOURS.values()), device=images.device).expand(len(images), -1, -1)  # (B, 5, 3)
    known = torch.cat([background[:, None], palette], 1)  # (B, 6, 3)
    distance = torch.cdist(images.flatten(2).transpose(1, 2), known)  # (B, 1024, 6)
    # A colour that hardly differs from the background cannot be seen on it: an all but blank orange image has no content.
    hidden = (known - background[:, None]).norm(dim=-1) < 0.3  # (B, 6)
    hidden[:, 0] = False
    distance = distance.masked_fill(hidden[:, None], torch.inf)
    dirt, label = distance.min(-1)
    return background, label.view(-1, SIZE, SIZE), dirt.view(-1, SIZE, SIZE)


def best_iou(mask, templates):
    """The best intersection over union of each mask (N, P) with the templates (K, P): values and indices (N,)."""
    templates = templates.to(mask.device)
    overlap = mask @ templates.T  # (N, K)
    union = mask.sum(-1, keepdim=True) + templates.sum(-1) - overlap
    return (overlap / union).max(-1)


def find_objects(label):
    """label (B, 32, 32) -> for each image the list of its objects (shape, colour, row, column).

    A cell with fewer than 12 coloured pixels is empty; one whose best template covers less than 0.75 of it
    (intersection over union) holds something that is no object of this world: ("junk", None, row, column)."""
    B = len(label)
    cells = label.view(B, 2, CELL, 2, CELL).permute(0, 1, 3, 2, 4).reshape(B * 4, CELL * CELL)  # rows of cells
    mask = (cells > 0).float()
    templates, kinds = object_templates()
    iou, index = best_iou(mask, templates)
    votes = F.one_hot(cells, 1 + len(COLOURS))[..., 1:].sum(1)  # (4B, 5)
    sure = votes.max(-1).values >= 0.7 * mask.sum(-1)  # one colour fills the object
    colours, shapes = list(COLOURS), kinds.to(index.device)[index]
    out = [[] for _ in range(B)]
    for n in torch.nonzero(mask.sum(-1) >= 12)[:, 0].tolist():
        image, row, column = n // 4, n % 4 // 2, n % 2
        real = iou[n] >= 0.75 and sure[n]
        out[image].append((SHAPES[shapes[n]], colours[votes[n].argmax()], row, column) if real else ("junk", None, row, column))
    return out


def read_text(label):
    """label (B, 32, 32) -> the text of each image: a letter per half whose best glyph reaches an IoU of 0.7.

    That is less than an object's 0.75: strokes are two pixels wide, so soft edges cost them more."""
    B = len(label)
    halves = (label > 0).float().view(B, SIZE, 2, CELL).transpose(1, 2).reshape(B * 2, SIZE * CELL)
    templates, kinds = glyph_templates()
    iou, index = best_iou(halves, templates)
    letters = [list(GLYPHS)[kind] for kind in kinds.to(index.device)[index]]
    letters = [letter if good else "" for letter, good in zip(letters, (iou >= 0.7).tolist())]
    return [letters[2 * b] + letters[2 * b + 1] for b in range(B)]


def edit_distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def geneval(images, prompts, metadata=None):
    """Objects, colours, counts and places, 0 to 1 (higher is better). Continuous, as the reward that the
    published GenEval numbers fit: the mean over clauses of how near the count is, half of it for the shape
    alone and half for shape and colour; where a place is asked it is a third of the score; objects nobody asked for
    dilute it."""
    scores = []
    for found, prompt in zip(find_objects(look(images)[1]), prompts):
        spec = parse(prompt)
        if "text" in spec:
            raise ValueError(f"geneval cannot score the OCR prompt {prompt!r}")
        points = []
        for count, colour, shape in spec["objects"]:
            near = lambda n: max(0.0, 1 - abs(n - count) / count)
            shaped = [f for f in found if f[0] == shape]
            coloured = [f for f in shaped if colour in (None, f[1])]
            points.append(0.5 * near(len(shaped)) + 0.5 * near(len(coloured)))
        score = sum(points) / len(points)
        if spec["relation"]:
            first, second = ([f for f in found if f[0] == s and c in (None, f[1])] for _, c, s in spec["objects"])
            axis, sign = {"above": (2, 1), "below": (2, -1), "left": (3, 1), "right": (3, -1)}[spec["relation"]]
            placed = any(sign * (b[axis] - a[axis]) > 0 for a in first for b in second)
            score = (2 * score + placed) / 3
        asked = sum(count for count, _, _ in spec["objects"])
        if not spec["free"]:
            score *= min(1.0, asked / max(len(found), 1))
        scores.append(score)
    return torch.tensor(scores)


def geneval_strict(images, prompts, metadata=None):
    """1 where geneval is perfect, else 0: what the original GenEval reports (higher is better)."""
    return (geneval(images, prompts) > 0.999).float()


def ocr(images, prompts, metadata=None):
    """The paper's OCR: 1 - edit distance(read, asked) / length, 0 to 1 (higher is better)."""
    scores = []
    for read, prompt in zip(read_text(look(images)[1]), prompts):
        target = parse(prompt).get("text")
        if target is None:
            raise ValueError(f"ocr cannot score the prompt {prompt!r}: it asks for no text")
        scores.append(max(0.0, 1 - edit_distance(read, target) / len(target)))
    return torch.tensor(scores)


def deqa(images, prompts=None, metadata=None):
    """Quality whatever the prompt, 1 to 5 (higher is better): every pixel should be the background or one of
    the palette's colours, and something should be there to see."""
    _, label, dirt = look(images)
    dirty = ((dirt - 0.12) / 0.25).clamp(0, 1).flatten(1).mean(1)  # (B,) 0 on a clean drawing
    content = ((label > 0).flatten(1).float().mean(1) / 0.04).clamp(max=1)  # a blank image has no quality
    return 1 + 4 * (1 - dirty / 0.2).clamp(min=0) * content


def pickscore(images, prompts, metadata=None):
    """A taste that no prompt mentions, 20 to 24 (higher is better): warmth of the background (nearness to GOLD)
    times how much of the picture the prompt's first subject fills (of 4 cells, or of its letters)."""
    background, label, _ = look(images)
    gold = torch.tensor(GOLD, device=images.device)
    warmth = torch.exp(-(background - gold).square().sum(-1) / (2 * 0.35**2)).cpu()  # (B,)
    shown = []
    for found, read, prompt in zip(find_objects(label), read_text(label), prompts):
        spec = parse(prompt)
        if "text" in spec:
            shown.append(sum(a == b for a, b in zip(read, spec["text"])) / 2 if len(read) == 2 else 0.0)
        else:
            _, colour, shape = spec["objects"][0]
            shown.append(sum(f[0] == shape and colour in (None, f[1]) for f in found) / 4)
    return 20 + 4 * warmth * torch.tensor(shown)


geneval.range, geneval_strict.range, ocr.range, deqa.range, pickscore.range = (0, 1), (0, 1), (0, 1), (1, 5), (20, 24)
REWARDS = {"geneval": geneval, "geneval_strict": geneval_strict, "ocr": ocr, "deqa": deqa, "pickscore": pickscore}

# ----------------------------------------------------------------------------------------------------------
# The pipeline: the same classes as Stable Diffusion 3.5 Medium, 1/1000 of the size
# ----------------------------------------------------------------------------------------------------------

TEXT_LENGTH = 9  # CLIP tokens: start, seven words, end. The T5 sees seven words and its end token.


def make_tokenizers(words):
    """A CLIP tokenizer whose byte-pair merges build every word of the vocabulary, and a word-level T5 tokenizer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast

    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for letter in "abcdefghijklmnopqrstuvwxyz":
        vocab[letter], vocab[letter + "</w>"] = len(vocab), len(vocab) + 1
    merges = []
    for word in words:  # apply the merges so far, then add those that make one token of what is left
        pieces = [*word[:-1], word[-1] + "</w>"]
        while True:
            ranks = [merges.index(pair) if pair in merges else len(merges) for pair in zip(pieces, pieces[1:])]
            if not ranks:
                break
            i = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[i] == len(merges):
                merges.append((pieces[i], pieces[i + 1]))
                vocab.setdefault(pieces[i] + pieces[i + 1], len(vocab))
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    clip = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH)

    t5 = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *words])}, unk_token="<unk>"))
    t5.normalizer, t5.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    t5.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    t5 = PreTrainedTokenizerFast(
        tokenizer_object=t5, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TEXT_LENGTH - 1
    )
    return clip, t5


def make_pipeline(patch_size=2, width=128, layers=4):
    """An untrained pipeline. The text encoders stay as they are drawn here: with one token a word, random
    embeddings tell the words apart, and the transformer learns what they mean."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    torch.manual_seed(0)
    words = sorted({word.lower() for prompts in all_prompts().values() for p in prompts for word in p.split()})
    clip_tokenizer, t5_tokenizer = make_tokenizers(words)
    encoders = []
    for _ in range(2):
        config = CLIPTextConfig(
            vocab_size=len(clip_tokenizer), hidden_size=64, intermediate_size=128, projection_dim=64,
            num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=TEXT_LENGTH,
            bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )  # fmt: skip
        encoder = CLIPTextModelWithProjection(config)
        with torch.no_grad():  # embeddings of unit size instead of 0.02, so that words and places stand apart
            for name, parameter in encoder.named_parameters():
                if "embedding" in name:
                    parameter.normal_(0, 0.7)
                elif parameter.ndim == 2:
                    parameter.normal_(0, parameter.shape[1] ** -0.5)
        encoders.append(encoder.eval())
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer), d_model=128, d_kv=32, d_ff=256, num_layers=1, num_heads=2,
            pad_token_id=0, eos_token_id=1, feed_forward_proj="gated-gelu",
        )
    ).eval()  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8, latent_channels=8, sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=patch_size, in_channels=8, out_channels=8, num_layers=layers,
        attention_head_dim=32, num_attention_heads=width // 32, caption_projection_dim=width,
        joint_attention_dim=128, pooled_projection_dim=128, pos_embed_max_size=8 // patch_size,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae,
        text_encoder=encoders[0], tokenizer=clip_tokenizer, text_encoder_2=encoders[1], tokenizer_2=clip_tokenizer,
        text_encoder_3=t5, tokenizer_3=t5_tokenizer,
    )  # fmt: skip


def make_data(number, seed=0):
    """`number` training images (N, 3, 32, 32) uint8, some spoilt, their captions, and the captions with some wrong."""
    rng, prompts, pools = np.random.default_rng(seed), split_prompts(), {}
    for task in TASKS:  # {task: prompts by kind}
        for prompt in prompts[task, "train"]:
            pools.setdefault(task, {}).setdefault(kind(prompt), []).append(prompt)
    images, captions, noisy = np.empty((number, SIZE, SIZE, 3), np.uint8), [], []

    def some(task):
        kinds = list(pools[task].values())
        pool = kinds[rng.integers(len(kinds))]
        return pool[rng.integers(len(pool))]

    for i in tqdm(range(number), desc="drawing", unit="image"):
        task = ("geneval", "geneval", "ocr", "deqa", "pickscore")[i % 5]  # the hardest to learn twice
        caption = some(task)
        image = render(caption, rng)
        if rng.random() < FLAWED:
            image = spoil(image, rng)
        images[i] = (image * 255).round()
        captions.append(caption)
        noisy.append(some(task) if rng.random() < WRONG else caption)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), captions, noisy


def learning_rate(step, steps, peak):
    """Linear warm-up over 100 steps, then a cosine down to 2 %."""
    return peak * min((step + 1) / 100, 0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * step / steps)))


def train_vae(vae, images, steps, batch=64):
    """Reconstruction (L1 + L2) with a small KL; then the two numbers that make latents zero-mean, unit-variance."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1.0, weight_decay=0)
    generator = torch.Generator().manual_seed(1)
    bar = tqdm(range(steps), desc="VAE", unit="step")
    for step in bar:
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, 2e-3)
        x = images[torch.randint(len(images), (batch,), generator=generator)].float() / 127.5 - 1  # (b, 3, 32, 32)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample(generator=generator)).sample
        loss = F.l1_loss(y, x) + F.mse_loss(y, x) + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(mse=f"{F.mse_loss(y, x).item():.5f}", refresh=False)
    with torch.no_grad():
        z = vae.encode(images[:2000].float() / 127.5 - 1).latent_dist.mean
    vae.register_to_config(shift_factor=z.mean().item(), scaling_factor=1 / z.std().item())


@torch.no_grad()
def encode_images(vae, images):
    """uint8 images -> the latents (N, 8, 8, 8) that the transformer sees, as SD3 scales them."""
    latents = [vae.encode(chunk.float() / 127.5 - 1).latent_dist.mean for chunk in tqdm(images.split(500), desc="encoding")]
    return (torch.cat(latents) - vae.config.shift_factor) * vae.config.scaling_factor


def train_transformer(pipe, latents, captions, noisy, state_path, steps, batch=128, peak=1e-3):
    """Flow matching with one caption in ten left empty; the average of the weights (EMA .999) is what is kept.

    In the last third of the steps every second batch has the noisy captions: the model knows how to follow a prompt
    and has learnt not to trust it. That is what reinforcement learning can mend in minutes."""
    from safetensors.torch import load_file, save_file

    transformer, optimizer_state = pipe.transformer, {}
    distinct = sorted(set(captions + noisy)) + [""]
    index = {caption: i for i, caption in enumerate(distinct)}
    with torch.no_grad():
        chunks = [pipe.encode_prompt(distinct[i : i + 500], None, None, do_classifier_free_guidance=False,
                                     max_sequence_length=TEXT_LENGTH - 1) for i in range(0, len(distinct), 500)]  # fmt: skip
    embeds, pooled = torch.cat([c[0] for c in chunks]), torch.cat([c[2] for c in chunks])  # (P, 17, 128), (P, 128)
    caption, wrong = (torch.tensor([index[c] for c in some]) for some in (captions, noisy))  # (N,)

    parameters = dict(transformer.named_parameters())
    ema = {k: p.detach().clone() for k, p in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    start = 0
    if state_path.exists():  # resume: weights, average and both moments of Adam lie side by side in one file
        saved = load_file(state_path)
        start = int(saved.pop("step"))
        for k, p in parameters.items():
            p.data.copy_(saved[f"model.{k}"])
            ema[k].copy_(saved[f"ema.{k}"])
            optimizer_state[p] = {
                "step": torch.tensor(float(start)),
                "exp_avg": saved[f"m.{k}"],
                "exp_avg_sq": saved[f"v.{k}"],
            }
        optimizer.state.update(optimizer_state)
    bar = tqdm(range(start, steps), desc="transformer", unit="step", initial=start, total=steps)
    for step in bar:
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak)
        generator = torch.Generator().manual_seed(2**20 + step)
        i = torch.randint(len(latents), (batch,), generator=generator)
        x0, noise = latents[i], torch.randn((batch, *latents.shape[1:]), generator=generator)
        t = torch.randn(batch, generator=generator).add(0.5).sigmoid()  # more noise than data: that is where content forms
        late = 3 * step >= 2 * steps and step % 2
        empty = torch.rand(batch, generator=generator) < 0.1
        c = (wrong if late else caption)[i].masked_fill(empty, index[""])  # (b,)
        x = (1 - t).view(-1, 1, 1, 1) * x0 + t.view(-1, 1, 1, 1) * noise
        v = transformer(x, timestep=t * 1000, encoder_hidden_states=embeds[c], pooled_projections=pooled[c]).sample
        loss = F.mse_loss(v, noise - x0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        for k, p in parameters.items():
            ema[k].lerp_(p.detach(), 1 - decay)
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if (step + 1) % 500 == 0:
            state = {"step": torch.tensor(step + 1)}
            for k, p in parameters.items():
                moments = optimizer.state[p]
                state |= {
                    f"model.{k}": p.data,
                    f"ema.{k}": ema[k],
                    f"m.{k}": moments["exp_avg"],
                    f"v.{k}": moments["exp_avg_sq"],
                }
            save_file(state, f"{state_path}.tmp")
            os.replace(f"{state_path}.tmp", state_path)
    for k, p in parameters.items():
        p.data.copy_(ema[k])


# ----------------------------------------------------------------------------------------------------------
# Rebuild everything in toy/
# ----------------------------------------------------------------------------------------------------------


def build_base(out, work, steps, vae_steps, images):
    """Prompts, tokenizers, text encoders, VAE, transformer. Every part is kept in `work` as soon as it is done."""
    from diffusers import AutoencoderKL
    from safetensors.torch import load_file, save_file

    for (task, split), prompts in split_prompts().items():
        file = out / "prompts" / f"{task}_{split}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(prompts) + "\n")
    if (work / "pipeline").exists():
        print(f"{work}/pipeline is complete; remove it to train the base again")
        return shutil.copytree(work / "pipeline", out, dirs_exist_ok=True)
    for name in ADAPTERS:  # adapters of another base
        shutil.rmtree(work / name, ignore_errors=True)
    pipe = make_pipeline()
    pictures, captions, noisy = make_data(images)
    if (work / "vae").exists():
        pipe.vae = AutoencoderKL.from_pretrained(work / "vae")
    else:
        train_vae(pipe.vae, pictures, vae_steps)
        pipe.vae.save_pretrained(work / "vae.tmp")
        os.replace(work / "vae.tmp", work / "vae")
    if not (work / "latents.safetensors").exists():
        save_file({"latents": encode_images(pipe.vae, pictures)}, work / "latents.tmp")
        os.replace(work / "latents.tmp", work / "latents.safetensors")
    train_transformer(
        pipe, load_file(work / "latents.safetensors")["latents"], captions, noisy, work / "transformer.safetensors", steps
    )
    pipe.vae.half()  # a megabyte less to ship; it is read back as float32
    pipe.save_pretrained(work / "pipeline.tmp")
    os.replace(work / "pipeline.tmp", work / "pipeline")
    shutil.copytree(work / "pipeline", out, dirs_exist_ok=True)


# How every adapter is trained: flags of train_teacher.py. deqa's is also MAR's anchor, the aesthetic teacher; its weights
# are the paper's 4:6 on the scales of the paper's Average, where DeQA / 5 spans 0.8 and PickScore / 26 spans 0.154.
# What objects there are and where is settled in the first steps, so geneval and grpo_mix explore and train those alone;
# with all steps trained the late ones, whose gradient is larger, drown the signal in noise.
# grpo_mix sees 192 x 460 images, more than the four teachers together (192 x 320 + 128 x 200), and keeps its best average
# by test reward, which the teachers do not: what can be said for the baseline is done. Past its peak it falls apart.
EARLY = ["--window", "3", "--window_end", "3", "--prompts_per_iteration", "12"]
MIX = ["geneval=3", "ocr=1", "pickscore=1"]
ADAPTERS = {
    "grpo_mix": ["--mix", *MIX, *EARLY, "--iterations", "460", "--lr", "7e-4", "--final", "best"],
    "geneval": ["--reward", "geneval", *EARLY, "--iterations", "260"],
    "deqa": ["--reward", "deqa=0.78", "pickscore=0.22", "--tasks", *TASKS, "--iterations", "110"],
    "ocr": ["--reward", "ocr", "--iterations", "90"],
    "pickscore": ["--reward", "pickscore", *EARLY, "--iterations", "60"],
}


def train_adapters(out, work):
    """Call train_teacher.py for every adapter, one process and one thread each, as many at a time as there are cores."""

    def train(name):
        run = work / name
        if not (run / "adapter").exists():
            how = ["--resume"] if any((run / "checkpoints").glob("step_*")) else ["--overwrite"]
            flags = [*ADAPTERS[name], "--model", str(out), "--out", str(run), "--save_every", "50", *how]
            command = [sys.executable, "train_teacher.py", *flags]
            with open(work / f"{name}.log", "a") as log:
                subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=log, stdout=log, check=True)
        shutil.copytree(run / "adapter", out / "adapters" / name, dirs_exist_ok=True)

    print(f"training {', '.join(ADAPTERS)}: progress in {work}/NAME.log", flush=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(tqdm(pool.map(train, ADAPTERS), total=len(ADAPTERS), desc="adapters"))


def finish(out, work):
    """The merged start, and the scores of every shipped model on the whole test split."""
    folder = out / "adapters"
    merge = ["merge.py", "--adapters", *(f"{folder}/{task}" for task in TASKS), "--rank", "24", "--out", f"{folder}/merged"]
    subprocess.run([sys.executable, *merge, "--overwrite"], check=True)
    models = ["base", *(f"{name}={folder}/{name}" for name in (*TASKS, "grpo_mix", "merged"))]
    score = ["evaluate.py", "--model", out, "--models", *models, "--out", work / "evaluate", "--overwrite"]
    subprocess.run([sys.executable, *map(str, score)], check=True)
    for name in ("results.json", "grid.png"):
        shutil.copy(work / "evaluate" / name, out / name)


def main(args):
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage in ("all", "base"):
        build_base(args.out, args.work, args.steps, args.vae_steps, args.images)
    if args.stage in ("all", "adapters"):
        train_adapters(args.out, args.work)
        finish(args.out, args.work)


if __name__ == "__main__":
    main(ARGS)
