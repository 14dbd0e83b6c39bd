"""T2I-CompBench's rules: attribute binding, numeracy and 3D-spatial, without any network.

The rules of Karine-Huang/T2I-CompBench at commit 1b70949 (MIT): BLIPvqa_eval/BLIP_vqa.py,
UniDet_eval/numeracy_eval.py and UniDet_eval/3D_spatial_eval.py, written again. A comment with
"upstream" marks what looks like a mistake there and is kept, because the published numbers have it.
Checked against upstream's own code, with random detections for each of its 300 + 300 prompts:
numeracy is equal in 9,000 cases of 9,000, 3D-spatial in 6,000 of 6,000.

Detections of an image, as rewards/unidet.py returns them, best score first:

    {"boxes": (n, 4) x0 y0 x1 y1 in pixels, "scores": (n,), "labels": list of n texts}

Two data sets are T2I-CompBench's too (MIT):

    WORDS, IRREGULAR     the 88 objects of examples/dataset/new_objects.txt (SHA-256 f39a3d2f...)
    t2i_phrases.jsonl    the noun phrases of its color_val, shape_val and texture_val.txt

Upstream asks spaCy for the noun phrases, and its models differ from each other. The file holds what
spaCy 3.8.18 with en_core_web_sm 3.8.0 (MIT) found, once and for all: a line for each of 900 prompts
with the SHA-256 of its UTF-8 text and the [start, end) of each phrase.
"""

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch

PHRASES = Path(__file__).with_name("t2i_phrases.jsonl")
ORIGIN = "https://github.com/Karine-Huang/T2I-CompBench/tree/main/examples/dataset"
NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6,
           "seven": 7, "eight": 8}  # fmt: skip
WORDS = (
    "airplane apple backpack bag balloon banana bear bee bicycle bird boat book bottle bowl boy "
    "bread butterfly cake camel camera candle car cat chair chicken clock computer couch cow cup "
    "deer desk dog drum duck egg fish flag frog giraffe girl goldfish guitar hamburger helicopter "
    "helmet horse key kite knife lamp lemon man microphone microwave mouse paddle painting peach "
    "pear pen person phone pig pillow plate printer rabbit refrigerator sheep ship shrimp sink "
    "sofa stool strawberry suitcase swan table television tent tomato toy train truck turtle vase "
    "woman"
).split()
IRREGULAR = {
    "butterfly": "butterflies", "couch": "couches", "deer": "deer", "fish": "fish",
    "goldfish": "goldfish", "knife": "knives", "man": "men", "mouse": "mice", "peach": "peaches",
    "person": "people", "sheep": "sheep", "shrimp": "shrimp", "strawberry": "strawberries",
    "tomato": "tomatoes", "woman": "women",
}  # fmt: skip
PLURALS = {IRREGULAR.get(word, word + "s"): word for word in WORDS}
PERSONS = dict.fromkeys(("boy", "girl", "man", "woman"), "person")
# Upstream also maps "telivision" to tv, which no prompt contains: a television must be labelled so.
ALIASES = PERSONS | {"ship": "boat", "goldfish": "fish", "painting": "picture"}
FORM = re.compile(r"an? (\w+) (in front of|behind|hidden by) an? (\w+)")


# ---- Attribute binding: is each noun phrase of the prompt in the image?


@functools.cache
def phrase_table() -> dict[str, dict[str, list]]:
    """{"color", "shape", "texture": {SHA-256 of a prompt: spans of its noun phrases}}"""
    tables = {"color": {}, "shape": {}, "texture": {}}
    for line in PHRASES.read_text("utf-8").splitlines():
        entry = json.loads(line)
        tables[entry["task"]][entry["prompt_sha256"]] = entry["chunks"]
    return tables


def questions(prompt: str, attribute: str) -> list[str]:
    """The noun phrases of the prompt as questions for BLIP: "a red car?", "a white sheep?"

    ValueError for a prompt that is not in the table: without spaCy its phrases are a guess."""
    spans = phrase_table()[attribute].get(hashlib.sha256(prompt.encode()).hexdigest())
    if spans is None:
        known = f"one of the 300 of {attribute}_val.txt ({ORIGIN})"
        raise ValueError(f"prompt {prompt!r} has no known noun phrases; expected {known}")
    return [clean(f"{prompt[start:end]}?") for start, end in spans[:8]]  # upstream asks 8 at most


def clean(question: str) -> str:
    """Lower case, without .!"()*#:;~ and with 50 words at most (BLIP's pre_question)."""
    words = re.sub(r'[.!"()*#:;~]', "", question.lower()).rstrip(" ").split(" ")
    return " ".join(words[:50])


def binding_score(yes: Sequence[float]) -> float:
    """The product of P(yes), in float32. Upstream writes each factor and the product with four
    decimals into files and reads them back. No question: 1."""
    product = torch.ones(())
    for probability in yes:
        product *= float(f"{probability:.4f}")
    return float(f"{product.item():.4f}")


# ---- Numeracy: is each object there, in the number that the prompt asks for?


def requested(prompt: str) -> list[tuple[str, int]]:
    """[(object in the singular, number)]: a number word followed by one of the 88 objects.

    Other words are passed over, as upstream: "three camels shared a burger" asks for camels alone.
    So is "three camel", at which upstream ends with an error. ValueError where nothing is left."""
    words, found = re.findall(r"\w+|[^\w\s]", prompt), []
    for number, word in zip(words, words[1:]):
        count = NUMBERS.get(number)
        if count and word in PLURALS:
            found.append((PLURALS[word], count))
        elif count == 1 and word in WORDS:
            found.append((word, 1))
    if not found:
        needed = "a number word (a, an, one ... eight) before one of T2I-CompBench's 88 objects"
        raise ValueError(f"prompt {prompt!r} asks for no known object; expected {needed}")
    return found


def numeracy_score(found: dict, requests: Sequence[tuple[str, int]]) -> float:
    """The mean over the requested objects of 1/2 (there is one) + 1/2 (the number is right)."""
    labels, score = distinct_labels(found), 0.0
    for name, number in requests:
        name = ALIASES.get(name, name)
        if name not in labels:
            # Upstream searches inside labels then: a microphone counts as a phone, a vegetable as a
            # table. The new names stay for the objects that follow.
            labels = [name if name in label else label for label in labels]
        score += 0.5 * (name in labels) + 0.5 * (labels.count(name) == number)
    return score / len(requests)


def distinct_labels(found: dict) -> list[str]:
    """The labels, best first, without repeated boxes of one object: same label, same place."""
    kept = []
    for label, box in zip(found["labels"], found["boxes"].tolist()):
        if not any(label == other and same_place(box, place) for other, place in kept):
            kept.append((label, box))
    return [label for label, _ in kept]


def same_place(a: Sequence[float], b: Sequence[float]) -> bool:
    """IoU above .9, or one box with more than .9 of its area inside the other one.

    A box ends with its last pixel here: widths and heights are one larger than elsewhere."""
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]) + 1)
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]) + 1)
    area_a = (a[2] - a[0] + 1) * (a[3] - a[1] + 1)
    area_b = (b[2] - b[0] + 1) * (b[3] - b[1] + 1)
    # The IoU's union is at least as large as either box: containment decides.
    return width * height > 0.9 * min(area_a, area_b)


# ---- 3D-spatial: is X in front of, behind, or hidden by Y?


def relation(prompt: str) -> tuple[str, str, str]:
    """ "a cat behind a chair" -> ("cat", "behind", "chair"). ValueError for any other form."""
    match = FORM.fullmatch(prompt)
    if not match:
        needed = '"a X in front of a Y", "a X behind a Y" or "a X hidden by a Y"'
        raise ValueError(f"prompt {prompt!r} has no 3D relation; expected {needed}")
    return match.groups()


def spatial_score(
    found: dict, depth: torch.Tensor, relation: tuple[str, str, str], mode: str = "official"
) -> float:
    """1/4 score(X) + 1/4 score(Y) + 1/2 position; 1/4 of the score where one of them is found.

    depth: (H, W) in the pixels of the boxes; near is large. mode: see `mean_depth`."""
    x, where, y = relation
    x, y = PERSONS.get(x, x), PERSONS.get(y, y)
    of_x = [i for i, label in enumerate(found["labels"]) if x in label]  # inside labels, again
    of_y = [i for i, label in enumerate(found["labels"]) if y in label]
    scores, boxes = found["scores"].tolist(), found["boxes"].tolist()
    if not (of_x or of_y):
        return 0.0
    if not (of_x and of_y):
        return 0.25 * scores[(of_x + of_y)[0]]
    # Upstream goes down the list until it has met both, and remembers the last match of each: of
    # three boxes X .9, X .5, Y .4 it takes the second and the third.
    end = max(of_x[0], of_y[0])
    i = max(i for i in of_x if i <= end)
    j = max(j for j in of_y if j <= end)
    place = position(boxes[i], boxes[j], where, depth, mode)
    return 0.25 * scores[i] + 0.25 * scores[j] + 0.5 * place


def position(
    a: Sequence[float], b: Sequence[float], where: str, depth: torch.Tensor, mode: str = "official"
) -> float:
    """min(1, 2 IoU) where the mean depths are in the right order, else 0.

    Upstream's exception: an IoU of exactly 1/2 gives 0."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area_a, area_b = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    overlap = width * height
    if overlap == 0:
        return 0.0
    iou = overlap / (area_a + area_b - overlap)
    nearer = mean_depth(depth, a, mode) - mean_depth(depth, b, mode)
    if where != "in front of":  # behind, hidden by
        nearer = -nearer
    if iou == 0.5 or not nearer > 0:  # nan, of a box without pixels, is not nearer
        return 0.0
    return min(1.0, 2 * iou)


def mean_depth(depth: torch.Tensor, box: Sequence[float], mode: str = "official") -> float:
    """Mean depth in the box. Upstream takes x for the row and y for the column: the place that is
    mirrored at the diagonal. mode="fixed" looks where the object is."""
    x0, y0, x1, y1 = (int(value) for value in box)
    inside = depth[x0:x1, y0:y1]
    if mode == "fixed":
        inside = depth[y0:y1, x0:x1]
    return inside.mean().item()  # nan where there is no pixel
