"""Convert GenEval's detector: OpenMMLab's .pth (mmdet 2.x) -> a folder that transformers loads.

    python -m rewards.geneval_convert FILE.pth --out weights/geneval

FILE.pth is mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth (Apache-2.0);
FETCH in geneval_detector.py has the command that downloads and converts it.
Not checked here against the real file: the names below come from mmdet 2.25's classes. A name or a
shape that does not fit is an error.
"""

import argparse
import hashlib
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Mask2FormerConfig, Mask2FormerModel, SwinConfig

from rewards.geneval_detector import SHA256, refuse

SHA256_MMDET3 = "c9d0c4f2"  # the same model for mmdet 3.x


def detector_config() -> Mask2FormerConfig:
    """mmdet's config of that name in transformers' words.

    decoder_layers also counts the prediction before the first layer."""
    swin = SwinConfig(
        embed_dim=96,
        depths=[2, 2, 18, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return Mask2FormerConfig(
        backbone_config=swin,
        num_labels=80,
        num_queries=100,
        encoder_layers=6,
        decoder_layers=10,
    )


SWIN = "model.pixel_level_module.encoder.swin."
FPN = "model.pixel_level_module.decoder."
QUERY = "model.transformer_module."
STAGE, STAGE_TO = r"backbone.stages.(\d+).", SWIN + r"encoder.layers.\1."
BLOCK, BLOCK_TO = STAGE + r"blocks.(\d+).", STAGE_TO + r"blocks.\2."
PIXEL = "panoptic_head.pixel_decoder."
ENCODER, ENCODER_TO = PIXEL + r"encoder.layers.(\d+).", FPN + r"encoder.layers.\1."
DECODER = "panoptic_head.transformer_decoder."
LAYER, LAYER_TO = DECODER + r"layers.(\d+).", QUERY + r"decoder.layers.\1."
MASK_EMBED, MASK_EMBED_TO = "panoptic_head.mask_embed.", QUERY + "decoder.mask_predictor."
# mmdet 2.x -> transformers 5, without .weight and .bias; `convert` splits every qkv in three.
NAMES = (
    ("backbone.patch_embed.projection", SWIN + "embeddings.patch_embeddings.projection"),
    ("backbone.patch_embed.norm", SWIN + "embeddings.norm"),
    (BLOCK + "norm1", BLOCK_TO + "layernorm_before"),
    (BLOCK + "norm2", BLOCK_TO + "layernorm_after"),
    (BLOCK + "attn.w_msa.qkv", BLOCK_TO + "attention.qkv"),
    (BLOCK + "attn.w_msa.proj", BLOCK_TO + "attention.o_proj"),
    (
        BLOCK + "attn.w_msa.(relative_position_bias_table)",
        BLOCK_TO + r"attention.relative_position_bias.\3",
    ),
    (BLOCK + "ffn.layers.0.0", BLOCK_TO + "mlp.fc1"),
    (BLOCK + "ffn.layers.1", BLOCK_TO + "mlp.fc2"),
    (STAGE + "downsample.(norm|reduction)", STAGE_TO + r"downsample.\2"),
    ("backbone.norm0", "model.pixel_level_module.encoder.hidden_states_norms.stage1"),
    ("backbone.norm1", "model.pixel_level_module.encoder.hidden_states_norms.stage2"),
    ("backbone.norm2", "model.pixel_level_module.encoder.hidden_states_norms.stage3"),
    ("backbone.norm3", "model.pixel_level_module.encoder.hidden_states_norms.stage4"),
    (PIXEL + r"input_convs.(\d+).conv", FPN + r"input_projections.\1.0"),
    (PIXEL + r"input_convs.(\d+).gn", FPN + r"input_projections.\1.1"),
    (ENCODER + r"attentions.0.(\w+)", ENCODER_TO + r"self_attn.\2"),
    (ENCODER + "norms.0", ENCODER_TO + "self_attn_layer_norm"),
    (ENCODER + "norms.1", ENCODER_TO + "final_layer_norm"),
    (ENCODER + "ffns.0.layers.0.0", ENCODER_TO + "fc1"),
    (ENCODER + "ffns.0.layers.1", ENCODER_TO + "fc2"),
    (PIXEL + "level_encoding.weight", FPN + "level_embed"),
    (PIXEL + "lateral_convs.0.conv", FPN + "adapter_1.0"),
    (PIXEL + "lateral_convs.0.gn", FPN + "adapter_1.1"),
    (PIXEL + "output_convs.0.conv", FPN + "layer_1.0"),
    (PIXEL + "output_convs.0.gn", FPN + "layer_1.1"),
    (PIXEL + "mask_feature", FPN + "mask_projection"),
    (  # in a layer the cross attention comes first
        LAYER + "attentions.0.attn.(in_proj_weight|in_proj_bias|out_proj)",
        LAYER_TO + r"cross_attn.\2",
    ),
    (LAYER + "attentions.1.attn.in_proj_(weight|bias)", LAYER_TO + r"self_attn.qkv.\2"),
    (LAYER + "attentions.1.attn.out_proj", LAYER_TO + "self_attn.out_proj"),
    (LAYER + "norms.0", LAYER_TO + "cross_attn_layer_norm"),
    (LAYER + "norms.1", LAYER_TO + "self_attn_layer_norm"),
    (LAYER + "norms.2", LAYER_TO + "final_layer_norm"),
    (LAYER + "ffns.0.layers.0.0", LAYER_TO + "fc1"),
    (LAYER + "ffns.0.layers.1", LAYER_TO + "fc2"),
    (DECODER + "post_norm", QUERY + "decoder.layernorm"),
    (MASK_EMBED + "0", MASK_EMBED_TO + "mask_embedder.0.0"),
    (MASK_EMBED + "2", MASK_EMBED_TO + "mask_embedder.1.0"),
    (MASK_EMBED + "4", MASK_EMBED_TO + "mask_embedder.2.0"),
    ("panoptic_head.query_embed", QUERY + "queries_embedder"),
    ("panoptic_head.query_feat", QUERY + "queries_features"),
    ("panoptic_head.level_embed", QUERY + "level_embed"),
    ("panoptic_head.cls_embed", "class_predictor"),
)


def rename(key: str) -> str | None:
    """The name in transformers of a parameter of mmdet 2.x, or None where NAMES has none."""
    for source, target in NAMES:
        pattern = source.replace(".", r"\.") + r"(?=\.weight$|\.bias$|$)"
        match = re.match(pattern, key)
        if match:
            return match.expand(target) + key[match.end() :]
    return None


def convert(state: dict[str, torch.Tensor], config: Mask2FormerConfig) -> dict[str, torch.Tensor]:
    """mmdet 2.x state_dict -> state_dict of transformers' Mask2FormerForUniversalSegmentation.

    One to one, or ValueError. Swin's patch merging stacks the four pixels of a 2 x 2 patch
    differently: nn.Unfold by (channel, row, column), transformers by (column, row, channel)."""
    marks = (".cross_attn.", "pixel_decoder.encoder.layers.0.self_attn.")
    for mark in marks:
        if any(mark in key for key in state):
            refuse("these are the names of the mmdet 3.x file, which gives near-zero scores")
    index = window_index(config.backbone_config.window_size)
    converted, unknown = {}, []
    for key, tensor in state.items():
        name = rename(key)
        if key.endswith(".relative_position_index"):  # transformers computes it itself
            if not torch.equal(tensor.long(), index):
                window = config.backbone_config.window_size
                refuse(f"{key} is not the index of a Swin window of {window}")
        elif name is None:
            unknown.append(key)
        elif ".qkv." in name:
            for letter, piece in zip("qkv", tensor.chunk(3)):
                to = name.replace(".qkv.", f".{letter}_proj.")
                converted[to] = piece.float().contiguous()
        elif ".downsample." in name:  # (…, C 4) -> (…, 4 C)
            patches = tensor.float().unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]]
            converted[name] = patches.transpose(-1, -2).flatten(-2).contiguous()
        else:
            converted[name] = tensor.float().contiguous()
    expected = expected_shapes(config)
    unused = SWIN + "layernorm."  # no mmdet parameter: the backbone never uses this norm
    converted[unused + "weight"] = torch.ones(expected[unused + "weight"])
    converted[unused + "bias"] = torch.zeros(expected[unused + "bias"])
    check_names_and_shapes(converted, unknown, expected)
    return converted


def window_index(window: int) -> torch.Tensor:
    """Swin's relative_position_index: the row of the bias table that each pair of places uses."""
    row = torch.arange(window).repeat_interleave(window)
    column = torch.arange(window).repeat(window)
    place = row * (2 * window - 1) + column
    return place[:, None] - place + 2 * window * (window - 1)


def expected_shapes(config: Mask2FormerConfig) -> dict[str, tuple[int, ...]]:
    """{name: shape} of every weight that transformers has: the model's and the class head's."""
    with torch.device("meta"):
        model = Mask2FormerModel(config)
    shapes = {"model." + key: tensor.shape for key, tensor in model.state_dict().items()}
    shapes["class_predictor.weight"] = (81, config.hidden_dim)
    shapes["class_predictor.bias"] = (81,)
    return shapes


def check_names_and_shapes(
    converted: dict[str, torch.Tensor],
    unknown: list[str],
    expected: dict[str, tuple[int, ...]],
) -> None:
    """Refuse a checkpoint with weights too many, too few, or in other shapes."""
    surplus = unknown + sorted(converted.keys() - expected.keys())
    missing = sorted(expected.keys() - converted.keys())
    shapes = []
    for name in converted.keys() & expected.keys():
        has, needs = tuple(converted[name].shape), tuple(expected[name])
        if has != needs:
            shapes.append(f"{name} {has}, not {needs}")
    problems = {
        "has parameters nobody knows": surplus,
        "lacks": missing,
        "has other shapes": sorted(shapes),
    }
    for problem, names in problems.items():
        if names:
            listed = ", ".join(names[:3])
            if len(names) > 3:
                listed += f" and {len(names) - 3} more"
            refuse(f"the checkpoint {problem}: {listed}")


def convert_file(path: str | Path, out: str | Path) -> None:
    """The .pth that GenEval uses -> a folder. Only a file with the published hash is opened."""
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


def save_detector(
    state: dict[str, torch.Tensor], config: Mask2FormerConfig, out: str | Path, digest: str
) -> None:
    """Write config.json and model.safetensors.

    The file's metadata holds the hash of the .pth, so that no other model passes for this one."""
    Path(out).mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out)
    temporary = Path(out) / "model.tmp"
    save_file(state, temporary, metadata={"format": "pt", "source_sha256": digest})
    temporary.replace(Path(out) / "model.safetensors")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")  # one line, no usage
    parser.add_argument("file", metavar="FILE.pth", help="GenEval's detector as OpenMMLab has it")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    try:
        convert_file(args.file, args.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main(parse_args())
