"""rewards/ without downloads: rules on hand-made cases, networks as tiny random models on the path
of real weights, ports against a plain rewriting of their source.

    python -m pytest tests/test_rewards.py --slow     # with the published weights, where they are
"""

import io
import json
import math
import shutil
import sys
import types
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from conftest import raises
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file
from torch.testing import assert_close

from experiments import published_networks as networks
from experiments.published_networks import DEQA_7B, DEQA_TINY, LETTERS, deqa_shapes, deqa_state
from rewards import aesthetic, clipscore, deqa, monitors, ocr, pickscore
from rewards.geneval import GenEval
from rewards.images import as_pictures, exact_float32

SIZES = [(64, 64), (33, 47), (71, 20), (40, 64), (19, 90)]  # height, width
PROMPTS = ["a cat", "", "two dogs on a very long leash, at night", "Ünïcödé ½ 猫", "a cat"]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def noise(height, width, seed=0):
    """Picture (3, H, W) of whole bytes in [0, 1], coarse enough to survive a resize."""
    coarse = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(coarse, (height, width), mode="nearest")[0] * 255).round() / 255


def as_image(pixels):
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())


def as_pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


@pytest.fixture(scope="module")
def pictures():
    return [as_image(noise(*size, seed)) for seed, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder with the files of tiny networks in clip/, deqa/, detector/, reader/ and head.pth."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "deqa").mkdir()
    networks.save_clip(folder / "clip")
    networks.save_head(folder / "head.pth")
    networks.save_deqa(folder / "deqa", deqa_state())
    networks.save_text_detector(folder / "detector")
    networks.save_reader(folder / "reader")
    return folder


# ---- What all of them have in common

NAMES = ["pickscore", "clipscore", "aesthetic", "deqa", "ocr"]


@pytest.fixture
def make_reward(tiny):
    """(name) -> the reward with tiny weights, or with those that the options name."""
    clip, head = tiny / "clip", tiny / "head.pth"
    makers = {
        "pickscore": (pickscore.PickScore, {"weights": clip, "tokenizer": clip}),
        "clipscore": (clipscore.CLIPScore, {"weights": clip}),
        "aesthetic": (aesthetic.Aesthetic, {"weights": clip, "head": head, "sha256": None}),
        "deqa": (deqa.DeQA, {"weights": tiny / "deqa"}),
        "ocr": (ocr.OCR, {"detector": tiny / "detector", "reader": tiny / "reader"}),
    }
    return lambda name, **options: makers[name][0](**makers[name][1] | options)


def prompts_for(reward, images):
    """Five prompts that this reward can score; OCR's quote what it reads, exactly and nearly."""
    if reward.name != "ocr":
        return PROMPTS
    texts = [text.replace(" ", "") for text in reward.read(images)]
    more = ("", "!", "", "!!!!!!!!", "!!!!!!!!!!!!!!!!!!!")
    return [f'{prompt} "{text}{end}"' for prompt, text, end in zip(PROMPTS, texts, more)]


@pytest.mark.parametrize("name", NAMES)
def test_scores_depend_on_the_image_and_the_prompt_alone(name, make_reward, pictures):
    """Not on batch size, order, the images beside it, its form, or whether the model is new."""
    reward = make_reward(name)
    assert reward.higher_is_better is True and reward.name == name
    for nothing in ([], torch.empty(0, 3, 8, 8)):
        assert reward(nothing, []).shape == (0,)
    if name in ("pickscore", "clipscore", "ocr"):
        raises("2 images and 1 prompts", reward, pictures[:2], ['"a"'])
    assert reward.model is None  # so far nothing was loaded

    prompts = prompts_for(reward, pictures)
    scores = reward(pictures, prompts)
    assert scores.shape == (5,) and scores.dtype == torch.float32 and not scores.requires_grad
    assert len({round(s, 4) for s in scores.tolist()}) > 2  # they tell pictures apart
    order = [3, 0, 4, 2, 1]
    reward.batch = 2
    shuffled = reward([pictures[i] for i in order], [prompts[i] for i in order])
    assert_close(shuffled, scores[order], rtol=1e-4, atol=1e-4)
    tensor = as_pixels(pictures[0])[None]
    assert_close(reward(tensor, prompts[:1]), scores[:1], rtol=1e-4, atol=1e-4)

    reward.model = None  # drops everything large; the next call loads it again
    assert not [v for v in vars(reward).values() if isinstance(v, torch.nn.Module)]
    assert_close(reward(pictures[:2], prompts[:2]), scores[:2], rtol=1e-4, atol=1e-4)


def truncated():
    file = io.BytesIO()
    as_image(torch.rand(3, 64, 64)).save(file, "JPEG")
    return Image.open(io.BytesIO(file.getvalue()[:-500]))


BAD_IMAGES = [
    (lambda: torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8"),
    (lambda: torch.zeros(1, 8, 8, 3), r"\(1, 8, 8, 3\)"),
    (lambda: torch.zeros(1, 1, 8, 8), r"\(1, 1, 8, 8\)"),
    (lambda: torch.zeros(3, 8, 8), r"\(B, 3, H, W\)"),
    (lambda: torch.zeros(1, 3, 0, 8), r"\(B, 3, H, W\)"),
    (lambda: torch.linspace(-1, 1, 192).view(1, 3, 8, 8), "-1 to 1"),
    (lambda: torch.full((1, 3, 8, 8), math.nan), "nan"),
    (lambda: [truncated()], "image 0 cannot be decoded.*truncated"),
    (lambda: ["cat.png"], "image 0 cannot be decoded"),
]


@pytest.mark.parametrize("images, message", BAD_IMAGES)
def test_bad_images_get_no_score(make_reward, images, message):
    """Neither from a scorer nor from a monitor, and before anything is loaded."""
    every = [make_reward(name) for name in NAMES] + [GenEval(weights="nowhere")]
    images = images()
    if isinstance(images, torch.Tensor):
        every += [monitors.edge_density, monitors.colour_entropy, monitors.diversity]
    metadata = [{"tag": "single_object", "include": [{"class": "cat", "count": 1}]}]
    for reward in every:
        raises(message, reward, images, ['a "sign"'], metadata)
        assert getattr(reward, "model", None) is None


def test_floats_become_bytes_by_rounding():
    values = torch.tensor([0.999, 0.5, 1.0009, -0.0009])  # 254.7, 127.5, and two rounding errors
    (picture,) = as_pictures(values.expand(1, 3, 2, 4))
    assert picture.size == (4, 2) and picture.mode == "RGB"
    assert np.array(picture)[1, :, 2].tolist() == [255, 128, 255, 0]


def test_exact_float32_restores_the_callers_settings(monkeypatch):
    settings = lambda: (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    product = lambda: (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("high")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with exact_float32("cpu"):
            inside = (*settings(), product())
        after = (*settings(), product())
    torch.set_float32_matmul_precision("highest")
    assert inside == ("highest", False, torch.float32) and after == ("high", True, torch.bfloat16)


@pytest.mark.parametrize("name", NAMES)
def test_missing_weights_name_the_command(name, make_reward, tmp_path, pictures):
    flag = {"aesthetic": "head", "ocr": "detector"}.get(name, "weights")
    for folder in ("no/such/weights", str(tmp_path)):
        reward = make_reward(name, **{flag: folder})
        raises(f"{name}: .*(hf download|curl -LO)", reward, pictures[:1], ['"a"'])


@pytest.mark.parametrize("name", ["pickscore", "clipscore", "aesthetic", "ocr"])
def test_pickled_weights_are_not_opened(name, make_reward, tmp_path, pictures):
    flag, folder = "detector" if name == "ocr" else "weights", tmp_path / "weights"
    shutil.copytree(getattr(make_reward(name), flag), folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    raises(f"{name}: cannot load", make_reward(name, **{flag: str(folder)}), pictures[:1], ['"a"'])


def test_no_code_beside_the_weights_is_run(tiny, tmp_path, pictures):
    """A kind of model that transformers does not know, with its own code."""
    folder = tmp_path / "weights"
    shutil.copytree(tiny / "detector", folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "zebra"}
    config["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModelForObjectDetection"), "z.Zebra")
    (folder / "config.json").write_text(json.dumps(config))
    code = f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Zebra:\n    pass\n"
    (folder / "z.py").write_text(code)
    raises("ocr: cannot load", ocr.OCR(detector=str(folder)), pictures[:1], ['"a"'])
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["pickscore", "clipscore"])
def test_an_incomplete_clip_is_refused(name, make_reward, tiny, tmp_path, pictures):
    """transformers makes random weights and an empty tokenizer in place of missing ones."""
    model = hf.CLIPModel.from_pretrained(tiny / "clip")
    hf.CLIPTokenizer().save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    flag = "tokenizer" if name == "pickscore" else "weights"
    reward = make_reward(name, **{flag: str(tmp_path)})
    raises("differ in vocabulary", reward, pictures[:1], PROMPTS[:1])
    state = model.state_dict()
    del state["visual_projection.weight"]
    networks.letter_tokenizer().save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, state_dict=state)
    message, reward = "lacks 1 weights .visual_pro", make_reward(name, weights=str(tmp_path))
    raises(message, reward, pictures[:1], PROMPTS[:1])


# ---- PickScore, CLIPScore, aesthetic


def logits(clip, pixels):
    """CLIPModel's own logits_per_image of pictures (B, 3, 32, 32) in [0, 1] and PROMPTS."""
    model = hf.CLIPModel.from_pretrained(clip)
    tokenizer = hf.CLIPTokenizer.from_pretrained(clip)
    length = {"padding": "max_length", "truncation": True, "max_length": 77}
    tokens = tokenizer(PROMPTS, **length, return_tensors="pt")
    with torch.no_grad():
        return model(pixel_values=(pixels - MEAN) / STD, **tokens).logits_per_image.diag()


def resized(picture, side, resample):
    """Shorter side to `side`; the other one rounded down."""
    short = min(picture.size)
    size = [side if n == short else int(side * n / short) for n in picture.size]
    return picture.resize(size, resample)


def test_pickscore_is_the_logit_of_clip(make_reward, tiny, pictures):
    prepared = []
    for picture in pictures:
        picture = resized(picture, 32, Image.Resampling.BICUBIC)
        left, top = (picture.width - 32) // 2, (picture.height - 32) // 2  # rounded down
        prepared.append(as_pixels(picture.crop((left, top, left + 32, top + 32))))
    scores = make_reward("pickscore")(pictures, PROMPTS)
    assert_close(scores, logits(tiny / "clip", torch.stack(prepared)), rtol=1e-4, atol=1e-3)


def test_clipscore_is_a_thirtieth_of_clips_logit(make_reward, tiny, pictures):
    prepared = []
    for picture in pictures:
        # Bilinear on floats, one channel at a time, by Pillow: what torchvision does to a tensor
        planes = [plane.convert("F") for plane in picture.split()]
        planes = [np.array(resized(plane, 32, Image.Resampling.BILINEAR)) for plane in planes]
        pixels = torch.from_numpy(np.stack(planes)) / 255
        top, left = (round((n - 32) / 2) for n in pixels.shape[1:])  # torchvision: 9.5 -> 10
        prepared.append(pixels[:, top : top + 32, left : left + 32])
    scores = make_reward("clipscore")(pictures, PROMPTS)
    assert_close(scores, logits(tiny / "clip", torch.stack(prepared)) / 30, rtol=1e-4, atol=1e-4)


def test_aesthetic_is_the_head_on_clips_vector(make_reward, tiny, pictures):
    state = torch.load(tiny / "head.pth", weights_only=True)
    x = F.normalize(torch.randn(7, 768, generator=torch.Generator().manual_seed(0)))

    def head(x):
        for i in (0, 2, 4, 6, 7):
            x = F.linear(x, state[f"layers.{i}.weight"], state[f"layers.{i}.bias"])
        return x[:, 0]

    w, b = aesthetic.fold(state)
    assert w.shape == (768,) and b.shape == () and w.dtype == b.dtype == torch.float32
    assert_close(x @ w + b, head(x), rtol=1e-4, atol=1e-5)

    model = hf.CLIPModel.from_pretrained(tiny / "clip")
    pixels = (as_pixels(resized(pictures[0], 32, Image.Resampling.BICUBIC)) - MEAN) / STD
    with torch.no_grad():
        vector = model.visual_projection(model.vision_model(pixels[None]).pooler_output)
    score = make_reward("aesthetic")(pictures[:1])
    assert_close(score, head(vector / vector.norm()), rtol=1e-4, atol=1e-4)


def test_another_head_is_refused(make_reward, tiny, pictures):
    state = torch.load(tiny / "head.pth", weights_only=True)
    without = {key: tensor for key, tensor in state.items() if key != "layers.2.bias"}
    more, shape = {"layers.1.weight": torch.zeros(2)}, {"layers.7.weight": torch.zeros(3, 5)}
    raises("1 weights too many .layers.1.weight", aesthetic.fold, state | more)
    raises("layers.2 is not a linear layer", aesthetic.fold, without)
    raises("layers.7 is not a linear layer", aesthetic.fold, state | shape)
    reward = make_reward("aesthetic", sha256=aesthetic.SHA256)
    raises("not the published file .SHA-256.*curl -LO", reward, pictures[:1])


# ---- DeQA


def test_deqa_is_the_published_forward_pass(make_reward, pictures):
    state = deqa_state()
    model = deqa.build(DEQA_TINY, deqa.convert(state, DEQA_TINY)).eval()
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        levels = deqa.level_logits(model, pixels)
    expected = networks.deqa_logits(state, DEQA_TINY, pixels)
    assert expected.std(0).min() > 0.05  # the picture matters
    assert_close(levels, expected, rtol=1e-4, atol=1e-4)

    picture = pictures[1]  # 33 high, 47 wide: 7 rows of padding above, 7 below
    padded = Image.new("RGB", (47, 47), (122, 116, 104))
    padded.paste(picture, (0, 7))
    pixels = (as_pixels(padded.resize((28, 28), Image.Resampling.BICUBIC)) - MEAN) / STD
    expected = networks.deqa_logits(state, DEQA_TINY, pixels[None]).softmax(1)
    score = make_reward("deqa")([picture])
    assert_close(score, expected @ torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]), rtol=1e-4, atol=1e-4)


def test_the_expected_level_and_the_padding():
    rows = [[7.0] * 5, [2.0, 1.0, 0.0, -1.0, -2.0], [200.0, 0, 0, 0, 0], [0, 0, 0, 0, 200.0]]
    levels = deqa.expected_level(torch.tensor(rows))
    assert_close(levels, torch.tensor([3.0, 4.451941, 5.0, 1.0]), rtol=0, atol=1e-6)
    assert deqa.expected_level(torch.tensor(rows).half()).dtype == torch.float32
    mean, red = (122, 116, 104), (255, 0, 0)
    square = deqa.square(Image.new("RGB", (3, 6), "red"))  # 1 column to the left, 2 to the right
    assert square.size == (6, 6)
    assert [square.getpixel((x, 0)) for x in range(6)] == [mean, red, red, red, mean, mean]
    assert deqa.square(Image.new("RGB", (6, 6), "red")).getcolors() == [(36, red)]


def test_every_published_weight_of_the_7b_has_its_place():
    shapes = deqa_shapes(DEQA_7B)
    total = sum(math.prod(shape) for shape in shapes.values())
    assert total == pytest.approx(8.2e9, rel=0.01)
    published = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    table = "model.layers.0.self_attn.rotary_emb.inv_freq"  # older files have it
    converted = deqa.convert(published | {table: torch.empty(64, device="meta")}, DEQA_7B)
    assert sum(t.numel() for t in converted.values()) == total
    model = deqa.build(DEQA_7B, converted)  # load_state_dict is strict: names and shapes
    assert set(model.state_dict()) == set(converted)


@pytest.mark.parametrize("key", ["few", "many", "shape", "shard", "tokenizer", "code"])
def test_deqa_refuses_other_weights(key, tmp_path, pictures):
    class Evil:  # its pickle would make a file
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    state = dict(deqa_state())
    if key == "few":
        del state["model.norm.weight"]
    changes = {"many": {"model.extra.weight": torch.zeros(2)},
               "shape": {"lm_head.weight": torch.zeros(31999, 32)},
               "code": {"lm_head.weight": Evil()}}  # fmt: skip
    networks.save_deqa(tmp_path, state | changes.get(key, {}))
    if key == "shard":
        (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    if key == "tokenizer":
        other = networks.tokenizer_model(change=deqa.LEVELS["poor"])
        (tmp_path / "tokenizer.model").write_bytes(other)
    raises(f"deqa: cannot load.*{deqa.FETCH}", deqa.DeQA(weights=str(tmp_path)), pictures[:1])
    assert not (tmp_path / "executed").exists()


# ---- OCR: the formula


@pytest.mark.parametrize(
    "read, target, score, with_nfkc",
    [("HELLO world", "Hello World", 1, 1), ("xxHello World!!", "Hello World", 1, 1),
     ("Helo World", "Hello World", 0.9, 0.9), ("", "Hello World", 0, 0),
     ("hell o wor1d", "Hello World", 0.9, 0.9), ("zzzzzzzzzzzzzzzzzzz", "Hello World", 0, 0),
     ("Hello\nWorld", "Hello World", 0.9, 0.9), ("Hello, World", "Hello World", 0.9, 0.9),
     ("E=mc²", "E=mc²", 1, 1), ("e=MC2", "E=mc²", 0.8, 1), ("CAFÉ", "café", 1, 1),
     ("cafe", "café", 0.75, 0.75), ("½ off", "½ OFF", 1, 1), ("H₂O", "H₂O", 1, 1),
     ("H2O", "H₂O", 2 / 3, 1), ("ＯＰＥＮ", "open", 0, 1), ("你好", "你好吗", 2 / 3, 2 / 3),
     ("don't", "don’t", 0.8, 0.8)],
)  # fmt: skip
def test_the_papers_formula(read, target, score, with_nfkc):
    assert ocr.score_text(read, target) == pytest.approx(score)
    assert ocr.score_text(read, target, nfkc=True) == pytest.approx(with_nfkc)


def test_edit_distance_against_its_definition():
    @cache
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = ("".join(rng.choice(list("abc"), rng.integers(0, 8))) for _ in range(2))
        assert ocr.edit_distance(a, b) == slow(a, b)


def test_the_quoted_text(pictures):
    assert ocr.quoted('a sign "Hi there" and "another"') == "Hi there"
    for prompt in ["", 'one quote " only', 'an empty "" one', 'only "  " spaces', "“typographic”"]:
        raises("quotes no text", ocr.OCR(), pictures[:1], [prompt])
        raises("quotes no text", ocr.OCR().check, [prompt])


# ---- OCR: before and after the networks


def page_with(*boxes, size=(256, 512)):
    """A map of text probabilities; boxes (y, x, height, width, probability)."""
    page = np.zeros(size, np.float32)
    for y, x, height, width, probability in boxes:
        page[y : y + height, x : x + width] = probability
    return page


def test_how_boxes_grow_and_what_is_no_line():
    # 300 x 40 pixels are 299 x 39 from first to last; it grows by
    # 1.5 * area / perimeter = 1.5 * 299 * 39 / 676 = 25.875 on every side
    page = page_with((100, 80, 40, 300, 0.9))
    (quad,) = ocr.find_lines(page, 256, 512)
    assert quad.tolist() == [[54, 74], [405, 74], [405, 165], [54, 165]]
    (double,) = ocr.find_lines(page, 512, 1024)  # the picture was twice the map
    assert double.tolist() == [[108, 148], [810, 148], [810, 330], [108, 330]]
    (quad,) = ocr.find_lines(page_with((0, 0, 50, 512, 0.9)), 256, 512)
    assert quad.tolist() == [[0, 0], [511, 0], [511, 83], [0, 83]]  # 49 + 33.53
    specks = [(5, 5, 1, 1, 1.0), (7, 100, 1, 1, 1.0)]
    for value, size, seen in [(0.59, 40, 0), (0.61, 40, 1), (0.9, 3, 0), (0.9, 8, 1)]:
        page = page_with((100, 80, size, 2 * size, value), *specks)
        assert len(ocr.find_lines(page, 256, 512)) == seen


def test_reading_order():
    # a and b are one row: 6 pixels apart
    boxes = {"c": (300, 20), "b": (104, 260), "a": (110, 20), "d": (306, 300), "e": (420, 5)}
    lines = [(y, x, 24, 150, 0.95) for y, x in boxes.values()]
    found = []
    for quad in ocr.find_lines(page_with(*lines, size=(512, 512)), 512, 512):
        x, y = quad[0] + 15
        found.append(min(boxes, key=lambda n: abs(boxes[n][0] - y) + abs(boxes[n][1] - x)))
    assert found == list("abcde")


@pytest.mark.parametrize("density", [0.05, 0.3, 0.55])
def test_components_against_flooding(density):
    bitmap = np.random.default_rng(0).random((23, 31)) < density
    left, expected = {(x, y) for y, x in zip(*np.nonzero(bitmap))}, []
    near = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    while left:
        region = edge = {left.pop()}
        while edge:
            edge = {(x + i, y + j) for x, y in edge for i, j in near} & left
            left, region = left - edge, region | edge
        points = np.array(sorted(region))
        expected.append((len(set(points[:, 1])), *points.min(0), *points.max(0)))
    regions = ocr.components(bitmap)
    found = [(len(set(points[:, 1])), *points.min(0), *points.max(0)) for points in regions]
    assert sorted(map(tuple, found)) == sorted(map(tuple, expected))


def test_the_smallest_rectangle_against_all_angles():
    rng = np.random.default_rng(1)
    angles = np.linspace(0, math.pi / 2, 2000)
    turns = np.array([[np.cos(angles), -np.sin(angles)], [np.sin(angles), np.cos(angles)]])
    for _ in range(20):
        rotation = np.linalg.qr(rng.normal(size=(2, 2)))[0]
        points = np.round(rng.normal(size=(12, 2)) * [20, 6] @ rotation)
        area = np.ptp(np.einsum("px,xya->pya", points, turns), axis=0).prod(0).min()
        quad, sides = ocr.smallest_rectangle(points)
        assert sides.prod() == pytest.approx(area, rel=5e-3) and sides.prod() <= area + 1e-6
        quad = quad + (quad - quad.mean(0)) * 1e-3  # its corners have three digits
        edges = np.roll(quad, -1, 0) - quad
        to_points = points[:, None] - quad
        side = edges[:, 0] * to_points[..., 1] - edges[:, 1] * to_points[..., 0]  # (points, edges)
        assert (abs(np.sign(side).sum(0)) == len(points)).all()  # all on one side of each edge
    assert ocr.smallest_rectangle(np.array([[4.0, 7.0]]))[1].tolist() == [0, 0]  # a single pixel
    diagonal = np.array([[1.0, 1.0], [2.0, 2.0], [5.0, 5.0]])
    assert ocr.smallest_rectangle(diagonal)[1].min() == pytest.approx(0, abs=1e-9)


def test_cutting_out_lines():
    pixels = (noise(90, 120, seed=4) * 255).round()
    straight = ocr.cut(pixels, np.array([[10.0, 20], [110, 20], [110, 50], [10, 50]]))
    assert torch.equal(straight, pixels[:, 20:50, 10:110])
    upright = ocr.cut(pixels, np.array([[10.0, 5], [30, 5], [30, 85], [10, 85]]))  # 20 x 80
    assert torch.equal(upright, pixels[:, 5:85, 10:30].rot90(1, (1, 2)))

    a, start = math.radians(20), np.array([60.0, 40.0])
    along, across = np.array([math.cos(a), math.sin(a)]), np.array([-math.sin(a), math.cos(a)])
    slope = along + 3 * across  # it gets brighter along the line, three times as much across it
    y, x = np.mgrid[:200, :300]
    ramp = torch.from_numpy(np.stack([x, y], -1) @ slope).float().expand(3, -1, -1) / 4
    ends = [start, start + 120 * along, start + 120 * along + 30 * across, start + 30 * across]
    tilted = ocr.cut(ramp, np.array(ends))[0]
    assert abs(tilted.shape[0] - 30) <= 1 and abs(tilted.shape[1] - 120) <= 1
    v, u = np.mgrid[: tilted.shape[0], : tilted.shape[1]]
    expected = torch.from_numpy((start @ slope + u + 3 * v) / 4)
    assert_close(tilted.double(), expected, rtol=0, atol=1.5)


def test_what_the_networks_get():
    mean = std = torch.full((3, 1, 1), 0.5)
    line = ocr.for_reader(torch.full((3, 24, 100), 255.0), mean, std)  # 200 of 320 columns
    assert line.shape == (3, 48, 320)
    assert (line[..., :200] == 1).all() and (line[..., 200:] == 0).all()
    for size, width in {(24, 400): 800, (10, 5000): 3200, (7, 5): 320}.items():
        assert ocr.for_reader(torch.zeros(3, *size), mean, std).shape == (3, 48, width)
    sizes = {(512, 512): (512, 512), (1024, 1024): (960, 960), (33, 47): (32, 32),
             (70, 1500): (32, 960), (8, 8): (32, 32)}  # fmt: skip
    for size, resized_to in sizes.items():
        assert ocr.for_detector(torch.zeros(3, *size)).shape == (3, *resized_to)
    pixels = torch.tensor([255.0, 0.0, 51.0])[:, None, None].expand(3, 32, 32)
    bgr = [(0.2 - 0.485) / 0.229, (0 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert_close(ocr.for_detector(pixels)[:, 3, 4], torch.tensor(bgr))


def test_ctc_and_its_alphabet():
    path = [1, 1, 0, 1, 2, 0, 3, 4, 1, 1]  # a a - a b - c _ a a
    steps = np.full((10, 5), 0.01)
    steps[range(10), path] = [0.9, 0.4, 0.99, 0.95, 0.9, 0.99, 0.92, 0.95, 0.9, 0.5]
    text, confidence = ocr.decode(steps, ["", "a", "b", "c", " "])
    assert text == "aabc a" and confidence == pytest.approx(0.92)
    assert ocr.decode(np.eye(5)[[0, 0, 0]], ["", "a", "b", "c", " "]) == ("", 0.0)
    full = ["", "a", "b", " "]
    for listed in (["a", "b"], ["a", "b", " "], full):
        assert ocr.alphabet(listed, 4) == full
    raises("5 letters for 4 outputs", ocr.alphabet, list("abcde"), 4)


# ---- OCR: the networks


def test_reading_end_to_end(make_reward, pictures, monkeypatch):
    reward = make_reward("ocr")
    texts = reward.read(pictures)
    assert all(texts) and len(set(texts)) > 2  # something is read everywhere, and different things
    detector, reader = reward.model
    pixels = torch.from_numpy(np.array(pictures[0])).permute(2, 0, 1).float()
    with torch.no_grad():  # pictures[0] is 64 x 64: no resize; one line, the whole picture up to 63
        assert detector(ocr.for_detector(pixels)[None]).last_hidden_state.min() > 0.6
        line = F.interpolate(pixels[None, :, :63, :63], (48, 48), mode="bilinear").round() / 127.5
        steps = reader(F.pad(line - 1, (0, 320 - 48))).last_hidden_state[0]
    assert steps.shape == (40, len(LETTERS) + 2)  # 320 columns, an eighth of them places
    assert texts[0] == ocr.decode(steps.numpy(), ["", *LETTERS, " "])[0]
    target = texts[0].replace(" ", "")
    assert reward([pictures[0]], [f'a sign that says "{target}"']).tolist() == [1.0]
    monkeypatch.setattr(ocr, "CONFIDENT", 1.1)  # doubtful lines are dropped
    assert reward.read(pictures[:1]) == [""] and reward(pictures[:1], ['"ab"']).tolist() == [0.0]


def test_networks_run_in_float32_and_nan_gives_no_score(make_reward, pictures):
    """NaN would mean no text, or other letters, and score 0."""
    reward, seen = make_reward("ocr"), []
    reward.load()
    note = lambda module, inputs, output: seen.append(output.last_hidden_state.dtype)
    for model in reward.model:
        model.register_forward_hook(note)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reward.read(pictures[:1])
    assert seen == [torch.float32] * 2
    for model in reversed(reward.model):  # the reader, then the detector
        for parameter in model.parameters():
            parameter.data.fill_(math.nan)
        raises("ocr: a network's output is not finite", reward, pictures[:2], ['"ab"'] * 2)


def test_other_networks_and_alphabets_are_refused(make_reward, tiny, tmp_path, pictures):
    reward = make_reward("ocr", detector=tiny / "clip")
    raises("ocr: cannot load .*hf download", reward, pictures[:1], ['"a"'])
    raises("no engine 'tesseract'", ocr.OCR, engine="tesseract")
    shutil.copytree(tiny / "reader", tmp_path / "reader")
    settings = tmp_path / "reader/preprocessor_config.json"
    reward = make_reward("ocr", reader=tmp_path / "reader")
    settings.write_text(json.dumps({"character_list": ["a", "b"]}))
    raises("no usable alphabet .*2 letters for 40 outputs", reward, pictures[:1], ['"a"'])
    settings.unlink()
    raises("no usable alphabet", reward, pictures[:1], ['"a"'])
    assert reward.model is None


def test_the_papers_engine(monkeypatch, pictures):
    """PaddleOCR 2.x as it answers: per page a list of [corners, (text, confidence)], or None."""
    seen, settings = [], {}

    class PaddleOCR:
        def __init__(self, **given):
            settings.update(given)

        def ocr(self, image, cls):
            seen.append(image)
            page = [[[[0, 0]] * 4, ("Hello ", 0.9)], [[[0, 9]] * 4, ("W0rld", 0.6)]]
            return [None if image.shape[0] == 33 else page]

    def score_with(module):
        monkeypatch.setitem(sys.modules, "paddleocr", module)
        return ocr.OCR(engine="paddleocr")(pictures[:2], ['"Hello World"'] * 2)

    scores = score_with(types.SimpleNamespace(PaddleOCR=PaddleOCR, __version__="2.9.1"))
    assert_close(scores, torch.tensor([0.9, 0.0]))
    assert settings == {"lang": "en", "use_angle_cls": False, "use_gpu": False, "show_log": False}
    assert np.array_equal(seen[0], np.array(pictures[0]))  # red first
    new = types.SimpleNamespace(__version__="3.2.0")
    for module, message in ((new, "3.2.0 is not the engine"), (None, "needs that package")):
        raises(f"{message}.*pip install paddleocr==2.9.1", score_with, module)


def test_training_prompts():
    prompts = ocr.make_prompts(500, seed=1)
    assert len(set(prompts)) == 500
    assert prompts == ocr.make_prompts(500, seed=1) != ocr.make_prompts(500, seed=2)
    texts = [ocr.quoted(prompt) for prompt in prompts]
    assert all(prompt.count('"') == 2 for prompt in prompts)
    assert 12 < np.mean([len(text) for text in texts]) < 20  # 16.8 in flow_grpo's test set
    held_out = [f'x "{text.upper()}"' for text in texts[:50]]
    others = {ocr.quoted(p).lower() for p in ocr.make_prompts(500, seed=1, exclude=held_out)}
    assert not others & {text.lower() for text in texts[:50]}


# ---- Monitors


def test_edges_and_colours():
    edges, colours = torch.zeros(3, 3, 16, 20), torch.zeros(3, 3, 8, 8)
    edges[0, :, :, 7:] = 1.0  # one upright edge: the columns on both sides of it
    edges[1, :, :8] = 0.5
    edges[2, :, ::2] = 0.2  # stripes below the threshold
    assert_close(monitors.edge_density(edges), torch.tensor([2 / 20, 2 / 16, 0.0]))

    colours[1, :, :4] = 1.0  # half black, half white: 1 bit
    for k in range(8):  # eight colours, one in each row: 3 bits
        colours[2, :, k] = torch.tensor([k & 1, k >> 1 & 1, k >> 2]).float()[:, None]
    assert_close(monitors.colour_entropy(colours), torch.tensor([0.0, 1.0, 3.0]))
    assert monitors.colour_entropy(torch.rand(1, 3, 256, 256)).item() == pytest.approx(9, abs=0.05)


def test_diversity():
    black, white, grey = (torch.full((3, 40, 56), v) for v in (0.0, 1.0, 0.5))
    images, prompts = torch.stack([black, white, grey, white, grey]), ["a", "b", "a", "b", "c"]
    expected = torch.tensor([0.5, 0.0, 0.5, 0.0, math.nan])
    assert_close(monitors.diversity(images, prompts), expected, equal_nan=True)
    mixed = monitors.diversity(torch.stack([black, white, grey]), ["a"] * 3)
    assert_close(mixed, torch.tensor([0.75, 0.75, 0.5]))
    raises("3 images and 1 prompts", monitors.diversity, images[:3], ["a"])


@pytest.mark.parametrize("name", ["edge_density", "colour_entropy", "diversity"])
def test_monitors_have_the_form_of_a_reward(name):
    monitor = getattr(monitors, name)
    assert monitor(torch.empty(0, 3, 9, 9), []).shape == (0,)
    assert monitor.name == name and monitor.higher_is_better is None
    raises("is needed, not list", monitor, [1, 2], ["a"])


# ---- With the published weights


def fetched(reward):
    """The reward with its weights, or a skipped test with the command that fetches them."""
    reward.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        reward.load()
    except ValueError as error:
        pytest.skip(str(error))
    return reward


def drawing(colour):
    image = Image.new("RGB", (512, 512), "white")
    ImageDraw.Draw(image).ellipse((100, 100, 412, 412), fill=colour)
    return image


@pytest.mark.slow
def test_the_right_prompt_and_the_clean_picture_score_higher():
    images = [drawing(colour) for colour in ("red", "red", "blue", "blue")]
    for kind, low, high in ((pickscore.PickScore, 10, 30), (clipscore.CLIPScore, 0.2, 1.4)):
        scores = fetched(kind())(images, ["a red circle", "a blue circle"] * 2)
        assert scores[0] > scores[1] and scores[3] > scores[2]
        assert low < scores.min() and scores.max() < high
    noisy = np.array(images[0]) + np.random.default_rng(0).normal(0, 90, (512, 512, 3))
    noisy = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    clean_score, noisy_score = fetched(deqa.DeQA())([images[0], noisy])
    assert clean_score > noisy_score + 0.5


@pytest.mark.slow
def test_the_published_aesthetic_head():
    file = aesthetic.Aesthetic().head
    if not file.is_file():
        pytest.skip(aesthetic.FETCH_HEAD)
    w, b = aesthetic.fold(torch.load(file, weights_only=True))
    expected = torch.tensor([17.995625, 5.236646])
    assert_close(torch.stack([w.norm(), b]), expected, rtol=1e-5, atol=1e-5)
    score = F.normalize(torch.arange(768.0).sin(), dim=0) @ w + b
    assert_close(score, torch.tensor(5.867869), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_printed_texts_are_read():
    reward, font = fetched(ocr.OCR()), ImageFont.load_default(36)
    prompts, images = ocr.make_prompts(64), []
    for prompt in prompts:
        image = Image.new("RGB", (640, 256), "white")
        ImageDraw.Draw(image).text((20, 100), ocr.quoted(prompt), font=font, fill="black")
        images.append(image)
    assert reward(images, prompts).mean() >= 0.98
