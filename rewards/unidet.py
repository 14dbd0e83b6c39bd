"""UniDet R50: which objects are in an image, and where. For numeracy and 3D of T2I-CompBench.

    from rewards.unidet import UniDet
    found = UniDet(device="cuda").detect(pictures)[0]  # of the first picture, best first
    found["boxes"], found["scores"], found["labels"]   # (n, 4), (n,), n names

A cascade R-CNN on ResNet-50 and FPN, trained on Objects365, COCO, OpenImages and Mapillary with
one list of 722 labels (Zhou et al., "Simple Multi-dataset Detection", 2022). Written from the
definitions in xingyizhou/UniDet (94cd0e8) and facebookresearch/detectron2 (02b5c4e), both
Apache-2.0. T2I-CompBench's settings: input of at most 479 x 480, scores above .1, 300 objects.
It runs the detector in half precision; here it is float32.

Weights: Unified_learned_OCIM_R50_6x+2x.pth (UniDet's model zoo, Apache-2.0, 288 MB; its SHA-256 is
checked). FETCH below is the command that downloads it.
unidet_labels.json: the label of each output. 683 of the 722 names are those of UniDet's
learned_mAP+M.json (Apache-2.0), in lower case; 39 were set by hand as T2I-CompBench prints them.
44 names occur more than once.

Checked here with random weights: each part, and the whole, equals an independent implementation
with plain loops (experiments/published_unidet.py). Not checked here: the real weights.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from rewards.images import as_pictures, exact_float32

FILE = "Unified_learned_OCIM_R50_6x+2x.pth"
SHA256 = "630dbe1eb012a8985016b7b8ca96aa7f9db588ac8921604cf9eea81d6c9f6e21"
DRIVE = "https://drive.usercontent.google.com/download?id=1C4sgkirmgMumKXXiLOPmCKNTZAc3oVbq"
FETCH = f"curl -L '{DRIVE}&confirm=t' -o {FILE}"
LABELS = tuple(json.loads(Path(__file__).with_name("unidet_labels.json").read_text("utf-8")))

EDGES = (479, 480)  # of the input: the short edge, and the most for the long one
MEAN = (103.53, 116.28, 123.675)  # blue, green, red; the values are 0 … 255 and are not scaled
STRIDES = (8, 16, 32, 64, 128)  # of the pyramid's levels P3 … P7
BINS = 7  # a box is pooled to 7 x 7
PROPOSALS = 1000  # of a level before suppression, and of an image after it
STAGES = ((10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15))  # what divides dx, dy, dw, dh
MAX_GROWTH = math.log(1000 / 16)  # of a side in one step, as a logarithm
MIN_SCORE = 0.1  # T2I-CompBench's
MAX_OBJECTS = 300


def refuse(what: str, cause: Exception | None = None) -> NoReturn:
    raise ValueError(f"unidet: {what}; fetch the published file: {FETCH}") from cause


class UniDet:
    """`detect` finds the objects in pictures.

    device: where the network is loaded at the first call; `.model = None` drops it again.
    weights: path of the .pth; sha256: the hash that it must have, None accepts any.
    batch: pictures of one size per forward pass; it changes results by no more than rounding."""

    def __init__(
        self,
        device: torch.device | str = "cpu",
        weights: str | Path = FILE,
        batch: int = 8,
        sha256: str | None = SHA256,
    ) -> None:
        self.device = device
        self.weights = Path(weights)
        self.batch = batch
        self.sha256 = sha256
        self.model = None

    def load(self) -> None:
        if not self.weights.is_file():
            refuse(f"no file {self.weights}")
        with open(self.weights, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if self.sha256 and digest != self.sha256:
            refuse(f"{self.weights} is not the published file (SHA-256)")
        try:
            state = torch.load(self.weights, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged, or holding more than tensors and plain values
            reason = str(error).strip().partition("\n")[0]
            refuse(f"{self.weights} cannot be read ({reason})", error)
        with torch.device("meta"):
            model = Network()
        load_published(model, state.get("model", state))  # detectron2 saves either form
        self.model = model.to(self.device)

    @torch.no_grad()
    def detect(self, pictures: torch.Tensor | Sequence[Image.Image]) -> list[dict]:
        """PIL pictures of any sizes -> for each a dict of its objects, best first:

        boxes (n, 4) float32: x0 y0 x1 y1 in pixels of the network's input (`input_size`),
        scores (n,) float32, labels: n strings. n is at most 300."""
        pictures = as_pictures(pictures)
        if pictures and self.model is None:
            self.load()
        results = [None] * len(pictures)
        sizes = [input_size(*picture.size) for picture in pictures]
        for size in dict.fromkeys(sizes):  # no picture is padded for the sake of another
            members = [i for i in range(len(pictures)) if sizes[i] == size]
            for start in range(0, len(members), self.batch):
                chosen = members[start : start + self.batch]
                x = torch.stack([prepare(pictures[i]) for i in chosen]).to(self.device)
                with exact_float32(self.device):
                    objects = find_objects(self.model, x)
                for i, found in zip(chosen, objects):
                    results[i] = found
        return results


# ---- Input


def input_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) of the network's input: detectron2's ResizeShortestEdge with EDGES."""
    short, long = min(width, height), max(width, height)
    scale = min(EDGES[0] / short, EDGES[1] / long)
    return max(int(width * scale + 0.5), 1), max(int(height * scale + 0.5), 1)


def prepare(picture: Image.Image) -> torch.Tensor:
    """RGB picture -> (3, h, w) float32: resized, blue first, minus the mean."""
    resized = picture.resize(input_size(*picture.size), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)  # (3, h, w), red first
    return pixels.flip(0).float() - torch.tensor(MEAN).view(3, 1, 1)


# ---- The network. Its modules have the names of the published file.


def conv(inner: int, outer: int, side: int = 1, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, side, stride, padding=side // 2)


class Bottleneck(nn.Module):
    """x + three convolutions. The original ResNet has the stride in the first."""

    def __init__(self, inner: int, width: int, stride: int) -> None:
        super().__init__()
        outer = 4 * width
        self.conv1 = conv(inner, width, 1, stride)
        self.conv2 = conv(width, width, 3)
        self.conv3 = conv(width, outer)
        self.shortcut = nn.Identity()
        if inner != outer:
            self.shortcut = conv(inner, outer, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.conv2(self.conv1(x).relu()).relu()
        return (self.conv3(hidden) + self.shortcut(x)).relu()


class ResNet(nn.Module):
    def __init__(self, width: int, blocks: Sequence[int]) -> None:
        super().__init__()
        self.stem = nn.ModuleDict({"conv1": conv(3, width, 7, 2)})
        inner = width
        for i, depth in enumerate(blocks):
            stage = nn.Sequential()
            for k in range(depth):
                stride = 2 if i > 0 and k == 0 else 1
                stage.append(Bottleneck(inner, width * 2**i, stride))
                inner = 4 * width * 2**i
            self.add_module(f"res{i + 2}", stage)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(B, 3, H, W) -> the outputs of strides 8, 16, 32."""
        x = F.max_pool2d(self.stem["conv1"](x).relu(), 3, 2, 1)
        x3 = self.res3(self.res2(x))
        x4 = self.res4(x3)
        return [x3, x4, self.res5(x4)]


class Pyramid(nn.Module):
    """FPN: each level is a view of the image at its stride, with what the coarser ones see."""

    def __init__(self, width: int, blocks: Sequence[int], channels: int) -> None:
        super().__init__()
        self.bottom_up = ResNet(width, blocks)
        for level in (3, 4, 5):
            self.add_module(f"fpn_lateral{level}", conv(width * 2**level, channels))
            self.add_module(f"fpn_output{level}", conv(channels, channels, 3))
        extra = {name: conv(channels, channels, 3, 2) for name in ("p6", "p7")}
        self.top_block = nn.ModuleDict(extra)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(B, 3, H, W), H and W multiples of 32 -> P3 … P7, (B, C, H / stride, W / stride)."""
        x3, x4, x5 = self.bottom_up(x)
        x5 = self.fpn_lateral5(x5)
        x4 = self.fpn_lateral4(x4) + F.interpolate(x5, scale_factor=2.0)  # nearest
        x3 = self.fpn_lateral3(x3) + F.interpolate(x4, scale_factor=2.0)
        p5 = self.fpn_output5(x5)
        p6 = self.top_block["p6"](p5)
        p7 = self.top_block["p7"](p6.relu())
        return [self.fpn_output3(x3), self.fpn_output4(x4), p5, p6, p7]


class Network(nn.Module):
    """The weights. What is done with them: `find_objects`."""

    def __init__(
        self,
        width: int = 64,
        blocks: Sequence[int] = (3, 4, 6, 3),
        channels: int = 256,
        hidden: int = 1024,
        labels: int = len(LABELS),
    ) -> None:
        super().__init__()
        self.backbone = Pyramid(width, blocks, channels)
        rpn = {
            "conv": conv(channels, channels, 3),
            "objectness_logits": conv(channels, 9),  # 9 anchors at a place
            "anchor_deltas": conv(channels, 9 * 4),
        }
        self.proposal_generator = nn.ModuleDict({"rpn_head": nn.ModuleDict(rpn)})
        heads, predictors = nn.ModuleList(), nn.ModuleList()
        for _ in STAGES:
            fc1, fc2 = nn.Linear(channels * BINS**2, hidden), nn.Linear(hidden, hidden)
            heads.append(nn.ModuleDict({"fc1": fc1, "fc2": fc2}))
            score = nn.Linear(hidden, labels + 1)  # the last one, background, is not used
            predictors.append(
                nn.ModuleDict({"cls_score": score, "bbox_pred": nn.Linear(hidden, 4)})
            )
        self.roi_heads = nn.ModuleDict({"box_head": heads, "box_predictor": predictors})


NORM = ("weight", "bias", "running_mean", "running_var")  # of a frozen batch norm, eps 1e-5


def published_shapes(network: Network) -> dict[str, tuple[int, ...]]:
    """{name: shape} in the file: a norm stands where a convolution of the ResNet has its bias."""
    shapes = {}
    for name, tensor in network.state_dict().items():
        layer = name.removesuffix(".bias")
        if layer != name and ".bottom_up." in name:
            shapes |= {f"{layer}.norm.{part}": tuple(tensor.shape) for part in NORM}
        else:
            shapes[name] = tuple(tensor.shape)
    return shapes


def saved_constants() -> dict[str, torch.Tensor]:
    """What detectron2 also saved until 2021. A file may hold it, with these values."""
    constants = {"pixel_mean": torch.tensor(MEAN).view(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
    for level in range(len(STRIDES)):
        name = f"proposal_generator.anchor_generator.cell_anchors.{level}"
        constants[name] = anchors(level, 1, 1)  # (9, 4)
    return constants


def load_published(network: Network, state: dict[str, torch.Tensor]) -> None:
    """Fill the network from the file's tensors, with each norm folded into its convolution.

    norm(w x) = g (w x - mean) / sqrt(var + 1e-5) + b, an affine map of x.
    ValueError unless every tensor is there in its shape and no other one is."""
    state = dict(state)
    for name, value in saved_constants().items():
        tensor = state.get(name, torch.empty(0))
        if tensor.shape == value.shape and torch.allclose(tensor.float(), value, atol=1e-3):
            del state[name]
    expected = published_shapes(network)
    shapes = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in state.items()}
    if shapes != expected:
        names = sorted(expected.keys() | shapes.keys())
        wrong = [name for name in names if expected.get(name) != shapes.get(name)]
        has, needs = shapes.get(wrong[0], "absent"), expected.get(wrong[0], "absent")
        refuse(f"tensors that do not fit: {len(wrong)} ({wrong[0]} is {has}, not {needs})")
    folded = {}
    for name in network.state_dict():
        layer, _, kind = name.rpartition(".")
        if f"{layer}.norm.weight" in state:
            g, b, mean, var = (state[f"{layer}.norm.{part}"].double() for part in NORM)
            factor = g / (var + 1e-5).sqrt()  # (outer,)
            weight = state[f"{layer}.weight"].double() * factor.view(-1, 1, 1, 1)
            both = {"weight": weight, "bias": b - mean * factor}
            folded[name] = both[kind].float()
        else:
            folded[name] = state[name].float()
    network.load_state_dict(folded, assign=True)
    network.eval().requires_grad_(False)


# ---- From pixels to objects


def find_objects(network: Network, x: torch.Tensor) -> list[dict]:
    """x (B, 3, h, w) from `prepare` -> the objects of each image, as `UniDet.detect` has them."""
    h, w = x.shape[-2:]
    levels = network.backbone(F.pad(x, (0, -w % 32, 0, -h % 32)))
    proposals = propose(network.proposal_generator["rpn_head"], levels, (h, w))
    results = []
    for i, boxes in enumerate(proposals):
        features = [level[i] for level in levels[:3]]  # P3 … P5, (C, h / stride, w / stride)
        boxes, scores = cascade(network.roi_heads, features, boxes, (h, w))
        check_finite(boxes, scores)
        results.append(choose(boxes.cpu(), scores.cpu()))
    return results


def check_finite(*outputs: torch.Tensor) -> None:
    """Nothing would be found in NaN, and an image without objects has a score."""
    for output in outputs:
        if not output.isfinite().all():
            raise ValueError("unidet: the network's output is not finite; check the device")


def anchors(level: int, height: int, width: int) -> torch.Tensor:
    """(height width 9, 4): at each place 3 sizes, and of each 3 shapes of height / width."""
    stride, shapes = STRIDES[level], []
    for size in (4 * stride * 2 ** (k / 3) for k in range(3)):
        for ratio in (0.5, 1.0, 2.0):
            w = size / math.sqrt(ratio)
            h = ratio * w
            shapes.append([-w / 2, -h / 2, w / 2, h / 2])
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    corners = torch.stack((x, y, x, y), 2) * stride  # (height, width, 4)
    return (corners[:, :, None] + torch.tensor(shapes)).flatten(0, 2)


def decode(boxes: torch.Tensor, deltas: torch.Tensor, weights: Sequence[int]) -> torch.Tensor:
    """Moved by (dx width, dy height), grown by (exp dw, exp dh). All (…, 4)."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    w, h = x1 - x0, y1 - y0
    dx, dy, dw, dh = (delta / weight for delta, weight in zip(deltas.unbind(-1), weights))
    x, y = dx * w + (x0 + 0.5 * w), dy * h + (y0 + 0.5 * h)  # the centre
    w, h = dw.clamp(max=MAX_GROWTH).exp() * w, dh.clamp(max=MAX_GROWTH).exp() * h
    return torch.stack((x - 0.5 * w, y - 0.5 * h, x + 0.5 * w, y + 0.5 * h), -1)


def clip(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Boxes (…, 4) cut to an image of (height, width)."""
    limits = torch.tensor([size[1], size[0]] * 2, dtype=boxes.dtype, device=boxes.device)
    return torch.minimum(boxes.clamp(min=0), limits)


def nonempty(boxes: torch.Tensor) -> torch.Tensor:
    return (boxes[..., 2:] > boxes[..., :2]).all(-1)


def propose(
    head: nn.ModuleDict, levels: Sequence[torch.Tensor], size: tuple[int, int]
) -> list[torch.Tensor]:
    """RPN: levels P3 … P7 of a batch -> for each image its proposals (n, 4), n <= PROPOSALS."""
    boxes, logits, origin = [], [], []
    for k, level in enumerate(levels):
        hidden = head["conv"](level).relu()
        logit = head["objectness_logits"](hidden).permute(0, 2, 3, 1).flatten(1)  # (B, h w 9)
        deltas = head["anchor_deltas"](hidden).unflatten(1, (9, 4))  # (B, 9, 4, h, w)
        deltas = deltas.permute(0, 3, 4, 1, 2).flatten(1, 3)  # (B, h w 9, 4)
        best, index = logit.topk(min(PROPOSALS, logit.shape[1]))  # (B, n)
        deltas = deltas.gather(1, index[:, :, None].expand(-1, -1, 4))
        chosen = anchors(k, *level.shape[-2:]).to(level.device)[index]  # (B, n, 4)
        boxes.append(decode(chosen, deltas, (1, 1, 1, 1)))
        logits.append(best)
        origin.append(torch.full((best.shape[1],), k))
    boxes, logits, origin = torch.cat(boxes, 1), torch.cat(logits, 1), torch.cat(origin)
    check_finite(boxes, logits)
    boxes, logits = clip(boxes, size).cpu(), logits.cpu()
    results = []
    for box, logit in zip(boxes, logits):
        valid = nonempty(box).nonzero().flatten()
        kept = suppress(box, valid, origin[valid], logit[valid], 0.7, PROPOSALS)
        results.append(box[valid[kept]].to(levels[0].device))
    return results


def suppress(
    boxes: torch.Tensor,
    member: torch.Tensor,
    group: torch.Tensor,
    scores: torch.Tensor,
    threshold: float,
    most: int,
) -> list[int]:
    """Greedy non-maximum suppression in each group -> the indices that are kept, best first.

    Entry n is boxes[member[n]] in group[n]; all on the CPU. An entry is dropped if a better one
    of its group is kept whose overlap (intersection / union) is above the threshold."""
    if not len(scores):
        return []
    x0, y0, x1, y1 = boxes.numpy().T
    area = (x1 - x0) * (y1 - y0)
    dropped = np.zeros((int(group.max()) + 1, len(boxes)), dtype=bool)
    order, kept = scores.argsort(descending=True, stable=True), []
    for n, i, g in zip(order.tolist(), member[order].tolist(), group[order].tolist()):
        if dropped[g, i]:
            continue
        kept.append(n)
        if len(kept) == most:
            break
        width = np.minimum(x1, x1[i]) - np.maximum(x0, x0[i])
        height = np.minimum(y1, y1[i]) - np.maximum(y0, y0[i])
        overlap = width.clip(0) * height.clip(0)
        dropped[g] |= overlap > threshold * (area + area[i] - overlap)
    return kept


def cascade(
    heads: nn.ModuleDict,
    features: Sequence[torch.Tensor],
    boxes: torch.Tensor,
    size: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Proposals (n, 4) -> boxes after three refinements, scores (n, labels): their mean."""
    scores = 0
    for head, predictor, weights in zip(heads["box_head"], heads["box_predictor"], STAGES):
        hidden = head["fc1"](pool(features, boxes).flatten(1)).relu()
        hidden = head["fc2"](hidden).relu()
        scores = scores + predictor["cls_score"](hidden).sigmoid()[:, :-1]
        boxes = clip(decode(boxes, predictor["bbox_pred"](hidden), weights), size)
    return boxes, scores / len(STAGES)


def box_levels(boxes: torch.Tensor) -> torch.Tensor:
    """(n, 4) -> (n,): 0, 1, 2 for P3, P4, P5. A box of 224 x 224 belongs to P4 (FPN, eq. 1)."""
    sides = boxes[:, 2:] - boxes[:, :2]
    side = sides.prod(1).sqrt()
    return (4 + (side / 224 + 1e-8).log2()).floor().clamp(3, 5).long() - 3


def pool(features: Sequence[torch.Tensor], boxes: torch.Tensor) -> torch.Tensor:
    """Features P3 … P5 of an image, boxes (n, 4) in its pixels -> (n, C, 7, 7)."""
    level = box_levels(boxes)
    pooled = boxes.new_zeros(len(boxes), len(features[0]), BINS, BINS)
    for k, feature in enumerate(features):
        chosen = (level == k).nonzero().flatten()
        for part in chosen.split(128):  # all 1000 boxes at once need 430 MB, and more time
            if len(part):
                pooled[part] = roi_align(feature, boxes[part] / STRIDES[k])
    return pooled


def roi_align(feature: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """feature (C, H, W), boxes (n, 4) in its pixels -> the mean of each bin (n, C, 7, 7).

    torchvision's roi_align(aligned=True, sampling_ratio=0). Bilinear interpolation and the mean
    over a regular grid act on rows and columns separately: two matrix products for all boxes."""
    rows = bin_weights(boxes[:, 1], boxes[:, 3], feature.shape[1])  # (n, 7, H)
    columns = bin_weights(boxes[:, 0], boxes[:, 2], feature.shape[2])  # (n, 7, W)
    strips = torch.einsum("nph,hwc->npwc", rows, feature.permute(1, 2, 0))
    return (columns[:, None] @ strips).movedim(3, 1)


def bin_weights(low: torch.Tensor, high: torch.Tensor, length: int) -> torch.Tensor:
    """Sides low … high (n,) of boxes -> (n, 7, length): what each pixel weighs in each bin's mean.

    A bin of width s has ceil(s) samples, evenly spaced. A sample at y takes max(0, 1 - |y - i|)
    of pixel i, whose centre is i + .5. More than a pixel outside the image a sample is 0."""
    low, high = low - 0.5, high - 0.5
    width = ((high - low) / BINS)[:, None, None]  # (n, 1, 1)
    count = width.ceil()
    sample = torch.arange(max(int(count.max()), 1), device=low.device)
    bins = torch.arange(BINS, device=low.device)[:, None]
    at = low[:, None, None] + bins * width + (sample + 0.5) * width / count.clamp(min=1)
    used = (sample < count) & (at >= -1) & (at <= length)  # (n, 7, samples)
    pixels = torch.arange(length, device=low.device)
    weights = 1 - (at.clamp(0, length - 1)[..., None] - pixels).abs()
    return (weights.clamp(min=0) * used[..., None]).sum(2) / count.clamp(min=1)


def choose(boxes: torch.Tensor, scores: torch.Tensor) -> dict:
    """boxes (n, 4), scores (n, labels) -> the objects. One box may carry several labels."""
    member, label = (scores > MIN_SCORE).nonzero().T
    score = scores[member, label]
    kept = suppress(boxes, member, label, score, 0.5, MAX_OBJECTS)
    kept = [n for n in kept if nonempty(boxes[member[n]])]
    names = [LABELS[i] for i in label[kept].tolist()]
    return {"boxes": boxes[member[kept]], "scores": score[kept], "labels": names}
