"""rewards/geneval*.py without the weights: rules on cases worked out by hand, the detector on
made-up logits, the converter on published names and shapes, tiny random models all the way."""

import hashlib
import io
import json
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, call, raises
from PIL import Image
from test_rewards import MEAN, STD, as_image, as_pixels, noise
from torch.testing import assert_close
from transformers import CLIPModel, CLIPTokenizer

from experiments.published_networks import DETECTOR, detector_shapes, detector_state, save_clip
from experiments.published_networks import mmdet_forward, tiny_detector_config, window_index
from rewards import geneval, geneval_convert, geneval_detector, geneval_prompts
from rewards import geneval_rules as rules
from rewards.geneval import GenEval
from rewards.images import as_pictures

# ---- The rules. Every expected value was worked out by hand from the definitions.


def thing(x=0.0, y=0.0, colour=None, size=10.0):
    """A square object whose top left corner is at (x, y)."""
    return {"box": (x, y, x + size, y + size), "score": 0.95, "mask": None, "colour": colour}


def want(tag, *include, exclude=()):
    keys = ("class", "count", "color", "position")
    rows = [{k: v for k, v in zip(keys, row) if v is not None} for row in include]
    exclude = [dict(zip(keys, row)) for row in exclude]
    return {"tag": tag, "include": rows, "exclude": exclude, "prompt": "a photo"}


CAT = want("single_object", ("cat", 1))
DOGS = want("counting", ("dog", 3), exclude=[("dog", 4)])
PAIR = want("two_object", ("cat", 1), ("dog", 1))
CAR = want("colors", ("car", 1, "red"))
BOTH = want("color_attr", ("cat", 1, "red"), ("dog", 1, "blue"))
TWO_RED = want("color_attr", ("cat", 2, "red"))  # no prompt of GenEval has it, the rule does
LEFT = want("position", ("cat", 1), ("dog", 1, None, ["left of", 0]))  # a dog left of a cat
LEFT2 = want("position", ("cat", 2), ("dog", 2, None, ["left of", 0]))
it, red, blue, white = thing(), *(thing(colour=c) for c in ("red", "blue", "white"))
L, M, R = thing(0), thing(100), thing(200)  # left, middle, right

CASES = [  # metadata, what is found (best first): official, strict, softened
    (CAT, {}, 0, 0, 0),
    (CAT, {"dog": [it]}, 0, 0, 0),
    (CAT, {"cat": [it], "dog": [it]}, 1, 1, 1),
    (CAT, {"cat": [it] * 2}, 1, 0, 0),
    (CAT, {"cat": [it] * 16}, 1, 0, -14),  # the lowest reward there is
    (DOGS, {"dog": [it] * 2}, 0, 0, 2 / 3),
    (DOGS, {"dog": [it] * 3}, 1, 1, 1),
    (DOGS, {"dog": [it] * 4}, 0, 0, 2 / 3),  # officially only `exclude` forbids the fourth
    (DOGS, {"dog": [it] * 7}, 0, 0, -1 / 3),
    (PAIR, {"cat": [it], "dog": [it]}, 1, 1, 1),
    (PAIR, {"cat": [it]}, 0, 0, 1 / 2),
    (PAIR, {"cat": [it], "dog": [it] * 2}, 1, 0, 1 / 2),
    (CAR, {"car": [red]}, 1, 1, 1),
    (CAR, {"car": [blue]}, 0, 0, 1 / 2),
    (CAR, {}, 0, 0, 0),  # 0 for the count and 0 for the colour
    (CAR, {"car": [red, blue]}, 1, 0, 0),
    (CAR, {"car": [blue, red]}, 0, 0, 0),
    (BOTH, {"cat": [red], "dog": [blue]}, 1, 1, 1),
    (BOTH, {"cat": [blue], "dog": [red]}, 0, 0, 1 / 2),
    (BOTH, {"cat": [red], "dog": [red]}, 0, 0, 3 / 4),
    (BOTH, {"cat": [red]}, 0, 0, 1 / 2),
    (TWO_RED, {"cat": [red, white]}, 0, 0, 3 / 4),
    (TWO_RED, {"cat": [red] * 3}, 1, 0, 1 / 4),
    (LEFT, {"cat": [M], "dog": [L]}, 1, 1, 1),
    (LEFT, {"cat": [M], "dog": [R]}, 0, 0, 3 / 4),  # (1 + 1 + 0 + the slip's 1) / 4
    (LEFT, {"dog": [L]}, 0, 0, 1 / 3),
    (LEFT, {"cat": [M]}, 0, 0, 1 / 3),
    (LEFT, {"cat": [M, thing(-50)], "dog": [L]}, 1, 0, 1 / 3),  # officially the best one counts
    (LEFT, {"cat": [thing(-50), M], "dog": [L]}, 0, 0, 1 / 3),
    (LEFT, {"cat": [M], "dog": [L, R]}, 1, 0, 1 / 3),
    (LEFT2, {"cat": [M, R], "dog": [L, thing(20)]}, 1, 1, 1),
    (LEFT2, {"cat": [M, L], "dog": [L, thing(20)]}, 0, 0, 3 / 4),  # every pair must be right ...
    (LEFT2, {"cat": [L, L], "dog": [M, R]}, 0, 0, 3 / 4),  # ... and is counted once
]


@pytest.mark.parametrize("metadata, found, official, strict, soft", CASES)
def test_rules(metadata, found, official, strict, soft):
    assert rules.official(found, metadata) is bool(official)
    reward, exact = rules.softened(found, metadata)
    assert reward == pytest.approx(soft, abs=1e-12) and exact is bool(strict)
    assert (reward == 1) is exact  # rewards.tables computes the strict score from this
    without, same = rules.softened(found, metadata, position_slip=False)
    slipped = soft == 3 / 4 and metadata["tag"] == "position"
    assert without == pytest.approx(2 / 3 if slipped else soft) and same is exact


def test_relative_position():
    cases = [  # b is a square of `size` at the origin, a is moved by (dx, dy); the dead zone is
        ((-100, 0), 10, {"left of"}),  # 0.1 (size + size): (100 - 2) / 100 = .98
        ((0, -100), 10, {"above"}),  # y grows downwards
        ((0, 100), 10, {"below"}),
        ((0, 0), 10, set()),
        ((2, 0), 10, set()),  # just the dead zone
        ((2.0005, 0), 10, set()),  # 5e-4 beyond it: still below 1e-3
        ((4, 0), 10, set()),  # (4 - 2) / 4 = .5 is not above .5; over the cut offset it would be 1
        ((5, 0), 10, {"right of"}),  # .6
        ((-100, -100), 10, {"left of", "above"}),  # 98 / 141.4 = .69 both ways
        ((-100, -50), 10, {"left of"}),  # .877 and 48 / 111.8 = .43
        ((30, 0), 100, set()),  # (30 - 20) / 30
        ((41, 0), 100, {"right of"}),  # 21 / 41 = .512: boxes may overlap
    ]
    for (dx, dy), size, relations in cases:
        a, b = (dx, dy, dx + size, dy + size), (0, 0, size, size)
        assert rules.relative_position(a, b) == relations
    # The dead zone is per axis: offset (150, 60), dead zones 40 and 2, so 110 and 58 over 161.6
    assert rules.relative_position((150, 60, 350, 70), (0, 0, 200, 10)) == {"right of"}


def test_summary():
    rows = [("counting", 1, 1, 1.0)] * 3 + [("counting", 0, 0, -1.0)]
    rows += [("colors", 0, 0, 0.5), ("position", 1, 0, 0.5)]
    results = [{"tag": t, "correct": c == 1, "strict": s == 1, "soft": r} for t, c, s, r in rows]
    expected = {"official": (3 / 4 + 0 + 1) / 3}  # tasks weigh the same, whatever their size
    expected |= {"official_images": 4 / 6, "strict": 3 / 6, "softened": 3 / 6}
    numbers = rules.summary(results)
    assert numbers.pop("tasks") == {"counting": 0.75, "colors": 0.0, "position": 1.0}
    assert numbers == pytest.approx(expected)
    raises("no results", rules.summary, [])
    names = rules.CLASSES
    assert len(set(names)) == 80 and names[0] == "person" and names[79] == "toothbrush"
    assert names[64:67] == ("computer mouse", "tv remote", "computer keyboard")  # not COCO's


def entry(**changes):
    return {"class": "cat", "count": 1} | changes


BAD_METADATA = [
    (None, "tag"),
    ({"include": [entry()]}, "tag"),
    ({"tag": "numbers", "include": [entry()]}, "tag.*counting"),
    ({"tag": "colors", "include": []}, "include"),
    ({"tag": "colors", "include": [{"count": 1}]}, "class"),
    ({"tag": "colors", "include": [entry(**{"class": "mouse"})]}, "'mouse' .*computer mouse"),
    ({"tag": "colors", "include": [entry(**{"class": "unicorn"})]}, "'unicorn' is not among"),
    ({"tag": "colors", "include": [entry(count=0)]}, "count"),
    ({"tag": "colors", "include": [entry(color="mauve")]}, "mauve"),
    ({"tag": "counting", "include": [entry()], "exclude": [entry(**{"class": "kat"})]}, "'kat'"),
    ({"tag": "position", "include": [entry(position=["left of", 0])]}, "position"),
    ({"tag": "position", "include": [entry(), entry(position=["behind", 0])]}, "position"),
]


@pytest.mark.parametrize("metadata, message", BAD_METADATA)
def test_bad_metadata(metadata, message):
    scorer = GenEval(weights="nowhere", clip="nowhere")  # metadata is read before loading
    images = torch.rand(2, 3, 8, 8)
    raises(f"metadata 1.*{message}", scorer, images, ["p"] * 2, [CAT, metadata])


# ---- The detector's pre- and post-processing (mmdet 2.x)


@pytest.mark.parametrize(
    "size, resized, padded",  # (height, width)
    [
        ((480, 640), (800, 1067), (800, 1088)),  # 640 * 5/3 = 1066.67
        ((591, 590), (801, 800), (832, 800)),  # 591 * 800/590 = 801.36
        ((400, 2000), (267, 1333), (288, 1344)),  # the long edge decides: 400 * .6665 = 266.6
        ((1, 1), (800, 800), (800, 800)),
    ],
)
def test_preprocess_sizes_and_padding(size, resized, padded):
    x, (h, w) = geneval_detector.preprocess(torch.full((1, 3, *size), 200, dtype=torch.uint8))
    assert (h, w) == resized and x.shape == (1, 3, *padded)
    mean, std = torch.tensor(geneval_detector.MEAN), torch.tensor(geneval_detector.STD)
    assert_close(x[0, :, :h, :w].amin((1, 2)), (200 - mean) / std)
    if padded != resized:  # grey 128 before the normalisation, not 0 after it
        assert_close(x[0, :, -1, -1], (128 - mean) / std)


@pytest.mark.parametrize("size", [(13, 22), (70, 45)])  # up and down
def test_preprocess_interpolates_like_cv2(monkeypatch, size):
    """Linear along each axis, with half-pixel centres, without antialiasing, rounded to bytes."""
    monkeypatch.setattr(geneval_detector, "EDGES", (60, 32))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, generator=generator)
    x, resized = geneval_detector.preprocess(pixels)
    expected = pixels[0, 1].numpy().astype(float)
    for axis, (old, new) in enumerate(zip(size, resized)):
        at = (np.arange(new) + 0.5) * old / new - 0.5
        line = lambda values, at=at, old=old: np.interp(at, np.arange(old), values)
        expected = np.apply_along_axis(line, axis, expected)
    levels = x[0, 1, : resized[0], : resized[1]].double()
    levels = levels * geneval_detector.STD[1] + geneval_detector.MEAN[1]
    assert np.abs(levels.numpy() - expected).max() < 0.5001
    assert_close(levels, levels.round(), atol=1e-3, rtol=0)
    swapped = geneval_detector.preprocess(pixels, swap=True)[0]
    assert torch.equal(swapped, geneval_detector.preprocess(pixels.flip(1))[0])


def class_logits(*rows):
    """rows: {class index: probability} of a query -> (Q, 81); the rest is "no object"."""
    p = torch.full((len(rows), 81), 1e-9)
    for q, row in enumerate(rows):
        p[q, -1] = 1 - sum(row.values())
        for label, value in row.items():
            p[q, label] = value
    return p.log()


def mask_logits(*boxes, inside=40.0):
    """Boxes (x1, y1, x2, y2), ends excluded -> (Q, 8, 8): `inside` in the box, -40 around it."""
    masks = torch.full((len(boxes), 8, 8), -40.0)
    for q, (x1, y1, x2, y2) in enumerate(boxes):
        masks[q, y1:y2, x1:x2] = inside
    return masks


def detections(logits, masks, threshold=0.3):
    return geneval_detector.postprocess(logits, masks, (8, 8), (8, 8), (8, 8), threshold)


CAT_ID, DOG_ID = rules.CLASSES.index("cat"), rules.CLASSES.index("dog")
WHOLE = (0, 0, 8, 8)


def test_postprocess_box_score_and_mask():
    masks = mask_logits((3, 2, 7, 5), WHOLE, inside=math.log(3))
    found = detections(class_logits({CAT_ID: 0.8}, {DOG_ID: 0.6}), masks)
    assert list(found) == ["cat", "dog"]
    (cat,) = found["cat"]
    assert cat["box"] == (3.0, 2.0, 7.0, 5.0)  # the last pixel's coordinates + 1
    assert cat["score"] == pytest.approx(0.8 * 0.75, abs=1e-4)  # sigmoid(log 3) = 3/4 inside
    assert cat["mask"].dtype == bool and cat["mask"].sum() == 12 and cat["mask"][2:5, 3:7].all()
    assert found["dog"][0]["box"] == (0.0, 0.0, 8.0, 8.0)  # overlapping masks are both kept
    both = detections(class_logits({CAT_ID: 0.5, DOG_ID: 0.45}), mask_logits((1, 1, 3, 3)))
    assert both["cat"][0]["box"] == both["dog"][0]["box"] == (1, 1, 3, 3)  # a query, two labels
    assert detections(class_logits({CAT_ID: 0.99}), mask_logits((0, 0, 0, 0))) == {}  # no pixel


def test_postprocess_thresholds():
    rows = [{CAT_ID: p} for p in (0.29, 0.91, 0.31, 0.95, 0.89)]
    given = class_logits(*rows), mask_logits(*[(0, 0, 4, 4)] * 5)
    for threshold, expected in {0.3: [0.95, 0.91, 0.89, 0.31], 0.9: [0.95, 0.91]}.items():
        found = detections(*given, threshold)
        assert [round(o["score"], 4) for o in found["cat"]] == expected
    half = torch.zeros(1, 2), mask_logits(WHOLE)  # a score of .5 exactly: the threshold is strict
    sure = torch.tensor([[100.0, -100.0]]), mask_logits(WHOLE, inside=1e-30)  # 1 * sigmoid(0)
    for given in (half, sure):
        assert detections(*given, 0.5) == {} and len(detections(*given, 0.4999)["person"]) == 1


def test_postprocess_limits():
    rows = [{CAT_ID: 0.5 + q / 100} for q in range(20)]
    found = detections(class_logits(*rows), mask_logits(*[WHOLE] * 20))
    best = [0.69 - q / 100 for q in range(16)]  # at most sixteen of a class
    assert [o["score"] for o in found["cat"]] == pytest.approx(best, abs=1e-4)
    p = torch.linspace(0.9, 0.5, 105).tolist()
    rows = [{q % 80: p[q]} for q in range(105)]
    found = detections(class_logits(*rows), mask_logits(*[WHOLE] * 105))
    scores = sorted(o["score"] for objects in found.values() for o in objects)
    assert len(scores) == 100 and scores[0] == pytest.approx(p[99], abs=1e-4)  # the hundred best


def test_postprocess_cuts_the_padding_and_scales_to_the_image():
    # The detector saw 32 x 32 of which 24 x 32 is image, with masks at a quarter; the image is
    # 12 x 16. The dog is only in the padding: its seam is at row 6 * 4 = 24, row 23 is below 0.
    logits = class_logits({CAT_ID: 0.9}, {DOG_ID: 0.9})
    masks = mask_logits((0, 0, 4, 6), (0, 6, 8, 8))
    found = geneval_detector.postprocess(logits, masks, (32, 32), (24, 32), (12, 16), 0.3)
    assert list(found) == ["cat"]
    (cat,) = found["cat"]
    assert cat["mask"].shape == (12, 16) and cat["box"] == (0.0, 0.0, 8.0, 12.0)


# ---- The converter, on mmdet's names and shapes from experiments/published_networks.py


def test_every_published_weight_has_its_place():
    """Each tensor holds a number of its own: all come out, and nothing else."""
    shapes = detector_shapes(**DETECTOR)
    indices = {key: window_index(7) for key in shapes if key.endswith("position_index")}
    learned = {key: shape for key, shape in shapes.items() if key not in indices}
    assert round(sum(map(math.prod, learned.values())) / 1e6, 2) == 68.74  # Swin-S, 80 classes
    state = {key: torch.tensor(i).expand(learned[key]) for i, key in enumerate(learned)}
    converted = geneval_convert.convert(state | indices, geneval_convert.detector_config())
    new = [key for key in converted if "swin.layernorm" in key]  # transformers has it, mmdet not
    values = [tensor.unique() for key, tensor in converted.items() if key not in new]
    counts = torch.cat(values).long().bincount()  # one value a tensor
    several = [".qkv." in key or ".attentions.1.attn.in_proj" in key for key in learned]
    assert len(new) == 2 and counts.tolist() == [3 if split else 1 for split in several]


def save_tiny(folder, digest=geneval_detector.SHA256 + "0" * 56):
    converted = geneval_convert.convert(detector_state(), tiny_detector_config())
    geneval_convert.save_detector(converted, tiny_detector_config(), folder, digest)


@pytest.mark.parametrize("size", [(64, 96), (160, 32)])
def test_converted_model_computes_what_mmdet_does(tmp_path, size):
    save_tiny(tmp_path)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    model, head = geneval_detector.load_detector(tmp_path, "cpu")
    with torch.no_grad():
        found = geneval_detector.detector_logits(model, head, x)
        expected = mmdet_forward(detector_state(), x)
    assert found[0].std() > 3 and found[1].std() > 0.1  # not a comparison of nothing with nothing
    assert_close(found, expected, atol=2e-3, rtol=1e-4)


BLOCK = "backbone.stages.0.blocks.0.attn.w_msa."
MMDET3 = ("transformer_decoder.layers.0.cross_attn.attn.in_proj_bias",
          "pixel_decoder.encoder.layers.0.self_attn.value_proj.bias")  # fmt: skip


@pytest.mark.parametrize(
    "change, message",  # None: that weight is left out
    [
        ({"ema_backbone_norm0_weight": torch.ones(8)}, "ema_backbone_norm0_weight"),
        ({"panoptic_head.query_feat.weight": None}, "queries_features"),
        ({"panoptic_head.cls_embed.bias": torch.ones(134)}, r"class_predictor.bias.*134"),
        ({BLOCK + "relative_position_index": torch.zeros(9, 9)}, "index"),
        ({"panoptic_head." + MMDET3[0]: torch.ones(1)}, "mmdet 3"),
        ({"panoptic_head." + MMDET3[1]: torch.ones(1)}, "mmdet 3"),
    ],
)
def test_convert_refuses(change, message):
    state = detector_state() | change
    state = {key: tensor for key, tensor in state.items() if tensor is not None}
    raises(message, geneval_convert.convert, state, tiny_detector_config())


def test_the_converter_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    file, out = tmp_path / "any.pth", tmp_path / "out"
    file.write_bytes(b"not a checkpoint")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    cases = [([file], "", "743b7d99"), ([tmp_path / "none.pth"], "", "curl"),
             ([], "", "FILE.pth"), ([file], "SHA256_MMDET3", "mmdet 3"),
             ([file], "SHA256", "cannot be read")]  # fmt: skip
    for args, constant, message in cases:
        with monkeypatch.context() as patch:
            if constant:
                patch.setattr(geneval_convert, constant, digest)
            with pytest.raises(SystemExit, match="2"):
                call(patch, "rewards.geneval_convert", *args, "--out", out)
        line = capsys.readouterr().err
        assert message in line and line.startswith("error: ") and line.count("\n") == 1
    assert not out.exists()


# ---- Tiny random models on the whole path


@pytest.fixture(scope="module")
def tiny_files(tmp_path_factory):
    """A tiny CLIP, and a .pth of mmdet's format with the hash that stands in for the real one."""
    folder = tmp_path_factory.mktemp("weights")
    save_clip(folder / "clip", side=224, patch=32)
    torch.save({"meta": {}, "state_dict": detector_state()}, folder / "tiny.pth")
    return folder, hashlib.sha256((folder / "tiny.pth").read_bytes()).hexdigest()


@pytest.fixture
def weights(tiny_files, monkeypatch):
    """Folders for GenEval. The detector's is made by the command, hash check included."""
    folder, digest = tiny_files
    for module in (geneval_detector, geneval_convert):
        monkeypatch.setattr(module, "SHA256", digest[:8])
    monkeypatch.setattr(geneval_convert, "detector_config", tiny_detector_config)
    monkeypatch.setattr(geneval_detector, "EDGES", (133, 80))  # a hundred times faster
    if not (folder / "detector").exists():
        files = [folder / "tiny.pth", "--out", folder / "detector"]
        call(monkeypatch, "rewards.geneval_convert", *files)
    return {"weights": folder / "detector", "clip": folder / "clip"}


PICTURES = torch.stack([noise(64, 64, seed) for seed in range(4)])


def metadata_for(scorer, images):
    """What the scorer itself finds: right for every second image, one too many for the others."""
    arrays = [np.array(picture) for picture in as_pictures(images)]
    if scorer.mode == "reward_server":
        arrays = [geneval.as_jpeg(array) for array in arrays]
    found = scorer.detect(arrays, [0.3] * len(arrays))
    assert sum(map(bool, found)) > len(arrays) / 2  # the tiny detector does find things
    names = [min(objects, key=lambda n: len(objects[n]), default="cat") for objects in found]
    scorer.name_colours(arrays, found, [want("colors", (name, 1, "red")) for name in names])
    rows = []
    for i, (name, objects) in enumerate(zip(names, found)):
        things = objects.get(name, [thing(colour="red")])
        count = 1 if i % 2 == 0 else len(things) + 1
        rows.append(want("colors", (name, count, things[0]["colour"])))
    return rows


@pytest.mark.parametrize("mode, key", [("official", "correct"), ("reward_server", "soft")])
def test_scores_depend_on_the_image_and_its_metadata_alone(weights, mode, key):
    """Not on batch size, order, the images beside it, its form, or whether the model is new."""
    sizes = [(64, 64), (37, 91), (64, 64), (5, 200), (1, 1), (37, 91)]
    images = [as_image(noise(*size, seed)) for seed, size in enumerate(sizes)]
    scorer = GenEval(**weights, mode=mode, batch=6)
    assert (scorer.name, scorer.higher_is_better, scorer.range) == ("geneval", True, (0.0, 1.0))
    metadata = metadata_for(scorer, images)
    together = scorer(images, ["p"] * 6, metadata)
    assert together.shape == (6,) and together.dtype == torch.float32 and together.std() > 0
    results = scorer.judge(images, metadata)
    assert together.tolist() == pytest.approx([float(result[key]) for result in results])
    scorer.batch, order = 1, [3, 0, 5, 1, 4, 2]
    shuffled = [images[i] for i in order]
    assert_close(scorer(shuffled, ["p"] * 6, [metadata[i] for i in order]), together[order])
    scorer.model = None
    assert not any(isinstance(v, torch.nn.Module) for v in vars(scorer).values())
    tensor = as_pixels(images[0])[None]
    assert torch.equal(scorer(tensor, ["p"], metadata[:1]), together[:1])


def test_counting_has_its_own_threshold(monkeypatch):
    seen, scorer = [], GenEval()
    scorer.model = (None, None, None)
    find_nothing = lambda arrays, thresholds: seen.extend(thresholds) or [{} for _ in arrays]
    monkeypatch.setattr(scorer, "detect", find_nothing)
    scorer.judge(PICTURES[:3], [CAT, DOGS, LEFT])
    assert seen == [0.3, 0.9, 0.3]


def test_the_modes_differ_as_upstream(weights, monkeypatch):
    """The reward server gives the detector a JPEG in BGR, and runs CLIP with GELU."""
    seen, real = [], geneval_detector.preprocess
    spy = lambda pixels, swap: seen.append((pixels[0], swap)) or real(pixels, swap)
    monkeypatch.setattr(geneval_detector, "preprocess", spy)
    scorers = [GenEval(**weights, mode=mode) for mode in ("official", "reward_server")]
    for scorer in scorers:
        scorer.judge(PICTURES[:1], [CAT])
    (plain, plain_swap), (jpeg, jpeg_swap) = seen
    array, buffer = np.array(as_image(PICTURES[0])), io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", quality=75, subsampling="4:2:0")
    assert not plain_swap and np.array_equal(plain.permute(1, 2, 0), array)
    assert jpeg_swap and np.array_equal(jpeg.permute(1, 2, 0), np.asarray(Image.open(buffer)))

    clips = [scorer.model[2] for scorer in scorers]
    for clip, name in zip(clips, ("quick_gelu", "gelu")):
        assert clip.config.vision_config.hidden_act == clip.config.text_config.hidden_act == name
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = (clip.get_image_features(pixel_values=pixels).pooler_output for clip in clips)
    assert (a - b).abs().max() > 1e-3  # the setting reaches the layers


def test_colour_classifier(weights):
    """Ten normalised means of three normalised embeddings, in the order of the colours."""
    scorer = GenEval(**weights, mode="official")
    scorer.load()
    rows = scorer.colour_classifier("tv remote")
    assert rows.shape == (10, 768) and scorer.colour_classifier("tv remote") is rows
    things = ["brown tv remote", "brown-colored tv remote", "brown object"]
    embeddings = []
    with torch.no_grad():
        for text in things:  # one by one: padding must not matter
            tokens = scorer.tokenizer([f"a photo of a {text}"], return_tensors="pt")
            assert tokens.input_ids.shape[1] > 20  # a token for each letter
            embedding = scorer.model[2].get_text_features(**tokens).pooler_output[0]
            embeddings.append(F.normalize(embedding, dim=0))
    expected = F.normalize(torch.stack(embeddings).mean(0), dim=0)
    assert_close(rows[rules.COLOURS.index("brown")], expected, atol=1e-5, rtol=1e-5)


def test_crop_shows_the_object_on_grey():
    array, mask = np.zeros((40, 60, 3), np.uint8), np.zeros((40, 60), bool)
    array[..., 0] = 255  # all red
    mask[10:30, 20:40] = True
    mask[10:20, 20:30] = False  # an L, so that its box holds some background
    crop = geneval.crop_object(array, {"box": (20.0, 10.0, 40.0, 30.0), "mask": mask}) * STD + MEAN
    assert crop.shape == (3, 224, 224)
    assert_close(crop[:, 20, 20], torch.full((3,), 153 / 255), atol=1e-4, rtol=0)  # #999
    assert_close(crop[:, 200, 200], torch.tensor([1.0, 0, 0]), atol=1e-4, rtol=0)


def test_clip_pixels_crops_where_torchvision_does():
    cases = [  # PIL (width, height) -> shortest edge 224; then the crop's offset
        ((512, 512), (224, 224), (0, 0)),
        ((331, 200), (370, 224), (73, 0)),
        ((7, 40), (224, 1280), (0, 528)),
        ((201, 200), (225, 224), (0, 0)),  # (L - 224) / 2 is rounded, half to even: .5 -> 0 ...
        ((203, 200), (227, 224), (2, 0)),  # ... and 1.5 -> 2
    ]
    for (w, h), resized, (x, y) in cases:
        array = np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)
        whole = Image.fromarray(array).resize(resized, Image.Resampling.BICUBIC)
        expected = (as_pixels(whole.crop((x, y, x + 224, y + 224))) - MEAN) / STD
        assert_close(geneval.clip_pixels(Image.fromarray(array)), expected)


# ---- Bad input: one clear line, never a score


def test_lengths_must_agree():
    raises("2 prompts and 3 lines", GenEval(), PICTURES[:3], ["p"] * 2, [CAT] * 3)
    raises("3 images and 2 lines", GenEval(), PICTURES[:3], ["p"] * 2, [CAT] * 2)
    raises("mode 'strict'", GenEval, mode="strict")
    scorer = GenEval(weights="nowhere", clip="nowhere")  # nothing is loaded for nothing
    assert scorer(torch.empty(0, 3, 64, 64), [], []).shape == scorer([], [], []).shape == (0,)


def test_networks_run_in_float32_and_nan_gives_no_score(weights):
    scorer, seen = GenEval(**weights), []
    metadata = metadata_for(scorer, PICTURES)
    _, head, clip = scorer.model
    for layer in (head, clip.visual_projection):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scorer(PICTURES, ["p"] * 4, metadata)
    assert seen == [torch.float32] * 2
    for layer, message in ((clip.visual_projection, "CLIP's output"), (head, "detector's output")):
        torch.nn.init.constant_(layer.weight, math.nan)
        raises(f"{message} is not finite", scorer, PICTURES, ["p"] * 4, metadata)


def test_missing_and_other_weights_are_refused(weights, tmp_path):
    fetch = r"curl .*743b7d99\.pth .*geneval_convert .*743b7d99\.pth --out"
    raises(fetch, GenEval(weights=tmp_path / "none", clip=weights["clip"]).load)
    no_clip = GenEval(weights=weights["weights"], clip=tmp_path / "none")
    raises("hf download openai/clip-vit-large-patch14", no_clip.load)
    CLIPModel.from_pretrained(weights["clip"]).save_pretrained(tmp_path / "clip")
    CLIPTokenizer().save_pretrained(tmp_path / "clip")  # what an incomplete download gives
    half_clip = GenEval(weights=weights["weights"], clip=tmp_path / "clip")
    raises("differ in vocabulary.*hf download", half_clip.load)
    save_tiny(tmp_path, digest="f" * 64)
    raises("another model than GenEval", geneval_detector.load_detector, tmp_path, "cpu")
    (tmp_path / "model.safetensors").write_bytes(b"nothing like it")
    raises("cannot be read", geneval_detector.load_detector, tmp_path, "cpu")


# ---- Training prompts


def test_training_prompts():
    lines = geneval_prompts.training_prompts(3000, ["a photo of two dogs"], seed=1)
    assert lines == geneval_prompts.training_prompts(3000, ["a photo of two dogs"], seed=1)
    tags = Counter(line["tag"] for line in lines)
    weight = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
    assert set(tags) == set(weight)  # single_object has weight 0
    for tag, n in weight.items():
        p = n / 17
        assert abs(tags[tag] - 3000 * p) < 5 * math.sqrt(3000 * p * (1 - p)), tag


def text_of(line):
    """The prompt that the metadata asks for, composed again."""
    first, second = (line["include"] * 2)[:2]
    a, b = first["class"], second["class"]
    plural = "es" if a.endswith("s") else "s"
    number = {2: "two", 3: "three", 4: "four"}.get(first["count"])
    forms = {
        "single_object": f"a {a}",
        "two_object": f"a {a} and a {b}",
        "counting": f"{number} {a}{plural}",
        "colors": f"a {first.get('color')} {a}",
        "color_attr": f"a {first.get('color')} {a} and a {second.get('color')} {b}",
        "position": f"a {b} {second.get('position', [''])[0]} a {a}",
    }
    text = " " + forms[line["tag"]]
    for vowel in "aeiou":
        text = text.replace(f" a {vowel}", f" an {vowel}")
    return "a photo of" + text


@pytest.mark.parametrize("tag", rules.TAGS)
def test_the_prompt_asks_for_what_the_metadata_has(tag):
    rng = random.Random(0)
    for _ in range(300):
        line = geneval_prompts.make_prompt(tag, rng)
        rules.check_metadata(line, 0)
        assert line["tag"] == tag and line["prompt"] == text_of(line)
        for key in ("class", "color"):
            values = [request[key] for request in line["include"] if key in request]
            assert len(set(values)) == len(values)
            assert key == "class" or not values or "person" not in line["prompt"]
        if tag == "counting":
            (request,) = line["include"]
            assert line["exclude"] == [request | {"count": request["count"] + 1}]


def test_prompt_file(tmp_path, monkeypatch, capsys):
    excluded = {line["prompt"] for line in geneval_prompts.training_prompts(400, [], seed=0)}
    test, out = tmp_path / "test.jsonl", tmp_path / "train.jsonl"
    test.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in excluded))
    command = ["rewards.geneval_prompts", 400, "--test", test, "--out", out]
    call(monkeypatch, *command)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 400 and not excluded & {line["prompt"] for line in lines}
    for i, line in enumerate(lines):
        rules.check_metadata(line, i)
    out.unlink()
    test.write_text("no json\n")
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, *command)
    assert not out.exists() and "is not JSON lines" in capsys.readouterr().err
    raises("at least 1", geneval_prompts.training_prompts, 0, [])


# ---- With the real weights


@pytest.mark.slow
def test_real_weights():
    """Uniform squares have the colours of their names, and nothing is found in them."""
    scorer = GenEval(weights=ROOT / geneval_detector.WEIGHTS, mode="official")
    try:
        scorer.load()
    except ValueError as error:
        pytest.skip(str(error))
    rgb = dict(red="#e01010", orange="#ff8c00", yellow="#ffe600", green="#109020", blue="#1030e0",
               purple="#8010a0", pink="#ff80c0", brown="#7a4a20", black="#000000",
               white="#ffffff")  # fmt: skip
    arrays = [np.asarray(Image.new("RGB", (256, 256), value)) for value in rgb.values()]
    mask = np.ones((256, 256), bool)
    found = [{"car": [{"box": (0, 0, 256, 256), "mask": mask}]} for _ in arrays]
    scorer.name_colours(arrays, found, [CAR] * len(arrays))
    assert [objects["car"][0]["colour"] for objects in found] == list(rgb)
    grey = Image.new("RGB", (512, 512), "#808080")
    assert scorer.judge([grey], [CAT])[0]["correct"] is False
