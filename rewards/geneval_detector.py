"""GenEval's detector: the Mask2Former of mmdet 2.x in transformers' class, with mmdet's processing.

    model, head = load_detector("weights/geneval", "cuda")  # the folder of geneval_convert.py
    find_objects(model, head, arrays, thresholds)           # -> an `objects` dict for each image

It needs no mmdet and no server. Around the network are mmdet's test pipeline and its choice of
instances, then GenEval's choice of objects (djghosh13/geneval evaluation/evaluate_images.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from transformers import Mask2FormerModel

from rewards.geneval_rules import CLASSES
from rewards.images import exact_float32

NAME = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco"
SHA256 = "743b7d99"  # OpenMMLab puts the first 8 digits of a file's hash into its name
PTH = f"{NAME}_20220504_001756-{SHA256}.pth"
WEIGHTS = "weights/geneval"
FETCH = (
    f"curl -LO https://download.openmmlab.com/mmdetection/v2.0/mask2former/{NAME}/{PTH}"
    f" && python -m rewards.geneval_convert {PTH} --out {WEIGHTS}"
)
MAX_PAIRS = 100  # max_per_image of the mmdet config: the (query, label) pairs that are looked at
MAX_OBJECTS = 16  # of one class; evaluate_images.py
EDGES = (1333, 800)  # mmdet's test pipeline: the long edge at most, the short edge at most
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # its img_norm_cfg, RGB
BILINEAR = {"mode": "bilinear", "align_corners": False}


def refuse(what: str, cause: Exception | None = None) -> NoReturn:
    """Every error about the detector ends in the command that gets the right one."""
    raise ValueError(f"geneval: {what}; fetch and convert GenEval's: {FETCH}") from cause


def load_detector(
    folder: str | Path, device: torch.device | str
) -> tuple[Mask2FormerModel, torch.nn.Linear]:
    """A converted folder -> the model and the linear class head, float32, in eval mode."""
    file = Path(folder) / "model.safetensors"
    if not file.is_file():
        refuse(f"there is no detector in {folder}")
    try:
        with safe_open(file, "pt") as tensors:
            source = (tensors.metadata() or {}).get("source_sha256", "")
            if not source.startswith(SHA256):
                refuse(f"{folder} holds another model than GenEval's detector")
            weight = tensors.get_tensor("class_predictor.weight")
            bias = tensors.get_tensor("class_predictor.bias")
        model, info = Mask2FormerModel.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, SafetensorError) as error:
        refuse(f"{file} cannot be read ({str(error).splitlines()[0]})", error)
    if info["missing_keys"]:
        refuse(f"{file} lacks {min(info['missing_keys'])}")
    head = torch.nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    head.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return model.to(device).eval(), head.to(device).requires_grad_(False)


@torch.no_grad()
def find_objects(
    model: torch.nn.Module,
    head: torch.nn.Module,
    arrays: list[np.ndarray],
    thresholds: Sequence[float],
    swap: bool = False,
    batch: int = 8,
    device: torch.device | str = "cpu",
) -> list[dict[str, list[dict]]]:
    """(H, W, 3) uint8 arrays of any sizes, a threshold for each -> the objects of each image.

    Only images of one size share a batch, so no image is padded for the sake of another."""
    results = [None] * len(arrays)
    for size in dict.fromkeys(array.shape[:2] for array in arrays):
        members = [i for i, array in enumerate(arrays) if array.shape[:2] == size]
        for start in range(0, len(members), batch):
            chosen = members[start : start + batch]
            stacked = torch.from_numpy(np.stack([arrays[i] for i in chosen]))  # (B, H, W, 3)
            pixels = stacked.permute(0, 3, 1, 2).to(device)
            with exact_float32(device):
                x, resized = preprocess(pixels, swap)
                classes, masks = detector_logits(model, head, x)
                # NaN would count as "nothing found"
                if not (classes.isfinite().all() and masks.isfinite().all()):
                    advice = "check the device and convert again"
                    raise ValueError(f"geneval: the detector's output is not finite; {advice}")
                padded = tuple(x.shape[-2:])
                for i, *logits in zip(chosen, classes, masks):
                    results[i] = postprocess(*logits, padded, resized, size, thresholds[i])
    return results


def preprocess(pixels: torch.Tensor, swap: bool = False) -> tuple[torch.Tensor, tuple[int, int]]:
    """uint8 (B, 3, H, W) -> normalised (B, 3, h', w'), and (h, w) without the padding.

    Resized to fit into EDGES, with the ratio kept. cv2's bilinear resize has no antialiasing,
    Pillow's has. Then right and bottom are padded to a multiple of 32 with grey 128, before the
    normalisation. swap exchanges red and blue."""
    H, W = pixels.shape[-2:]
    scale = min(EDGES[0] / max(H, W), EDGES[1] / min(H, W))
    h, w = max(int(H * scale + 0.5), 1), max(int(W * scale + 0.5), 1)
    x = F.interpolate(pixels.float(), (h, w), **BILINEAR).round()  # cv2 returns bytes
    x = F.pad(x, (0, -w % 32, 0, -h % 32), value=128.0)  # (B, 3, h', w')
    if swap:
        x = x.flip(1)
    mean = torch.tensor(MEAN, device=x.device).view(3, 1, 1)
    std = torch.tensor(STD, device=x.device).view(3, 1, 1)
    return (x - mean) / std, (h, w)


def detector_logits(
    model: torch.nn.Module, head: torch.nn.Module, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (B, 3, h', w') -> class logits (B, Q, 81), mask logits (B, Q, h'/4, w'/4).

    The last class is "no object". Mask2FormerForUniversalSegmentation computes the same, but needs
    scipy for its loss. The head reads the states after the decoder's norm;
    `transformer_decoder_last_hidden_state` is before it."""
    out = model(x)
    norm = model.transformer_module.decoder.layernorm
    states = norm(out.transformer_decoder_last_hidden_state)  # (B, Q, 256)
    return head(states), out.masks_queries_logits[-1]


def postprocess(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    padded: tuple[int, int],
    resized: tuple[int, int],
    size: tuple[int, int],
    threshold: float,
) -> dict[str, list[dict]]:
    """mmdet's maskformer_fusion_head.instance_postprocess, then GenEval's choice of objects.

    For one image: class_logits (Q, C + 1), mask_logits (Q, h, w). padded, resized, size: (height,
    width) of the detector's input, of the image in that input, of the image itself.
    -> {class: [{"box", "score", "mask" (H, W) bool, "colour": None}, …]}, best first.
    A query may appear under several labels, and masks may overlap."""
    scores = class_logits.softmax(-1)[:, :-1]  # (Q, C)
    values, index = scores.flatten().topk(min(MAX_PAIRS, scores.numel()))
    # An exact shortcut: `sure` below is at most 1, so the other pairs cannot pass.
    index = index[values > threshold]
    if not len(index):
        return {}
    query, label = index // scores.shape[1], index % scores.shape[1]  # (N,)
    logits = F.interpolate(mask_logits[query][None], padded, **BILINEAR)
    logits = logits[..., : resized[0], : resized[1]]
    logits = F.interpolate(logits, size, **BILINEAR)[0]  # (N, H, W)
    masks = logits > 0
    sure = (logits.sigmoid() * masks).sum((1, 2)) / (masks.sum((1, 2)) + 1e-6)  # (N,)
    score = scores[query, label] * sure  # 0 where the mask is empty
    objects = {}
    for n in score.argsort(descending=True).tolist():
        found = objects.setdefault(CLASSES[label[n]], [])
        if score[n] > threshold and len(found) < MAX_OBJECTS:
            y, x = masks[n].any(1).nonzero(), masks[n].any(0).nonzero()
            box = tuple(float(v) for v in (x[0], y[0], x[-1] + 1, y[-1] + 1))
            mask = masks[n].cpu().numpy()
            found.append({"box": box, "score": score[n].item(), "mask": mask, "colour": None})
    return {name: objects[name] for name in CLASSES if objects.get(name)}
