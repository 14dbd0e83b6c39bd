"""UniDet R50 once more, slowly: what detectron2 and UniDet define, in plain loops and float64.
At the end DPT-Hybrid's configuration, a tiny one, and the steps around it.

tests/test_rewards_unidet.py holds rewards/unidet.py against it. Nothing here comes from that file:
names and shapes are written down from the published classes (xingyizhou/UniDet 94cd0e8,
facebookresearch/detectron2 02b5c4e, torchvision's roi_align and nms), boxes are lists of four
numbers, and every box, bin, sample and pair has its own turn.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
import transformers as hf
from PIL import Image

from experiments.published_networks import spread_out

FULL = dict(width=64, blocks=(3, 4, 6, 3), channels=256, hidden=1024, labels=722)
TINY = dict(width=4, blocks=(2, 1, 1, 1), channels=8, hidden=16, labels=9)


def unidet_shapes(width, blocks, channels, hidden, labels):
    """{name: shape} of the published file, in the sizes given."""
    shapes = {}

    def layer(name, outer, *inner):
        shapes[f"{name}.weight"] = (outer, *inner)
        shapes[f"{name}.bias"] = (outer,)

    def normed(name, outer, *inner):
        shapes[f"{name}.weight"] = (outer, *inner)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.norm.{part}"] = (outer,)

    normed("backbone.bottom_up.stem.conv1", width, 3, 7, 7)
    before = width
    for stage, depth in zip((2, 3, 4, 5), blocks):
        middle, after = width * 2 ** (stage - 2), width * 2**stage
        for k in range(depth):
            block = f"backbone.bottom_up.res{stage}.{k}"
            if before != after:
                normed(f"{block}.shortcut", after, before, 1, 1)
            normed(f"{block}.conv1", middle, before, 1, 1)
            normed(f"{block}.conv2", middle, middle, 3, 3)
            normed(f"{block}.conv3", after, middle, 1, 1)
            before = after
    for level in (3, 4, 5):
        layer(f"backbone.fpn_lateral{level}", channels, width * 2**level, 1, 1)
        layer(f"backbone.fpn_output{level}", channels, channels, 3, 3)
    for level in (6, 7):
        layer(f"backbone.top_block.p{level}", channels, channels, 3, 3)
    head = "proposal_generator.rpn_head"
    layer(f"{head}.conv", channels, channels, 3, 3)
    layer(f"{head}.objectness_logits", 9, channels, 1, 1)
    layer(f"{head}.anchor_deltas", 36, channels, 1, 1)
    for stage in range(3):
        layer(f"roi_heads.box_head.{stage}.fc1", hidden, channels * 49)
        layer(f"roi_heads.box_head.{stage}.fc2", hidden, hidden)
        layer(f"roi_heads.box_predictor.{stage}.cls_score", labels + 1, hidden)
        layer(f"roi_heads.box_predictor.{stage}.bbox_pred", 4, hidden)
    return shapes


def unidet_state(sizes=TINY, seed=0, saturated=False):
    """Random tensors under the published names; norms too, or a forgotten one would not show.

    saturated: all scores are 0, 1/3, 2/3 or 1 exactly, so that most objects are tied."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, shape in unidet_shapes(**sizes).items():
        value = torch.randn(shape, generator=generator)
        if len(shape) > 1:  # keep the signal alive
            value *= (2 / math.prod(shape[1:])) ** 0.5
        elif "running_var" in name:
            value = 1 + 0.3 * value.abs()
        else:
            value = 0.3 * value + (".norm.weight" in name)
        if "stem.conv1.weight" in name:
            value /= 60  # pixels are 0 … 255
        if "conv3.norm.weight" in name or "fpn" in name:
            value *= 0.4
        if "cls_score" in name:
            value *= 1e8 if saturated else 1.5
        if "anchor_deltas.weight" in name:
            value *= 0.3
        state[name] = value
    return state


def old_constants():
    """What detectron2 before 2021-05 saved too."""
    constants = {"pixel_mean": torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1)}
    constants["pixel_std"] = torch.ones(3, 1, 1)
    for i in range(5):
        name = f"proposal_generator.anchor_generator.cell_anchors.{i}"
        constants[name] = torch.tensor(slow_anchors(i + 3, 1, 1))
    return constants


# ---- Boxes: lists x0, y0, x1, y1


def slow_anchors(level, height, width):
    """All anchors of a level (3 … 7) of height x width places, row by row."""
    stride, found = 2**level, []
    for row in range(height):
        for column in range(width):
            for k in range(3):
                size = 32 * 2 ** (level - 3) * 2 ** (k / 3)
                for ratio in (0.5, 1, 2):
                    w = math.sqrt(size * size / ratio)
                    h = ratio * w
                    x, y = column * stride, row * stride
                    found.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    return found


def slow_decode(box, deltas, weights):
    w, h = box[2] - box[0], box[3] - box[1]
    x, y = box[0] + w / 2, box[1] + h / 2
    dx, dy, dw, dh = (float(delta) / weight for delta, weight in zip(deltas, weights))
    x, y = x + dx * w, y + dy * h
    w *= math.exp(min(dw, math.log(1000 / 16)))
    h *= math.exp(min(dh, math.log(1000 / 16)))
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


def slow_clip(box, height, width):
    x0, y0, x1, y1 = box
    x0, x1 = min(max(x0, 0), width), min(max(x1, 0), width)
    y0, y1 = min(max(y0, 0), height), min(max(y1, 0), height)
    return [x0, y0, x1, y1]


def has_area(box):
    return box[2] > box[0] and box[3] > box[1]


def overlap(a, b):
    """Intersection over union; 0 where neither has an area."""
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    both = max(w, 0) * max(h, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if union > 0 else 0.0


def slow_nms(boxes, groups, scores, threshold, most):
    """Every entry against every better one that is kept. The indices kept, best first."""
    order = sorted(range(len(boxes)), key=lambda n: -scores[n])  # stable: ties keep their order
    kept = []
    for n in order:
        free = True
        for m in kept:
            if groups[m] == groups[n] and overlap(boxes[m], boxes[n]) > threshold:
                free = False
        if free:
            kept.append(n)
        if len(kept) == most:
            break
    return kept


def slow_level(box):
    if not has_area(box):
        return 3
    side = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
    return min(max(math.floor(4 + math.log2(side / 224 + 1e-8)), 3), 5)


def slow_roi_align(feature, box, scale):
    """feature (C, H, W), box in pixels of the image, scale from them to the feature's pixels."""
    C, H, W = feature.shape
    x0, y0, x1, y1 = (value * scale - 0.5 for value in box)
    bin_w, bin_h = (x1 - x0) / 7, (y1 - y0) / 7
    grid_w, grid_h = math.ceil(bin_w), math.ceil(bin_h)
    pooled = np.zeros((C, 7, 7))
    for row in range(7):
        for column in range(7):
            for i in range(grid_h):
                for j in range(grid_w):
                    y = y0 + row * bin_h + (i + 0.5) * bin_h / grid_h
                    x = x0 + column * bin_w + (j + 0.5) * bin_w / grid_w
                    if -1 <= y <= H and -1 <= x <= W:
                        pooled[:, row, column] += bilinear(feature, y, x)
    return pooled / max(grid_w * grid_h, 1)


def slow_pool(features, boxes):
    """Features of P3, P4, P5 (C, H, W) of an image, boxes in its pixels -> (n, C, 7, 7)."""
    pooled = []
    for box in boxes:
        level = slow_level(box)
        pooled.append(slow_roi_align(features[level - 3], box, 1 / 2**level))
    return np.array(pooled)


def bilinear(feature, y, x):
    """feature (C, H, W) at a place given in pixel centres; outside, the nearest edge."""
    H, W = feature.shape[1:]
    y, x = min(max(y, 0), H - 1), min(max(x, 0), W - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, H - 1), min(left + 1, W - 1)
    down, across = y - top, x - left
    upper = (1 - across) * feature[:, top, left] + across * feature[:, top, right]
    lower = (1 - across) * feature[:, bottom, left] + across * feature[:, bottom, right]
    return (1 - down) * upper + down * lower


# ---- The network, on the published names s


def slow_pyramid(s, x):
    """x (1, 3, H, W) float64 -> P3 … P7."""

    def plain(v, name, **how):
        return F.conv2d(v, s[f"{name}.weight"], s[f"{name}.bias"], **how)

    def normed(v, name, **how):
        v = F.conv2d(v, s[f"{name}.weight"], **how)
        part = lambda kind: s[f"{name}.norm.{kind}"].view(-1, 1, 1)
        v = (v - part("running_mean")) / (part("running_var") + 1e-5).sqrt()
        return v * part("weight") + part("bias")

    v = normed(x, "backbone.bottom_up.stem.conv1", stride=2, padding=3).relu()
    v = F.max_pool2d(v, 3, stride=2, padding=1)
    outputs = {}
    for stage in (2, 3, 4, 5):
        k = 0
        while f"backbone.bottom_up.res{stage}.{k}.conv1.weight" in s:
            block = f"backbone.bottom_up.res{stage}.{k}"
            stride = 2 if k == 0 and stage > 2 else 1
            short = v
            if f"{block}.shortcut.weight" in s:
                short = normed(v, f"{block}.shortcut", stride=stride)
            v = normed(v, f"{block}.conv1", stride=stride).relu()
            v = normed(v, f"{block}.conv2", padding=1).relu()
            v = (normed(v, f"{block}.conv3") + short).relu()
            k += 1
        outputs[stage] = v
    double = lambda v: v.repeat_interleave(2, 2).repeat_interleave(2, 3)
    inner5 = plain(outputs[5], "backbone.fpn_lateral5")
    inner4 = plain(outputs[4], "backbone.fpn_lateral4") + double(inner5)
    inner3 = plain(outputs[3], "backbone.fpn_lateral3") + double(inner4)
    p3, p4, p5 = (
        plain(v, f"backbone.fpn_output{level}", padding=1)
        for level, v in ((3, inner3), (4, inner4), (5, inner5))
    )
    p6 = plain(p5, "backbone.top_block.p6", stride=2, padding=1)
    p7 = plain(p6.relu(), "backbone.top_block.p7", stride=2, padding=1)
    return [p3, p4, p5, p6, p7]


def slow_proposals(s, levels, height, width, most):
    """The boxes that the RPN proposes, best first."""
    head = "proposal_generator.rpn_head."
    boxes, groups, scores = [], [], []
    for level, v in zip((3, 4, 5, 6, 7), levels):
        v = F.conv2d(v, s[head + "conv.weight"], s[head + "conv.bias"], padding=1).relu()
        logits, deltas = (
            F.conv2d(v, s[head + f"{name}.weight"], s[head + f"{name}.bias"])[0]
            for name in ("objectness_logits", "anchor_deltas")
        )
        found = []
        places = slow_anchors(level, *v.shape[2:])
        for n, anchor in enumerate(places):
            place, k = divmod(n, 9)
            row, column = divmod(place, v.shape[3])
            box = slow_decode(anchor, deltas[4 * k : 4 * k + 4, row, column], (1, 1, 1, 1))
            found.append((logits[k, row, column].item(), slow_clip(box, height, width)))
        found.sort(key=lambda pair: -pair[0])
        for score, box in found[:most]:
            if has_area(box):
                boxes.append(box)
                groups.append(level)
                scores.append(score)
    kept = slow_nms(boxes, groups, scores, 0.7, most)
    return [boxes[n] for n in kept]


def slow_input(picture, edges=(479, 480)):
    """RGB picture -> (3, h, w): BGR less the mean; the short and the long edge at most `edges`."""
    width, height = picture.size
    scale = edges[0] / min(width, height)
    if max(width, height) * scale > edges[1]:
        scale = edges[1] / max(width, height)
    resized = picture.resize((int(width * scale + 0.5), int(height * scale + 0.5)), Image.BILINEAR)
    red, green, blue = (np.array(channel, dtype=float) for channel in resized.split())
    return torch.tensor(np.stack((blue - 103.53, green - 116.28, red - 123.675)))


def slow_detect(state, x, proposals=1000):
    """x (3, h, w): BGR less the mean -> [(score, label number, box)], best first."""
    s = {name: tensor.double() for name, tensor in state.items()}
    height, width = x.shape[1:]
    canvas = torch.zeros(1, 3, math.ceil(height / 32) * 32, math.ceil(width / 32) * 32).double()
    canvas[0, :, :height, :width] = x
    levels = slow_pyramid(s, canvas)
    boxes = slow_proposals(s, levels, height, width, proposals)
    features = [level[0].numpy() for level in levels[:3]]
    total = 0
    for stage, weights in enumerate(((10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15))):
        linear = lambda v, name: F.linear(v, s[f"{name}.weight"], s[f"{name}.bias"])
        head, predictor = f"roi_heads.box_head.{stage}.", f"roi_heads.box_predictor.{stage}."
        v = torch.tensor(slow_pool(features, boxes)).view(len(boxes), -1)
        v = linear(linear(v, head + "fc1").relu(), head + "fc2").relu()
        total = total + linear(v, predictor + "cls_score").sigmoid()
        deltas = linear(v, predictor + "bbox_pred").tolist()
        moved = [slow_decode(box, delta, weights) for box, delta in zip(boxes, deltas)]
        boxes = [slow_clip(box, height, width) for box in moved]
    scores = (total / 3)[:, :-1].float().tolist()  # float32, as published: ties are ties
    return slow_choose(boxes, scores)


def slow_choose(boxes, scores):
    """boxes and for each its scores of all labels -> [(score, label number, box)], best first."""
    found = []
    for box, row in zip(boxes, scores):
        for label, score in enumerate(row):
            if score > 0.1:
                found.append((score, label, box))
    if not found:
        return []
    scores, labels, boxes = zip(*found)
    kept = slow_nms(boxes, labels, scores, 0.5, 300)
    return [found[n] for n in kept if has_area(boxes[n])]


def largest_difference(found, expected, names):
    """Between a detector's dict and slow_choose's list: of scores, and of boxes in pixels.

    Compared as sets, since equally good objects have no order; infinite if one has no partner."""
    scores, labels, boxes = zip(*expected)
    falling = (found["scores"].diff() <= 0).all()
    if len(found["labels"]) != len(labels) or not falling:
        return math.inf
    other = np.array([names[label] for label in labels])[:, None] != np.array(found["labels"])
    away = torch.cdist(torch.tensor(boxes), found["boxes"], p=math.inf)
    away[torch.tensor(other)] = math.inf
    furthest = max(away.amin(0).max().item(), away.amin(1).max().item())
    return max(furthest, (found["scores"] - torch.tensor(scores)).abs().max().item())


def random_boxes(n, seed=0, height=480, width=480):
    """(n, 4) of all sizes in an image; two have no area, one is the whole image."""
    sides = torch.tensor([width, height])
    places = torch.rand(n, 2, 2, generator=torch.Generator().manual_seed(seed)) ** 2
    boxes = torch.cat((places.amin(1), places.amax(1)), 1) * sides.repeat(2)
    boxes[0, 2:], boxes[1, 3], boxes[2] = boxes[0, :2], boxes[1, 1], torch.tensor([0, 0, *sides])
    return boxes


# ---- Depth


def depth_config(tiny=False):
    """DPT-Hybrid as Intel/dpt-hybrid-midas has it: 414 tensors."""
    sizes = dict(is_hybrid=True, reassemble_factors=[1, 1, 1, 0.5])
    if not tiny:
        return hf.DPTConfig(**sizes, neck_hidden_sizes=[256, 512, 768, 768])
    backbone = hf.BitConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 32],
        depths=[1, 1, 1],
        num_groups=2,
        global_padding="same",
        embedding_dynamic_padding=True,
        out_features=["stage1", "stage2", "stage3"],
    )
    sizes |= dict(hidden_size=16, intermediate_size=32, num_attention_heads=2)
    sizes |= dict(num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3])
    sizes |= dict(backbone_featmap_shape=[1, 32, 24, 24], fusion_hidden_size=8)
    return hf.DPTConfig(**sizes, backbone_config=backbone, neck_hidden_sizes=[8, 16, 16, 16])


def save_depth(folder, without=()):
    """A tiny one as on the hub, without the weights whose names begin so."""
    model = spread_out(hf.DPTForDepthEstimation(depth_config(tiny=True)))
    state = model.state_dict()
    state = {name: value for name, value in state.items() if not name.startswith(tuple(without))}
    model.save_pretrained(folder, state_dict=state)
    return folder


def slow_depth(model, picture, size):
    """The steps around the network by hand; size: (width, height) of the result."""
    squashed = np.array(picture.resize((480, 480), Image.BILINEAR)).astype(np.float32)
    x = torch.from_numpy((squashed - 127.5) / 127.5).permute(2, 0, 1)[None]
    with torch.no_grad():
        depth = model(x).predicted_depth[0].double().numpy()
    depth = (depth - depth.min()) / (depth.max() - depth.min())
    for axis, new in enumerate(picture.size[::-1]):  # corners stay corners
        at = np.linspace(0, 479, new)
        line = lambda values, at=at: np.interp(at, np.arange(480), values)
        depth = np.apply_along_axis(line, axis, depth)
    stored = Image.fromarray(np.floor(depth * 255).astype(np.uint8))
    return torch.tensor(np.array(stored.resize(size, Image.BILINEAR)) / 255).float()
