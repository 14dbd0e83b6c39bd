"""OCR reward: how much of the text that the prompt puts in quotes can be read in the image. 0 to 1.

    from rewards.ocr import OCR
    scores = OCR(device="cuda")(images, ['a sign that says "Hello World"', ...])  # (B,)

The paper's formula (flow_grpo/ocr.py) is `score_text`; "OCR Acc." is its mean over 1018 test prompts. The engine reads:
  transformers  PP-OCRv5: `find_lines` on a map of text pixels, `cut` each line out, `decode` its letters (the default)
  paddleocr     PaddleOCR 2.9.1 (en_PP-OCRv3_det, en_PP-OCRv4_rec), what the paper ran; needs that package
Both are a segmentation network and a CTC reader without a language model, so misspelt letters are read as drawn. They
are not the same networks: compare numbers within one engine only. Everything before and after the networks follows
PaddleOCR 2.9.1 (ppocr/postprocess/db_postprocess.py, tools/infer/predict_{system,det,rec}.py), without OpenCV.

Weights (Apache-2.0), 20 MB together:
    hf download PaddlePaddle/PP-OCRv5_mobile_det_safetensors
    hf download PaddlePaddle/PP-OCRv5_mobile_rec_safetensors
PP-OCRv5_server_{det,rec}_safetensors fit too: larger, slower, better. Not checked against the real weights here.
"""

import contextlib
import json
import random
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModelForObjectDetection, AutoModelForTextRecognition
from transformers.utils import cached_file

DETECTOR, READER = "PaddlePaddle/PP-OCRv5_mobile_det_safetensors", "PaddlePaddle/PP-OCRv5_mobile_rec_safetensors"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the detector, in its channel order: blue, green, red
LONGEST, PIXEL, BOX, UNCLIP, MIN_SIDE, MAX_LINES = 960, 0.3, 0.6, 1.5, 3, 1000  # predict_det.py's defaults
CONFIDENT = 0.5  # drop_score of predict_system.py: a line read with less confidence does not count


class OCR:
    """Callable (images, prompts, metadata=None) -> (B,) float32 on the CPU. images: see `as_pictures`.

    device: where the models live once they are needed (first call); `reward.model = None` drops them again.
    engine: "transformers" or "paddleocr". detector, reader: hub ids or directories; never downloaded here.
    nfkc: full-width letters and the like count as plain ones (the paper does not do this).
    batch: pictures and lines per forward pass; scores do not depend on it beyond rounding.
    ValueError where a prompt quotes no text, an image cannot be decoded, or weights or the package are missing."""

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
        self.device, self.engine, self.detector, self.reader = device, engine, detector, reader
        self.nfkc, self.batch, self.model = nfkc, batch, None

    def load(self) -> None:
        if self.engine == "paddleocr":
            self.model = load_paddle(self.device)
            return
        detector = load(AutoModelForObjectDetection, self.detector).to(self.device)
        reader = load(AutoModelForTextRecognition, self.reader).to(self.device)
        for kind in (detector.config.model_type, reader.config.model_type):
            if not kind.startswith("pp_ocrv5"):
                raise ValueError(f"ocr: {kind} wants its pictures prepared in another way; expected PP-OCRv5")
        try:
            config = json.loads(Path(cached_file(self.reader, "preprocessor_config.json", local_files_only=True)).read_text())
            self.letters = alphabet(config["character_list"], reader.config.head_out_channels)
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"ocr: no usable alphabet in {self.reader} ({error}); hf download {self.reader}") from error
        self.scale = [torch.tensor(config.get(key, [0.5] * 3))[:, None, None] for key in ("image_mean", "image_std")]
        self.model = detector, reader

    def check(self, prompts: Sequence[str], metadata: Sequence[dict] | None = None) -> None:
        """ValueError, one line, where a prompt quotes no text: to be asked before anything is painted."""
        for prompt in prompts:
            quoted(prompt)

    def __call__(
        self, images: torch.Tensor | Sequence[Image.Image], prompts: Sequence[str], metadata: Sequence[dict] | None = None
    ) -> torch.Tensor:
        pictures, targets = as_pictures(images), [quoted(prompt) for prompt in prompts]
        if len(pictures) != len(targets):
            raise ValueError(f"ocr: {len(pictures)} images and {len(targets)} prompts; give one prompt per image")
        n = self.batch
        texts = [text for i in range(0, len(pictures), n) for text in self.read(pictures[i : i + n])]
        return torch.tensor([score_text(text, target, self.nfkc) for text, target in zip(texts, targets)])

    @torch.no_grad()
    def read(self, pictures: list[Image.Image]) -> list[str]:
        """What stands in each RGB picture: its confident lines in reading order, joined without anything between."""
        if self.model is None:
            self.load()
        if self.engine == "paddleocr":  # given red, green, blue though it expects the reverse: as flow_grpo does
            pages = [self.model.ocr(np.array(picture), cls=False)[0] or [] for picture in pictures]
            return ["".join(text for _, (text, confidence) in page if confidence > 0) for page in pages]
        detector, reader = self.model
        pixels = [torch.from_numpy(np.array(p)).permute(2, 0, 1).float() for p in pictures]  # (3, H, W), 0 to 255
        maps = self.forward(detector, [for_detector(p) for p in pixels])  # (1, h, w) each, probability of text
        quads = [find_lines(m[0].numpy(), *p.shape[1:]) for m, p in zip(maps, pixels)]
        crops = [for_reader(cut(p, quad), *self.scale) for p, found in zip(pixels, quads) for quad in found]
        lines = iter([decode(steps.numpy(), self.letters) for steps in self.forward(reader, crops)])
        pages = [[next(lines) for _ in found] for found in quads]
        return ["".join(text for text, confidence in page if confidence >= CONFIDENT) for page in pages]

    def forward(self, model: torch.nn.Module, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs on the CPU, in the order of the inputs; inputs of equal shape go through together."""
        outputs = {}
        for shape in sorted({x.shape for x in inputs}):
            same = [i for i, x in enumerate(inputs) if x.shape == shape]
            for start in range(0, len(same), self.batch):
                part = same[start : start + self.batch]
                with exact_float32(self.device):
                    got = model(torch.stack([inputs[i] for i in part]).to(self.device)).last_hidden_state
                if not got.isfinite().all():  # would read as "no text", a score of 0
                    raise ValueError("ocr: a network's output is not finite; check the device and fetch the weights again")
                outputs |= zip(part, got.float().cpu())
        return [outputs[i] for i in range(len(inputs))]


@contextlib.contextmanager
def exact_float32(device: torch.device | str) -> Iterator[None]:
    """No autocast and no TF32 inside: a box just above or below a threshold is a line more or less. Settings restored after."""
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


# ---- The formula


def quoted(prompt: str) -> str:
    """The text between the prompt's first two double quotes. ValueError where there is none."""
    parts = prompt.split('"')
    if len(parts) < 3 or not parts[1].replace(" ", ""):
        raise ValueError(f'ocr: the prompt {prompt!r} quotes no text; expected one such as: a sign that says "Hi"')
    return parts[1]


def score_text(text: str, target: str, nfkc: bool = False) -> float:
    """1 - min(edit distance, length) / length of the target, after removing spaces (only) and case. 1 as soon as the
    target stands anywhere in the text: what else is written costs nothing."""
    clean = lambda s: (unicodedata.normalize("NFKC", s) if nfkc else s).replace(" ", "").lower()
    text, target = clean(text), clean(target)
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
    """(3, H, W) in 0 to 255 -> (3, h, w) normalised: longest side at most 960, both sides multiples of 32."""
    H, W = pixels.shape[1:]
    shrink = min(1.0, LONGEST / max(H, W))
    h, w = (max(round(int(side * shrink) / 32) * 32, 32) for side in (H, W))
    bgr = resize(pixels, h, w).flip(0) / 255
    return (bgr - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def resize(pixels: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """OpenCV's bilinear resize of bytes: no antialiasing, rounded."""
    return F.interpolate(pixels[None], (h, w), mode="bilinear", align_corners=False)[0].round()


def find_lines(probability: np.ndarray, height: int, width: int) -> list[np.ndarray]:
    """Map (h, w) of text probabilities -> corners (4, 2) of each line, in pixels of the height x width picture, clockwise
    from the top left, in reading order. DBPostProcess with its "fast" score, then filter_tag_det_res and sorted_boxes.
    Holes in a text region get no box of their own here; OpenCV's contours give them one, which scores below BOX."""
    h, w = probability.shape
    found = []
    for points in components(probability > PIXEL)[:MAX_LINES]:
        rectangle = smallest_rectangle(points)
        sides = rectangle[2]
        if sides.min() < MIN_SIDE or mean_inside(probability, corners(rectangle)) < BOX:
            continue
        grow = sides.prod() * UNCLIP / (2 * sides.sum())  # area * 1.5 / perimeter, outwards on every side
        if sides.min() + 2 * grow < MIN_SIDE + 2:
            continue
        quad = np.round(corners(rectangle, grow) * [width / w, height / h]).clip(0, [width, height])
        quad = clockwise(quad).clip(0, [width - 1, height - 1])
        if min(int(np.linalg.norm(quad[0] - quad[1])), int(np.linalg.norm(quad[0] - quad[3]))) > 3:
            found.append(quad)
    found.sort(key=lambda quad: (quad[0][1], quad[0][0]))  # by the top left corner: y, then x ...
    for i in range(1, len(found)):  # ... but corners less than 10 pixels apart in y are on one row, left to right
        for j in range(i, 0, -1):
            if abs(found[j][0][1] - found[j - 1][0][1]) >= 10 or found[j][0][0] >= found[j - 1][0][0]:
                break
            found[j - 1], found[j] = found[j], found[j - 1]
    return found


def components(bitmap: np.ndarray) -> list[np.ndarray]:
    """Regions of a (h, w) bool map that hang together, corners included -> [(N, 2) x, y of the ends of their rows]."""
    steps = np.diff(np.pad(bitmap, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(steps == 1)  # runs of True: row, first column, one past the last column
    ends = np.nonzero(steps == -1)[1]
    root = list(range(len(rows)))

    def find(i):
        while root[i] != i:
            root[i] = i = root[root[i]]
        return i

    first = np.searchsorted(rows, np.arange(len(bitmap) + 1))  # where each row's runs begin
    for row in range(1, len(bitmap)):
        above, stop = first[row - 1], first[row]
        for i in range(first[row], first[row + 1]):
            while above < stop and ends[above] < starts[i]:
                above += 1
            touching = above
            while touching < stop and starts[touching] <= ends[i]:
                root[find(i)] = find(touching)
                touching += 1
    groups = {}
    for i in range(len(rows)):
        groups.setdefault(find(i), []).extend([(starts[i], rows[i]), (ends[i] - 1, rows[i])])
    return [np.array(points, float) for points in groups.values()]


def smallest_rectangle(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rectangle of least area around points (N, 2): (axes (2, 2), centre along the axes (2,), sides (2,)).
    One of its sides lies on an edge of the convex hull (Freeman and Shapira, 1975), so those are all tried."""
    hull = convex_hull(points)
    edges = np.roll(hull, -1, 0) - hull
    lengths = np.linalg.norm(edges, axis=1)
    along = edges[lengths > 0] / lengths[lengths > 0, None] if lengths.any() else np.array([[1.0, 0.0]])
    axes = np.stack([along, along[:, ::-1] * [-1, 1]], 1)  # (edges, 2, 2): along the edge, across it
    spread = np.einsum("eax,px->epa", axes, hull)  # (edges, points, 2)
    low, high = spread.min(1), spread.max(1)  # (edges, 2)
    best = (high - low).prod(1).argmin()
    return axes[best], (low[best] + high[best]) / 2, high[best] - low[best]


def convex_hull(points: np.ndarray) -> np.ndarray:
    """The points (N, 2) on the outline of the hull, in order (Andrew's monotone chain)."""
    points, hull = sorted(set(map(tuple, points.tolist()))), []
    for ordered in (points, points[::-1]):
        half = []
        for x, y in ordered:
            while len(half) > 1:
                (ax, ay), (bx, by) = half[-2:]
                if (bx - ax) * (y - ay) > (by - ay) * (x - ax):  # a, b, (x, y) turn the right way: b stays
                    break
                half.pop()
            half.append((x, y))
        hull += half[:-1]
    return np.array(hull or points)


def corners(rectangle: tuple[np.ndarray, np.ndarray, np.ndarray], grow: float = 0.0) -> np.ndarray:
    """(4, 2) corners, in order around the rectangle, each side moved outwards by `grow`."""
    axes, centre, sides = rectangle
    return (centre + (sides / 2 + grow) * [[-1, -1], [1, -1], [1, 1], [-1, 1]]) @ axes


def mean_inside(probability: np.ndarray, quad: np.ndarray) -> np.floating:
    """Mean of the map over the pixels of a convex quad, its outline included (box_score_fast, corners cut to integers)."""
    last = [probability.shape[1] - 1, probability.shape[0] - 1]
    (x0, y0), (x1, y1) = np.floor(quad.min(0)).clip(0, last).astype(int), np.ceil(quad.max(0)).clip(0, last).astype(int)
    y, x = np.mgrid[y0 : y1 + 1, x0 : x1 + 1]
    quad = np.trunc(quad - [x0, y0]) + [x0, y0]
    inside = np.ones(x.shape, bool)
    centre = quad.mean(0)
    for a, b in zip(quad, np.roll(quad, -1, 0)):
        normal = np.array([b[1] - a[1], a[0] - b[0]]) / max(np.linalg.norm(b - a), 1e-9)
        normal *= np.sign(normal @ (centre - a)) or 1
        inside &= (x - a[0]) * normal[0] + (y - a[1]) * normal[1] >= -0.5  # half a pixel: those the outline runs through
    return probability[y0 : y1 + 1, x0 : x1 + 1][inside].mean()


def clockwise(quad: np.ndarray) -> np.ndarray:
    """Corners from the top left: least x + y first, most x + y third, and of the others the one further right second."""
    total, lean = quad.sum(1), quad[:, 1] - quad[:, 0]
    first, third = total.argmin(), total.argmax()
    second, fourth = sorted(set(range(4)) - {first, third}, key=lambda i: lean[i])[:2]
    return quad[[first, second, third, fourth]]


# ---- Recognition: from a line to its letters


def cut(pixels: torch.Tensor, quad: np.ndarray) -> torch.Tensor:
    """The line inside the quad, straightened: (3, H, W) -> (3, h, w). Upright ones (h >= 1.5 w) are laid on their side
    (get_rotate_crop_image: perspective, bicubic, edges repeated)."""
    side = lambda i, j: np.linalg.norm(quad[i] - quad[j])
    w, h = max(int(max(side(0, 1), side(2, 3))), 1), max(int(max(side(0, 3), side(1, 2))), 1)
    # Homography from the crop's corners (u, v) to the quad's (x, y): x = (a u + b v + c) / (g u + h v + 1), y likewise
    rows = []
    for (u, v), (x, y) in zip([(0, 0), (w, 0), (w, h), (0, h)], quad):
        rows += [[u, v, 1, 0, 0, 0, -u * x, -v * x], [0, 0, 0, u, v, 1, -u * y, -v * y]]
    # least squares: corners that fell together at the picture's edge give nonsense to read instead of an exception
    matrix = np.append(np.linalg.lstsq(np.array(rows, float), quad.flatten())[0], 1.0).reshape(3, 3)
    v, u = np.mgrid[:h, :w]
    x, y, z = np.einsum("ij,jhw->ihw", matrix, np.stack([u, v, np.ones_like(u)]))
    H, W = pixels.shape[1:]
    grid = np.stack([2 * x / z / max(W - 1, 1) - 1, 2 * y / z / max(H - 1, 1) - 1], -1)  # (h, w, 2) in -1 to 1
    options = {"mode": "bicubic", "padding_mode": "border", "align_corners": True}
    crop = F.grid_sample(pixels[None].double(), torch.from_numpy(grid)[None], **options)[0].float().round().clamp(0, 255)
    return crop.rot90(1, (1, 2)) if h / w >= 1.5 else crop


def for_reader(crop: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(3, h, w) in 0 to 255 -> (3, 48, 320 or more): 48 high, its own width, zeros to the right (resize_norm_img).
    Red, green, blue: transformers' processor of this checkpoint does not swap. PaddleOCR pads a batch to its widest
    line and so lets a line's neighbours change how it is read; here every line has its own width."""
    h, w = crop.shape[1:]
    total = min(int(48 * max(320 / 48, w / h)), 3200)
    own = min(total, -(-48 * w // h))  # 48 w / h, rounded up
    crop = (resize(crop, 48, own) / 255 - mean) / std
    return F.pad(crop, (0, total - own))


def decode(steps: np.ndarray, letters: Sequence[str]) -> tuple[str, float]:
    """Probabilities (T, letters) of each place along the line -> (text, mean confidence): the likeliest letter of each
    place, a repeated one once, and none where that is the blank, letter 0 (CTCLabelDecode)."""
    best = steps.argmax(1)
    keep = (best != 0) & np.append(True, best[1:] != best[:-1])
    confidence = float(steps.max(1)[keep].mean()) if keep.any() else 0.0
    return "".join(letters[i] for i in best[keep]), confidence


def alphabet(listed: Sequence[str], outputs: int) -> list[str]:
    """The letter of each of the reader's outputs. The blank comes first and the space last; a list may lack them."""
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
        folder = Path(cached_file(weights, "config.json", local_files_only=True)).parent  # by name, Auto classes ask the hub
        how = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False, "dtype": torch.float32}
        model, info = kind.from_pretrained(folder, **how, output_loading_info=True)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"ocr: cannot load {weights} ({reason}); fetch it with: hf download {weights}") from error
    missing = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
    if missing:  # transformers would go on with random weights in their place
        raise ValueError(f"ocr: {weights} lacks {len(missing)} weights ({missing[0]}, …); hf download {weights}")
    return model.eval()


def load_paddle(device: torch.device | str) -> Any:
    wanted = "pip install paddleocr==2.9.1 paddlepaddle"
    try:
        import paddleocr
    except ImportError as error:
        raise ValueError(f"ocr: engine paddleocr needs that package ({error}); {wanted}") from error
    version = getattr(paddleocr, "__version__", "unknown")
    if not version.startswith("2."):  # 3.x has other models and another interface
        raise ValueError(f"ocr: paddleocr {version} is not the engine of the paper; {wanted}")
    gpu = str(device).startswith("cuda")
    return paddleocr.PaddleOCR(lang="en", use_angle_cls=False, use_gpu=gpu, show_log=False)


def as_pictures(images: torch.Tensor | Sequence[Image.Image]) -> list[Image.Image]:
    """(B, 3, H, W) floats in [0, 1], rounded to bytes as flow_grpo's training does, or PIL images -> RGB PIL images."""
    if isinstance(images, torch.Tensor):
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:] or not images.is_floating_point():
            raise ValueError(f"images: (B, 3, H, W) floats in [0, 1] are needed, not {images.dtype} {tuple(images.shape)}")
        if len(images) and not (images.amin() >= -1e-3 and images.amax() <= 1 + 1e-3):  # so written, nan fails too
            raise ValueError(f"images must lie in [0, 1]; these span {images.amin():.3g} to {images.amax():.3g}")
        pixels = (images.detach().float() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(p) for p in pixels]
    pictures = []
    for i, image in enumerate(images):
        try:
            pictures.append(image.convert("RGB"))
        except (AttributeError, OSError, SyntaxError) as error:
            raise ValueError(f"image {i} cannot be decoded ({error}); a PIL image of a whole file is needed") from error
    return pictures


# ---- Prompts to train on, by rule

PLACES = (
    "A street sign reading {}", "A neon sign at night that says {}", "A chalkboard in a café with the words {}",
    "A birthday cake with {} written in icing", "A book cover with the title {}", "A T-shirt printed with {}",
    "Graffiti on a brick wall that spells {}", "A poster with the headline {}", "A coffee mug with the text {}",
    "A cardboard sign held by a robot that says {}", "A train station display showing {}", "A museum plaque that reads {}",
    "Skywriting over a beach that spells {}", "A spaceship hull stencilled with {}", "A computer screen showing {}",
)  # fmt: skip
WORDS = (
    "open closed welcome home fresh bread daily hello world dream big slow down keep out grand opening free coffee lost cat "
    "happy birthday night market next stop central park ocean view mind the gap last train north summer sale new arrivals "
    "quiet please garden party live music best pizza in town push pull exit moon base alpha golden river winter festival "
    "secret recipe road work ahead wild honey captain jack lucky number electric city red planet never give up time machine"
).split()


def make_prompts(count: int, seed: int = 0, exclude: Iterable[str] = ()) -> list[str]:
    """`count` different prompts of the kind of flow_grpo's dataset/ocr, each with one quoted text of 2 to 29 letters, as in
    its test set. Flow-OPD's repository leaves its 19,653 training prompts out; these are ours. exclude: prompts (a test
    set, say) whose quoted texts must not come up."""
    rng, taken, prompts = random.Random(seed), {quoted(prompt).lower() for prompt in exclude}, {}
    for _ in range(100 * count + 1000):
        if len(prompts) == count:
            return list(prompts)
        text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 5)))
        text = rng.choice((str.title, str.upper, str.capitalize, str.lower))(text)
        text += rng.choice(("", "", "", "!", f" {rng.randint(1, 2030)}"))
        if 2 <= len(text) <= 29 and text.lower() not in taken:
            prompts[rng.choice(PLACES).format(f'"{text}"')] = None
    raise ValueError(f"ocr: only {len(prompts)} of {count} prompts can be made with these exclusions; ask for fewer")
