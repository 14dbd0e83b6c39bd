"""rewards/geneval.py without its weights: the rules against cases worked out by hand, the detector's pre- and
post-processing on made-up logits, the converter on dicts of the published names and shapes, and tiny random models
through the whole path. The last test wants the real weights (--slow).

    python -m pytest tests/test_rewards_geneval.py
"""

import ast
import hashlib
import io
import json
import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Mask2FormerConfig, SwinConfig
from transformers.models.mask2former import modeling_mask2former

from rewards import geneval
from rewards.geneval import GenEval

ROOT = Path(__file__).resolve().parents[1]

# ----------------------------------------------------------------------------------------------------------
# The rules. Every expected value below was worked out by hand from the definitions, before the code was written.
# ----------------------------------------------------------------------------------------------------------


def thing(x=0.0, y=0.0, colour=None, size=10.0):
    """A square object whose top left corner is at (x, y)."""
    return {"box": (x, y, x + size, y + size), "score": 0.95, "mask": None, "colour": colour}


def want(tag, *include, exclude=()):
    keys = ("class", "count", "color", "position")
    rows = [{k: v for k, v in zip(keys, row) if v is not None} for row in include]
    return {"tag": tag, "include": rows, "exclude": [dict(zip(keys, row)) for row in exclude], "prompt": "a photo"}


CAT = want("single_object", ("cat", 1))
DOGS = want("counting", ("dog", 3), exclude=[("dog", 4)])
PAIR = want("two_object", ("cat", 1), ("dog", 1))
CAR = want("colors", ("car", 1, "red"))
BOTH = want("color_attr", ("cat", 1, "red"), ("dog", 1, "blue"))
TWO_RED = want("color_attr", ("cat", 2, "red"))  # no prompt of GenEval has it, the rule does
LEFT = want("position", ("cat", 1), ("dog", 1, None, ["left of", 0]))  # "a photo of a dog left of a cat"
dog_left, dog_right, cat_mid = thing(0), thing(200), thing(100)

CASES = [  # what is asked, what is found (best first): official correct, strict, softened
    ("1 cat: none", CAT, {}, 0, 0, 0),
    ("1 cat: one", CAT, {"cat": [thing()]}, 1, 1, 1),
    ("1 cat: a dog instead", CAT, {"dog": [thing()]}, 0, 0, 0),
    ("1 cat: and a dog", CAT, {"cat": [thing()], "dog": [thing()]}, 1, 1, 1),
    ("1 cat: two", CAT, {"cat": [thing()] * 2}, 1, 0, 0),
    ("1 cat: four", CAT, {"cat": [thing()] * 4}, 1, 0, -2),
    ("1 cat: sixteen, the worst there is", CAT, {"cat": [thing()] * 16}, 1, 0, -14),
    ("3 dogs: none", DOGS, {}, 0, 0, 0),
    ("3 dogs: two", DOGS, {"dog": [thing()] * 2}, 0, 0, 2 / 3),
    ("3 dogs: three", DOGS, {"dog": [thing()] * 3}, 1, 1, 1),
    ("3 dogs: four, which only `exclude` forbids officially", DOGS, {"dog": [thing()] * 4}, 0, 0, 2 / 3),
    ("3 dogs: seven", DOGS, {"dog": [thing()] * 7}, 0, 0, -1 / 3),
    ("cat and dog: none", PAIR, {}, 0, 0, 0),
    ("cat and dog: both", PAIR, {"cat": [thing()], "dog": [thing()]}, 1, 1, 1),
    ("cat and dog: one", PAIR, {"cat": [thing()]}, 0, 0, 1 / 2),
    ("cat and dog: a dog too many", PAIR, {"cat": [thing()], "dog": [thing()] * 2}, 1, 0, 1 / 2),
    ("red car: red", CAR, {"car": [thing(colour="red")]}, 1, 1, 1),
    ("red car: blue", CAR, {"car": [thing(colour="blue")]}, 0, 0, 1 / 2),
    ("red car: none, so 0 for the count and 0 for the colour", CAR, {}, 0, 0, 0),
    ("red car: two, the best red", CAR, {"car": [thing(colour="red"), thing(colour="blue")]}, 1, 0, 0),
    ("red car: two, the second red", CAR, {"car": [thing(colour="blue"), thing(colour="red")]}, 0, 0, 0),
    ("red cat, blue dog", BOTH, {"cat": [thing(colour="red")], "dog": [thing(colour="blue")]}, 1, 1, 1),
    ("… swapped", BOTH, {"cat": [thing(colour="blue")], "dog": [thing(colour="red")]}, 0, 0, 1 / 2),
    ("… both red", BOTH, {"cat": [thing(colour="red")], "dog": [thing(colour="red")]}, 0, 0, 3 / 4),
    ("… no dog", BOTH, {"cat": [thing(colour="red")]}, 0, 0, 1 / 2),
    ("2 red cats: one of them", TWO_RED, {"cat": [thing(colour="red"), thing(colour="white")]}, 0, 0, 3 / 4),
    ("2 red cats: three", TWO_RED, {"cat": [thing(colour="red")] * 3}, 1, 0, 1 / 4),
    ("dog left of cat", LEFT, {"cat": [cat_mid], "dog": [dog_left]}, 1, 1, 1),
    ("… it is right of it: (1 + 1 + 0 + the slip's 1) / 4", LEFT, {"cat": [cat_mid], "dog": [dog_right]}, 0, 0, 3 / 4),
    ("… no cat: nothing to be left of", LEFT, {"dog": [dog_left]}, 0, 0, 1 / 3),
    ("… no dog", LEFT, {"cat": [cat_mid]}, 0, 0, 1 / 3),
    ("… neither", LEFT, {}, 0, 0, 0),
    ("… two cats: officially the best one counts", LEFT, {"cat": [cat_mid, thing(-50)], "dog": [dog_left]}, 1, 0, 1 / 3),
    ("… two cats, the best on the wrong side", LEFT, {"cat": [thing(-50), cat_mid], "dog": [dog_left]}, 0, 0, 1 / 3),
    ("… two dogs", LEFT, {"cat": [cat_mid], "dog": [dog_left, dog_right]}, 1, 0, 1 / 3),
]


@pytest.mark.parametrize("name, metadata, found, correct, strict, soft", CASES, ids=[case[0] for case in CASES])
def test_rules(name, metadata, found, correct, strict, soft):
    assert geneval.official(found, metadata) is bool(correct)
    reward, exact = geneval.softened(found, metadata)
    assert reward == pytest.approx(soft, abs=1e-12) and exact is bool(strict)
    assert (reward == 1) is exact  # so evaluate.py needs no second pass for the strict score


def test_position_slip_is_a_switch():
    found = {"cat": [cat_mid], "dog": [dog_right]}
    assert geneval.softened(found, LEFT, position_slip=False) == (pytest.approx(2 / 3), False)
    for missing in ("cat", "dog"):  # the slip concerns violated relations alone
        rest = {name: o for name, o in found.items() if name != missing}
        assert geneval.softened(rest, LEFT, position_slip=False) == geneval.softened(rest, LEFT)


def test_every_pair_must_stand_in_the_relation():
    metadata = want("position", ("cat", 2), ("dog", 2, None, ["left of", 0]))
    dogs, cats = [thing(0), thing(20)], [thing(100), thing(130)]
    assert geneval.official({"cat": cats, "dog": dogs}, metadata)
    assert not geneval.official({"cat": [thing(100), thing(0)], "dog": dogs}, metadata)
    # one violation is counted once, however many pairs violate: (1 + 1 + 0 + 1) / 4
    assert geneval.softened({"cat": [thing(-90), thing(-60)], "dog": dogs}, metadata)[0] == 0.75


@pytest.mark.parametrize(
    "dx, dy, size, relations",
    [  # b is a square of `size` at the origin, a the same one moved by (dx, dy); the dead zone is 0.1 (size + size)
        (-100, 0, 10, {"left of"}),  # (100 - 2) / 100 = .98
        (100, 0, 10, {"right of"}),
        (0, -100, 10, {"above"}),  # y grows downwards
        (0, 100, 10, {"below"}),
        (0, 0, 10, set()),
        (2, 0, 10, set()),  # just the dead zone
        (2.0005, 0, 10, set()),  # 5e-4 beyond it: still below 1e-3
        (4, 0, 10, set()),  # (4 - 2) / 4 = .5 is not above .5; over the revised offset it would be 1
        (5, 0, 10, {"right of"}),  # .6
        (-100, -100, 10, {"left of", "above"}),  # 98 / 141.4 = .69 both ways
        (-100, -50, 10, {"left of"}),  # .877 and 48 / 111.8 = .43
        (30, 0, 100, set()),  # (30 - 20) / 30
        (41, 0, 100, {"right of"}),  # 21 / 41 = .512: overlapping boxes may stand in a relation
    ],
)
def test_relative_position(dx, dy, size, relations):
    assert geneval.relative_position((dx, dy, dx + size, dy + size), (0, 0, size, size)) == relations


def test_dead_zone_is_per_axis():
    a, b = (150, 60, 350, 70), (0, 0, 200, 10)  # offset (150, 60); dead zones 40 and 2: 110 and 58 over 161.6
    assert geneval.relative_position(a, b) == {"right of"}


def test_summary():
    rows = [("counting", 1, 1, 1.0)] * 3 + [("counting", 0, 0, -1.0), ("colors", 0, 0, 0.5), ("position", 1, 0, 0.5)]
    results = [{"tag": t, "correct": bool(c), "strict": bool(s), "soft": r} for t, c, s, r in rows]
    got = geneval.summary(results)
    assert got["official"] == pytest.approx((3 / 4 + 0 + 1) / 3)  # tasks weigh the same, however many images they have
    assert got["official_images"] == pytest.approx(4 / 6)
    assert got["strict"] == pytest.approx(3 / 6) and got["softened"] == pytest.approx(3 / 6)
    assert got["tasks"] == {"counting": 0.75, "colors": 0.0, "position": 1.0}
    with pytest.raises(ValueError, match="no result"):
        geneval.summary([])


def test_names_are_the_eighty_of_geneval():
    assert len(set(geneval.CLASSES)) == 80 and geneval.CLASSES[0] == "person" and geneval.CLASSES[79] == "toothbrush"
    assert geneval.CLASSES[64:67] == ("computer mouse", "tv remote", "computer keyboard")  # COCO: mouse, remote, keyboard
    assert geneval.CLASSES[49] == "orange" and "orange" in geneval.COLOURS and len(geneval.COLOURS) == 10


# ----------------------------------------------------------------------------------------------------------
# The detector's pre- and post-processing (mmdet 2.x)
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, resized, padded",  # (height, width)
    [
        ((512, 512), (800, 800), (800, 800)),
        ((480, 640), (800, 1067), (800, 1088)),  # 640 * 5/3 = 1066.67
        ((591, 590), (801, 800), (832, 800)),  # 591 * 800/590 = 801.36
        ((400, 2000), (267, 1333), (288, 1344)),  # the long edge decides: 400 * .6665 = 266.6
        ((1024, 1024), (800, 800), (800, 800)),
        ((1, 1), (800, 800), (800, 800)),
    ],
)
def test_preprocess_sizes_and_padding(size, resized, padded):
    x, got = geneval.preprocess(torch.full((1, 3, *size), 200, dtype=torch.uint8))
    assert got == resized and x.shape == (1, 3, *padded)
    inside, outside = (torch.tensor([(v - m) / s for m, s in zip(geneval.MEAN, geneval.STD)]) for v in (200.0, 128.0))
    assert_close(x[0, :, 0, 0], inside)
    assert_close(x[0, :, : resized[0], : resized[1]].amin((1, 2)), inside)
    if padded[0] > resized[0]:
        assert_close(x[0, :, -1, 0], outside)  # grey 128 before the normalisation, not 0 after it
    if padded[1] > resized[1]:
        assert_close(x[0, :, 0, -1], outside)


def plain_bilinear(image, height, width):
    """image (H, W) -> (height, width): four neighbours a pixel, half-pixel centres, no antialias, as cv2 does it."""
    H, W = image.shape
    out = np.empty((height, width))
    for i in range(height):
        for j in range(width):
            y, x = (min(max((i + 0.5) * H / height - 0.5, 0), H - 1), min(max((j + 0.5) * W / width - 0.5, 0), W - 1))
            a, b = int(y), int(x)
            c, d = min(a + 1, H - 1), min(b + 1, W - 1)
            top = image[a, b] * (1 - (x - b)) + image[a, d] * (x - b)
            low = image[c, b] * (1 - (x - b)) + image[c, d] * (x - b)
            out[i, j] = top * (1 - (y - a)) + low * (y - a)
    return out


@pytest.mark.parametrize("size", [(13, 22), (70, 45)])  # up and down
def test_preprocess_interpolates_like_cv2(monkeypatch, size):
    monkeypatch.setattr(geneval, "EDGES", (60, 32))
    pixels = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x, (h, w) = geneval.preprocess(pixels)
    levels = x[0, :, :h, :w] * torch.tensor(geneval.STD)[:, None, None] + torch.tensor(geneval.MEAN)[:, None, None]
    expected = plain_bilinear(pixels[0, 1].numpy().astype(float), h, w)
    assert_close(levels[1].double(), torch.from_numpy(expected.round()), atol=1.0001, rtol=0)  # a tie may round either way
    assert (levels[1].double() - torch.from_numpy(expected)).abs().max() < 0.5001
    assert_close(levels, levels.round(), atol=1e-3, rtol=0)  # the resized image is 8 bit again


def test_preprocess_swap():
    pixels = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    assert_close(geneval.preprocess(pixels, swap=True)[0], geneval.preprocess(pixels.flip(1))[0])
    assert not torch.equal(geneval.preprocess(pixels, swap=True)[0], geneval.preprocess(pixels)[0])


def class_logits(*rows, classes=80):
    """rows: {class index: probability} a query -> (Q, classes + 1) logits; what is left goes to "no object"."""
    p = torch.full((len(rows), classes + 1), 1e-9)
    for q, row in enumerate(rows):
        p[q, -1] = 1 - sum(row.values())
        for label, value in row.items():
            p[q, label] = value
    return p.log()


def mask_logits(*boxes, size=(8, 8), inside=40.0):
    """Boxes (x1, y1, x2, y2), ends excluded -> (Q, h, w): `inside` in the box, -40 around it."""
    masks = torch.full((len(boxes), *size), -40.0)
    for q, (x1, y1, x2, y2) in enumerate(boxes):
        masks[q, y1:y2, x1:x2] = inside
    return masks


def detections(logits, masks, threshold=0.3, size=(8, 8)):
    return geneval.postprocess(logits, masks, size, size, size, threshold)


CAT_ID, DOG_ID = geneval.CLASSES.index("cat"), geneval.CLASSES.index("dog")


def test_postprocess_box_score_and_mask():
    found = detections(class_logits({CAT_ID: 0.8}, {DOG_ID: 0.6}), mask_logits((3, 2, 7, 5), (0, 0, 8, 8), inside=math.log(3)))
    assert list(found) == ["cat", "dog"]
    (cat,) = found["cat"]
    assert cat["box"] == (3.0, 2.0, 7.0, 5.0)  # the last pixel's coordinates + 1
    assert cat["score"] == pytest.approx(0.8 * 0.75, abs=1e-4)  # sigmoid(log 3) = 3/4 on every pixel of the mask
    assert cat["mask"].dtype == bool and cat["mask"].sum() == 12 and cat["mask"][2:5, 3:7].all()
    assert found["dog"][0]["box"] == (0.0, 0.0, 8.0, 8.0)  # overlapping masks are both kept


@pytest.mark.parametrize("threshold, kept", [(0.3, [0.95, 0.91, 0.89, 0.31]), (0.9, [0.95, 0.91])])
def test_postprocess_thresholds_and_order(threshold, kept):
    rows = [{CAT_ID: p} for p in (0.29, 0.91, 0.31, 0.95, 0.89)]
    found = detections(class_logits(*rows), mask_logits(*[(0, 0, 4, 4)] * 5), threshold)
    assert [round(o["score"], 4) for o in found["cat"]] == kept


def test_postprocess_threshold_is_strict():
    assert detections(torch.zeros(1, 2), mask_logits((0, 0, 8, 8)), 0.5) == {}  # a score of .5 exactly
    assert len(detections(torch.zeros(1, 2), mask_logits((0, 0, 8, 8)), 0.4999)["person"]) == 1
    sure, half = torch.tensor([[100.0, -100.0]]), mask_logits((0, 0, 8, 8), inside=1e-30)  # 1 * sigmoid(0)
    assert detections(sure, half, 0.5) == {} and len(detections(sure, half, 0.4999)["person"]) == 1


def test_postprocess_empty_mask_and_nothing():
    assert detections(class_logits({CAT_ID: 0.99}), mask_logits((0, 0, 0, 0))) == {}
    assert detections(class_logits({}), mask_logits((0, 0, 8, 8))) == {}


def test_postprocess_one_query_under_two_labels():
    found = detections(class_logits({CAT_ID: 0.5, DOG_ID: 0.45}), mask_logits((1, 1, 3, 3)))
    assert found["cat"][0]["box"] == found["dog"][0]["box"] == (1.0, 1.0, 3.0, 3.0)


def test_postprocess_at_most_sixteen_of_a_class():
    found = detections(class_logits(*[{CAT_ID: 0.5 + q / 100} for q in range(20)]), mask_logits(*[(0, 0, 8, 8)] * 20))
    assert [o["score"] for o in found["cat"]] == pytest.approx([0.69 - q / 100 for q in range(16)], abs=1e-4)


def test_postprocess_keeps_the_hundred_best_pairs():
    p = torch.linspace(0.9, 0.5, 105).tolist()
    found = detections(class_logits(*[{q % 80: p[q]} for q in range(105)]), mask_logits(*[(0, 0, 8, 8)] * 105))
    scores = sorted(o["score"] for objects in found.values() for o in objects)
    assert len(scores) == 100 and scores[0] == pytest.approx(p[99], abs=1e-4)


def test_postprocess_cuts_the_padding_and_scales_to_the_image():
    # The detector saw 32 x 32 of which 24 x 32 is image, and gives masks at a quarter of that; the image is 12 x 16.
    masks = mask_logits((0, 0, 4, 6), (0, 6, 8, 8), size=(8, 8))  # left half; only padding
    found = geneval.postprocess(class_logits({CAT_ID: 0.9}, {DOG_ID: 0.9}), masks, (32, 32), (24, 32), (12, 16), 0.3)
    # The seam lies at 6 * 4 = 24 of the padded rows: row 23 is still below 0 for the dog, so its mask is cut off whole.
    assert list(found) == ["cat"]
    assert found["cat"][0]["mask"].shape == (12, 16) and found["cat"][0]["box"] == (0.0, 0.0, 8.0, 12.0)


# ----------------------------------------------------------------------------------------------------------
# The converter. Names and shapes as mmdet 2.25's classes define them: SwinTransformer, MSDeformAttnPixelDecoder,
# Mask2FormerHead. Written out here on their own, so that a mistake in the key map cannot hide.
# ----------------------------------------------------------------------------------------------------------


def published_shapes(C=96, depths=(2, 2, 18, 2), heads=(3, 6, 12, 24), window=7, D=256, ffn=(1024, 2048), Q=100,
                     encoder=6, decoder=9, classes=80):  # fmt: skip
    shapes = {}

    def layer(name, out, *inner, bias=True):
        shapes[name + ".weight"] = (out, *inner)
        if bias:
            shapes[name + ".bias"] = (out,)

    layer("backbone.patch_embed.projection", C, 3, 4, 4)
    layer("backbone.patch_embed.norm", C)
    for i, (depth, head) in enumerate(zip(depths, heads)):
        width = C * 2**i
        for j in range(depth):
            block = f"backbone.stages.{i}.blocks.{j}"
            layer(f"{block}.norm1", width)
            shapes[f"{block}.attn.w_msa.relative_position_bias_table"] = ((2 * window - 1) ** 2, head)
            shapes[f"{block}.attn.w_msa.relative_position_index"] = (window**2, window**2)
            layer(f"{block}.attn.w_msa.qkv", 3 * width, width)
            layer(f"{block}.attn.w_msa.proj", width, width)
            layer(f"{block}.norm2", width)
            layer(f"{block}.ffn.layers.0.0", 4 * width, width)
            layer(f"{block}.ffn.layers.1", width, 4 * width)
        if i < 3:
            layer(f"backbone.stages.{i}.downsample.norm", 4 * width)
            layer(f"backbone.stages.{i}.downsample.reduction", 2 * width, 4 * width, bias=False)
        layer(f"backbone.norm{i}", width)

    pixel = "panoptic_head.pixel_decoder"
    for i in range(3):  # from the coarsest level
        layer(f"{pixel}.input_convs.{i}.conv", D, C * 2 ** (3 - i), 1, 1)
        layer(f"{pixel}.input_convs.{i}.gn", D)
    for i in range(encoder):
        name = f"{pixel}.encoder.layers.{i}"
        layer(f"{name}.attentions.0.sampling_offsets", 8 * 3 * 4 * 2, D)  # heads, levels, points, xy
        layer(f"{name}.attentions.0.attention_weights", 8 * 3 * 4, D)
        layer(f"{name}.attentions.0.value_proj", D, D)
        layer(f"{name}.attentions.0.output_proj", D, D)
        layer(f"{name}.ffns.0.layers.0.0", ffn[0], D)
        layer(f"{name}.ffns.0.layers.1", D, ffn[0])
        layer(f"{name}.norms.0", D)
        layer(f"{name}.norms.1", D)
    shapes[f"{pixel}.level_encoding.weight"] = (3, D)
    layer(f"{pixel}.lateral_convs.0.conv", D, C, 1, 1, bias=False)
    layer(f"{pixel}.lateral_convs.0.gn", D)
    layer(f"{pixel}.output_convs.0.conv", D, D, 3, 3, bias=False)
    layer(f"{pixel}.output_convs.0.gn", D)
    layer(f"{pixel}.mask_feature", D, D, 1, 1)

    for i in range(decoder):
        name = f"panoptic_head.transformer_decoder.layers.{i}"
        for k in (0, 1):
            shapes[f"{name}.attentions.{k}.attn.in_proj_weight"] = (3 * D, D)
            shapes[f"{name}.attentions.{k}.attn.in_proj_bias"] = (3 * D,)
            layer(f"{name}.attentions.{k}.attn.out_proj", D, D)
        layer(f"{name}.ffns.0.layers.0.0", ffn[1], D)
        layer(f"{name}.ffns.0.layers.1", D, ffn[1])
        for k in range(3):
            layer(f"{name}.norms.{k}", D)
    layer("panoptic_head.transformer_decoder.post_norm", D)
    shapes["panoptic_head.query_embed.weight"] = shapes["panoptic_head.query_feat.weight"] = (Q, D)
    shapes["panoptic_head.level_embed.weight"] = (3, D)
    layer("panoptic_head.cls_embed", classes + 1, D)
    for k in (0, 2, 4):
        layer(f"panoptic_head.mask_embed.{k}", D, D)
    return shapes


TINY = dict(C=8, depths=(2, 1, 2, 1), heads=(1, 2, 2, 4), window=3, D=32, ffn=(16, 24), Q=12, encoder=1, decoder=2)


def tiny_config():
    swin = SwinConfig(embed_dim=8, depths=[2, 1, 2, 1], num_heads=[1, 2, 2, 4], window_size=3,
                      out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    return Mask2FormerConfig(backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, num_queries=12,
                             encoder_feedforward_dim=16, dim_feedforward=24, encoder_layers=1, decoder_layers=3,
                             num_labels=80)  # fmt: skip


def window_index(window):
    """mmdet's relative_position_index buffer, from its definition: which row of the bias table a pair of places uses."""
    places = [(y, x) for y in range(window) for x in range(window)]
    rows = [[(a[0] - b[0] + window - 1) * (2 * window - 1) + a[1] - b[1] + window - 1 for b in places] for a in places]
    return torch.tensor(rows)


def random_checkpoint(seed=0, **sizes):
    """A dict of the published names with random values; norms random too, or a forgotten one would not show."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in published_shapes(**sizes).items():
        if key.endswith("relative_position_index"):
            state[key] = window_index(sizes["window"])
        elif len(shape) == 1:
            state[key] = torch.randn(shape, generator=generator) * 0.3 + (1 if ".weight" in key else 0)
        else:
            state[key] = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
    state["panoptic_head.cls_embed.weight"] *= 12  # confident queries: scores above the thresholds
    return state


def test_published_shapes_have_the_published_size():
    learned = {k: s for k, s in published_shapes().items() if not k.endswith("relative_position_index")}
    assert round(sum(map(math.prod, learned.values())) / 1e6, 2) == 68.74  # Swin-S Mask2Former on 80 classes


def test_convert_full_size_is_bijective():
    """Each source tensor is filled with a number of its own; the same numbers must come out, each as often as it should."""
    number = {key: float(i) for i, key in enumerate(published_shapes(), start=1)}
    state = {k: torch.tensor(number[k]).expand(shape) for k, shape in published_shapes().items()}
    state |= {k: window_index(7) for k in state if k.endswith("relative_position_index")}
    out = geneval.convert(state, geneval.detector_config())
    unused = {k: t for k, t in out.items() if "swin.layernorm" in k}
    seen = Counter(t.flatten()[0].item() for k, t in out.items() if k not in unused)
    assert all(t.min() == t.max() for t in out.values()) and len(unused) == 2
    for key, value in number.items():
        split = ".qkv." in key or ".attentions.1.attn.in_proj" in key
        assert seen.pop(value, 0) == (0 if key.endswith("relative_position_index") else 3 if split else 1), key
    assert not seen


def test_convert_round_trip(tmp_path):
    """mmdet dict -> file -> stock from_pretrained -> every converted tensor again, none missing."""
    state = random_checkpoint(**TINY)
    out = geneval.convert(state, tiny_config())
    geneval.save_detector(out, tiny_config(), tmp_path, geneval.SHA256 + "0" * 56)
    model, head = geneval.load_detector(tmp_path, "cpu")
    loaded = {"model." + k: t for k, t in model.state_dict().items()}
    loaded |= {"class_predictor." + k: t for k, t in head.state_dict().items()}
    assert loaded.keys() == out.keys()
    for key, tensor in out.items():
        assert torch.equal(loaded[key], tensor), key
    index = model.pixel_level_module.encoder.swin.encoder.layers[2].blocks[1].attention.relative_position_bias
    assert torch.equal(index.relative_position_index.view(9, 9), window_index(3))  # a buffer that it makes itself


def mmdet_forward(s, x, depths=(2, 1, 2, 1), heads=(1, 2, 2, 4), window=3):
    """mmdet 2.25's Mask2Former in plain functions on its own names s, written from its classes: what converting must keep.

    x (B, 3, H, W), H and W multiples of 32 -> class logits (B, Q, 81), mask logits (B, Q, H/4, W/4)."""
    linear = lambda v, name: F.linear(v, s[name + ".weight"], s.get(name + ".bias"))
    norm = lambda v, name: F.layer_norm(v, v.shape[-1:], s[name + ".weight"], s[name + ".bias"])
    conv = lambda v, name, **how: F.conv2d(v, s[name + ".weight"], s.get(name + ".bias"), **how)
    group = lambda v, name: F.group_norm(v, 32, s[name + ".weight"], s[name + ".bias"])
    resize = lambda v, size: F.interpolate(v, size, mode="bilinear", align_corners=False)
    ffn = lambda v, name, act: v + linear(act(linear(v, name + ".layers.0.0")), name + ".layers.1")

    def window_attention(v, name, head, shift):  # v (B, H, W, C)
        B, H, W, C = v.shape
        v = F.pad(v, (0, 0, 0, -W % window, 0, -H % window)).roll((-shift, -shift), (1, 2))
        rows, columns = (torch.arange(n) for n in v.shape[1:3])
        region = lambda i: (i >= len(i) - window).long() + (i >= len(i) - shift).long() if shift else 0 * i
        label = region(rows)[:, None] * 3 + region(columns)
        cut = lambda u: u.unflatten(1, (-1, window)).unflatten(3, (-1, window)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        v, label = cut(v), cut(label[None, :, :, None].float())[0, :, :, 0]  # (B, windows, N, C), (windows, N)
        q, k, u = linear(v, name + ".qkv").unflatten(-1, (3, head, -1)).permute(3, 0, 1, 4, 2, 5)  # (B, windows, head, N, d)
        table = s[name + ".relative_position_bias_table"][s[name + ".relative_position_index"].view(-1)]
        bias = table.view(window**2, window**2, head).permute(2, 0, 1) - 100.0 * (
            label[:, None, :, None] != label[:, None, None]
        )
        v = ((q * (C // head) ** -0.5) @ k.transpose(-1, -2) + bias).softmax(-1) @ u
        v = linear(v.transpose(2, 3).flatten(3), name + ".proj")
        v = v.unflatten(1, (len(rows) // window, -1)).unflatten(3, (window, window)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return v.roll((shift, shift), (1, 2))[:, :H, :W]

    v = norm(conv(x, "backbone.patch_embed.projection", stride=4).permute(0, 2, 3, 1), "backbone.patch_embed.norm")
    features = []
    for i, depth in enumerate(depths):
        for j in range(depth):
            name = f"backbone.stages.{i}.blocks.{j}."
            v = v + window_attention(norm(v, name + "norm1"), name + "attn.w_msa", heads[i], j % 2 * (window // 2))
            v = v + linear(F.gelu(linear(norm(v, name + "norm2"), name + "ffn.layers.0.0")), name + "ffn.layers.1")
        features.append(norm(v, f"backbone.norm{i}").permute(0, 3, 1, 2))
        if i < 3:
            H, W = v.shape[1:3]
            v = F.unfold(F.pad(v.permute(0, 3, 1, 2), (0, W % 2, 0, H % 2)), 2, stride=2).transpose(1, 2)
            name = f"backbone.stages.{i}.downsample."
            v = linear(norm(v, name + "norm"), name + "reduction").unflatten(1, ((H + 1) // 2, -1))

    def sine(h, w, D):  # SinePositionalEncoding(num_feats=D // 2, normalize=True) -> (h w, D)
        scale = 10000 ** (2 * (torch.arange(D // 2) // 2) / (D // 2))
        y, x = (torch.arange(1, n + 1)[:, None] / (n + 1e-6) * 2 * math.pi / scale for n in (h, w))  # (n, D / 2)
        y, x = (torch.stack((p[:, 0::2].sin(), p[:, 1::2].cos()), 2).flatten(1) for p in (y, x))
        return torch.cat((y[:, None].expand(-1, w, -1), x[None].expand(h, -1, -1)), 2).flatten(0, 1)

    name, D = "panoptic_head.pixel_decoder.", s["panoptic_head.query_feat.weight"].shape[1]
    B, sizes = len(x), [f.shape[-2:] for f in features[:0:-1]]  # from the coarsest of three levels
    v = [group(conv(f, f"{name}input_convs.{i}.conv"), f"{name}input_convs.{i}.gn") for i, f in enumerate(features[:0:-1])]
    v = torch.cat([u.flatten(2).transpose(1, 2) for u in v], 1)  # (B, N, D)
    place = torch.cat([sine(*size, D) + e for size, e in zip(sizes, s[name + "level_encoding.weight"])])  # (N, D)
    grid = [torch.stack(torch.meshgrid((torch.arange(w) + 0.5) / w, (torch.arange(h) + 0.5) / h, indexing="xy"), -1)
            for h, w in sizes]  # fmt: skip
    points = torch.cat([g.flatten(0, 1) for g in grid])  # (N, 2)
    for i in range(1):
        layer = f"{name}encoder.layers.{i}."
        offset = linear(v + place, layer + "attentions.0.sampling_offsets").unflatten(-1, (8, 3, 4, 2))
        share = (
            linear(v + place, layer + "attentions.0.attention_weights").unflatten(-1, (8, 12)).softmax(-1).unflatten(-1, (3, 4))
        )
        value = linear(v, layer + "attentions.0.value_proj").unflatten(-1, (8, -1)).split([h * w for h, w in sizes], 1)
        total = 0
        for k, (h, w) in enumerate(sizes):
            at = points[:, None, None] + offset[:, :, :, k] / torch.tensor([w, h])  # (B, N, 8, 4, 2) in [0, 1]
            image = value[k].permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, (h, w))  # (B 8, d, h, w)
            picked = F.grid_sample(image, 2 * at.transpose(1, 2).flatten(0, 1) - 1, align_corners=False)  # (B 8, d, N, 4)
            total = total + (picked.unflatten(0, (B, 8)) * share[:, :, :, k].transpose(1, 2)[:, :, None]).sum(-1)
        v = v + linear(total.flatten(1, 2).transpose(1, 2), layer + "attentions.0.output_proj")
        v = norm(ffn(norm(v, layer + "norms.0"), layer + "ffns.0", F.relu), layer + "norms.1")
    levels = [u.transpose(1, 2).unflatten(-1, size) for u, size in zip(v.split([h * w for h, w in sizes], 1), sizes)]
    fine = group(conv(features[0], name + "lateral_convs.0.conv"), name + "lateral_convs.0.gn")
    fine = conv(fine + resize(levels[2], fine.shape[-2:]), name + "output_convs.0.conv", padding=1)
    fine = conv(group(fine, name + "output_convs.0.gn").relu(), name + "mask_feature")

    def attend(q, k, u, name, mask=None):
        weights = [s[f"{name}.{n}"] for n in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")]
        q, k, u = (F.linear(t, *p).unflatten(-1, (8, -1)).transpose(1, 2)
                   for t, *p in zip((q, k, u), weights[0].chunk(3), weights[1].chunk(3)))  # fmt: skip
        return F.linear(F.scaled_dot_product_attention(q, k, u, attn_mask=mask).transpose(1, 2).flatten(2), *weights[2:])

    def predict(query, size):
        state = norm(query, "panoptic_head.transformer_decoder.post_norm")
        embed = linear(state, "panoptic_head.mask_embed.0").relu()
        embed = linear(linear(embed, "panoptic_head.mask_embed.2").relu(), "panoptic_head.mask_embed.4")
        masks = torch.einsum("bqd,bdhw->bqhw", embed, fine)
        seen = resize(masks, size).sigmoid().flatten(2) >= 0.5  # (B, Q, h w): where the next layer may look
        return linear(state, "panoptic_head.cls_embed"), masks, seen | ~seen.any(-1, keepdim=True)

    query, own = (s[f"panoptic_head.{n}.weight"].expand(B, -1, -1) for n in ("query_feat", "query_embed"))
    for i in range(2):
        layer, level = f"panoptic_head.transformer_decoder.layers.{i}.", i % 3
        memory = levels[level].flatten(2).transpose(1, 2) + s["panoptic_head.level_embed.weight"][level]
        seen = predict(query, sizes[level])[2][:, None]
        key = memory + sine(*sizes[level], D)
        query = norm(query + attend(query + own, key, memory, layer + "attentions.0.attn", seen), layer + "norms.0")
        query = norm(query + attend(query + own, query + own, query, layer + "attentions.1.attn"), layer + "norms.1")
        query = norm(ffn(query, layer + "ffns.0", F.relu), layer + "norms.2")
    return predict(query, sizes[0])[:2]


@pytest.mark.parametrize("size", [(64, 96), (160, 32)])
def test_converted_model_computes_what_mmdet_does(tmp_path, size):
    state = random_checkpoint(**TINY)
    geneval.save_detector(geneval.convert(state, tiny_config()), tiny_config(), tmp_path, geneval.SHA256 + "0" * 56)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        classes, masks = geneval.detector_logits(*geneval.load_detector(tmp_path, "cpu"), x)
        expected_classes, expected_masks = mmdet_forward(state, x)
    assert classes.std() > 3 and masks.std() > 0.1  # not a comparison of nothing with nothing
    assert_close(classes, expected_classes, atol=2e-3, rtol=1e-4)
    assert_close(masks, expected_masks, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.update({"ema_backbone_norm0_weight": torch.ones(8)}), "ema_backbone_norm0_weight"),
        (lambda s: s.pop("panoptic_head.query_feat.weight"), "queries_features"),
        (lambda s: s.update({"panoptic_head.cls_embed.bias": torch.ones(134)}), r"class_predictor.bias.*134"),
        (lambda s: s.update({"backbone.stages.0.blocks.0.attn.w_msa.relative_position_index": torch.zeros(9, 9)}), "index"),
        (lambda s: s.update({"panoptic_head.transformer_decoder.layers.0.cross_attn.attn.in_proj_bias": 0}), "mmdet 3"),
        (lambda s: s.update({"panoptic_head.pixel_decoder.encoder.layers.0.self_attn.value_proj.bias": 0}), "mmdet 3"),
    ],
)
def test_convert_refuses(change, message):
    state = random_checkpoint(**TINY)
    change(state)
    with pytest.raises(ValueError, match=message):
        geneval.convert(state, tiny_config())


# ----------------------------------------------------------------------------------------------------------
# Tiny random models through the whole path
# ----------------------------------------------------------------------------------------------------------


def save_tiny_clip(folder):
    """A CLIP of 2 x 1 layers at 224 px, and a tokenizer that spells: a token a letter."""
    letters = "abcdefghijklmnopqrstuvwxyz-"
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77)
    tokenizer.save_pretrained(folder)
    ends = dict(bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1, pad_token_id=len(tokens) - 1)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, hidden_act="quick_gelu")
    text = dict(shape, vocab_size=len(tokens), max_position_embeddings=77, **ends)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=dict(shape, patch_size=32, image_size=224), projection_dim=16))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def tiny_files(tmp_path_factory):
    """A tiny CLIP, and a .pth of mmdet's format with the hash that stands in for the real one's."""
    folder = tmp_path_factory.mktemp("weights")
    save_tiny_clip(folder / "clip")
    torch.save({"meta": {"CLASSES": geneval.CLASSES}, "state_dict": random_checkpoint(**TINY)}, folder / "tiny.pth")
    return folder, hashlib.sha256((folder / "tiny.pth").read_bytes()).hexdigest()


@pytest.fixture
def weights(tiny_files, monkeypatch):
    """Folders for GenEval. The detector's is made by the command line, hash check included."""
    folder, digest = tiny_files
    monkeypatch.setattr(geneval, "SHA256", digest[:8])
    monkeypatch.setattr(geneval, "detector_config", tiny_config)
    monkeypatch.setattr(geneval, "EDGES", (133, 80))  # 80 pixels, not 800: the same code a hundred times faster
    if not (folder / "detector").exists():
        assert geneval.main(["--convert", str(folder / "tiny.pth"), "--out", str(folder / "detector")]) == 0
    return {"weights": folder / "detector", "clip": folder / "clip"}


def noise(n, height=64, width=64, seed=0):
    """Coloured blotches: (n, 3, height, width) in [0, 1], some of them far from grey."""
    coarse = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (height, width), mode="bilinear").mul(1.6).sub(0.3).clamp(0, 1)


def requests_for(scorer, images):
    """Metadata made from what the scorer itself finds: right for every second image, one object too many for the others."""
    arrays = geneval.to_arrays(images)
    arrays = [geneval.as_jpeg(a) for a in arrays] if scorer.mode == "reward_server" else arrays
    found = scorer.detect(arrays, [0.3] * len(arrays))
    assert sum(map(bool, found)) > len(arrays) / 2  # the tiny detector does find things
    names = [min(objects, key=lambda name: len(objects[name]), default="cat") for objects in found]
    scorer.name_colours(arrays, found, [want("colors", (name, 1, "red")) for name in names])
    rows = []
    for i, (name, objects) in enumerate(zip(names, found)):
        best = objects[name][0]["colour"] if objects else "red"
        rows.append(want("colors", (name, 1 if i % 2 == 0 else len(objects.get(name, [])) + 1, best)))
    return rows


def test_logits_equal_the_full_class(weights, monkeypatch):
    """Ours is Mask2FormerModel plus a linear layer, since the full class wants scipy for its loss. Same numbers."""

    class NoLoss(torch.nn.Module):
        def __init__(self, config, weight_dict):
            super().__init__()
            self.num_labels, self.eos_coef = config.num_labels, config.no_object_weight
            self.register_buffer("empty_weight", torch.ones(config.num_labels + 1))

    monkeypatch.setattr(modeling_mask2former, "Mask2FormerLoss", NoLoss)
    full = modeling_mask2former.Mask2FormerForUniversalSegmentation.from_pretrained(weights["weights"]).eval()
    model, head = geneval.load_detector(weights["weights"], "cpu")
    x = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        expected = full(x)
        classes, masks = geneval.detector_logits(model, head, x)
    assert classes.shape == (2, 12, 81) and masks.shape == (2, 12, 24, 16)
    assert_close(classes, expected.class_queries_logits, atol=1e-4, rtol=1e-4)
    assert_close(masks, expected.masks_queries_logits, atol=1e-4, rtol=1e-4)
    assert classes.std() > 1  # the comparison is of something


@pytest.mark.parametrize("mode", ["official", "reward_server"])
def test_scores_do_not_depend_on_batch_or_order(weights, mode):
    images, scorer = noise(6), GenEval(**weights, mode=mode, batch=6)
    metadata = requests_for(scorer, images)
    together = scorer(images, ["p"] * 6, metadata)
    assert together.shape == (6,) and together.dtype == torch.float32 and together.std() > 0
    alone = GenEval(**weights, mode=mode, batch=1)
    assert_close(alone(images, ["p"] * 6, metadata), together)
    order = [3, 0, 5, 1, 4, 2]
    assert_close(scorer(images[order], ["p"] * 6, [metadata[i] for i in order]), together[order])
    single = [scorer(images[i : i + 1], ["p"], [metadata[i]]) for i in range(6)]
    assert all(s.shape == (1,) for s in single)
    assert_close(torch.cat(single), together)
    pil = [Image.fromarray(a) for a in geneval.to_arrays(images)]
    assert_close(scorer(pil, ["p"] * 6, metadata), together)


def test_modes_return_their_own_score(weights):
    images = noise(4)
    metadata = requests_for(GenEval(**weights), images)
    for mode, key in (("official", "correct"), ("reward_server", "soft")):
        scorer = GenEval(**weights, mode=mode)
        results = scorer.judge(images, metadata)
        assert [r["tag"] for r in results] == ["colors"] * 4
        assert scorer(images, ["p"] * 4, metadata).tolist() == pytest.approx([float(r[key]) for r in results])
        assert all(type(r["correct"]) is type(r["strict"]) is bool for r in results)
    assert (GenEval.name, GenEval.higher_is_better) == ("geneval", True)
    assert GenEval(mode="official").range == GenEval().range == (0.0, 1.0)


def test_batch_of_none_loads_nothing():
    scorer = GenEval(weights="nowhere", clip="nowhere")
    assert scorer(torch.empty(0, 3, 64, 64), [], []).shape == scorer([], [], []).shape == (0,)


def test_odd_and_mixed_sizes(weights):
    sizes = [(64, 64), (37, 91), (64, 64), (5, 200), (1, 1), (37, 91)]
    pil = [Image.fromarray(geneval.to_arrays(noise(1, *size, seed=i))[0]) for i, size in enumerate(sizes)]
    scorer = GenEval(**weights, mode="official")
    together = scorer.detect([np.asarray(p) for p in pil], [0.3] * 6)
    for i, (picture, size) in enumerate(zip(pil, sizes)):
        (alone,) = scorer.detect([np.asarray(picture)], [0.3])
        assert {k: [o["box"] for o in v] for k, v in alone.items()} == {
            k: [o["box"] for o in v] for k, v in together[i].items()
        }
        assert all(o["mask"].shape == size for v in alone.values() for o in v)
    metadata = [want("colors", ("cat", 1, "red"))] * 6
    assert scorer(pil, ["p"] * 6, metadata).shape == (6,)


def test_pixels_are_rounded_not_truncated():
    array = geneval.to_arrays(torch.full((1, 3, 2, 4), 0.999))[0]  # 254.7
    assert array.shape == (2, 4, 3) and array.dtype == np.uint8 and (array == 255).all()


def test_counting_uses_its_own_threshold(weights, monkeypatch):
    seen = []
    scorer = GenEval(**weights)
    monkeypatch.setattr(scorer, "detect", lambda arrays, thresholds: seen.extend(thresholds) or [{} for _ in arrays])
    scorer.judge(noise(3), [CAT, DOGS, LEFT])
    assert seen == [0.3, 0.9, 0.3]


def test_reward_server_sees_swapped_jpeg(weights, monkeypatch):
    seen = {}
    for mode in ("official", "reward_server"):

        def spy(pixels, swap=False, mode=mode, real=geneval.preprocess):
            seen[mode] = (pixels, swap)
            return real(pixels, swap)

        with monkeypatch.context() as patch:
            patch.setattr(geneval, "preprocess", spy)
            GenEval(**weights, mode=mode).judge(noise(1), [CAT])
    array = geneval.to_arrays(noise(1))[0]
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", quality=75, subsampling="4:2:0")
    jpeg = np.asarray(Image.open(buffer))
    assert not seen["official"][1] and torch.equal(seen["official"][0][0], torch.tensor(array).permute(2, 0, 1))
    assert seen["reward_server"][1] and torch.equal(seen["reward_server"][0][0], torch.tensor(jpeg).permute(2, 0, 1))
    assert not np.array_equal(array, jpeg)


def test_clip_activation_follows_the_mode(weights):
    official, server = (GenEval(**weights, mode=mode) for mode in ("official", "reward_server"))
    for scorer, name in ((official, "quick_gelu"), (server, "gelu")):
        scorer.load()
        assert scorer.model[2].config.vision_config.hidden_act == scorer.model[2].config.text_config.hidden_act == name
    assert_close(official.model[2].visual_projection.weight, server.model[2].visual_projection.weight)
    with torch.no_grad():
        pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        a, b = (s.model[2].get_image_features(pixel_values=pixels) for s in (official, server))
    assert (a.pooler_output - b.pooler_output).abs().max() > 1e-3  # the flag reaches the layers


def test_colour_classifier(weights):
    """Ten normalised means of three normalised embeddings: three templates, ten colours, in this order."""
    scorer = GenEval(**weights, mode="official")
    scorer.load()
    got = scorer.colour_classifier("tv remote")
    assert got.shape == (10, 16)
    texts = ["a photo of a brown tv remote", "a photo of a brown-colored tv remote", "a photo of a brown object"]
    with torch.no_grad():
        rows = []
        for text in texts:  # one by one: padding must not matter
            tokens = scorer.tokenizer([text], return_tensors="pt")
            assert tokens.input_ids.shape[1] > 20  # the spelling tokenizer reads it
            rows.append(F.normalize(scorer.model[2].get_text_features(**tokens).pooler_output[0], dim=0))
    assert_close(got[7], F.normalize(torch.stack(rows).mean(0), dim=0), atol=1e-5, rtol=1e-5)
    assert scorer.colour_classifier("tv remote") is got  # once per class name


def test_crop_shows_the_object_on_grey():
    array = np.zeros((40, 60, 3), np.uint8)
    array[..., 0] = 255  # all red
    mask = np.zeros((40, 60), bool)
    mask[10:30, 20:40] = True
    mask[10:20, 20:30] = False  # an L, so that its box holds some background
    crop = geneval.crop_object(array, {"box": (20.0, 10.0, 40.0, 30.0), "mask": mask})
    back = crop * torch.tensor(geneval.CLIP_STD)[:, None, None] + torch.tensor(geneval.CLIP_MEAN)[:, None, None]
    assert crop.shape == (3, 224, 224)
    assert_close(back[:, 20, 20], torch.full((3,), 153 / 255), atol=1e-4, rtol=0)  # #999
    assert_close(back[:, 200, 200], torch.tensor([1.0, 0, 0]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "size, resized, corner",  # PIL (width, height) -> shortest edge 224; then the crop's offset
    [
        ((512, 512), (224, 224), (0, 0)),
        ((331, 200), (370, 224), (73, 0)),
        ((7, 40), (224, 1280), (0, 528)),
        ((201, 200), (225, 224), (0, 0)),
        ((203, 200), (227, 224), (2, 0)),
    ],  # fmt: skip
)
def test_clip_pixels_crops_where_torchvision_does(size, resized, corner):
    """(L - 224) / 2 is rounded, half to even: .5 -> 0, 1.5 -> 2."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    whole = np.asarray(picture.resize(resized, Image.Resampling.BICUBIC))
    part = whole[corner[1] : corner[1] + 224, corner[0] : corner[0] + 224]
    expected = (torch.tensor(part).permute(2, 0, 1) / 255 - torch.tensor(geneval.CLIP_MEAN)[:, None, None]) / torch.tensor(
        geneval.CLIP_STD
    )[:, None, None]
    assert_close(geneval.clip_pixels(picture), expected)


def test_float32_without_tf32_and_settings_restored():
    torch.set_float32_matmul_precision("high")
    before = torch.backends.cudnn.allow_tf32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with geneval.exact_float32("cpu"):
            assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32 == before
    torch.set_float32_matmul_precision("highest")


# ----------------------------------------------------------------------------------------------------------
# Bad input: one clear line, never a score
# ----------------------------------------------------------------------------------------------------------

BAD_METADATA = [
    ({}, "tag"),
    ({"include": CAT["include"]}, "tag"),
    ({"tag": "numbers", "include": CAT["include"]}, "tag.*counting"),
    ({"tag": "colors"}, "include"),
    ({"tag": "colors", "include": []}, "include"),
    ({"tag": "colors", "include": [{"count": 1}]}, "class"),
    ({"tag": "colors", "include": [{"class": "mouse", "count": 1}]}, "'mouse' is not among.*computer mouse"),
    ({"tag": "colors", "include": [{"class": "unicorn", "count": 1}]}, "'unicorn' is not among"),
    ({"tag": "colors", "include": [{"class": "cat"}]}, "count"),
    ({"tag": "colors", "include": [{"class": "cat", "count": 0}]}, "count"),
    ({"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "mauve"}]}, "mauve"),
    ({"tag": "counting", "include": CAT["include"], "exclude": [{"class": "kat", "count": 2}]}, "'kat'"),
    ({"tag": "position", "include": [{"class": "cat", "count": 1, "position": ["left of", 0]}]}, "position"),
    ({"tag": "position", "include": [*CAT["include"], {"class": "dog", "count": 1, "position": ["behind", 0]}]}, "position"),
    (None, "tag"),
]


@pytest.mark.parametrize("metadata, message", BAD_METADATA)
def test_bad_metadata(metadata, message):
    scorer = GenEval(weights="nowhere", clip="nowhere")  # metadata is read before anything is loaded
    with pytest.raises(ValueError, match=message) as error:
        scorer(noise(2), ["p"] * 2, [CAT, metadata])
    assert "\n" not in str(error.value) and "metadata 1" in str(error.value)


class Undecodable(Image.Image):
    def convert(self, *args, **kwargs):
        raise OSError("image file is truncated")


@pytest.mark.parametrize(
    "images, message",
    [
        (noise(1)[0], r"\(B, 3, H, W\)"),
        (noise(1)[:, :1], r"\(B, 3, H, W\)"),
        ((noise(1) * 255).byte(), "uint8"),
        (noise(1) * 2 - 1, r"\[0, 1\]"),
        (noise(1) * math.nan, r"\[0, 1\]"),
        (torch.rand(1, 3, 0, 8), r"\(B, 3, H, W\)"),
        ([Undecodable()], "image 0 cannot be decoded.*truncated"),
        (["cat.png"], "image 0 cannot be decoded"),
    ],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message) as error:
        GenEval(weights="nowhere", clip="nowhere")(images, ["p"], [CAT])
    assert "\n" not in str(error.value)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="2 prompts and 3 lines"):
        GenEval()(noise(3), ["p"] * 2, [CAT] * 3)
    with pytest.raises(ValueError, match="3 images and 2 lines"):
        GenEval()(noise(3), ["p"] * 2, [CAT] * 2)
    with pytest.raises(ValueError, match="mode 'strict'"):
        GenEval(mode="strict")


def test_a_detector_that_gives_nan_gives_no_score(weights):
    scorer = GenEval(**weights)
    scorer.load()
    torch.nn.init.constant_(scorer.model[1].weight, math.nan)
    with pytest.raises(ValueError, match="not finite"):
        scorer(noise(1), ["p"], [CAT])


def test_a_clip_that_gives_nan_names_no_colour(weights):
    scorer = GenEval(**weights)
    metadata = requests_for(scorer, noise(4))
    torch.nn.init.constant_(scorer.model[2].visual_projection.weight, math.nan)
    with pytest.raises(ValueError, match="CLIP's output is not finite"):
        scorer(noise(4), ["p"] * 4, metadata)


def test_a_dropped_model_is_loaded_again(weights):
    scorer = GenEval(**weights)
    metadata = requests_for(scorer, noise(4))
    before, scorer.model = scorer(noise(4), ["p"] * 4, metadata), None
    assert not any(isinstance(v, torch.nn.Module) for v in vars(scorer).values())
    assert torch.equal(scorer(noise(4), ["p"] * 4, metadata), before)


def test_a_tokenizer_without_its_words_is_refused(weights, tmp_path):
    CLIPModel.from_pretrained(weights["clip"]).save_pretrained(tmp_path)
    CLIPTokenizer().save_pretrained(tmp_path)  # what transformers makes of missing files: three tokens and no complaint
    with pytest.raises(ValueError, match="differ in vocabulary.*hf download"):
        GenEval(weights=weights["weights"], clip=tmp_path).load()


def test_missing_weights_name_the_command(weights, tmp_path):
    with pytest.raises(ValueError, match=r"curl .*743b7d99\.pth .*--convert .*743b7d99\.pth --out"):
        GenEval(weights=tmp_path / "none", clip=weights["clip"])(noise(1), ["p"], [CAT])
    with pytest.raises(ValueError, match="hf download openai/clip-vit-large-patch14"):
        GenEval(weights=weights["weights"], clip=tmp_path / "none")(noise(1), ["p"], [CAT])


def test_another_checkpoint_is_refused(tmp_path):
    geneval.save_detector(geneval.convert(random_checkpoint(**TINY), tiny_config()), tiny_config(), tmp_path, "f" * 64)
    with pytest.raises(ValueError, match="another model than GenEval"):
        geneval.load_detector(tmp_path, "cpu")
    (tmp_path / "model.safetensors").write_bytes(b"nothing like it")
    with pytest.raises(ValueError, match="cannot be read"):
        geneval.load_detector(tmp_path, "cpu")


def test_the_file_can_be_copied_alone():
    tree = ast.parse((ROOT / "rewards" / "geneval.py").read_text())
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    others = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert others == {"torch", "transformers", "numpy", "PIL", "safetensors"}


def command(*args, expect):
    run = subprocess.run([sys.executable, "rewards/geneval.py", *map(str, args)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == expect, run.stderr
    return run


def test_command_line_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    file = tmp_path / "any.pth"
    file.write_bytes(b"not a checkpoint")
    run = command("--convert", file, "--out", tmp_path / "out", expect=2)
    assert run.stdout == "" and run.stderr.count("\n") == 1 and "743b7d99" in run.stderr
    assert not (tmp_path / "out").exists()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    for name, message in (("SHA256_MMDET3", "mmdet 3"), ("SHA256", "cannot be read")):
        monkeypatch.undo()
        monkeypatch.setattr(geneval, name, digest[:8])
        assert geneval.main(["--convert", str(file), "--out", str(tmp_path / "out")]) == 2
        line = capsys.readouterr().err
        assert message in line and line.count("\n") == 1
    assert geneval.main(["--convert", str(tmp_path / "none.pth"), "--out", str(tmp_path / "out")]) == 2
    assert "curl" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------
# Prompts for training
# ----------------------------------------------------------------------------------------------------------


def test_training_prompts():
    lines = geneval.training_prompts(3000, test_prompts=["a photo of two dogs"], seed=1)
    assert lines == geneval.training_prompts(3000, test_prompts=["a photo of two dogs"], seed=1)
    for i, line in enumerate(lines):
        geneval.check_metadata(line, i)
    tags = Counter(line["tag"] for line in lines)
    share = {"position": 7 / 17, "counting": 5 / 17, "color_attr": 3 / 17, "colors": 1 / 17, "two_object": 1 / 17}
    assert set(tags) == set(share)  # single_object has weight 0
    for tag, p in share.items():
        assert abs(tags[tag] - 3000 * p) < 5 * math.sqrt(3000 * p * (1 - p)), tag
    with pytest.raises(ValueError, match="at least 1"):
        geneval.training_prompts(0, [])


@pytest.mark.parametrize("tag", geneval.TAGS)
def test_prompt_says_what_the_metadata_asks(tag):
    article = lambda word: ("an " if word[0] in "aeiou" else "a ") + word
    rng = random.Random(0)
    for _ in range(300):
        line = geneval.make_prompt(tag, rng)
        geneval.check_metadata(line, 0)
        first, second = (line["include"] * 2)[:2]
        if tag == "single_object":
            text = article(first["class"])
        elif tag == "two_object":
            text = f"{article(first['class'])} and {article(second['class'])}"
        elif tag == "counting":
            plural = first["class"] + ("es" if first["class"].endswith("s") else "s")
            text = f"{['two', 'three', 'four'][first['count'] - 2]} {plural}"
            assert line["exclude"] == [{"class": first["class"], "count": first["count"] + 1}]
        elif tag == "colors":
            text = f"{article(first['color'])} {first['class']}"
        elif tag == "color_attr":
            text = f"{article(first['color'])} {first['class']} and {article(second['color'])} {second['class']}"
            assert first["color"] != second["color"]
        else:
            relation, target = second["position"]
            text = f"{article(second['class'])} {relation} {article(first['class'])}"
            assert target == 0
        assert line["prompt"] == "a photo of " + text
        assert len(line["include"]) == 1 or first["class"] != second["class"]
        assert tag not in ("colors", "color_attr") or "person" not in (first["class"], second["class"])


def test_prompt_file(tmp_path):
    excluded = {line["prompt"] for line in geneval.training_prompts(400, [], seed=0)}
    test = tmp_path / "evaluation_metadata.jsonl"
    test.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in excluded))
    assert geneval.main(["--prompts", "400", "--test", str(test), "--out", str(tmp_path / "train.jsonl")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(lines) == 400 and not excluded & {line["prompt"] for line in lines}
    for i, line in enumerate(lines):  # as read back: positions are lists now
        geneval.check_metadata(line, i)
    test.write_text("no json\n")
    assert geneval.main(["--prompts", "4", "--test", str(test), "--out", str(tmp_path / "other.jsonl")]) == 2
    assert not (tmp_path / "other.jsonl").exists()


# ----------------------------------------------------------------------------------------------------------
# With the real weights
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_weights():
    """Uniform squares are named by their colour; where the reward server's sample is there, both its objects are found."""
    scorer = GenEval(ROOT / geneval.WEIGHTS, mode="official")
    try:
        scorer.load()
    except ValueError as error:
        pytest.skip(str(error))
    rgb = dict(red="#e01010", orange="#ff8c00", yellow="#ffe600", green="#109020", blue="#1030e0", purple="#8010a0",
               pink="#ff80c0", brown="#7a4a20", black="#000000", white="#ffffff")  # fmt: skip
    arrays = [np.asarray(Image.new("RGB", (256, 256), value)) for value in rgb.values()]
    found = [{"car": [{"box": (0, 0, 256, 256), "mask": np.ones((256, 256), bool)}]} for _ in arrays]
    scorer.name_colours(arrays, found, [CAR] * len(arrays))
    assert [f["car"][0]["colour"] for f in found] == list(rgb)
    assert scorer.judge([Image.new("RGB", (512, 512), "#808080")], [CAT])[0]["correct"] is False
    sample = ROOT / "weights" / "a photo of a brown giraffe and a white stop sign.png"  # of yifan123/reward-server
    if sample.is_file():
        (objects,) = scorer.detect([np.asarray(Image.open(sample).convert("RGB"))], [0.3])
        assert {"giraffe", "stop sign"} <= set(objects)
