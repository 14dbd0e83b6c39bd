"""GenEval: are the objects of the prompt in the image, in the right number, colour and place? (arXiv 2310.11513)

    score = GenEval(device="cuda")            # loads nothing yet
    score(images, prompts, metadata)          # (B,) rewards
    score.judge(images, metadata)             # per image: tag, official and strict verdict, softened reward
    summary(results)                          # the four numbers that papers call "GenEval"

    python rewards/geneval.py --convert FILE.pth --out weights/geneval                              # once
    python rewards/geneval.py --prompts 50000 --test evaluation_metadata.jsonl --out train_metadata.jsonl

A Mask2Former finds the objects, CLIP names their colours, rules compare them with the metadata of the prompt (a line of
GenEval's evaluation_metadata.jsonl: tag, include, exclude). No mmdet and no server: the detector is transformers' own
class with the weights that GenEval uses. Two modes:

    official        djghosh13/geneval evaluation/evaluate_images.py; the score is 0 or 1
    reward_server   yifan123/reward-server gen_eval.py as Flow-GRPO and Flow-OPD train with it; the score is softened.
                    It sees JPEGs, the detector gets red and blue exchanged (RGB passed on as BGR), CLIP runs with
                    GELU for QuickGELU, and a violated position earns .75 (position_slip): all as upstream has it

Weights: mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth of OpenMMLab's mmdetection 2.x
(Apache-2.0; FETCH below has the command) and openai/clip-vit-large-patch14 (MIT). GenEval itself is MIT.
Not checked against the real weights here: the names in the .pth rest on mmdet 2.25's classes, and a name that does not
fit is an error. Images are scored in float32 with TF32 off, since every decision hangs on a threshold.
"""

import argparse
import contextlib
import difflib
import hashlib
import io
import json
import math
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Mask2FormerConfig, Mask2FormerModel, SwinConfig

NAME = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco"
SHA256, SHA256_MMDET3 = "743b7d99", "c9d0c4f2"  # OpenMMLab puts the first 8 digits of a file's hash into its name
WEIGHTS, CLIP = "weights/geneval", "openai/clip-vit-large-patch14"
PTH = f"{NAME}_20220504_001756-{SHA256}.pth"
FETCH = (
    f"curl -LO https://download.openmmlab.com/mmdetection/v2.0/mask2former/{NAME}/{PTH}"
    f" && python rewards/geneval.py --convert {PTH} --out {WEIGHTS}"
)
FETCH_CLIP = f"hf download {CLIP} --include '*.json' --include merges.txt --include model.safetensors"


def refuse(what: str, cause: Exception | None = None) -> NoReturn:
    """Every error about the detector ends in the command that gets the right one."""
    raise ValueError(f"geneval: {what}; fetch and convert GenEval's: {FETCH}") from cause


# object_names.txt: COCO's order with three names changed (computer mouse, tv remote, computer keyboard), so the
# detector's labels are looked up by index and never by COCO's names.
CLASSES = tuple(
    """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,bench,
bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,
sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,
banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,
laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,
scissors,teddy bear,hair drier,toothbrush""".replace("\n", "").split(",")
)
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
# The six tasks, and their shares of Flow-GRPO's training prompts (its merge_genevaltask.py).
TAGS = dict(position=0.7, counting=0.5, color_attr=0.3, colors=0.1, two_object=0.1, single_object=0.0)
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # evaluate_images.py: an object counts above this score (counting: above .9)
MAX_OBJECTS = 16  # of one class; evaluate_images.py
DEAD_ZONE = 0.1  # POSITION_THRESHOLD there: the share of both sizes by which centres must differ
EDGES = (1333, 800)  # of the mmdet config's test pipeline: the long edge at most, the short edge at most
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # its img_norm_cfg, RGB
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# ---- The rules. objects: {class: [{"box": (x1, y1, x2, y2), "colour": name, …}, …]}, each list from the best score down


def relative_position(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Where box a lies, seen from box b: a subset of RELATIONS, at most two of them (evaluate_images.py)."""
    offset = [(a[k] + a[k + 2] - b[k] - b[k + 2]) / 2 for k in (0, 1)]  # between the centres, x and y
    reach = [max(abs(offset[k]) - DEAD_ZONE * (a[k + 2] - a[k] + b[k + 2] - b[k]), 0) for k in (0, 1)]
    if max(reach) < 1e-3:
        return set()
    dx, dy = (math.copysign(reach[k], offset[k]) / math.hypot(*offset) for k in (0, 1))  # over the offset before the cut
    return {name for name, far in zip(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)) if far}


def in_place(found: list[dict], target: list[dict] | None, relation: str) -> bool:
    """Every object found stands in the relation to every object of the target group; None: there is no target."""
    return target is not None and all(relation in relative_position(a["box"], b["box"]) for a in found for b in target)


def official(objects: dict[str, list[dict]], metadata: dict) -> bool:
    """The official verdict on one image (evaluate in evaluate_images.py) -> bool.

    Only the best `count` objects of a class are looked at, so a cat too many is no error, unless `exclude` says so."""
    groups = []
    for request in metadata["include"]:
        found = objects.get(request["class"], [])[: request["count"]]
        matched = len(found) == request["count"]
        if matched and "color" in request:
            matched = all(o["colour"] == request["color"] for o in found)
        if matched and "position" in request:
            relation, target = request["position"]
            matched = in_place(found, groups[target], relation)
        groups.append(found if matched else None)
    excluded = any(len(objects.get(r["class"], [])) >= r["count"] for r in metadata.get("exclude") or ())
    return None not in groups and not excluded


def softened(objects: dict[str, list[dict]], metadata: dict, position_slip: bool = True) -> tuple[float, bool]:
    """The reward that trains, and the strict verdict (evaluate_reward in reward-server's gen_eval.py) -> (float, bool).

    The mean of one term a count, colour and position. A count's term is 1 - |wanted - found| / wanted: with 1 wanted and
    4 found it is -2. Strict: every count exact, every colour and position right; `exclude` is not read.
    position_slip: upstream appends 1 after the 0 of a violated position too, (1 + 1 + 0 + 1) / 4; False leaves it out."""
    terms, groups = [], []
    for request in metadata["include"]:
        wanted, found = request["count"], objects.get(request["class"], [])
        matched = len(found) == wanted
        terms.append(1 - abs(wanted - len(found)) / wanted)
        if not matched and ("color" in request or "position" in request):
            terms.append(0.0)
        if matched and "color" in request:
            right = sum(o["colour"] == request["color"] for o in found)
            matched = right == wanted
            terms.append(1 - abs(wanted - right) / wanted)
        if matched and "position" in request:
            relation, target = request["position"]
            matched = in_place(found, groups[target], relation)
            terms.append(float(matched))
            if not matched and groups[target] is not None and position_slip:
                terms.append(1.0)
        groups.append(found if matched else None)
    return sum(terms) / len(terms), None not in groups


def summary(results: list[dict]) -> dict:
    """The four numbers that go by the name of GenEval, from `judge`'s results of all images.

    official         mean of the task accuracies, as GenEval reports it (summary_scores.py); tasks weigh the same
    official_images  share of the images that are officially correct
    strict           share of the images that are strictly correct; what Flow-GRPO logs
    softened         mean softened reward
    tasks            {tag: official accuracy}. All of them averages over those given: six tags for the whole benchmark."""
    if not results:
        raise ValueError("geneval: there is no result to sum up")
    mean = lambda key, rows: sum(float(row[key]) for row in rows) / len(rows)
    tasks = {tag: mean("correct", [r for r in results if r["tag"] == tag]) for tag in dict.fromkeys(r["tag"] for r in results)}
    images = {"official_images": mean("correct", results), "strict": mean("strict", results), "softened": mean("soft", results)}
    return {"official": sum(tasks.values()) / len(tasks), **images, "tasks": tasks}


def check_metadata(metadata: object, i: int) -> None:
    """ValueError, one line, unless this is a line of GenEval's metadata that the rules can judge."""
    where = f"geneval: metadata {i}"
    if not isinstance(metadata, dict) or metadata.get("tag") not in [*TAGS]:
        raise ValueError(f'{where} has no "tag" of {", ".join(TAGS)}; give lines as in GenEval\'s evaluation_metadata.jsonl')
    excluded = metadata.get("exclude") or []
    if not isinstance(metadata.get("include"), list) or not metadata["include"] or not isinstance(excluded, list):
        raise ValueError(f'{where} has no "include": a list of {{"class", "count"}} with "color" or "position" where asked')
    for k, request in enumerate([*metadata["include"], *excluded]):
        if not isinstance(request, dict) or "class" not in request:
            raise ValueError(f'{where}: {request} names no "class"; give one of the 80')
        if request["class"] not in CLASSES:
            name = str(request["class"])
            near = [c for c in CLASSES if name in c.split()] or difflib.get_close_matches(name, CLASSES, 1) or ["person"]
            raise ValueError(f"{where}: class {name!r} is not among GenEval's 80 (object_names.txt); {near[0]!r} is one")
        if type(request.get("count")) is not int or request["count"] < 1:
            raise ValueError(f'{where}: {request} needs a "count", a whole number of at least 1')
        if request.get("color", "red") not in COLOURS:
            raise ValueError(f"{where}: color {request['color']!r} is none of {', '.join(COLOURS)}")
        if "position" in request:
            place = request["position"]
            known = isinstance(place, (list, tuple)) and len(place) == 2 and place[0] in RELATIONS
            if not known or type(place[1]) is not int or place[1] not in range(k):
                raise ValueError(f"{where}: position {place} is not [{' | '.join(RELATIONS)}, index of an earlier entry]")


# ---- The detector: mmdet's Mask2Former in transformers' class


def preprocess(pixels: torch.Tensor, swap: bool = False) -> tuple[torch.Tensor, tuple[int, int]]:
    """The test pipeline of mmdet's config: uint8 (B, 3, H, W) -> normalised (B, 3, h', w'), and (h, w) without the padding.

    Keep the ratio, fit into EDGES; cv2's bilinear has no antialias, so Pillow's would differ when shrinking. Padding on the
    right and below to a multiple of 32, with grey 128 before the normalisation. swap exchanges red and blue."""
    H, W = pixels.shape[-2:]
    scale = min(EDGES[0] / max(H, W), EDGES[1] / min(H, W))
    h, w = max(int(H * scale + 0.5), 1), max(int(W * scale + 0.5), 1)
    x = F.interpolate(pixels.float(), (h, w), mode="bilinear", align_corners=False).round()  # cv2 gives 8 bit back
    x = F.pad(x, (0, -w % 32, 0, -h % 32), value=128.0)  # (B, 3, h', w')
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (MEAN, STD))
    return ((x.flip(1) if swap else x) - mean) / std, (h, w)


def detector_logits(model: torch.nn.Module, head: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (B, 3, h', w') -> class logits (B, Q, 81), the last being "no object", and mask logits (B, Q, h'/4, w'/4).

    What Mask2FormerForUniversalSegmentation computes; that class wants scipy for its loss. The head reads the states
    after the decoder's norm, which `transformer_decoder_last_hidden_state` is not yet."""
    out = model(x)
    states = model.transformer_module.decoder.layernorm(out.transformer_decoder_last_hidden_state)  # (B, Q, 256)
    return head(states), out.masks_queries_logits[-1]


def postprocess(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    padded: tuple[int, int],
    resized: tuple[int, int],
    size: tuple[int, int],
    threshold: float,
) -> dict[str, list[dict]]:
    """mmdet's maskformer_fusion_head.instance_postprocess for one image, then GenEval's choice of objects.

    class_logits (Q, C + 1), mask_logits (Q, h, w); padded, resized, size: (height, width) of the detector's input, of the
    image in it, of the image itself. -> {class: [{"box", "score", "mask" (H, W) bool}, …]}, best first.
    A query may appear under several labels and masks may overlap."""
    scores = class_logits.softmax(-1)[:, :-1]  # (Q, C)
    values, index = scores.flatten().topk(min(100, scores.numel()))  # max_per_image
    index = index[values > threshold]  # exact shortcut: the mask's share below is at most 1, so no more can be kept
    if not len(index):
        return {}
    query, label = index // scores.shape[1], index % scores.shape[1]  # (N,)
    logits = F.interpolate(mask_logits[query][None], padded, mode="bilinear", align_corners=False)
    logits = F.interpolate(logits[..., : resized[0], : resized[1]], size, mode="bilinear", align_corners=False)[0]  # (N, H, W)
    masks = logits > 0
    share = (logits.sigmoid() * masks).sum((1, 2)) / (masks.sum((1, 2)) + 1e-6)  # (N,) how sure its pixels are
    score = scores[query, label] * share  # 0 where the mask is empty
    objects = {}
    for n in score.argsort(descending=True).tolist():
        found = objects.setdefault(CLASSES[label[n]], [])
        if score[n] > threshold and len(found) < MAX_OBJECTS:
            y, x = masks[n].any(1).nonzero(), masks[n].any(0).nonzero()
            box = tuple(float(v) for v in (x[0], y[0], x[-1] + 1, y[-1] + 1))
            found.append({"box": box, "score": score[n].item(), "mask": masks[n].cpu().numpy(), "colour": None})
    return {name: objects[name] for name in CLASSES if objects.get(name)}


def detector_config() -> Mask2FormerConfig:
    """mmdet's config of that name in transformers' words. decoder_layers counts the prediction before the first layer."""
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], window_size=7, out_features=stages)
    return Mask2FormerConfig(backbone_config=swin, num_labels=80, num_queries=100, encoder_layers=6, decoder_layers=10)


SWIN, FPN, QUERY = (f"model.{n}." for n in ("pixel_level_module.encoder", "pixel_level_module.decoder", "transformer_module"))
BLOCK, BLOCK_TO = r"backbone.stages.(\d+).blocks.(\d+).", SWIN + r"swin.encoder.layers.\1.blocks.\2."
PIXEL, PIXEL_TO = r"panoptic_head.pixel_decoder.encoder.layers.(\d+).", FPN + r"encoder.layers.\1."
LAYER, LAYER_TO = r"panoptic_head.transformer_decoder.layers.(\d+).", QUERY + r"decoder.layers.\1."
NAMES = (  # mmdet 2.x -> transformers 5, in front of .weight and .bias; what is called qkv is cut in three afterwards
    (r"backbone.patch_embed.projection", SWIN + "swin.embeddings.patch_embeddings.projection"),
    (r"backbone.patch_embed.norm", SWIN + "swin.embeddings.norm"),
    (BLOCK + "norm1", BLOCK_TO + "layernorm_before"),
    (BLOCK + "norm2", BLOCK_TO + "layernorm_after"),
    (BLOCK + "attn.w_msa.qkv", BLOCK_TO + "attention.qkv"),
    (BLOCK + "attn.w_msa.proj", BLOCK_TO + "attention.o_proj"),
    (BLOCK + "attn.w_msa.(relative_position_bias_table)", BLOCK_TO + r"attention.relative_position_bias.\3"),
    (BLOCK + "ffn.layers.0.0", BLOCK_TO + "mlp.fc1"),
    (BLOCK + "ffn.layers.1", BLOCK_TO + "mlp.fc2"),
    (r"backbone.stages.(\d+).downsample.(norm|reduction)", SWIN + r"swin.encoder.layers.\1.downsample.\2"),
    *((f"backbone.norm{i}", f"{SWIN}hidden_states_norms.stage{i + 1}") for i in range(4)),
    (r"panoptic_head.pixel_decoder.input_convs.(\d+).conv", FPN + r"input_projections.\1.0"),
    (r"panoptic_head.pixel_decoder.input_convs.(\d+).gn", FPN + r"input_projections.\1.1"),
    (PIXEL + r"attentions.0.(\w+)", PIXEL_TO + r"self_attn.\2"),
    (PIXEL + "norms.0", PIXEL_TO + "self_attn_layer_norm"),
    (PIXEL + "norms.1", PIXEL_TO + "final_layer_norm"),
    (PIXEL + "ffns.0.layers.0.0", PIXEL_TO + "fc1"),
    (PIXEL + "ffns.0.layers.1", PIXEL_TO + "fc2"),
    (r"panoptic_head.pixel_decoder.level_encoding.weight", FPN + "level_embed"),
    (r"panoptic_head.pixel_decoder.lateral_convs.0.conv", FPN + "adapter_1.0"),
    (r"panoptic_head.pixel_decoder.lateral_convs.0.gn", FPN + "adapter_1.1"),
    (r"panoptic_head.pixel_decoder.output_convs.0.conv", FPN + "layer_1.0"),
    (r"panoptic_head.pixel_decoder.output_convs.0.gn", FPN + "layer_1.1"),
    (r"panoptic_head.pixel_decoder.mask_feature", FPN + "mask_projection"),
    (LAYER + "attentions.0.attn.(in_proj_weight|in_proj_bias|out_proj)", LAYER_TO + r"cross_attn.\2"),  # it comes first
    (LAYER + "attentions.1.attn.in_proj_(weight|bias)", LAYER_TO + r"self_attn.qkv.\2"),
    (LAYER + "attentions.1.attn.out_proj", LAYER_TO + "self_attn.out_proj"),
    (LAYER + "norms.0", LAYER_TO + "cross_attn_layer_norm"),
    (LAYER + "norms.1", LAYER_TO + "self_attn_layer_norm"),
    (LAYER + "norms.2", LAYER_TO + "final_layer_norm"),
    (LAYER + "ffns.0.layers.0.0", LAYER_TO + "fc1"),
    (LAYER + "ffns.0.layers.1", LAYER_TO + "fc2"),
    (r"panoptic_head.transformer_decoder.post_norm", QUERY + "decoder.layernorm"),
    *((f"panoptic_head.mask_embed.{2 * i}", f"{QUERY}decoder.mask_predictor.mask_embedder.{i}.0") for i in range(3)),
    (r"panoptic_head.query_embed", QUERY + "queries_embedder"),
    (r"panoptic_head.query_feat", QUERY + "queries_features"),
    (r"panoptic_head.level_embed", QUERY + "level_embed"),
    (r"panoptic_head.cls_embed", "class_predictor"),
)


def rename(key: str) -> str | None:
    """The name in transformers of a parameter of mmdet 2.x, or None where NAMES has none."""
    for source, target in NAMES:
        if match := re.match(source.replace(".", r"\.") + r"(?=\.weight$|\.bias$|$)", key):
            return match.expand(target) + key[match.end() :]
    return None


def convert(state: dict[str, torch.Tensor], config: Mask2FormerConfig) -> dict[str, torch.Tensor]:
    """mmdet 2.x state_dict -> transformers state_dict of Mask2FormerForUniversalSegmentation; one to one or ValueError.

    Swin's patch merging stacks the four pixels of a 2 x 2 patch in another order: nn.Unfold has (channel, row, column),
    transformers (column, row, channel)."""
    if any(".cross_attn." in k or "pixel_decoder.encoder.layers.0.self_attn." in k for k in state):
        refuse("these are the names of the mmdet 3.x file, which gives near-zero scores")
    window = config.backbone_config.window_size
    place = torch.arange(window).repeat_interleave(window) * (2 * window - 1) + torch.arange(window).repeat(window)
    index = place[:, None] - place + 2 * window * (window - 1)  # Swin's relative_position_index: transformers makes it itself
    out, unknown = {}, []
    for key, tensor in state.items():
        name = rename(key)
        if key.endswith(".relative_position_index"):
            if not torch.equal(tensor.long(), index):
                refuse(f"{key} is not the index of a Swin window of {window}")
        elif name is None:
            unknown.append(key)
        elif ".qkv." in name:
            for part, piece in zip("qkv", tensor.chunk(3)):
                out[name.replace(".qkv.", f".{part}_proj.")] = piece.float().contiguous()
        elif ".downsample." in name:  # (…, C 4) -> (…, 4 C)
            out[name] = tensor.float().unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]].transpose(-1, -2).flatten(-2).contiguous()
        else:
            out[name] = tensor.float().contiguous()
    with torch.device("meta"):
        expected = {"model." + k: t.shape for k, t in Mask2FormerModel(config).state_dict().items()}
    expected |= {"class_predictor.weight": (81, config.hidden_dim), "class_predictor.bias": (81,)}
    norm = SWIN + "swin.layernorm."  # no mmdet parameter: the backbone never uses it
    out |= {norm + "weight": torch.ones(expected[norm + "weight"]), norm + "bias": torch.zeros(expected[norm + "bias"])}
    shapes = [f"{k} {tuple(out[k].shape)}, not {tuple(v)}" for k, v in expected.items() if k in out and out[k].shape != v]
    surplus, missing = unknown + sorted(out.keys() - expected.keys()), sorted(expected.keys() - out.keys())
    for what, names in (("has parameters nobody knows", surplus), ("lacks", missing), ("has other shapes", shapes)):
        if names:
            refuse(f"the checkpoint {what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}")
    return out


def convert_file(path: str | Path, out: str | Path) -> None:
    """The .pth that GenEval uses -> a folder that transformers loads. Only a file with the published hash is opened."""
    if not Path(path).is_file():
        refuse(f"{path} is not a file")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest.startswith(SHA256_MMDET3):
        refuse(f"{path} is the mmdet 3.x file, which gives near-zero scores")
    if not digest.startswith(SHA256):
        refuse(f"{path} has SHA-256 {digest[:8]}…, not {SHA256}…")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:  # damaged, or holding more than tensors and plain values
        refuse(f"{path} cannot be read ({str(error).splitlines()[0]})", error)
    config = detector_config()
    save_detector(convert(state, config), config, out, digest)


def save_detector(state: dict[str, torch.Tensor], config: Mask2FormerConfig, out: str | Path, digest: str) -> None:
    """config.json and model.safetensors; the hash of the .pth goes along, so that no other model passes for this one."""
    Path(out).mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out)
    save_file(state, Path(out) / "model.tmp", metadata={"format": "pt", "source_sha256": digest})
    (Path(out) / "model.tmp").replace(Path(out) / "model.safetensors")


def load_detector(folder: str | Path, device: torch.device | str) -> tuple[Mask2FormerModel, torch.nn.Linear]:
    """A converted folder -> the model and the linear class head, float32, in eval mode."""
    file = Path(folder) / "model.safetensors"
    if not file.is_file():
        refuse(f"there is no detector in {folder}")
    try:
        with safe_open(file, "pt") as tensors:
            source = (tensors.metadata() or {}).get("source_sha256", "")
            if not source.startswith(SHA256):
                refuse(f"{folder} holds another model than GenEval's detector")
            weight, bias = tensors.get_tensor("class_predictor.weight"), tensors.get_tensor("class_predictor.bias")
        how = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
        model, info = Mask2FormerModel.from_pretrained(folder, **how)
    except (OSError, SafetensorError) as error:
        refuse(f"{file} cannot be read ({str(error).splitlines()[0]})", error)
    if info["missing_keys"]:
        refuse(f"{file} lacks {min(info['missing_keys'])}")
    head = torch.nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    head.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return model.to(device).eval(), head.to(device).requires_grad_(False)


# ---- Colours: CLIP on the object alone, against grey


def clip_pixels(picture: Image.Image) -> torch.Tensor:
    """CLIP's preprocessing as torchvision does it: PIL -> (3, 224, 224). transformers' own floors the crop's offset."""
    w, h = picture.size
    picture = picture.resize((224, int(224 * h / w)) if w <= h else (int(224 * w / h), 224), Image.Resampling.BICUBIC)
    left, top = (int(round((edge - 224) / 2)) for edge in picture.size)
    x = torch.from_numpy(np.array(picture.crop((left, top, left + 224, top + 224)))).permute(2, 0, 1).float() / 255
    return (x - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


def crop_object(array: np.ndarray, found: dict) -> torch.Tensor:
    """(H, W, 3) uint8 and an object -> (3, 224, 224): what is not the object becomes #999, then its box is cut out."""
    picture, mask = Image.fromarray(array), Image.fromarray(found["mask"])
    alone = Image.composite(picture, Image.new("RGB", picture.size, "#999"), mask)
    return clip_pixels(alone.crop(tuple(round(v) for v in found["box"])))


# ---- The scorer


def to_arrays(images: torch.Tensor | Sequence[Image.Image]) -> list[np.ndarray]:
    """Floats (B, 3, H, W) in [0, 1] or PIL images -> a list of (H, W, 3) uint8 arrays. Rounded, not truncated."""
    if torch.is_tensor(images):
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:] or not images.is_floating_point():
            raise ValueError(f"geneval: images must be floats (B, 3, H, W), not {images.dtype} {tuple(images.shape)}")
        if not ((images >= 0) & (images <= 1)).all():  # NaN is neither
            raise ValueError("geneval: images must lie in [0, 1]; these do not")
        return list((images.float() * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    arrays = []
    for i, image in enumerate(images):
        try:
            arrays.append(np.array(image.convert("RGB")))
        except Exception as error:  # Pillow decodes only here, and a damaged file can fail in many ways
            raise ValueError(f"geneval: image {i} cannot be decoded ({error}); give PIL images or a tensor") from error
    return arrays


def as_jpeg(array: np.ndarray) -> np.ndarray:
    """What is left of an image after flow_grpo's client has sent it: JPEG at Pillow's defaults (quality 75, 4:2:0)."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG")
    return np.array(Image.open(buffer))


@contextlib.contextmanager
def exact_float32(device: torch.device | str) -> Iterator[None]:
    """No autocast and no TF32 inside (geneval issue 15: an A100 with TF32 scores differently); settings restored after."""
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


class GenEval:
    """Callable (images, prompts, metadata) -> (B,) float32 on the CPU: the softened reward, at most 1, or 0 / 1 with
    mode="official".

    images: floats (B, 3, H, W) in [0, 1] or B PIL images of any sizes; prompts are not read; metadata: B lines of GenEval.
    weights: the folder that --convert made; clip: hub id or folder, never downloaded here. Both are loaded at the first
    image, onto `device`; `scorer.model = None` drops them again. batch: images per forward pass, without effect on scores.
    Raises ValueError, one line, for weights that are missing or others, and for images or metadata that cannot be scored."""

    name, higher_is_better = "geneval", True
    range = (0.0, 1.0)  # what a weighted sum of rewards scales by; a softened reward can lie below: 4 found, 1 wanted is -2

    def __init__(
        self,
        device: torch.device | str = "cpu",
        weights: str | Path = WEIGHTS,
        clip: str | Path = CLIP,
        mode: str = "reward_server",
        position_slip: bool = True,
        batch: int = 8,
    ) -> None:
        if mode not in ("official", "reward_server"):
            raise ValueError(f"geneval: mode {mode!r} is neither 'official' nor 'reward_server'")
        self.paths, self.device, self.mode = (weights, clip), device, mode
        self.position_slip, self.batch = position_slip, batch
        self.model = None

    def load(self) -> None:
        weights, clip = self.paths
        model, head = load_detector(weights, self.device)
        try:
            config = CLIPConfig.from_pretrained(clip, local_files_only=True)
            if self.mode == "reward_server":  # open_clip 2.29 and later build openai's weights so, with no more than a warning
                config.text_config.hidden_act = config.vision_config.hidden_act = "gelu"
            self.tokenizer = CLIPTokenizer.from_pretrained(clip, local_files_only=True)
            how = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
            clip_model, info = CLIPModel.from_pretrained(clip, config=config, **how)
            if missing := sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]]):
                raise OSError(f"it lacks {missing[0]}")
            if len(self.tokenizer) != config.text_config.vocab_size:  # an incomplete download loads as an empty tokenizer
                raise OSError("tokenizer and model differ in vocabulary")
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"geneval: cannot load CLIP from {clip} ({reason}); fetch it: {FETCH_CLIP}") from error
        clip_model.to(self.device).eval().requires_grad_(False)
        self.classifiers, self.model = {}, (model, head, clip_model)

    @torch.no_grad()
    def detect(self, arrays: list[np.ndarray], thresholds: Sequence[float]) -> list[dict]:
        """(H, W, 3) uint8 arrays of any sizes, a threshold each -> the objects of each image, see `postprocess`.

        Only images of one size share a batch, so none is padded for the sake of another."""
        if self.model is None:
            self.load()
        found = [None] * len(arrays)
        for size in dict.fromkeys(a.shape[:2] for a in arrays):
            members = [i for i, a in enumerate(arrays) if a.shape[:2] == size]
            for k in range(0, len(members), self.batch):
                part = members[k : k + self.batch]
                pixels = torch.from_numpy(np.stack([arrays[i] for i in part])).permute(0, 3, 1, 2).to(self.device)
                with exact_float32(self.device):
                    x, resized = preprocess(pixels, swap=self.mode == "reward_server")
                    classes, masks = detector_logits(*self.model[:2], x)
                    if not (classes.isfinite().all() and masks.isfinite().all()):  # would count as "nothing found"
                        raise ValueError("geneval: the detector's output is not finite; check the device and convert again")
                    for i, c, m in zip(part, classes, masks):
                        found[i] = postprocess(c, m, tuple(x.shape[-2:]), resized, size, thresholds[i])
        return found

    @torch.no_grad()
    def colour_classifier(self, name: str) -> torch.Tensor:
        """(10, D): for each colour the normalised mean of three normalised text embeddings (clip_benchmark's zero-shot)."""
        if name not in self.classifiers:
            forms = (f"a photo of a {{}} {name}", f"a photo of a {{}}-colored {name}", "a photo of a {} object")
            texts = [form.format(colour) for colour in COLOURS for form in forms]
            tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.device)
            rows = F.normalize(self.model[2].get_text_features(**tokens).pooler_output, dim=-1)  # (30, D)
            self.classifiers[name] = F.normalize(rows.view(10, 3, -1).mean(1), dim=-1)
        return self.classifiers[name]

    @torch.no_grad()
    def name_colours(self, arrays: list[np.ndarray], found: list[dict], metadata: Sequence[dict]) -> None:
        """Fills in "colour" of the objects of every class whose colour the metadata asks for."""
        targets = []
        for array, objects, line in zip(arrays, found, metadata):
            for name in {request["class"] for request in line["include"] if "color" in request}:
                targets += [(array, name, o) for o in objects.get(name, [])]
        for k in range(0, len(targets), 64):
            part = targets[k : k + 64]
            crops = torch.stack([crop_object(a, o) for a, _, o in part]).to(self.device)  # (N, 3, 224, 224)
            with exact_float32(self.device):
                features = self.model[2].get_image_features(pixel_values=crops).pooler_output  # (N, D); argmax needs no norm
                if not features.isfinite().all():  # argmax would name a colour all the same
                    raise ValueError("geneval: CLIP's output is not finite; check the device and fetch it again")
                for (_, name, o), feature in zip(part, features):
                    o["colour"] = COLOURS[(self.colour_classifier(name) @ feature).argmax()]

    def check(self, prompts: Sequence[str] | None, metadata: Sequence[dict]) -> None:
        """ValueError, one line, where a prompt's metadata cannot be judged: to be asked before anything is painted."""
        for i, line in enumerate(metadata):
            check_metadata(line, i)

    def judge(self, images: torch.Tensor | Sequence[Image.Image], metadata: Sequence[dict]) -> list[dict]:
        """-> a dict an image: tag, correct (official), strict, soft. Images as the mode sees them, all three rules on them."""
        self.check(None, metadata)
        arrays = to_arrays(images)
        if len(arrays) != len(metadata):
            raise ValueError(f"geneval: {len(arrays)} images and {len(metadata)} lines of metadata; give one each")
        if not arrays:
            return []
        if self.mode == "reward_server":
            arrays = [as_jpeg(a) for a in arrays]
        thresholds = [COUNTING_THRESHOLD if line["tag"] == "counting" else THRESHOLD for line in metadata]
        found = self.detect(arrays, thresholds)
        self.name_colours(arrays, found, metadata)
        results = []
        for objects, line in zip(found, metadata):
            soft, strict = softened(objects, line, self.position_slip)
            results.append({"tag": line["tag"], "correct": official(objects, line), "strict": strict, "soft": soft})
        return results

    def __call__(
        self, images: torch.Tensor | Sequence[Image.Image], prompts: Sequence[str], metadata: Sequence[dict]
    ) -> torch.Tensor:
        if len(prompts) != len(metadata):
            raise ValueError(f"geneval: {len(prompts)} prompts and {len(metadata)} lines of metadata; give one each")
        key = "correct" if self.mode == "official" else "soft"
        return torch.tensor([float(r[key]) for r in self.judge(images, metadata)])


# ---- Prompts for training, by the rules of the test prompts (geneval prompts/create_prompts.py)


def make_prompt(tag: str, rng: random.Random) -> dict:
    """One line of metadata. rng: random.Random. Persons get no colour; two objects never share class or colour."""
    article = lambda words: ("an " if words[0] in "aeiou" else "a ") + words
    a, b = rng.sample(CLASSES[1:] if tag in ("colors", "color_attr") else CLASSES, 2)
    red, blue = rng.sample(COLOURS, 2)
    include, exclude = [{"class": a, "count": 1}, {"class": b, "count": 1}], {}
    if tag == "single_object":
        include, text = include[:1], article(a)
    elif tag == "two_object":
        text = f"{article(a)} and {article(b)}"
    elif tag == "counting":
        count = rng.randint(2, 4)
        include, exclude = [{"class": a, "count": count}], {"exclude": [{"class": a, "count": count + 1}]}
        text = f"{('two', 'three', 'four')[count - 2]} {a}{'es' if a.endswith('s') else 's'}"
    elif tag == "colors":
        include, text = [{"class": a, "count": 1, "color": red}], f"{article(red)} {a}"
    elif tag == "color_attr":
        include[0]["color"], include[1]["color"] = red, blue
        text = f"{article(red)} {a} and {article(blue)} {b}"
    else:  # position: the object that is placed comes second, it refers to the first
        include[1]["position"] = [rng.choice(RELATIONS), 0]
        text = f"{article(b)} {include[1]['position'][0]} {article(a)}"
    return {"tag": tag, "include": include, **exclude, "prompt": f"a photo of {text}"}


def training_prompts(n: int, test_prompts: Iterable[str], seed: int = 0) -> list[dict]:
    """n lines of metadata in the shares of TAGS, none of whose prompts is in test_prompts. Repeats are left in, as upstream
    (its file of 50,000 is not public and other numbers were drawn for it: the same rule, not the same lines)."""
    if n < 1:
        raise ValueError(f"geneval: {n} prompts asked for; give at least 1")
    rng, held_out, lines = random.Random(seed), set(test_prompts), []
    while len(lines) < n:
        line = make_prompt(rng.choices(list(TAGS), TAGS.values())[0], rng)
        if line["prompt"] not in held_out:
            lines.append(line)
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(print(f"error: {message}", file=sys.stderr) or 2)  # one line, no usage
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--convert", metavar="FILE.pth", help="turn GenEval's detector into a folder of safetensors")
    task.add_argument("--prompts", type=int, metavar="N", help="write N lines of training metadata")
    parser.add_argument("--test", metavar="FILE.jsonl", help="GenEval's evaluation_metadata.jsonl, whose prompts are left out")
    parser.add_argument("--seed", type=int, default=0, help="of --prompts")
    parser.add_argument("--out", required=True, help="folder of the weights, or file of the prompts")
    args = parser.parse_args(argv)
    try:
        if args.convert:
            convert_file(args.convert, args.out)
        else:
            if not args.test:
                raise ValueError("geneval: --prompts needs --test FILE.jsonl, the prompts to leave out")
            try:
                test = [json.loads(line)["prompt"] for line in Path(args.test).read_text("utf-8").split("\n") if line.strip()]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f'geneval: {args.test} is not JSON lines with a "prompt" in each') from error
            lines = training_prompts(args.prompts, test, args.seed)
            Path(args.out).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
