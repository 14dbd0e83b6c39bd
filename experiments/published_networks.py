"""Networks of scorers as they were published: names and shapes of their weights, files with random
weights of any size, and slow forward passes. The tests hold rewards/ against them, and
benchmark_rewards.py measures them. All of it is written down from the published classes; from
rewards/ come the numbers of DeQA's tokens and `publish`. So a mistake in a key map cannot hide."""

import hashlib
import json
import math
from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import transformers as hf
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Mask2FormerConfig, SwinConfig

from rewards import convert, deqa

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


# ---- Qwen-VL


def qwenvl_config(kind, image):
    """A tiny network of this model_type. image: the id of a picture's token."""
    text = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 262}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    text |= {"rope_parameters": rope, "bos_token_id": 256, "eos_token_id": 258}
    vision = {"depth": 2, "num_heads": 2, "hidden_size": 32}
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 32}
    else:
        vision |= {"intermediate_size": 64, "out_hidden_size": 32}
    if kind == "qwen2_5_vl":
        vision |= {"fullatt_block_indexes": [1]}
    if kind.startswith("qwen3"):
        text |= {"head_dim": 8}
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    if kind == "qwen3_vl_moe":
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    names = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
    make = getattr(hf, names.get(kind, "Qwen3VLMoe") + "Config")
    return make(text_config=text, vision_config=vision, image_token_id=image)


def save_qwenvl(folder, kind):
    """A tiny random Qwen-VL as on the hub: a token for each byte, and settings that sample."""
    letters = sorted(ByteLevel.alphabet())
    tokenizer = hf.Qwen2Tokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    special = "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|>"
    tokenizer.add_special_tokens({"additional_special_tokens": special.split()})
    tokenizer.save_pretrained(folder)
    config = qwenvl_config(kind, tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    model = spread_out(hf.AutoModelForImageTextToText.from_config(config), seed=1)
    torch.nn.init.zeros_(model.lm_head.weight[94:])  # it writes ASCII, and never ends
    model.generation_config = hf.GenerationConfig(do_sample=True, temperature=9.0, top_k=50)
    model.save_pretrained(folder)
    size = {"shortest_edge": 56**2, "longest_edge": 10**6}
    processor = hf.Qwen2VLImageProcessorPil(size=size, patch_size=config.vision_config.patch_size)
    processor.save_pretrained(folder)


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


@cache
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


def deqa_logits(state, config, pixels):
    """The published forward pass, written again on published names -> levels' logits (B, 5)."""
    linear = lambda x, name: F.linear(x, state[name + ".weight"], state.get(name + ".bias"))
    norm = lambda x, name, eps: F.layer_norm(
        x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"], eps
    )
    B = len(pixels)

    c, name = config["visual_config"]["visual_model"], "model.vision_model."
    D, heads, eps = c["hidden_size"], c["num_attention_heads"], c["layer_norm_eps"]
    x = F.conv2d(pixels, state[name + "embeddings.patch_embed.weight"], stride=c["patch_size"])
    x = torch.cat([state[name + "embeddings.cls_token"].expand(B, 1, D), x.flatten(2).mT], 1)
    x = x + state[name + "embeddings.position_embedding"]
    x = norm(x, name + "embeddings.pre_layernorm", eps)
    for i in range(c["num_hidden_layers"]):
        layer = f"{name}encoder.layers.{i}."
        qkv = linear(norm(x, layer + "input_layernorm", eps), layer + "self_attn.query_key_value")
        q, k, v = qkv.reshape(B, -1, heads, 3, D // heads).permute(3, 0, 2, 1, 4)
        attention = (q @ k.mT * (D // heads) ** -0.5).softmax(-1) @ v
        x = x + linear(attention.permute(0, 2, 1, 3).reshape(B, -1, D), layer + "self_attn.dense")
        h = linear(norm(x, layer + "post_attention_layernorm", eps), layer + "mlp.fc1")
        x = x + linear(h * torch.sigmoid(1.702 * h), layer + "mlp.fc2")
    tokens = norm(x, name + "post_layernorm", eps)

    c, name = config["visual_config"]["visual_abstractor"], "model.visual_abstractor."
    D, heads, eps = c["hidden_size"], c["num_attention_heads"], c["layer_norm_eps"]
    x = state[name + "query_embeds"].repeat(B, 1, 1)
    for i in range(c["num_hidden_layers"]):
        layer = f"{name}encoder.layers.{i}.crossattention."
        x, seen = norm(x, layer + "norm1", 1e-5), norm(tokens, layer + "normk", 1e-5)
        both = torch.cat([x, seen], 1)
        q_pos, k_pos = (state[f"{layer}attention.{n}_pos_embed"] for n in "qk")
        q = linear(x + q_pos, layer + "attention.query")
        k = linear(both + torch.cat([q_pos, k_pos]), layer + "attention.key")
        v = linear(both, layer + "attention.value")
        q, k, v = (y.view(B, -1, heads, D // heads).permute(0, 2, 1, 3) for y in (q, k, v))
        attention = (q @ k.mT / math.sqrt(D // heads)).softmax(-1) @ v
        attention = attention.permute(0, 2, 1, 3).reshape(B, -1, D)
        x = x + linear(attention, layer + "output.out_proj")
        h = norm(x, layer + "output.norm2", 1e-5)
        h = F.silu(linear(h, layer + "output.mlp.w1")) * linear(h, layer + "output.mlp.w3")
        x = x + linear(norm(h, layer + "output.mlp.ffn_ln", eps), layer + "output.mlp.w2")
    end = state[name + "vit_eos"].repeat(B, 1, 1)
    picture = torch.cat([linear(x, name + "visual_fc"), end], 1)

    H, heads = config["hidden_size"], config["num_attention_heads"]
    d, groups = H // heads, config["num_key_value_heads"]
    embed = lambda ids: state["model.embed_tokens.weight"][torch.tensor(ids)].expand(B, -1, -1)
    x = torch.cat([embed(deqa.BEFORE), picture, embed(deqa.AFTER)], 1)
    L = x.shape[1]
    way = torch.zeros(L, dtype=torch.long)  # which of the two weights each place uses
    way[len(deqa.BEFORE) : len(deqa.BEFORE) + picture.shape[1]] = 1
    rms = lambda x, w: x * (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt() * w
    weights = lambda name: [state[f"{name}.multiway.{m}.weight"] for m in (0, 1)]
    both_ways = lambda name: torch.stack(weights(name))[way]
    linear_way = lambda x, name: torch.einsum("bli,loi->blo", x, both_ways(name))
    angle = torch.arange(L)[:, None] * config["rope_theta"] ** (-torch.arange(0, d, 2) / d)

    def rotate(y):  # (B, heads, L, d): pairs (j, j + d / 2) turn by the angle (L, d / 2)
        a, b = y.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        h = rms(x, both_ways(layer + "input_layernorm"))
        q = linear(h, layer + "self_attn.q_proj").view(B, L, heads, d).transpose(1, 2)
        k = linear_way(h, layer + "self_attn.k_proj").view(B, L, groups, d).transpose(1, 2)
        v = linear_way(h, layer + "self_attn.v_proj").view(B, L, groups, d).transpose(1, 2)
        k, v = (y.repeat_interleave(heads // groups, 1) for y in (rotate(k), v))
        weight = rotate(q) @ k.mT / math.sqrt(d)
        weight = weight.masked_fill(torch.ones(L, L).triu(1).bool(), -math.inf).softmax(-1)
        h = (weight @ v).transpose(1, 2).reshape(B, L, H)
        x = x + linear(h, layer + "self_attn.o_proj")
        h = rms(x, both_ways(layer + "post_attention_layernorm"))
        h = F.silu(linear(h, layer + "mlp.gate_proj")) * linear(h, layer + "mlp.up_proj")
        x = x + linear(h, layer + "mlp.down_proj")
    words = linear(rms(x[:, -1], state["model.norm.weight"]), "lm_head")
    return words[:, [15129, 1781, 6534, 6460, 4319]]


# ---- OCR: the networks of PP-OCRv5 mobile

LETTERS = list("abcdefghijklmnopqrstuvwxyz0123456789²é")
READER = {"hidden_size": 24, "num_attention_heads": 2, "head_out_channels": len(LETTERS) + 2}


def save_text_detector(folder):
    """A detector of random weights that takes a whole picture for one line."""
    torch.manual_seed(0)
    blocks = [[[3, 16, 32, 1, False]], [[3, 32, 64, 2, False]], [[3, 64, 128, 2, False]],
              [[3, 128, 256, 2, False]], [[5, 256, 512, 2, True]]]  # fmt: skip
    backbone = hf.PPOCRV5MobileDetConfig().backbone_config.to_dict()
    backbone |= {"block_configs": blocks, "scale": 0.25, "divisor": 8, "conv_symmetric_num": 1}
    config = hf.PPOCRV5MobileDetConfig(backbone_config=backbone)
    model = hf.PPOCRV5MobileDetForObjectDetection(config)
    model.head.conv_final.bias.data.fill_(4.0)
    model.save_pretrained(folder)
    return folder


def save_reader(folder):
    """A reader of random weights that is sure of what it reads."""
    torch.manual_seed(0)
    blocks = [[[3, 16, 32, 1, False]], [[3, 32, 64, [2, 1], False]], [[3, 64, 128, [1, 2], False]],
              [[3, 128, 256, [2, 1], False]], [[5, 256, 512, [2, 1], True]]]  # fmt: skip
    backbone = {"model_type": "pp_lcnet_v3", "scale": 0.25, "block_configs": blocks, "divisor": 8}
    backbone["conv_symmetric_num"] = 2
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


def mmdet_forward(s, x, depths=(2, 1, 2, 1), heads=(1, 2, 2, 4), window=3):
    """mmdet 2.25's Mask2Former in plain functions on its own names s: what converting must keep.

    x (B, 3, H, W), H and W multiples of 32 -> class logits (B, Q, 81), masks (B, Q, H/4, W/4)."""
    linear = lambda v, name: F.linear(v, s[name + ".weight"], s.get(name + ".bias"))
    norm = lambda v, name: F.layer_norm(v, v.shape[-1:], s[name + ".weight"], s[name + ".bias"])
    conv = lambda v, name, **how: F.conv2d(v, s[name + ".weight"], s.get(name + ".bias"), **how)
    group = lambda v, name: F.group_norm(v, 32, s[name + ".weight"], s[name + ".bias"])
    resize = lambda v, size: F.interpolate(v, size, mode="bilinear", align_corners=False)
    two_layers = lambda v, name, act: linear(act(linear(v, name + "layers.0.0")), name + "layers.1")

    def window_attention(v, name, head, shift):  # v (B, H, W, C)
        B, H, W, C = v.shape
        v = F.pad(v, (0, 0, 0, -W % window, 0, -H % window)).roll((-shift, -shift), (1, 2))
        rows, columns = (torch.arange(n) for n in v.shape[1:3])

        def region(i):
            return (i >= len(i) - window).long() + (i >= len(i) - shift).long() if shift else 0 * i

        def cut(u):  # (B, H, W, C) -> (B, windows, N, C)
            u = u.unflatten(1, (-1, window)).unflatten(3, (-1, window))
            return u.transpose(2, 3).flatten(3, 4).flatten(1, 2)

        label = region(rows)[:, None] * 3 + region(columns)
        label = cut(label[None, :, :, None].float())[0, :, :, 0]  # (windows, N)
        qkv = linear(cut(v), name + ".qkv").unflatten(-1, (3, head, -1))
        q, k, u = qkv.permute(3, 0, 1, 4, 2, 5)  # (B, windows, head, N, d)
        index = s[name + ".relative_position_index"].view(-1)
        table = s[name + ".relative_position_bias_table"][index].view(window**2, window**2, head)
        apart = label[:, None, :, None] != label[:, None, None]
        weight = (q * (C // head) ** -0.5) @ k.mT + table.permute(2, 0, 1) - 100.0 * apart
        v = linear((weight.softmax(-1) @ u).transpose(2, 3).flatten(3), name + ".proj")
        v = v.unflatten(1, (len(rows) // window, -1)).unflatten(3, (window, window))
        v = v.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return v.roll((shift, shift), (1, 2))[:, :H, :W]

    v = conv(x, "backbone.patch_embed.projection", stride=4).permute(0, 2, 3, 1)
    v = norm(v, "backbone.patch_embed.norm")
    features = []
    for i, depth in enumerate(depths):
        for j in range(depth):
            name, shift = f"backbone.stages.{i}.blocks.{j}.", j % 2 * (window // 2)
            v = v + window_attention(norm(v, name + "norm1"), name + "attn.w_msa", heads[i], shift)
            v = v + two_layers(norm(v, name + "norm2"), name + "ffn.", F.gelu)
        features.append(norm(v, f"backbone.norm{i}").permute(0, 3, 1, 2))
        if i < 3:
            H, W = v.shape[1:3]
            v = F.pad(v.permute(0, 3, 1, 2), (0, W % 2, 0, H % 2))
            v = F.unfold(v, 2, stride=2).mT
            name = f"backbone.stages.{i}.downsample."
            v = linear(norm(v, name + "norm"), name + "reduction").unflatten(1, ((H + 1) // 2, -1))

    def sine(h, w, D):  # SinePositionalEncoding(num_feats=D // 2, normalize=True) -> (h w, D)
        scale = 10000 ** (2 * (torch.arange(D // 2) // 2) / (D // 2))
        waves = []
        for n in (h, w):
            p = torch.arange(1, n + 1)[:, None] / (n + 1e-6) * 2 * math.pi / scale  # (n, D / 2)
            waves.append(torch.stack((p[:, 0::2].sin(), p[:, 1::2].cos()), 2).flatten(1))
        y, x = waves
        return torch.cat((y[:, None].expand(-1, w, -1), x[None].expand(h, -1, -1)), 2).flatten(0, 1)

    name, D = "panoptic_head.pixel_decoder.", s["panoptic_head.query_feat.weight"].shape[1]
    coarse = features[:0:-1]  # three levels, the coarsest first
    B, sizes, lengths = len(x), [f.shape[-2:] for f in coarse], [f[0, 0].numel() for f in coarse]
    v, place, points = [], [], []
    for i, (f, (h, w)) in enumerate(zip(coarse, sizes)):
        f = group(conv(f, f"{name}input_convs.{i}.conv"), f"{name}input_convs.{i}.gn")
        v.append(f.flatten(2).mT)
        place.append(sine(h, w, D) + s[name + "level_encoding.weight"][i])
        rows, columns = ((torch.arange(n) + 0.5) / n for n in (h, w))
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        points.append(torch.stack((x, y), -1).flatten(0, 1))
    v, place, points = torch.cat(v, 1), torch.cat(place), torch.cat(points)  # N places
    layer = name + "encoder.layers.0."
    offset = linear(v + place, layer + "attentions.0.sampling_offsets")
    offset = offset.unflatten(-1, (8, 3, 4, 2))
    share = linear(v + place, layer + "attentions.0.attention_weights").unflatten(-1, (8, 12))
    share = share.softmax(-1).unflatten(-1, (3, 4))
    value = linear(v, layer + "attentions.0.value_proj").unflatten(-1, (8, -1)).split(lengths, 1)
    total = 0
    for k, (h, w) in enumerate(sizes):
        at = points[:, None, None] + offset[:, :, :, k] / torch.tensor([w, h])  # (B, N, 8, 4, 2)
        at = 2 * at.transpose(1, 2).flatten(0, 1) - 1  # (B 8, N, 4, 2)
        image = value[k].permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, (h, w))  # (B 8, d, h, w)
        picked = F.grid_sample(image, at, align_corners=False).unflatten(0, (B, 8))
        total = total + (picked * share[:, :, :, k].transpose(1, 2)[:, :, None]).sum(-1)
    v = v + linear(total.flatten(1, 2).mT, layer + "attentions.0.output_proj")
    v = norm(v, layer + "norms.0")
    v = norm(v + two_layers(v, layer + "ffns.0.", F.relu), layer + "norms.1")
    levels = [u.mT.unflatten(-1, size) for u, size in zip(v.split(lengths, 1), sizes)]
    fine = group(conv(features[0], name + "lateral_convs.0.conv"), name + "lateral_convs.0.gn")
    fine = fine + resize(levels[2], fine.shape[-2:])
    fine = group(conv(fine, name + "output_convs.0.conv", padding=1), name + "output_convs.0.gn")
    fine = conv(fine.relu(), name + "mask_feature")

    def attend(q, k, u, name, mask=None):
        weights, biases = s[name + ".in_proj_weight"].chunk(3), s[name + ".in_proj_bias"].chunk(3)
        inputs = [F.linear(*given) for given in zip((q, k, u), weights, biases)]
        q, k, u = (t.unflatten(-1, (8, -1)).transpose(1, 2) for t in inputs)
        out = F.scaled_dot_product_attention(q, k, u, attn_mask=mask).transpose(1, 2).flatten(2)
        return linear(out, name + ".out_proj")

    def predict(query, size):
        state = norm(query, "panoptic_head.transformer_decoder.post_norm")
        embed = linear(state, "panoptic_head.mask_embed.0").relu()
        embed = linear(embed, "panoptic_head.mask_embed.2").relu()
        embed = linear(embed, "panoptic_head.mask_embed.4")
        masks = torch.einsum("bqd,bdhw->bqhw", embed, fine)
        seen = resize(masks, size).sigmoid().flatten(2) >= 0.5  # (B, Q, h w): the next layer's view
        return linear(state, "panoptic_head.cls_embed"), masks, seen | ~seen.any(-1, keepdim=True)

    names = ("query_feat", "query_embed")
    query, own = (s[f"panoptic_head.{n}.weight"].expand(B, -1, -1) for n in names)
    for i in range(2):
        layer, size = f"panoptic_head.transformer_decoder.layers.{i}.", sizes[i]
        memory = levels[i].flatten(2).mT + s["panoptic_head.level_embed.weight"][i]
        seen, key = predict(query, size)[2][:, None], memory + sine(*size, D)
        found = attend(query + own, key, memory, layer + "attentions.0.attn", seen)
        query = norm(query + found, layer + "norms.0")
        found = attend(query + own, query + own, query, layer + "attentions.1.attn")
        query = norm(query + found, layer + "norms.1")
        query = norm(query + two_layers(query, layer + "ffns.0.", F.relu), layer + "norms.2")
    return predict(query, sizes[0])[:2]


# ---- HPSv2: the CLIP of open_clip. BLIP: ImageReward, and the two encoders of BLIP-VQA


def random_state(shapes, seed=0):
    """Random values that keep the signal's size; norms too, or a forgotten one would not show."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for key, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if len(shape) < 2:
            state[key] = values * 0.3 + float(key.endswith(".weight"))
        else:
            state[key] = values / math.sqrt(math.prod(shape[1:]))
    return state


def open_clip_shapes(vision, text, side, patch, projection, words):
    """{name: shape} of open_clip's CLIP. vision, text: (width, layers)."""
    (V, _), (T, _) = vision, text
    shapes = {"logit_scale": (), "visual.proj": (V, projection), "text_projection": (T, projection)}
    shapes |= {"token_embedding.weight": (words, T), "positional_embedding": (77, T)}
    shapes |= {"visual.class_embedding": (V,), "visual.conv1.weight": (V, 3, patch, patch)}
    shapes["visual.positional_embedding"] = ((side // patch) ** 2 + 1, V)

    def add(name, *shape):
        shapes[name + ".weight"], shapes[name + ".bias"] = shape, shape[:1]

    add("visual.ln_pre", V)
    add("visual.ln_post", V)
    add("ln_final", T)
    for prefix, (D, layers) in {"visual.": vision, "": text}.items():
        for i in range(layers):
            name = f"{prefix}transformer.resblocks.{i}."
            shapes[name + "attn.in_proj_weight"] = (3 * D, D)
            shapes[name + "attn.in_proj_bias"] = (3 * D,)
            parts = {"ln_1": (D,), "ln_2": (D,), "attn.out_proj": (D, D)}
            parts |= {"mlp.c_fc": (4 * D, D), "mlp.c_proj": (D, 4 * D)}
            for part, shape in parts.items():
                add(name + part, *shape)
    return shapes


OPEN_CLIP_H = dict(vision=(1280, 32), text=(1024, 24), side=224, patch=14, projection=1024,
                   words=49408)  # fmt: skip
OPEN_CLIP_TINY = dict(vision=(32, 2), text=(48, 3), side=56, patch=14, projection=24,
                      words=514)  # fmt: skip


def open_clip_vectors(s, heads, pixels, ids):
    """open_clip's CLIP in plain functions on its own names s: unit vectors of images and texts.

    pixels (B, 3, H, W); ids (B, 77), where the end token is the largest number."""
    linear = lambda v, name: F.linear(v, s[name + ".weight"], s[name + ".bias"])
    norm = lambda v, name: F.layer_norm(v, v.shape[-1:], s[name + ".weight"], s[name + ".bias"])

    def transformer(v, prefix, mask):  # v (B, N, D)
        layers = {key.removeprefix(prefix).split(".")[0] for key in s if key.startswith(prefix)}
        for i in range(len(layers)):
            name = f"{prefix}{i}."
            qkv = norm(v, name + "ln_1") @ s[name + "attn.in_proj_weight"].T
            qkv = (qkv + s[name + "attn.in_proj_bias"]).unflatten(-1, (3, heads, -1))
            q, k, u = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, d)
            weight = (q @ k.mT / math.sqrt(q.shape[-1]) + mask).softmax(-1)
            v = v + linear((weight @ u).transpose(1, 2).flatten(2), name + "attn.out_proj")
            inner = F.gelu(linear(norm(v, name + "ln_2"), name + "mlp.c_fc"))
            v = v + linear(inner, name + "mlp.c_proj")
        return v

    kernel = s["visual.conv1.weight"]
    x = F.conv2d(pixels, kernel, stride=kernel.shape[-1]).flatten(2).mT
    x = torch.cat((s["visual.class_embedding"].expand(len(x), 1, -1), x), 1)
    x = norm(x + s["visual.positional_embedding"], "visual.ln_pre")
    x = transformer(x, "visual.transformer.resblocks.", 0.0)
    image = norm(x[:, 0], "visual.ln_post") @ s["visual.proj"]
    x = s["token_embedding.weight"][ids] + s["positional_embedding"]
    x = transformer(x, "transformer.resblocks.", torch.full((77, 77), -math.inf).triu(1))
    text = norm(x, "ln_final")[range(len(ids)), ids.argmax(1)] @ s["text_projection"]
    return [v / v.norm(dim=1, keepdim=True) for v in (image, text)]


def blip_shapes(vision, text, side, words, positions=512):
    """{name: shape} of BLIP's vision and text encoder (models/vit.py, med.py), patches of 16."""
    (V, vision_layers), (T, text_layers) = vision, text
    shapes = {"visual_encoder.cls_token": (1, 1, V)}
    shapes["visual_encoder.pos_embed"] = (1, (side // 16) ** 2 + 1, V)
    shapes["text_encoder.embeddings.position_ids"] = (1, positions)
    shapes["text_encoder.embeddings.word_embeddings.weight"] = (words, T)
    shapes["text_encoder.embeddings.position_embeddings.weight"] = (positions, T)

    def add(name, *shape):
        shapes[name + ".weight"], shapes[name + ".bias"] = shape, shape[:1]

    add("visual_encoder.patch_embed.proj", V, 3, 16, 16)
    add("visual_encoder.norm", V)
    add("text_encoder.embeddings.LayerNorm", T)
    for i in range(vision_layers):
        parts = {"norm1": (V,), "norm2": (V,), "attn.qkv": (3 * V, V), "attn.proj": (V, V)}
        parts |= {"mlp.fc1": (4 * V, V), "mlp.fc2": (V, 4 * V)}
        for part, shape in parts.items():
            add(f"visual_encoder.blocks.{i}.{part}", *shape)
    for i in range(text_layers):
        parts = {"intermediate.dense": (4 * T, T), "output.dense": (T, 4 * T)}
        parts["output.LayerNorm"] = (T,)
        for attention, width in {"attention": T, "crossattention": V}.items():
            parts |= {f"{attention}.self.query": (T, T), f"{attention}.self.key": (T, width)}
            parts |= {f"{attention}.self.value": (T, width), f"{attention}.output.dense": (T, T)}
            parts[f"{attention}.output.LayerNorm"] = (T,)
        for part, shape in parts.items():
            add(f"text_encoder.encoder.layer.{i}.{part}", *shape)
    return shapes


def imagereward_shapes(vision, text, side, words):
    """{name: shape} of ImageReward.pt."""
    shapes = {"blip." + k: v for k, v in blip_shapes(vision, text, side, words).items()}
    sizes = (text[0], 1024, 128, 64, 16, 1)
    layers = {f"mlp.layers.{i}": n for i, n in zip((0, 2, 4, 6, 7), zip(sizes[1:], sizes))}
    layers |= {"blip.vision_proj": (256, vision[0]), "blip.text_proj": (256, text[0])}
    for name, shape in layers.items():
        shapes[name + ".weight"], shapes[name + ".bias"] = shape, shape[:1]
    return shapes


IMAGEREWARD = dict(vision=(1024, 24), text=(768, 12), side=224, words=30524)
IMAGEREWARD_TINY = dict(vision=(32, 2), text=(24, 2), side=48, words=79)


def shrink(config, vision, text, side, words, projection=None, patch=None):
    """The config of a published network with these sizes. Heads, activation and eps stay."""
    for part, (width, layers) in ((config.vision_config, vision), (config.text_config, text)):
        part.hidden_size, part.intermediate_size = width, 4 * width
        part.num_hidden_layers = layers
    config.vision_config.image_size = side
    config.text_config.vocab_size = words
    if projection:  # CLIP
        config.projection_dim = projection
        config.text_config.bos_token_id, config.text_config.eos_token_id = words - 2, words - 1
    else:
        config.text_config.encoder_hidden_size = vision[0]
    return config


def save_letter_tokenizers(folder):
    """clip/ and bert/: tokenizers that know letters and digits alone."""
    letter_tokenizer().save_pretrained(folder / "clip")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    vocabulary = {word: i for i, word in enumerate(words)}
    hf.BertTokenizer(vocab=vocabulary).save_pretrained(folder / "bert")


def blip_image(s, heads, pixels):
    """BLIP's vision encoder in plain functions: pixels (B, 3, H, W) -> (B, N, D), all tokens."""
    linear = lambda v, name: F.linear(v, s[name + ".weight"], s[name + ".bias"])
    norm = lambda v, name: F.layer_norm(
        v, v.shape[-1:], s[name + ".weight"], s[name + ".bias"], 1e-6
    )
    name = "visual_encoder."
    patches, bias = s[name + "patch_embed.proj.weight"], s[name + "patch_embed.proj.bias"]
    x = F.conv2d(pixels, patches, bias, stride=16).flatten(2).mT
    x = torch.cat((s[name + "cls_token"].expand(len(x), -1, -1), x), 1) + s[name + "pos_embed"]
    for i in range(sum(key.endswith("attn.qkv.bias") for key in s)):
        block = f"{name}blocks.{i}."
        qkv = linear(norm(x, block + "norm1"), block + "attn.qkv").unflatten(-1, (3, heads, -1))
        q, k, u = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, d)
        found = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ u
        x = x + linear(found.transpose(1, 2).flatten(2), block + "attn.proj")
        inner = F.gelu(linear(norm(x, block + "norm2"), block + "mlp.fc1"))
        x = x + linear(inner, block + "mlp.fc2")
    return norm(x, name + "norm")


def blip_text(s, heads, ids, mask, image):
    """BLIP's text encoder: ids, mask (B, N), image (B, M, E) -> (B, N, D). Norms come last."""
    linear = lambda v, name: F.linear(v, s[name + ".weight"], s[name + ".bias"])
    norm = lambda v, name: F.layer_norm(
        v, v.shape[-1:], s[name + ".weight"], s[name + ".bias"], 1e-12
    )

    def attend(x, other, name, hidden):
        split = lambda v: v.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, heads, N, d)
        q, k, u = (split(linear(v, f"{name}.self.{part}"))
                   for v, part in ((x, "query"), (other, "key"), (other, "value")))  # fmt: skip
        weight = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(hidden, -math.inf).softmax(-1)
        found = linear((weight @ u).transpose(1, 2).flatten(2), f"{name}.output.dense")
        return norm(x + found, f"{name}.output.LayerNorm")

    name = "text_encoder.embeddings."
    x = s[name + "word_embeddings.weight"][ids]
    x = norm(x + s[name + "position_embeddings.weight"][: ids.shape[1]], name + "LayerNorm")
    for i in range(sum(key.endswith("crossattention.self.query.bias") for key in s)):
        layer = f"text_encoder.encoder.layer.{i}."
        x = attend(x, x, layer + "attention", (mask == 0)[:, None, None])
        x = attend(x, image, layer + "crossattention", torch.tensor(False))
        inner = F.gelu(linear(x, layer + "intermediate.dense"))
        x = norm(x + linear(inner, layer + "output.dense"), layer + "output.LayerNorm")
    return x


def imagereward_scores(state, heads, pixels, ids):
    """ImageReward on its own names; heads of vision and text. The MLP as five layers."""
    s = {key.removeprefix("blip."): tensor for key, tensor in state.items()}
    x = blip_text(s, heads[1], ids, ids > 0, blip_image(s, heads[0], pixels))[:, 0]
    for i in (0, 2, 4, 6, 7):
        x = F.linear(x, s[f"mlp.layers.{i}.weight"], s[f"mlp.layers.{i}.bias"])
    return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


# ---- HPSv2 and ImageReward: tiny weights of random values, and files as they are published

QUALITY = {
    "hpsv2": (open_clip_shapes, OPEN_CLIP_H, OPEN_CLIP_TINY),
    "imagereward": (imagereward_shapes, IMAGEREWARD, IMAGEREWARD_TINY),
}
EXAMPLE = {  # of ImageReward's README
    "fetch": "curl -L --output-dir weights --remote-name-all "
    "'https://github.com/THUDM/ImageReward/raw/main/assets/images/[1-4].webp'",
    "files": [f"weights/{i}.webp" for i in (1, 2, 3, 4)],
    "prompt": "a painting of an ocean with clouds and birds, day time, low depth field effect",
    "scores": [0.581162, 0.274528, -1.413182, -2.029570],
}
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def as_pixels(picture):
    """(3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def coarse_pictures(*sizes):
    """Pictures of (width, height) with 5 x 5 random colours."""
    rng = np.random.default_rng(0)
    colours = [Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)) for _ in sizes]
    return [picture.resize(size, Image.Resampling.NEAREST) for picture, size in zip(colours, sizes)]


def quality_state(name, mlp=None):
    """Tiny weights. The first norm of BLIP gets faint vectors, or a wrong eps would not show.

    mlp: the number that ImageReward's MLP always returns."""
    shapes, _, tiny = QUALITY[name]
    state = random_state(shapes(**tiny))
    if mlp is not None:
        state |= {key: torch.zeros_like(state[key]) for key in state if key.startswith("mlp.")}
        state["mlp.layers.7.bias"] += mlp
    for part in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        if f"blip.visual_encoder.{part}" in state:
            state[f"blip.visual_encoder.{part}"] *= 0.01
    return state


def empty_state(name):
    """The published shapes without values; ImageReward's MLP, which converting folds, is 0."""
    shapes, large, _ = QUALITY[name]
    shapes = shapes(**large)
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return state | {key: torch.zeros(shapes[key]) for key in shapes if key.startswith("mlp.")}


def as_published(name, state):
    if name == "hpsv2":
        return {"state_dict": state}
    return state


def publish(module, folder, state):
    """Write `state` as the published file is, and convert it. -> The options of a scorer.

    module: rewards.hpsv2 or rewards.imagereward."""
    name = module.__name__.removeprefix("rewards.")
    torch.save(as_published(name, state), folder / "file.pt")
    digest = hashlib.sha256((folder / "file.pt").read_bytes()).hexdigest()
    config = shrink(module.make_config(), **QUALITY[name][2])
    changed = {"SHA256": digest, "make_config": lambda: config}
    module = SimpleNamespace(**vars(module) | changed)
    convert.convert_file(module, folder / "file.pt", folder / name)
    save_letter_tokenizers(folder)
    tokenizer = folder / {"hpsv2": "clip", "imagereward": "bert"}[name]
    return {"weights": folder / name, "tokenizer": tokenizer, "sha256": digest}


def lose_weight(file):
    """Take one tensor out of a .safetensors file."""
    with safe_open(file, "pt") as tensors:
        state = {key: tensors.get_tensor(key) for key in tensors.keys()}
        del state[max(state)]
        metadata = tensors.metadata()
    save_file(state, file, metadata)
