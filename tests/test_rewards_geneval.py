"""rewards/geneval*.py without the weights: rules on cases worked out by hand (geneval_cases.json:
what it shows, what is given, what is expected), the detector on made-up logits, the converter on
published names and shapes, tiny random models all the way."""

import hashlib
import io
import json
import math
import random
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, call, raises
from PIL import Image
from test_rewards import PICTURES, fetched
from torch.testing import assert_close

from experiments import published_networks as networks
from experiments import published_steps as steps
from experiments.published_networks import DETECTOR, MEAN, STD, detector_state
from experiments.tiny_scorers import save_objects
from rewards import geneval, geneval_convert, geneval_detector, geneval_prompts
from rewards import geneval_rules as rules
from rewards.geneval import GenEval

# ---- The rules

CASES = json.loads(Path(__file__).with_name("geneval_cases.json").read_text("utf-8"))
CAT, DOGS, LEFT = (CASES["metadata"][name] for name in ("cat", "three dogs", "dog left of cat"))


def objects(found):
    """{class: objects of 10 x 10 pixels, the best first}, each given by its colour or by its x."""
    things = {name: [] for name in found}
    for name, given in found.items():
        for value in given:
            x, colour = (0, value) if isinstance(value, str) else (value, None)
            things[name].append({"box": (x, 0, x + 10, 10), "colour": colour})
    return things


@pytest.mark.parametrize("case", CASES["rules"], ids=lambda case: f"{case[1]}: {case[0]}")
def test_rules(case):
    _, name, found, official, strict, soft = case
    metadata, found, soft = CASES["metadata"][name], objects(found), float(Fraction(soft))
    assert rules.official(found, metadata) is official
    reward, exact = rules.softened(found, metadata)
    assert reward == pytest.approx(soft, abs=1e-12) and exact is strict
    assert (reward == 1) is exact  # rewards.tables computes the strict score from this
    without, same = rules.softened(found, metadata, position_slip=False)
    if soft == 3 / 4 and metadata["tag"] == "position":  # (1 + 1 + 0) / 3
        soft = 2 / 3
    assert without == pytest.approx(soft) and same is strict


@pytest.mark.parametrize("case", CASES["relative_position"], ids=lambda case: case[0])
def test_relative_position(case):
    """The dead zone is a tenth of both sizes; what exceeds it must be above half the distance."""
    _, a, b, relations = case
    assert rules.relative_position(a, b) == set(relations)


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


@pytest.mark.parametrize("metadata, message", CASES["bad_metadata"])
def test_bad_metadata(metadata, message):
    scorer = GenEval(weights="nowhere", clip="nowhere")  # metadata is read before loading
    raises(f"metadata 1.*{message}", scorer, PICTURES[:2], ["p"] * 2, [CAT, metadata])


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
    """Rounded to bytes."""
    monkeypatch.setattr(geneval_detector, "EDGES", (60, 32))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, generator=generator)
    x, resized = geneval_detector.preprocess(pixels)
    levels = x[0, 1, : resized[0], : resized[1]].double()
    levels = levels * geneval_detector.STD[1] + geneval_detector.MEAN[1]
    expected = steps.cv2_resized(pixels[0, 1].numpy(), resized)
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
    shapes = networks.detector_shapes(**DETECTOR)
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    indices = [key for key in shapes if key.endswith("position_index")]
    learned = sum(state[key].numel() for key in state.keys() - set(indices))
    assert round(learned / 1e6, 2) == 68.74  # Swin-S, 80 classes
    state |= dict.fromkeys(indices, networks.window_index(7))
    converted = geneval_convert.convert(state, geneval_convert.detector_config())
    new = [key for key in converted if "swin.layernorm" in key]  # transformers has it, mmdet not
    placed = sum(converted[key].numel() for key in converted.keys() - set(new))
    assert len(new) == 2 and placed == learned  # `convert` compares names and shapes


@pytest.mark.parametrize("size", [(64, 96), (160, 32)])
def test_converted_model_computes_what_mmdet_does(tiny, size):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    folder = tiny["geneval"].keywords["weights"]
    model, head = geneval_detector.load_detector(folder, "cpu")
    with torch.no_grad():
        found = geneval_detector.detector_logits(model, head, x)
        expected = networks.mmdet_forward(detector_state(), x)
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
    raises(message, geneval_convert.convert, state, networks.tiny_detector_config())


def test_the_converter_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    file, out = tmp_path / "any.pth", tmp_path / "out"
    file.write_bytes(b"not a checkpoint")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    cases = [
        ([], {}, "FILE.pth"),
        ([tmp_path / "none.pth"], {}, "curl"),
        ([file], {}, "not 743b7d99"),
        ([file], {"SHA256_MMDET3": digest}, "mmdet 3"),
        ([file], {"SHA256": digest}, "cannot be read"),
    ]
    for words, constants, message in cases:
        with monkeypatch.context() as patch:
            for constant, value in constants.items():
                patch.setattr(geneval_convert, constant, value)
            with pytest.raises(SystemExit, match="2"):
                call(patch, "rewards.geneval_convert", *words, "--out", out)
        line = capsys.readouterr().err
        assert message in line and line.startswith("error: ") and line.count("\n") == 1
    assert not out.exists()


def test_the_converter_takes_the_file_with_the_hash(tmp_path, monkeypatch):
    file, out = tmp_path / "published.pth", tmp_path / "out"
    torch.save({"meta": {}, "state_dict": detector_state()}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    for module in (geneval_convert, geneval_detector):
        monkeypatch.setattr(module, "SHA256", digest)
    monkeypatch.setattr(geneval_convert, "detector_config", networks.tiny_detector_config)
    call(monkeypatch, "rewards.geneval_convert", file, "--out", out)
    geneval_detector.load_detector(out, "cpu")


# ---- Tiny random models on the whole path


@pytest.mark.parametrize("mode, score", [("official", 1.0), ("reward_server", 0.0)])
def test_the_score_is_the_verdict_of_the_mode(mode, score):
    scorer = GenEval(mode=mode)
    scorer.model = (None, None, None)
    scorer.detect = lambda arrays, thresholds: [objects({"cat": [0, 0]})]  # one too many
    assert scorer(PICTURES[:1], ["p"], [CAT]).tolist() == [score]


def test_counting_has_its_own_threshold():
    seen, scorer = [], GenEval()
    scorer.model = (None, None, None)
    scorer.detect = lambda arrays, thresholds: seen.extend(thresholds) or [{} for _ in arrays]
    scorer.judge(PICTURES[:3], [CAT, DOGS, LEFT])
    assert seen == [0.3, 0.9, 0.3]


def test_the_modes_differ_as_upstream(tiny, monkeypatch):
    """The reward server gives the detector a JPEG in BGR, and runs CLIP with GELU."""
    seen, real = [], geneval_detector.preprocess
    spy = lambda pixels, swap: seen.append((pixels[0], swap)) or real(pixels, swap)
    monkeypatch.setattr(geneval_detector, "preprocess", spy)
    scorers = [tiny[name]() for name in ("geneval_official", "geneval")]
    for scorer in scorers:
        scorer.judge(PICTURES[:1], [CAT])
    (plain, plain_swap), (jpeg, jpeg_swap) = seen
    array, buffer = np.array(PICTURES[0]), io.BytesIO()
    PICTURES[0].save(buffer, "JPEG", quality=75, subsampling="4:2:0")
    assert not plain_swap and np.array_equal(plain.permute(1, 2, 0), array)
    assert jpeg_swap and np.array_equal(jpeg.permute(1, 2, 0), np.asarray(Image.open(buffer)))

    clips = [scorer.model[2] for scorer in scorers]
    for clip, name in zip(clips, ("quick_gelu", "gelu")):
        assert clip.config.vision_config.hidden_act == clip.config.text_config.hidden_act == name
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = (clip.get_image_features(pixel_values=pixels).pooler_output for clip in clips)
    assert (a - b).abs().max() > 1e-3  # the setting reaches the layers


def test_colour_classifier(tiny):
    """Ten normalised means of three normalised embeddings, in the order of the colours."""
    scorer = tiny["geneval_official"]()
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
        expected = (networks.as_pixels(whole.crop((x, y, x + 224, y + 224))) - MEAN) / STD
        assert_close(geneval.clip_pixels(Image.fromarray(array)), expected)


# ---- Bad input: one clear line, never a score


def test_prompts_and_metadata_must_agree():
    raises("2 prompts and 3 lines", GenEval(), PICTURES[:3], ["p"] * 2, [CAT] * 3)
    raises("mode 'strict'", GenEval, mode="strict")


def test_missing_and_other_weights_are_refused(tiny, tmp_path):
    fetch = r"curl .*743b7d99\.pth .*geneval_convert .*743b7d99\.pth --out"
    raises(fetch, tiny["geneval"](weights=tmp_path / "none").load)
    raises("hf download openai/clip-vit", tiny["geneval"](clip=tmp_path / "none").load)
    save_objects(tmp_path, digest="f" * 64)
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


@pytest.mark.parametrize("tag", rules.TAGS)
def test_the_prompt_asks_for_what_the_metadata_has(tag):
    rng = random.Random(0)
    for _ in range(300):
        line = geneval_prompts.make_prompt(tag, rng)
        rules.check_metadata(line, 0)
        assert line["tag"] == tag and line["prompt"] == steps.geneval_prompt(line)
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
    scorer = fetched(GenEval(weights=ROOT / geneval_detector.WEIGHTS, mode="official"))
    rgb = dict(red="#e01010", orange="#ff8c00", yellow="#ffe600", green="#109020", blue="#1030e0",
               purple="#8010a0", pink="#ff80c0", brown="#7a4a20", black="#000000",
               white="#ffffff")  # fmt: skip
    arrays = [np.asarray(Image.new("RGB", (256, 256), value)) for value in rgb.values()]
    mask = np.ones((256, 256), bool)
    found = [{"car": [{"box": (0, 0, 256, 256), "mask": mask}]} for _ in arrays]
    scorer.name_colours(arrays, found, [CASES["metadata"]["red car"]] * len(arrays))
    assert [objects["car"][0]["colour"] for objects in found] == list(rgb)
    grey = Image.new("RGB", (512, 512), "#808080")
    assert scorer.judge([grey], [CAT])[0]["correct"] is False
