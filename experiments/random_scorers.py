"""Scorers with random weights, of any size, in the published names and shapes: for
experiments/benchmark_rewards.py and for the tests. Names and shapes are written down here on their
own, from the published classes, so that a mistake in a scorer's key map cannot hide."""

import json
import math
from functools import cache

import torch
import transformers as hf
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Mask2FormerConfig, SwinConfig

from rewards import deqa

# ---- CLIP


def spread_out(model, seed=0):
    """Random weights of a size at which different pictures get visibly different scores."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    return model.eval()


def letter_tokenizer():
    """CLIP's tokenizer without its words: a token for each letter, 514 in all."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    return hf.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def save_clip(folder, side=32, patch=8):
    """A CLIP of 2 + 2 layers as on the hub. Vectors of 768, as L/14's."""
    letter_tokenizer().save_pretrained(folder)
    layers = {"hidden_size": 32, "intermediate_size": 64}
    layers |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    text = layers | ends | {"vocab_size": 514, "max_position_embeddings": 77}
    vision = layers | {"image_size": side, "patch_size": patch}
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)
    config.logit_scale_init_value = math.log(100)
    spread_out(hf.CLIPModel(config)).save_pretrained(folder)


def save_head(path):
    """A random aesthetic head in the published shapes."""
    generator = torch.Generator().manual_seed(1)
    sizes, state = (768, 1024, 128, 64, 16, 1), {}
    for layer, inner, outer in zip((0, 2, 4, 6, 7), sizes, sizes[1:]):
        weight = torch.randn(outer, inner, generator=generator) / inner**0.5
        state[f"layers.{layer}.weight"] = weight
        state[f"layers.{layer}.bias"] = torch.randn(outer, generator=generator)
    torch.save(state, path)
    return path


# ---- DeQA: mPLUG-Owl2

SIZE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def deqa_config(llama, heads_of_values, vision, image, abstractor, queries):
    """config.json as it is published; the tuples hold SIZE, image the size and that of a patch."""
    vision = dict(zip(SIZE, vision)) | {"image_size": image[0], "patch_size": image[1]}
    abstractor = dict(zip(SIZE, abstractor)) | {"encoder_hidden_size": vision["hidden_size"]}
    abstractor |= {"num_learnable_queries": queries, "grid_size": image[0] // image[1]}
    visual = {"visual_model": vision, "visual_abstractor": abstractor}
    for part in visual.values():
        part["layer_norm_eps"] = 1e-6
    config = dict(zip(SIZE, llama)) | {"num_key_value_heads": heads_of_values, "vocab_size": 32000}
    config |= {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "rope_theta": 10000.0}
    config["auto_map"] = {"AutoConfig": "configuration_mplug_owl2.MPLUGOwl2Config"}
    return config | {"model_type": "mplug_owl2", "visual_config": visual}


DEQA_TINY = deqa_config((32, 48, 2, 4), 2, (24, 40, 2, 3), (28, 7), (24, 36, 2, 4), 5)
DEQA_7B = deqa_config(
    (4096, 11008, 32, 32), 32, (1024, 4096, 24, 16), (448, 14), (1024, 2816, 6, 16), 64
)


def deqa_shapes(config):
    """{name: shape} as mPLUG-Owl2's classes define them (visual_encoder.py, modeling_llama2.py)."""
    H, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = H // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (vocabulary, H), "model.norm.weight": (H,)}
    shapes["lm_head.weight"] = (vocabulary, H)
    for i in range(config["num_hidden_layers"]):
        name = f"model.layers.{i}."
        for x, shape in {"q": (H, H), "o": (H, H), "k": (kv, H), "v": (kv, H)}.items():
            ways = (".multiway.0", ".multiway.1") if x in "kv" else ("",)
            shapes |= {f"{name}self_attn.{x}_proj{way}.weight": shape for way in ways}
        for x, shape in {"gate": (inner, H), "up": (inner, H), "down": (H, inner)}.items():
            shapes[f"{name}mlp.{x}_proj.weight"] = shape
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{name}{norm}.multiway.{way}.weight": (H,) for way in (0, 1)}

    def add(name, *shape):
        shapes[name + ".weight"], shapes[name + ".bias"] = shape, shape[:1]

    c = config["visual_config"]["visual_model"]
    D, inner, patch = c["hidden_size"], c["intermediate_size"], c["patch_size"]
    name = "model.vision_model.embeddings."
    shapes[name + "cls_token"] = (1, 1, D)
    shapes[name + "patch_embed.weight"] = (D, 3, patch, patch)
    shapes[name + "position_embedding"] = (1, (c["image_size"] // patch) ** 2 + 1, D)
    add(name + "pre_layernorm", D)
    add("model.vision_model.post_layernorm", D)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.vision_model.encoder.layers.{i}."
        parts = {"self_attn.query_key_value": (3 * D, D), "self_attn.dense": (D, D),
                 "mlp.fc1": (inner, D), "mlp.fc2": (D, inner), "input_layernorm": (D,),
                 "post_attention_layernorm": (D,)}  # fmt: skip
        for part, shape in parts.items():
            add(layer + part, *shape)

    c, name = config["visual_config"]["visual_abstractor"], "model.visual_abstractor."
    D, E, inner = c["hidden_size"], c["encoder_hidden_size"], c["intermediate_size"]
    shapes[name + "query_embeds"] = (1, c["num_learnable_queries"], D)
    shapes[name + "vit_eos"] = (1, 1, H)
    add(name + "visual_fc", H, D)
    for i in range(c["num_hidden_layers"]):
        layer = f"{name}encoder.layers.{i}.crossattention."
        shapes[layer + "attention.q_pos_embed"] = (c["num_learnable_queries"], D)
        shapes[layer + "attention.k_pos_embed"] = (c["grid_size"] ** 2 + 1, D)
        parts = {"attention.query": (D, D), "attention.key": (D, E), "attention.value": (D, E),
                 "output.out_proj": (D, D), "output.norm2": (D,), "output.mlp.w1": (inner, D),
                 "output.mlp.w2": (D, inner), "output.mlp.w3": (inner, D),
                 "output.mlp.ffn_ln": (inner,), "norm1": (D,), "normk": (E,)}  # fmt: skip
        for part, shape in parts.items():
            add(layer + part, *shape)
    return shapes


@cache
def deqa_state():
    generator = torch.Generator().manual_seed(3)
    state = {}
    for name, shape in deqa_shapes(DEQA_TINY).items():
        size = 2 * shape[-1] ** -0.5 if len(shape) > 1 and "embed" not in name else 1.0
        state[name] = torch.randn(shape, generator=generator) * size
    return state


def protobuf(number, payload):
    """One field of a message: its number, length and bytes."""
    size, head = len(payload), bytearray([number << 3 | 2])
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    return bytes(head) + bytes([size]) + payload


def tokenizer_model(change=None):
    """A SentencePiece file of 32000 pieces that spells what LLaMA's does where DeQA needs it."""
    pieces = [f"piece{i}" for i in range(32000)]
    before = "<s> ▁US ER : ▁How ▁would ▁you ▁rate ▁the ▁quality ▁of ▁this ▁image ? <0x0A>"
    after = "▁ <0x0A> ASS IST ANT : ▁The ▁quality ▁of ▁the ▁image ▁is"
    levels = "▁excellent ▁good ▁fair ▁poor ▁bad"
    for ids, text in ((deqa.BEFORE, before), (deqa.AFTER, after), (deqa.LEVELS.values(), levels)):
        for i, piece in zip(ids, text.split(" "), strict=True):
            assert pieces[i] in (f"piece{i}", piece)  # one number, one piece
            pieces[i] = piece
    if change:
        pieces[change] = "other"
    # Of a piece: 1 text, 2 score (four bytes), 3 kind (varint). Then 2, the trainer's settings
    more = b"\x15\0\0\x80\xbf" + b"\x18\x01"
    body = b"".join(protobuf(1, protobuf(1, piece.encode()) + more) for piece in pieces)
    return body + protobuf(2, b"\x08\xac\x02" + b"\x11" + bytes(8))


def save_deqa(folder, state):
    """As on the hub: two pickled shards, an index, config.json, tokenizer.model."""
    shards, index = {}, {}
    for i, (key, tensor) in enumerate(state.items()):
        index[key] = f"pytorch_model-0000{i % 2 + 1}-of-00002.bin"
        shards.setdefault(index[key], {})[key] = tensor
    for name, shard in shards.items():
        torch.save(shard, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(DEQA_TINY))
    (folder / "tokenizer.model").write_bytes(tokenizer_model())
    (folder / "configuration_mplug_owl2.py").write_text("raise SystemExit('remote code ran')")
    return folder


# ---- OCR: the networks of PP-OCRv5 mobile

LETTERS = list("abcdefghijklmnopqrstuvwxyz0123456789²é")
READER = {"hidden_size": 24, "num_attention_heads": 2, "head_out_channels": len(LETTERS) + 2}


def save_text_detector(folder):
    """A detector of random weights that takes a whole picture for one line."""
    torch.manual_seed(0)
    model = hf.PPOCRV5MobileDetForObjectDetection(hf.PPOCRV5MobileDetConfig())
    model.head.conv_final.bias.data.fill_(4.0)
    model.save_pretrained(folder)
    return folder


def save_reader(folder):
    """A reader of random weights that is sure of what it reads."""
    torch.manual_seed(0)
    blocks = [[[3, 16, 32, 1, False]], [[3, 32, 64, [2, 1], False]], [[3, 64, 128, [1, 2], False]],
              [[3, 128, 256, [2, 1], False]], [[5, 256, 512, [2, 1], True]]]  # fmt: skip
    backbone = {"model_type": "pp_lcnet_v3", "scale": 0.25, "block_configs": blocks, "divisor": 8}
    backbone["out_features"] = ["stage2", "stage3", "stage4", "stage5"]
    config = hf.PPOCRV5MobileRecConfig(backbone_config=backbone, **READER)
    model = hf.PPOCRV5MobileRecForTextRecognition(config)
    for parameter in model.parameters():
        if parameter.ndim == 4:  # convolutions: keep the signal alive through all the layers
            torch.nn.init.kaiming_normal_(parameter)
    model.head.head.weight.data.normal_(0, 8.0)
    model.save_pretrained(folder)
    settings = {"character_list": LETTERS, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


# ---- GenEval: the detector, as the classes of mmdet 2.25 define it

DETECTOR = dict(C=96, depths=(2, 2, 18, 2), heads=(3, 6, 12, 24), window=7, D=256, ffn=(1024, 2048),
            Q=100, encoder=6, decoder=9)  # fmt: skip  # fmt: skip
DETECTOR_TINY = dict(C=8, depths=(2, 1, 2, 1), heads=(1, 2, 2, 4), window=3, D=32, ffn=(16, 24),
            Q=12, encoder=1, decoder=2)  # fmt: skip  # fmt: skip


def detector_shapes(C, depths, heads, window, D, ffn, Q, encoder, decoder):
    shapes = {}

    def layer(name, out, *inner, bias=True):
        shapes[name + ".weight"] = (out, *inner)
        if bias:
            shapes[name + ".bias"] = (out,)

    def feed_forward(name, width, inner):
        layer(name + ".layers.0.0", inner, width)
        layer(name + ".layers.1", width, inner)

    layer("backbone.patch_embed.projection", C, 3, 4, 4)
    layer("backbone.patch_embed.norm", C)
    for i, (depth, head) in enumerate(zip(depths, heads)):
        width, stage = C * 2**i, f"backbone.stages.{i}"
        for j in range(depth):
            block = f"{stage}.blocks.{j}"
            attention = f"{block}.attn.w_msa."
            shapes[attention + "relative_position_bias_table"] = ((2 * window - 1) ** 2, head)
            shapes[attention + "relative_position_index"] = (window**2, window**2)
            layer(attention + "qkv", 3 * width, width)
            layer(attention + "proj", width, width)
            layer(f"{block}.norm1", width)
            layer(f"{block}.norm2", width)
            feed_forward(f"{block}.ffn", width, 4 * width)
        if i < 3:
            layer(f"{stage}.downsample.norm", 4 * width)
            layer(f"{stage}.downsample.reduction", 2 * width, 4 * width, bias=False)
        layer(f"backbone.norm{i}", width)

    pixel = "panoptic_head.pixel_decoder"
    for i in range(3):  # from the coarsest level
        layer(f"{pixel}.input_convs.{i}.conv", D, C * 2 ** (3 - i), 1, 1)
        layer(f"{pixel}.input_convs.{i}.gn", D)
    for i in range(encoder):
        name = f"{pixel}.encoder.layers.{i}"
        outputs = {"value_proj": D, "output_proj": D}
        outputs["sampling_offsets"] = 8 * 3 * 4 * 2  # heads, levels, points, xy
        outputs["attention_weights"] = 8 * 3 * 4
        for part, out in outputs.items():
            layer(f"{name}.attentions.0.{part}", out, D)
        feed_forward(f"{name}.ffns.0", D, ffn[0])
        for k in (0, 1):
            layer(f"{name}.norms.{k}", D)
    shapes[f"{pixel}.level_encoding.weight"] = (3, D)
    for part, inputs in {"lateral_convs": (C, 1, 1), "output_convs": (D, 3, 3)}.items():
        layer(f"{pixel}.{part}.0.conv", D, *inputs, bias=False)
        layer(f"{pixel}.{part}.0.gn", D)
    layer(f"{pixel}.mask_feature", D, D, 1, 1)

    for i in range(decoder):
        name = f"panoptic_head.transformer_decoder.layers.{i}"
        for k in (0, 1):
            shapes[f"{name}.attentions.{k}.attn.in_proj_weight"] = (3 * D, D)
            shapes[f"{name}.attentions.{k}.attn.in_proj_bias"] = (3 * D,)
            layer(f"{name}.attentions.{k}.attn.out_proj", D, D)
        feed_forward(f"{name}.ffns.0", D, ffn[1])
        for k in range(3):
            layer(f"{name}.norms.{k}", D)
    layer("panoptic_head.transformer_decoder.post_norm", D)
    for part, rows in {"query_embed": Q, "query_feat": Q, "level_embed": 3}.items():
        shapes[f"panoptic_head.{part}.weight"] = (rows, D)
    layer("panoptic_head.cls_embed", 81, D)
    for k in (0, 2, 4):
        layer(f"panoptic_head.mask_embed.{k}", D, D)
    return shapes


def tiny_detector_config():
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(embed_dim=8, depths=[2, 1, 2, 1], num_heads=[1, 2, 2, 4], window_size=3,
                      out_features=stages)  # fmt: skip
    return Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, num_queries=12,
        encoder_feedforward_dim=16, dim_feedforward=24, encoder_layers=1, decoder_layers=3,
        num_labels=80,
    )  # fmt: skip


def window_index(window):
    """mmdet's relative_position_index, from its definition: a pair's row of the bias table."""
    places = [(y, x) for y in range(window) for x in range(window)]
    index = torch.empty(len(places), len(places), dtype=torch.long)
    for i, a in enumerate(places):
        for j, b in enumerate(places):
            index[i, j] = (a[0] - b[0] + window - 1) * (2 * window - 1) + a[1] - b[1] + window - 1
    return index


def detector_state():
    """The published names with random values; norms too, or a forgotten one would not show."""
    generator, state = torch.Generator().manual_seed(0), {}
    for key, shape in detector_shapes(**DETECTOR_TINY).items():
        if key.endswith("relative_position_index"):
            state[key] = window_index(DETECTOR_TINY["window"])
        elif len(shape) == 1:
            state[key] = torch.randn(shape, generator=generator) * 0.3 + (".weight" in key)
        else:
            size = math.sqrt(math.prod(shape[1:]))
            state[key] = torch.randn(shape, generator=generator) / size
    state["panoptic_head.cls_embed.weight"] *= 12  # confident: scores above the thresholds
    return state
