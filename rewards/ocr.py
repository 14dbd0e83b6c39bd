"""OCR reward: how much of the text that the prompt puts in quotes can be read in the image, 0 to 1.

    from rewards.ocr import OCR
    scores = OCR(device="cuda")(images, ['a sign that says "Hello World"', ...])  # (B,)

The paper's formula (flow_grpo/ocr.py) is `score_text`; "OCR Acc." is its mean over the 1018 test
prompts. Two engines can read the image:
  transformers  PP-OCRv5 (the default): `find_lines` on a map of text pixels, `cut` each line out,
                `decode` its letters
  paddleocr     PaddleOCR 2.9.1 (en_PP-OCRv3_det, en_PP-OCRv4_rec), as in the paper; needs that
                package
Both are a segmentation network and a CTC reader without a language model, so a misspelt word is
read as it is. They are not the same networks: compare numbers within one engine only. Everything
before and after the networks follows PaddleOCR 2.9.1 (ppocr/postprocess/db_postprocess.py,
tools/infer/predict_{system,det,rec}.py), without OpenCV. On 120 pictures crowded with text, 833 of
PaddleOCR's 854 boxes, 117 texts and all rewards were equal.

Weights (Apache-2.0), 20 MB together:
    hf download PaddlePaddle/PP-OCRv5_mobile_det_safetensors
    hf download PaddlePaddle/PP-OCRv5_mobile_rec_safetensors
PP-OCRv5_server_{det,rec}_safetensors have the same inputs and outputs. Checked here: the mobile
networks' real weights, from another package (tests/test_ocr.py), not the files of the hub.
"""

import json
import random
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModelForObjectDetection, AutoModelForTextRecognition
from transformers.utils import cached_file

from rewards.images import as_pictures, exact_float32

DETECTOR = "PaddlePaddle/PP-OCRv5_mobile_det_safetensors"
READER = "PaddlePaddle/PP-OCRv5_mobile_rec_safetensors"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # the detector's: blue, green, red
# predict_det.py's defaults
LONGEST = 960  # pixels of the longer side for the detector
PIXEL = 0.3  # a pixel is text above this probability
BOX = 0.6  # a box is a line from this mean probability
UNCLIP = 1.5  # how far a box grows: times area / perimeter
MIN_SIDE = 3  # pixels of the shorter side of a box
MAX_LINES = 1000
CONFIDENT = 0.5  # drop_score of predict_system.py: a line read with less confidence does not count


class OCR:
    """Callable (images, prompts, metadata=None) -> (B,) float32 on the CPU.

    images: see `as_pictures`.
    device: where the models are loaded at the first call; `reward.model = None` drops them again.
    engine: "transformers" or "paddleocr". detector, reader: hub ids or folders; nothing is
    downloaded.
    nfkc: full-width letters and the like count as plain ones (the paper does not do this).
    batch: pictures and lines per forward pass; it changes scores by no more than rounding.
    ValueError where a prompt quotes no text, an image cannot be decoded, or weights or the package
    are missing."""

    name, range, higher_is_better = "ocr", (0.0, 1.0), True

    def __init__(
        self,
        device: torch.device | str = "cpu",
        engine: str = "transformers",
        detector: str | Path = DETECTOR,
        reader: str | Path = READER,
        nfkc: bool = False,
        batch: int = 16,
    ) -> None:
        if engine not in ("transformers", "paddleocr"):
            raise ValueError(f"ocr: no engine {engine!r}; there are transformers and paddleocr")
        self.device = device
        self.engine = engine
        self.detector = detector
        self.reader = reader
        self.nfkc = nfkc
        self.batch = batch
        self.model = None

    def load(self) -> None:
        if self.engine == "paddleocr":
            self.model = load_paddle(self.device)
            return
        detector = fuse(load(AutoModelForObjectDetection, self.detector)).to(self.device)
        reader = fuse(load(AutoModelForTextRecognition, self.reader)).to(self.device)
        for kind in (detector.config.model_type, reader.config.model_type):
            if not kind.startswith("pp_ocrv5"):
                what = f"{kind} needs its pictures prepared in another way"
                raise ValueError(f"ocr: {what}; expected PP-OCRv5")
        try:
            file = cached_file(self.reader, "preprocessor_config.json", local_files_only=True)
            config = json.loads(Path(file).read_text())
            self.letters = alphabet(config["character_list"], reader.config.head_out_channels)
        except (OSError, KeyError, ValueError) as error:
            what = f"no usable alphabet in {self.reader} ({error})"
            raise ValueError(f"ocr: {what}; hf download {self.reader}") from error
        mean, std = (config.get(key, [0.5] * 3) for key in ("image_mean", "image_std"))
        self.scale = [torch.tensor(values)[:, None, None] for values in (mean, std)]
        self.model = detector, reader

    def check(self, prompts: Sequence[str], metadata: Sequence[dict] | None = None) -> None:
        """ValueError, one line, where a prompt quotes no text. To be called before sampling."""
        for prompt in prompts:
            quoted(prompt)

    def __call__(
        self,
        images: torch.Tensor | Sequence[Image.Image],
        prompts: Sequence[str],
        metadata: Sequence[dict] | None = None,
    ) -> torch.Tensor:
        pictures, targets = as_pictures(images), [quoted(prompt) for prompt in prompts]
        if len(pictures) != len(targets):
            counts = f"{len(pictures)} images and {len(targets)} prompts"
            raise ValueError(f"ocr: {counts}; give one prompt per image")
        texts = []
        for i in range(0, len(pictures), self.batch):
            texts += self.read(pictures[i : i + self.batch])
        pairs = zip(texts, targets)
        return torch.tensor([score_text(text, target, self.nfkc) for text, target in pairs])

    @torch.no_grad()
    def read(self, pictures: list[Image.Image]) -> list[str]:
        """The text in each RGB picture: its confident lines in reading order, joined."""
        if self.model is None:
            self.load()
        if self.engine == "paddleocr":
            return [self.read_with_paddle(picture) for picture in pictures]
        detector, reader = self.model
        arrays = [torch.from_numpy(np.array(picture)) for picture in pictures]
        pixels = [array.permute(2, 0, 1).float() for array in arrays]  # (3, H, W), 0 to 255
        # The probability of text, (1, h, w) for each picture
        maps = self.forward(detector, [for_detector(p) for p in pixels])
        page_of, crops = [], []  # the picture that each line belongs to, and its pixels
        for page, (probability, p) in enumerate(zip(maps, pixels)):
            for quad in find_lines(probability[0].numpy(), *p.shape[1:]):
                page_of.append(page)
                crops.append(for_reader(cut(p, quad), *self.scale))
        texts = [""] * len(pictures)
        for page, steps in zip(page_of, self.forward(reader, crops)):
            text, confidence = decode(steps.numpy(), self.letters)
            if confidence >= CONFIDENT:
                texts[page] += text
        return texts

    def read_with_paddle(self, picture: Image.Image) -> str:
        """Like flow_grpo we give it red, green, blue, though it expects the reverse."""
        lines = self.model.ocr(np.array(picture), cls=False)[0] or []
        return "".join(text for _, (text, confidence) in lines if confidence > 0)

    def forward(self, model: torch.nn.Module, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs on the CPU, in the order of the inputs; inputs of one shape share batches."""
        outputs = {}
        for shape in sorted({x.shape for x in inputs}):
            same = [i for i, x in enumerate(inputs) if x.shape == shape]
            for start in range(0, len(same), self.batch):
                chosen = same[start : start + self.batch]
                x = torch.stack([inputs[i] for i in chosen]).to(self.device)
                with exact_float32(self.device):
                    output = model(x).last_hidden_state
                if not output.isfinite().all():  # it would mean "no text", a score of 0
                    advice = "check the device and fetch the weights again"
                    raise ValueError(f"ocr: a network's output is not finite; {advice}")
                outputs |= zip(chosen, output.float().cpu())
        return [outputs[i] for i in range(len(inputs))]


# ---- The formula


def quoted(prompt: str) -> str:
    """The text between the prompt's first two double quotes. ValueError where there is none."""
    parts = prompt.split('"')
    if len(parts) < 3 or not parts[1].replace(" ", ""):
        example = 'expected one such as: a sign that says "Hi"'
        raise ValueError(f"ocr: the prompt {prompt!r} quotes no text; {example}")
    return parts[1]


def score_text(text: str, target: str, nfkc: bool = False) -> float:
    """1 - min(edit distance, length) / length of the target, without spaces (only) and case.

    1 as soon as the target is anywhere in the text: what else is written costs nothing."""
    if nfkc:
        text, target = (unicodedata.normalize("NFKC", s) for s in (text, target))
    text, target = (s.replace(" ", "").lower() for s in (text, target))
    distance = 0 if target in text else min(edit_distance(text, target), len(target))
    return 1 - distance / len(target)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein: how many letters to insert, delete or replace to turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


# ---- Detection: from a picture to the four corners of each line


def for_detector(pixels: torch.Tensor) -> torch.Tensor:
    """(3, H, W) in 0 to 255 -> (3, h, w), normalised blue, green, red.

    The longer side is at most 960; both are multiples of 32."""
    H, W = pixels.shape[1:]
    shrink = min(1.0, LONGEST / max(H, W))
    h, w = (max(round(int(side * shrink) / 32) * 32, 32) for side in (H, W))
    bgr = resize(pixels, h, w).flip(0) / 255
    return (bgr - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def resize(pixels: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """OpenCV's bilinear resize of bytes: no antialiasing, rounded."""
    return F.interpolate(pixels[None], (h, w), mode="bilinear", align_corners=False)[0].round()


def find_lines(probability: np.ndarray, height: int, width: int) -> list[np.ndarray]:
    """Map (h, w) of text probabilities -> corners (4, 2) of each line, in reading order.

    Corners are in pixels of the height x width picture, clockwise from the top left. This is
    DBPostProcess with its "fast" score, then filter_tag_det_res and sorted_boxes. A corner is a
    pixel off where OpenCV's float32 turns 67 into 66.99999, which is truncated; and where several
    rectangles or corners fit equally well, at 45 degrees, another may be taken."""
    h, w = probability.shape
    found = []
    for points in outlines(probability > PIXEL)[:MAX_LINES]:
        quad, sides = smallest_rectangle(points)
        quad = np.trunc(quad.round(3))  # whole pixels; rounded first, or noise would decide
        if sides.min() < MIN_SIDE or mean_inside(probability, quad) < BOX:
            continue
        distance = UNCLIP * sides.prod() / (2 * sides.sum())  # 1.5 * area / perimeter
        quad, sides = smallest_rectangle(grow(quad, distance))
        if sides.min() < MIN_SIDE + 2:
            continue
        quad = np.round(quad * [width / w, height / h]).clip(0, [width, height])
        quad = clockwise(quad).clip(0, [width - 1, height - 1])
        sides = np.linalg.norm(quad[[1, 3]] - quad[0], axis=1)  # of the top, of the left
        if sides.astype(int).min() > 3:
            found.append(quad)
    return in_reading_order(found)


def in_reading_order(quads: list[np.ndarray]) -> list[np.ndarray]:
    """By the top left corner: y, then x. Corners less than 10 pixels apart in y are in one row."""
    quads = sorted(quads, key=lambda quad: (quad[0][1], quad[0][0]))
    for i in range(1, len(quads)):
        for j in range(i, 0, -1):
            (x_before, y_before), (x, y) = quads[j - 1][0], quads[j][0]
            if abs(y - y_before) >= 10 or x >= x_before:
                break
            quads[j - 1], quads[j] = quads[j], quads[j - 1]
    return quads


def outlines(bitmap: np.ndarray) -> list[np.ndarray]:
    """Regions of a (h, w) bool map, and holes in them -> for each, points (N, 2) x, y of its hull.

    As in OpenCV's findContours, pixels of a region may touch at a corner, those of a hole may not;
    a hole's outline runs over the pixels around it; what begins last comes first."""
    regions = components(bitmap)
    _, *holes = components(~np.pad(bitmap, 1), corners_touch=False)  # the first is the outside
    around = np.array([[-1, 0], [1, 0], [0, -1], [0, 1]]) - 1  # -1: the padding
    regions += [(points[:, None] + around).reshape(-1, 2) for points in holes]
    return sorted(regions, key=lambda points: (points[0][1], points[0][0]), reverse=True)


def components(bitmap: np.ndarray, corners_touch: bool = True) -> list[np.ndarray]:
    """Connected regions of a (h, w) bool map -> for each the ends of its rows, (N, 2) x, y."""
    steps = np.diff(np.pad(bitmap, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(steps == 1)  # each run of True: its row, its first column
    ends = np.nonzero(steps == -1)[1]  # one past its last column
    # A run touches those below it from the first that ends late enough to the last that starts
    # early enough. Counted over all rows, columns order the runs.
    below, gap = steps.shape[1], int(not corners_touch)
    first = np.searchsorted(rows * below + ends, (rows + 1) * below + starts + gap)
    stop = np.searchsorted(rows * below + starts, (rows + 1) * below + ends - gap, side="right")
    root = list(range(len(rows)))

    def find(i):
        while root[i] != i:
            root[i] = i = root[root[i]]
        return i

    groups = {}
    for i in range(len(rows)):
        for touching in range(first[i], stop[i]):
            root[find(touching)] = find(i)
    for i, row in enumerate(rows):
        groups.setdefault(find(i), []).extend([(starts[i], row), (ends[i] - 1, row)])
    return [np.array(points, float) for points in groups.values()]


def smallest_rectangle(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rectangle of least area around points (N, 2): corners (4, 2) in order around it, sides (2,).

    One of its sides lies on an edge of the convex hull (Freeman and Shapira, 1975); we try all."""
    hull = convex_hull(points)
    edges = np.append(np.roll(hull, -1, 0) - hull, [[1.0, 0.0]], 0)  # 1, 0: for a single pixel
    edges = edges[edges.any(1)]
    along = edges / np.linalg.norm(edges, axis=1, keepdims=True)  # (edges, 2)
    axes = np.stack([along, along[:, ::-1] * [-1, 1]], 1)  # (edges, 2, 2): along it, across it
    spread = np.einsum("eax,px->epa", axes, hull)  # (edges, points, 2)
    low, high = spread.min(1), spread.max(1)  # (edges, 2)
    best = (high - low).prod(1).argmin()
    corners = np.where([[0, 0], [1, 0], [1, 1], [0, 1]], high[best], low[best]) @ axes[best]
    return corners, high[best] - low[best]


def convex_hull(points: np.ndarray) -> np.ndarray:
    """The points (N, 2) on the outline of the hull, in order (Andrew's monotone chain)."""
    points, hull = sorted(set(map(tuple, points.tolist()))), []
    for ordered in (points, points[::-1]):
        half = []
        for x, y in ordered:
            while len(half) > 1:
                (ax, ay), (bx, by) = half[-2:]
                if (bx - ax) * (y - ay) > (by - ay) * (x - ax):  # the turn at b is convex: it stays
                    break
                half.pop()
            half.append((x, y))
        hull += half[:-1]
    return np.array(hull or points)


def mean_inside(probability: np.ndarray, quad: np.ndarray) -> np.floating:
    """Mean of the map over the pixels of a convex quad of whole pixels, its outline included.

    This is box_score_fast."""
    h, w = probability.shape
    (x0, y0), (x1, y1) = np.stack([quad.min(0), quad.max(0)]).clip(0, [w - 1, h - 1]).astype(int)
    y, x = np.mgrid[y0 : y1 + 1, x0 : x1 + 1]
    inside = np.ones(x.shape, bool)
    for a, b in zip(quad, np.roll(quad, -1, 0)):
        width, height = abs(b - a)
        reach = max(width, height) / 2  # the outline's pixels: half a pixel along its longer axis
        if height > width or a[1] < b[1]:  # here OpenCV 4 draws those exactly half a pixel outside
            reach += 0.1
        inside &= (x - a[0]) * (a[1] - b[1]) + (y - a[1]) * (b[0] - a[0]) > -reach
    return probability[y0 : y1 + 1, x0 : x1 + 1][inside].mean()


def grow(quad: np.ndarray, distance: float) -> np.ndarray:
    """The outline at this distance around a quad, in whole pixels (N, 2); its corners are arcs.

    This is unclip, so Clipper's offset with JT_ROUND: it keeps the chords of an arc within a
    quarter of a pixel of it, but two pixels long or more."""
    edges = np.roll(quad, -1, 0) - quad
    normals = edges[:, ::-1] * [1, -1] / np.linalg.norm(edges, axis=1, keepdims=True)  # outwards
    chord = max(2 * np.arccos(1 - 0.25 / distance), 2 / distance)  # its angle
    points = []
    for corner, before, after in zip(quad, np.roll(normals, 1, 0), normals):
        chords = max(int(np.arccos(before @ after) / chord + 0.5), 1)
        angles = np.arctan2(before[1], before[0]) + chord * np.arange(chords)
        arc = np.append(np.stack([np.cos(angles), np.sin(angles)], 1), [after], 0)
        points.append(corner + distance * arc)
    points = np.concatenate(points)
    return np.trunc(points + np.copysign(0.5, points))  # rounded, halves away from 0


def clockwise(quad: np.ndarray) -> np.ndarray:
    """Corners from the top left: least x + y first, most x + y third, the right one second."""
    total, lean = quad.sum(1), quad[:, 1] - quad[:, 0]
    first, third = total.argmin(), total.argmax()
    second, fourth = sorted(set(range(4)) - {first, third}, key=lambda i: lean[i])[:2]
    return quad[[first, second, third, fourth]]


# ---- Recognition: from a line to its letters


def cut(pixels: torch.Tensor, quad: np.ndarray) -> torch.Tensor:
    """The line inside the quad, straightened: (3, H, W) -> (3, h, w).

    Upright lines (h >= 1.5 w) are turned on their side. This is get_rotate_crop_image: perspective,
    bicubic, edges repeated."""
    top, right, bottom, left = np.linalg.norm(quad - np.roll(quad, -1, 0), axis=1)
    w, h = max(int(max(top, bottom)), 1), max(int(max(left, right)), 1)
    # The homography from the crop's corners (u, v) to the quad's (x, y):
    # x = (m0 u + m1 v + m2) / (m6 u + m7 v + 1) and y = (m3 u + m4 v + m5) / (m6 u + m7 v + 1)
    rows = []
    for (u, v), (x, y) in zip([(0, 0), (w, 0), (w, h), (0, h)], quad):
        rows += [[u, v, 1, 0, 0, 0, -u * x, -v * x], [0, 0, 0, u, v, 1, -u * y, -v * y]]
    # Least squares: corners that coincide at the picture's edge give a senseless crop, no error.
    solution = np.linalg.lstsq(np.array(rows, float), quad.flatten())[0]
    matrix = np.append(solution, 1.0).reshape(3, 3)
    v, u = np.mgrid[:h, :w]
    x, y, z = np.einsum("ij,jhw->ihw", matrix, np.stack([u, v, np.ones_like(u)]))
    H, W = pixels.shape[1:]
    places = [2 * x / z / max(W - 1, 1) - 1, 2 * y / z / max(H - 1, 1) - 1]  # in -1 to 1
    grid = torch.from_numpy(np.stack(places, -1))[None]  # (1, h, w, 2)
    sampling = {"mode": "bicubic", "padding_mode": "border", "align_corners": True}
    crop = F.grid_sample(pixels[None].double(), grid, **sampling)[0]
    crop = crop.float().round().clamp(0, 255)
    if h / w >= 1.5:
        return crop.rot90(1, (1, 2))
    return crop


def for_reader(crop: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(3, h, w) in 0 to 255 -> (3, 48, 320 or more): resized to 48 high, zeros to the right.

    This is resize_norm_img. The channels stay red, green, blue: transformers' processor of this
    checkpoint does not swap them. PaddleOCR pads a batch to its widest line, so that a line's
    neighbours change how it is read; here every line has its own width."""
    h, w = crop.shape[1:]
    padded = min(int(48 * max(320 / 48, w / h)), 3200)
    width = min(padded, -(-48 * w // h))  # 48 w / h, rounded up
    crop = (resize(crop, 48, width) / 255 - mean) / std
    return F.pad(crop, (0, padded - width))


def decode(steps: np.ndarray, letters: Sequence[str]) -> tuple[str, float]:
    """Probabilities (T, letters) of each place along the line -> (text, mean confidence).

    The likeliest letter of each place, a repeated one once, none where it is the blank, letter 0
    (CTCLabelDecode)."""
    best = steps.argmax(1)
    keep = (best != 0) & np.append(True, best[1:] != best[:-1])
    if not keep.any():
        return "", 0.0
    return "".join(letters[i] for i in best[keep]), float(steps.max(1)[keep].mean())


def alphabet(listed: Sequence[str], outputs: int) -> list[str]:
    """The letter of each of the reader's outputs: first the blank, last the space.

    The list may lack the blank, or both."""
    letters = list(listed)
    if len(letters) == outputs - 2:
        letters.append(" ")
    if len(letters) == outputs - 1:
        letters.insert(0, "")
    if len(letters) != outputs:
        raise ValueError(f"{len(listed)} letters for {outputs} outputs")
    return letters


# ---- Loading


def load(kind: type, weights: str | Path) -> torch.nn.Module:
    try:
        # A folder and not a name: for a name the Auto classes query the hub.
        folder = Path(cached_file(weights, "config.json", local_files_only=True)).parent
        model, info = kind.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        what = f"cannot load {weights} ({reason})"
        raise ValueError(f"ocr: {what}; fetch it with: hf download {weights}") from error
    missing = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
    if missing:  # transformers would use random weights in their place
        what = f"{weights} lacks {len(missing)} weights ({missing[0]}, …)"
        raise ValueError(f"ocr: {what}; hf download {weights}")
    return model.eval()


@torch.no_grad()
def fuse(model: torch.nn.Module) -> torch.nn.Module:
    """Each layer's parallel convolutions as one, in place: the same output in half the time.

    PP-LCNetV3 was trained with layers that add up four k x k convolutions, one of 1 x 1 and the
    input itself, each through a batch norm, scaled at the end: all linear (RepVGG, 2021)."""
    for layer in model.modules():
        if not hasattr(layer, "conv_symmetric"):
            continue
        fused = layer.conv_symmetric[0].convolution
        branches = [*layer.conv_symmetric, layer.conv_small_symmetric]
        pairs = [(b.convolution.weight, b.normalization) for b in branches if b is not None]
        if layer.identity is not None:
            kernel = torch.nn.init.dirac_(torch.empty_like(fused.weight), fused.groups)
            pairs.append((kernel, layer.identity))
        weight, bias = torch.zeros_like(fused.weight), layer.lab.bias.clone()
        for kernel, norm in pairs:
            gain = layer.lab.scale * norm.weight / (norm.running_var + norm.eps).sqrt()
            margin = (fused.kernel_size[0] - kernel.shape[-1]) // 2  # 1 x 1 is the middle of k x k
            weight += F.pad(gain[:, None, None, None] * kernel, [margin] * 4)
            bias = bias + layer.lab.scale * norm.bias - gain * norm.running_mean
        fused.weight.copy_(weight)
        fused.bias = torch.nn.Parameter(bias)
        layer.conv_symmetric = torch.nn.ModuleList([fused])
        layer.conv_small_symmetric = layer.identity = None
        layer.lab = torch.nn.Identity()
    return model


def load_paddle(device: torch.device | str) -> Any:
    install = "pip install paddleocr==2.9.1 paddlepaddle"
    try:
        import paddleocr
    except ImportError as error:
        what = f"engine paddleocr needs that package ({error})"
        raise ValueError(f"ocr: {what}; {install}") from error
    version = getattr(paddleocr, "__version__", "unknown")
    if not version.startswith("2."):  # 3.x has other models and another interface
        raise ValueError(f"ocr: paddleocr {version} is not the engine of the paper; {install}")
    gpu = str(device).startswith("cuda")
    return paddleocr.PaddleOCR(lang="en", use_angle_cls=False, use_gpu=gpu, show_log=False)


# ---- Training prompts, by rule

PLACES = (
    "A street sign reading {}", "A neon sign at night that says {}",
    "A chalkboard in a café with the words {}", "A birthday cake with {} written in icing",
    "A book cover with the title {}", "A T-shirt printed with {}",
    "Graffiti on a brick wall that spells {}", "A poster with the headline {}",
    "A coffee mug with the text {}", "A cardboard sign held by a robot that says {}",
    "A train station display showing {}", "A museum plaque that reads {}",
    "Skywriting over a beach that spells {}", "A spaceship hull stencilled with {}",
    "A computer screen showing {}",
)  # fmt: skip
WORDS = (
    "open closed welcome home fresh bread daily hello world dream big slow down keep out grand "
    "opening free coffee lost cat happy birthday night market next stop central park ocean view "
    "mind the gap last train north summer sale new arrivals quiet please garden party live music "
    "best pizza in town push pull exit moon base alpha golden river winter festival secret recipe "
    "road work ahead wild honey captain jack lucky number electric city red planet never give up "
    "time machine"
).split()


def make_prompts(count: int, seed: int = 0, exclude: Iterable[str] = ()) -> list[str]:
    """`count` different prompts like those of flow_grpo's dataset/ocr.

    Each quotes one text of 2 to 29 letters, as in its test set. Flow-OPD's repository does not have
    its 19,653 training prompts; these are ours.
    exclude: prompts (of a test set, for example) whose quoted texts must not appear."""
    rng = random.Random(seed)
    taken = {quoted(prompt).lower() for prompt in exclude}
    prompts = {}  # a dict: no duplicates, in order
    for _ in range(100 * count + 1000):
        if len(prompts) == count:
            return list(prompts)
        text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 5)))
        text = rng.choice((str.title, str.upper, str.capitalize, str.lower))(text)
        text += rng.choice(("", "", "", "!", f" {rng.randint(1, 2030)}"))
        if 2 <= len(text) <= 29 and text.lower() not in taken:
            prompts[rng.choice(PLACES).format(f'"{text}"')] = None
    what = f"only {len(prompts)} of {count} prompts can be made with these exclusions"
    raise ValueError(f"ocr: {what}; give a smaller number")
