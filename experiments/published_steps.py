"""The steps around the scorers' networks, once more and slowly: from pictures and prompts to
scores, from maps and outlines to boxes, from GenEval's metadata to its prompts. The tests hold
rewards/ against them. All of it is written down from the packages that the scorers follow; nothing
here comes from rewards/."""

import cmath
import math
import re

import numpy as np
import torch
import torch.nn.functional as F
import transformers as hf
from PIL import Image

from experiments import published_networks as networks
from experiments.published_networks import MEAN, STD, as_pixels

BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR

# ---- Scores of pictures and prompts, by the networks that tiny_scorers.py puts into a folder


def resized(picture, side, resample):
    """Shorter side to `side`; the other one rounded down."""
    short = min(picture.size)
    size = [side if n == short else int(side * n / short) for n in picture.size]
    return picture.resize(size, resample)


def clip_pixels(pictures):
    """CLIPImageProcessor: bicubic on bytes, and the middle 32 x 32; offsets are rounded down."""
    prepared = []
    for picture in pictures:
        picture = resized(picture, 32, BICUBIC)
        left, top = (picture.width - 32) // 2, (picture.height - 32) // 2
        prepared.append(as_pixels(picture.crop((left, top, left + 32, top + 32))))
    return (torch.stack(prepared) - MEAN) / STD


def torchvision_pixels(pictures):
    """torchvision on a tensor: bilinear on floats, so by Pillow on one channel at a time."""
    prepared = []
    for picture in pictures:
        planes = [resized(plane.convert("F"), 32, BILINEAR) for plane in picture.split()]
        pixels = torch.from_numpy(np.stack(planes)) / 255
        top, left = (round((n - 32) / 2) for n in pixels.shape[1:])  # 9.5 -> 10
        prepared.append(pixels[:, top : top + 32, left : left + 32])
    return (torch.stack(prepared) - MEAN) / STD


def clip_logits(folder, pixels, prompts):
    """CLIPModel's own logits_per_image, (B,): each picture with its prompt."""
    tokenizer = hf.CLIPTokenizer.from_pretrained(folder / "clip")
    length = {"padding": "max_length", "truncation": True, "max_length": 77}
    tokens = tokenizer(prompts, **length, return_tensors="pt")
    model = hf.CLIPModel.from_pretrained(folder / "clip")
    return model(pixel_values=pixels, **tokens).logits_per_image.diag()


def pickscore(folder, pictures, prompts):
    return clip_logits(folder, clip_pixels(pictures), prompts)


def clipscore(folder, pictures, prompts):
    return clip_logits(folder, torchvision_pixels(pictures), prompts) / 30


def aesthetic(folder, pictures, prompts):
    """The head's five layers on CLIP's image vector."""
    model = hf.CLIPModel.from_pretrained(folder / "clip")
    vision = model.vision_model(clip_pixels(pictures))
    x = F.normalize(model.visual_projection(vision.pooler_output))
    state = torch.load(folder / "head.pth", weights_only=True)
    for i in (0, 2, 4, 6, 7):
        x = F.linear(x, state[f"layers.{i}.weight"], state[f"layers.{i}.bias"])
    return x[:, 0]


def deqa(folder, pictures, prompts):
    """Each picture on a square of CLIP's mean colour, and the expected level, 1 to 5."""
    prepared = []
    for picture in pictures:
        side = max(picture.size)
        padded = Image.new("RGB", (side, side), (122, 116, 104))
        padded.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        prepared.append(as_pixels(padded.resize((28, 28), BICUBIC)))
    pixels = (torch.stack(prepared) - MEAN) / STD
    logits = networks.deqa_logits(networks.deqa_state(), networks.DEQA_TINY, pixels)
    return logits.softmax(1) @ torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])


def hpsv2(folder, pictures, prompts):
    """Pillow's bicubic on floats is antialiased and not clamped."""
    prepared, ids = [], torch.zeros(len(prompts), 77, dtype=torch.long)
    tokenizer = hf.CLIPTokenizer.from_pretrained(folder / "clip")
    for picture, row, prompt in zip(pictures, ids, prompts):
        size = [round(n * 56 / max(picture.size)) for n in picture.size]
        planes = [plane.convert("F").resize(size, BICUBIC) for plane in picture.split()]
        left, top = ((56 - n) // 2 for n in size)
        pixels = torch.zeros(3, 56, 56)
        small = torch.from_numpy(np.stack(planes)) / 255
        pixels[:, top : top + size[1], left : left + size[0]] = small
        prepared.append((pixels - MEAN) / STD)
        prompt = prompt.replace("“", '"').replace("”", '"').replace("&amp;amp;", "&")
        words = tokenizer(prompt, add_special_tokens=False).input_ids
        words = [512, *words[:75], 513]
        row[: len(words)] = torch.tensor(words)
    state = networks.quality_state("hpsv2")
    image, text = networks.open_clip_vectors(state, 16, torch.stack(prepared), ids)
    return (image * text).sum(1)


def imagereward(folder, pictures, prompts):
    prepared, ids = [], torch.zeros(len(prompts), 35, dtype=torch.long)
    tokenizer = hf.BertTokenizer.from_pretrained(folder / "bert")
    for picture, row, prompt in zip(pictures, ids, prompts):
        size = [int(48 * n / min(picture.size)) for n in picture.size]
        left, top = (int(round((n - 48) / 2.0)) for n in size)
        picture = picture.resize(size, BICUBIC).crop((left, top, left + 48, top + 48))
        prepared.append((as_pixels(picture) - MEAN) / STD)
        words = tokenizer(prompt, add_special_tokens=False).input_ids
        words = [2, *words[:33], 3]  # [CLS], [SEP]
        row[: len(words)] = torch.tensor(words)
    state = networks.quality_state("imagereward")
    return networks.imagereward_scores(state, (16, 12), torch.stack(prepared), ids)


# ---- GenEval


def cv2_resized(levels, size):
    """Of levels (H, W): linear along each axis, half-pixel centres, no antialiasing."""
    for axis, (old, new) in enumerate(zip(levels.shape, size)):
        at = (np.arange(new) + 0.5) * old / new - 0.5
        line = lambda values, at=at, old=old: np.interp(at, np.arange(old), values)
        levels = np.apply_along_axis(line, axis, levels)
    return levels


def geneval_prompt(line):
    """The prompt that a line of metadata asks for."""
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


# ---- OCR


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


def flooded_regions(bitmap):
    """[(rows, least x, least y, greatest x, greatest y)] of each region; corners touch."""
    left, found = {(x, y) for y, x in zip(*np.nonzero(bitmap))}, []
    near = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    while left:
        region = edge = {left.pop()}
        while edge:
            edge = {(x + i, y + j) for x, y in edge for i, j in near} & left
            left, region = left - edge, region | edge
        points = np.array(sorted(region))
        found.append((len(set(points[:, 1])), *points.min(0), *points.max(0)))
    return sorted(found)


def least_area(points):
    """Of a rectangle around points (N, 2): the best of two thousand angles."""
    angles = np.linspace(0, math.pi / 2, 2000)
    turns = np.array([[np.cos(angles), -np.sin(angles)], [np.sin(angles), np.cos(angles)]])
    return np.ptp(np.einsum("px,xya->pya", points, turns), axis=0).prod(0).min()


def fill(model, graph):
    """Weights of an ONNX graph into a model of PP-OCRv5 whose modules run in the same order."""
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
