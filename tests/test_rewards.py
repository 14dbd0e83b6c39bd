"""rewards/ without a single downloaded weight: every rule against hand-made cases, every class of transformers as a tiny
random model through the very path that real weights take, every port against a plain rewriting of what it ports.

    python -m pytest tests/test_rewards.py
    python -m pytest tests/test_rewards.py --slow     # with the published weights, where they have been fetched
"""

import io
import json
import math
import shutil
import sys
import types
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from torch.testing import assert_close
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    PPOCRV5MobileDetConfig,
    PPOCRV5MobileDetForObjectDetection,
    PPOCRV5MobileRecConfig,
    PPOCRV5MobileRecForTextRecognition,
    PPOCRV5ServerDetConfig,
    PPOCRV5ServerDetForObjectDetection,
    PPOCRV5ServerRecConfig,
    PPOCRV5ServerRecForTextRecognition,
)

from rewards import aesthetic, clipscore, deqa, monitors, ocr, pickscore

SIZES = [(64, 64), (33, 47), (71, 20), (40, 64), (19, 90)]  # height, width: square, odd, upright, wide
PROMPTS = ["a cat", "", "two dogs on a very long leash, at night", "Ünïcödé ½ 猫", "a cat"]
MEAN, STD = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])


def noise(height, width, seed=0):
    """Picture (3, H, W) of whole bytes in [0, 1], coarse enough to survive a resize."""
    coarse = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(coarse, (height, width), mode="nearest")[0] * 255).round() / 255


def as_image(pixels):
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())


def spread_out(model, seed=0):
    """Random weights of a size at which different pictures get visibly different scores."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def pictures():
    return [as_image(noise(*size, seed)) for seed, size in enumerate(SIZES)]


def letter_tokenizer():
    """CLIP's tokenizer without its words: a token a letter, 514 in all."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of 2 + 2 layers whose tokenizer knows bytes and no words, saved as on the hub. Vectors of 768, as L/14's."""
    folder = tmp_path_factory.mktemp("clip")
    letter_tokenizer().save_pretrained(folder)
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 514, "max_position_embeddings": 77, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    config = CLIPConfig(
        text_config=layers | text, vision_config=layers | {"image_size": 32, "patch_size": 8}, projection_dim=768
    )
    config.logit_scale_init_value = math.log(100)
    spread_out(CLIPModel(config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def head_file(tmp_path_factory):
    """A random aesthetic head in the published shapes."""
    generator, path = torch.Generator().manual_seed(1), tmp_path_factory.mktemp("head") / "head.pth"
    sizes = (768, 1024, 128, 64, 16, 1)
    state = {}
    for layer, inner, outer in zip((0, 2, 4, 6, 7), sizes, sizes[1:]):
        state[f"layers.{layer}.weight"] = torch.randn(outer, inner, generator=generator) / inner**0.5
        state[f"layers.{layer}.bias"] = torch.randn(outer, generator=generator)
    torch.save(state, path)
    return path


# ---- What all of them have in common


@pytest.fixture(params=["pickscore", "clipscore", "aesthetic", "deqa", "ocr"])
def make_reward(request):
    """() -> the reward with tiny weights; (batch=n) with another batch size."""

    def make(**options):
        folder = lambda name: str(request.getfixturevalue(name))
        if request.param == "pickscore":
            return pickscore.PickScore(weights=folder("clip_folder"), tokenizer=folder("clip_folder"), **options)
        if request.param == "clipscore":
            return clipscore.CLIPScore(weights=folder("clip_folder"), **options)
        if request.param == "aesthetic":
            return aesthetic.Aesthetic(weights=folder("clip_folder"), head=folder("head_file"), sha256=None, **options)
        if request.param == "deqa":
            return deqa.DeQA(weights=folder("deqa_folder"), **options)
        return ocr.OCR(detector=folder("detector_folder"), reader=folder("reader_folder"), **options)

    return make


def asked(reward, images=None):
    """Five prompts that this reward can score; for OCR some ask for what it reads in the images, some nearly so."""
    if reward.name != "ocr":
        return PROMPTS
    read = [text.replace(" ", "") for text in reward.read(images)] if images else ["E=mc²"] * 5
    return [
        f'{prompt} "{text}{more}"'
        for prompt, text, more in zip(PROMPTS, read, ("", "!", "", "!!!!!!!!", "!!!!!!!!!!!!!!!!!!!"))
    ]


def test_scores_do_not_depend_on_batch_size_order_or_company(make_reward, pictures):
    reward = make_reward()
    prompts = asked(reward, pictures)
    scores = reward(pictures, prompts)
    assert scores.shape == (5,) and scores.dtype == torch.float32 and scores.isfinite().all()
    assert len({round(s, 4) for s in scores.tolist()}) > 2  # they tell pictures apart, or nothing would be tested here
    order = [3, 0, 4, 2, 1]
    shuffled = make_reward(batch=2)([pictures[i] for i in order], [prompts[i] for i in order])
    assert_close(shuffled, scores[order], rtol=1e-4, atol=1e-4)
    alone = torch.cat([reward([picture], [prompt]) for picture, prompt in zip(pictures, prompts)])
    assert_close(alone, scores, rtol=1e-4, atol=1e-4)
    assert not scores.requires_grad and not scores.is_inference()


def test_a_tensor_scores_like_the_pictures_in_it(make_reward):
    reward = make_reward()
    pixels = torch.stack([noise(48, 40, seed) for seed in range(5)])
    images = [as_image(p) for p in pixels]
    prompts = asked(reward, images)
    assert_close(reward(pixels, prompts), reward(images, prompts), rtol=1e-5, atol=1e-5)


def test_no_pictures_no_scores_and_no_loading(make_reward):
    reward = make_reward()
    for nothing in ([], torch.empty(0, 3, 8, 8)):
        assert reward(nothing, []).shape == (0,)
    assert reward.model is None


def test_attributes(make_reward):
    reward = make_reward()
    low, high = reward.range
    assert reward.higher_is_better is True and low < high and reward.name in type(reward).__module__


def test_a_dropped_model_is_loaded_again(make_reward, pictures):
    """`reward.model = None` lets go of everything large; the next call loads it and scores the same."""
    reward = make_reward()
    prompts = asked(reward, pictures)
    before = reward(pictures, prompts)
    reward.model = None
    left = [v for v in vars(reward).values() if isinstance(v, torch.nn.Module)]
    assert not left and torch.equal(reward(pictures, prompts), before)


def truncated():
    file = io.BytesIO()
    as_image(torch.rand(3, 64, 64)).save(file, "JPEG")
    return Image.open(io.BytesIO(file.getvalue()[:-500]))


@pytest.mark.parametrize(
    "images, says",
    [
        (lambda: torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8"),
        (lambda: torch.zeros(1, 8, 8, 3), r"\(1, 8, 8, 3\)"),
        (lambda: torch.zeros(3, 8, 8), r"\(B, 3, H, W\)"),
        (lambda: torch.zeros(1, 3, 0, 8), r"\(B, 3, H, W\)"),
        (lambda: torch.linspace(-1, 1, 192).view(1, 3, 8, 8), "-1 to 1"),
        (lambda: torch.full((1, 3, 8, 8), math.nan), "nan"),
        (lambda: [truncated()], "image 0 cannot be decoded"),
        (lambda: ["cat.png"], "image 0 cannot be decoded"),
    ],
)
def test_bad_images_get_no_score(make_reward, images, says):
    reward = make_reward()
    with pytest.raises(ValueError, match=says) as error:
        reward(images(), asked(reward)[:1])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("reward", [pickscore.PickScore, clipscore.CLIPScore, ocr.OCR])
def test_one_prompt_per_image(reward, pictures):
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        reward(weights="nowhere")(pictures[:2], ['"a"']) if reward is not ocr.OCR else reward()(pictures[:2], ['"a"'])


def missing_weights(folder):
    return [
        pickscore.PickScore(weights=folder),
        clipscore.CLIPScore(weights=folder),
        aesthetic.Aesthetic(head=folder + "/head.pth"),
        deqa.DeQA(weights=folder),
        ocr.OCR(detector=folder),
    ]


@pytest.mark.parametrize("folder", ["no/such/weights", "{empty}"])
@pytest.mark.parametrize("which", range(5))
def test_missing_weights_name_the_command(which, folder, tmp_path, pictures):
    reward = missing_weights(folder.format(empty=tmp_path))[which]
    with pytest.raises(ValueError, match="hf download|curl -LO") as error:
        reward(pictures[:1], asked(reward)[:1])
    assert "\n" not in str(error.value) and reward.name in str(error.value)


@pytest.mark.parametrize("which", ["pickscore", "clipscore", "aesthetic", "ocr"])
def test_pickled_weights_are_not_opened(which, clip_folder, head_file, detector_folder, tmp_path, pictures):
    """The right weights, as a pickle: who offers safetensors is read from those alone."""
    folder = tmp_path / "weights"
    shutil.copytree(detector_folder if which == "ocr" else clip_folder, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    reward = {
        "pickscore": lambda: pickscore.PickScore(weights=str(folder), tokenizer=str(clip_folder)),
        "clipscore": lambda: clipscore.CLIPScore(weights=str(folder)),
        "aesthetic": lambda: aesthetic.Aesthetic(weights=str(folder), head=head_file, sha256=None),
        "ocr": lambda: ocr.OCR(detector=str(folder)),
    }[which]()
    with pytest.raises(ValueError, match=f"{which}: cannot load"):
        reward(pictures[:1], asked(reward)[:1])


def test_no_code_beside_the_weights_is_run(detector_folder, tmp_path, pictures):
    """A kind of model that transformers does not know, with its own code: nobody is asked whether to run it."""
    shutil.copytree(detector_folder, tmp_path / "weights")
    config = json.loads((tmp_path / "weights/config.json").read_text())
    config |= {"model_type": "zebra", "auto_map": dict.fromkeys(("AutoConfig", "AutoModelForObjectDetection"), "zebra.Zebra")}
    (tmp_path / "weights/config.json").write_text(json.dumps(config))
    (tmp_path / "weights/zebra.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Zebra:\n    pass\n")
    with pytest.raises(ValueError, match="ocr: cannot load"):
        ocr.OCR(detector=str(tmp_path / "weights"))(pictures[:1], ['"a"'])
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("make", [pickscore.PickScore, clipscore.CLIPScore])
def test_a_clip_without_all_its_weights_is_refused(make, clip_folder, tmp_path, pictures):
    model = CLIPModel.from_pretrained(clip_folder)
    state = model.state_dict()
    del state["visual_projection.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    CLIPTokenizer.from_pretrained(clip_folder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks 1 weights .visual_projection.weight"):
        make(weights=str(tmp_path))(pictures[:1], PROMPTS[:1])


@pytest.mark.parametrize("make", [pickscore.PickScore, clipscore.CLIPScore])
def test_a_tokenizer_without_its_words_is_refused(make, clip_folder, tmp_path, pictures):
    CLIPModel.from_pretrained(clip_folder).save_pretrained(tmp_path)
    CLIPTokenizer().save_pretrained(tmp_path)  # what transformers makes of missing files: three tokens and no complaint
    options = {"tokenizer": str(tmp_path)} if make is pickscore.PickScore else {}
    with pytest.raises(ValueError, match="differ in vocabulary"):
        make(weights=str(tmp_path), **options)(pictures[:1], PROMPTS[:1])


# ---- PickScore, CLIPScore, aesthetic


def logits(clip_folder, pixels):
    """CLIPModel's own logits_per_image for pictures (B, 3, 32, 32) in [0, 1] and PROMPTS, each with its own."""
    model, tokenizer = CLIPModel.from_pretrained(clip_folder), CLIPTokenizer.from_pretrained(clip_folder)
    words = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    pixels = (pixels - MEAN[:, None, None]) / STD[:, None, None]
    with torch.no_grad():
        return model(pixel_values=pixels, **words).logits_per_image.diag()


def resized(picture, side, resample):
    """Shorter side to `side`; the other one rounded down."""
    short = min(picture.size)
    return picture.resize([side if n == short else int(side * n / short) for n in picture.size], resample)


def test_pickscore_is_the_logit_of_clip(clip_folder, pictures):
    prepared = []
    for picture in pictures:
        picture = resized(picture, 32, Image.Resampling.BICUBIC)
        left, top = (picture.width - 32) // 2, (picture.height - 32) // 2  # transformers rounds down
        prepared.append(torch.from_numpy(np.array(picture.crop((left, top, left + 32, top + 32)))).permute(2, 0, 1) / 255)
    reward = pickscore.PickScore(weights=str(clip_folder), tokenizer=str(clip_folder))
    scores = reward(pictures, PROMPTS)
    assert_close(scores, logits(clip_folder, torch.stack(prepared)), rtol=1e-4, atol=1e-3)
    assert_close(reward.model.logit_scale.exp().item(), 100.0, rtol=1e-5, atol=0.0)
    assert scores[0] != scores[4]  # same prompt, other picture


def test_clipscore_is_a_thirtieth_of_clips_logit(clip_folder, pictures):
    prepared = []
    for picture in pictures:
        # bilinear on floats, one channel at a time, by Pillow: what torchvision does to a tensor, antialiasing included
        planes = [resized(plane.convert("F"), 32, Image.Resampling.BILINEAR) for plane in picture.split()]
        pixels = torch.from_numpy(np.stack([np.array(plane) for plane in planes])) / 255
        top, left = (round((n - 32) / 2) for n in pixels.shape[1:])  # torchvision rounds to the nearest
        prepared.append(pixels[:, top : top + 32, left : left + 32])
    scores = clipscore.CLIPScore(weights=str(clip_folder))(pictures, PROMPTS)
    assert_close(scores, logits(clip_folder, torch.stack(prepared)) / 30, rtol=1e-4, atol=1e-4)


def test_clipscore_crops_as_torchvision_does():
    pixels = torch.arange(35.0).expand(3, 32, 35) / 255  # (35 - 32) / 2 = 1.5 is rounded to the even 2
    got = clipscore.prepare(pixels, 32) * STD[:, None, None] + MEAN[:, None, None]
    assert_close(got[0, 0] * 255, torch.arange(2.0, 34.0), rtol=0, atol=1e-4)


def test_the_folded_head_is_the_head(head_file):
    state = torch.load(head_file, weights_only=True)
    layers = [torch.nn.Linear(*state[f"layers.{i}.weight"].shape[::-1]) for i in (0, 2, 4, 6, 7)]
    torch.nn.Sequential(*layers).load_state_dict({f"{k}.{p}": state[f"layers.{i}.{p}"] for k, i in enumerate((0, 2, 4, 6, 7))
                                                  for p in ("weight", "bias")})  # fmt: skip
    w, b = aesthetic.fold(state)
    x = F.normalize(torch.randn(7, 768, generator=torch.Generator().manual_seed(0)))
    assert w.shape == (768,) and b.shape == () and w.dtype == b.dtype == torch.float32
    assert_close(x @ w + b, torch.nn.Sequential(*layers)(x)[:, 0].detach(), rtol=1e-4, atol=1e-5)
    assert_close(b, torch.nn.Sequential(*layers)(torch.zeros(1, 768))[0, 0].detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", ["layers.2.bias", "layers.7.weight"])
def test_a_head_with_a_key_too_few_or_too_many_is_refused(head_file, key):
    state = torch.load(head_file, weights_only=True)
    with pytest.raises(ValueError, match="1 weights too many .layers.1.weight"):
        aesthetic.fold(state | {"layers.1.weight": torch.zeros(2)})
    del state[key]
    with pytest.raises(ValueError, match=rf"layers\.{key[7]} is not a linear layer"):
        aesthetic.fold(state)
    with pytest.raises(ValueError, match=rf"layers\.{key[7]} is not a linear layer"):
        aesthetic.fold(state | {key: torch.zeros(3, 5)})


def test_aesthetic_end_to_end(clip_folder, head_file, pictures):
    model, (w, b) = CLIPModel.from_pretrained(clip_folder), aesthetic.fold(torch.load(head_file, weights_only=True))
    scores = aesthetic.Aesthetic(weights=str(clip_folder), head=head_file, sha256=None)(pictures)
    image = resized(pictures[0], 32, Image.Resampling.BICUBIC)
    pixels = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - MEAN[:, None, None]) / STD[:, None, None]
    with torch.no_grad():
        vector = model.visual_projection(model.vision_model(pixels[None]).pooler_output)[0]
    assert_close(scores[0], vector @ w / vector.norm() + b, rtol=1e-4, atol=1e-4)


def test_another_file_than_the_published_head_is_refused(head_file, clip_folder, pictures):
    with pytest.raises(ValueError, match="not the published file .SHA-256.*curl -LO"):
        aesthetic.Aesthetic(weights=str(clip_folder), head=head_file)(pictures[:1])


# ---- DeQA

DEQA = {
    "vocab_size": 32000, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 256, "rope_theta": 10000.0,
    "model_type": "mplug_owl2", "auto_map": {"AutoConfig": "configuration_mplug_owl2.MPLUGOwl2Config"},
    "visual_config": {
        "visual_model": {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
                         "image_size": 28, "patch_size": 7, "layer_norm_eps": 1e-6},
        "visual_abstractor": {"hidden_size": 24, "encoder_hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2,
                              "num_attention_heads": 4, "num_learnable_queries": 5, "grid_size": 4, "layer_norm_eps": 1e-6},
    },
}  # fmt: skip
FULL = DEQA | {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "max_position_embeddings": 2048,
    "visual_config": {
        "visual_model": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                         "image_size": 448, "patch_size": 14, "layer_norm_eps": 1e-6},
        "visual_abstractor": {"hidden_size": 1024, "encoder_hidden_size": 1024, "intermediate_size": 2816,
                              "num_hidden_layers": 6, "num_attention_heads": 16, "num_learnable_queries": 64,
                              "grid_size": 32, "layer_norm_eps": 1e-6},
    },
}  # fmt: skip


def published_shapes(config):
    """{name: shape} as mPLUG-Owl2's own classes name and shape their weights (visual_encoder.py, modeling_llama2.py)."""
    H, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = H // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (vocabulary, H), "model.norm.weight": (H,), "lm_head.weight": (vocabulary, H)}
    for i in range(config["num_hidden_layers"]):
        name = f"model.layers.{i}."
        shapes |= {name + f"self_attn.{x}_proj.weight": (H, H) for x in "qo"}
        shapes |= {name + f"self_attn.{x}_proj.multiway.{way}.weight": (kv, H) for x in "kv" for way in (0, 1)}
        shapes |= {name + f"mlp.{x}_proj.weight": (inner, H) for x in ("gate", "up")}
        shapes |= {name + "mlp.down_proj.weight": (H, inner)}
        norms = ("input_layernorm", "post_attention_layernorm")
        shapes |= {name + f"{norm}.multiway.{way}.weight": (H,) for norm in norms for way in (0, 1)}

    def add(name, *shape):
        shapes[name + ".weight"], shapes[name + ".bias"] = shape, shape[:1]

    c = config["visual_config"]["visual_model"]
    D, patch, name = c["hidden_size"], c["patch_size"], "model.vision_model."
    shapes[name + "embeddings.cls_token"] = (1, 1, D)
    shapes[name + "embeddings.patch_embed.weight"] = (D, 3, patch, patch)
    shapes[name + "embeddings.position_embedding"] = (1, (c["image_size"] // patch) ** 2 + 1, D)
    add(name + "embeddings.pre_layernorm", D)
    add(name + "post_layernorm", D)
    for i in range(c["num_hidden_layers"]):
        layer = f"{name}encoder.layers.{i}."
        add(layer + "self_attn.query_key_value", 3 * D, D)
        add(layer + "self_attn.dense", D, D)
        add(layer + "mlp.fc1", c["intermediate_size"], D)
        add(layer + "mlp.fc2", D, c["intermediate_size"])
        add(layer + "input_layernorm", D)
        add(layer + "post_attention_layernorm", D)

    c = config["visual_config"]["visual_abstractor"]
    D, E, inner, name = c["hidden_size"], c["encoder_hidden_size"], c["intermediate_size"], "model.visual_abstractor."
    shapes[name + "query_embeds"], shapes[name + "vit_eos"] = (1, c["num_learnable_queries"], D), (1, 1, H)
    add(name + "visual_fc", H, D)
    for i in range(c["num_hidden_layers"]):
        layer = f"{name}encoder.layers.{i}.crossattention."
        shapes[layer + "attention.q_pos_embed"] = (c["num_learnable_queries"], D)
        shapes[layer + "attention.k_pos_embed"] = (c["grid_size"] ** 2 + 1, D)
        for x, width in (("query", D), ("key", E), ("value", E)):
            add(layer + "attention." + x, D, width)
        for x, shape in {"out_proj": (D, D), "norm2": (D,), "mlp.w1": (inner, D), "mlp.w2": (D, inner), "mlp.w3": (inner, D),
                         "mlp.ffn_ln": (inner,)}.items():  # fmt: skip
            add(layer + "output." + x, *shape)
        add(layer + "norm1", D)
        add(layer + "normk", E)
    return shapes


@cache
def published_state():
    generator = torch.Generator().manual_seed(3)
    state = {}
    for name, shape in published_shapes(DEQA).items():
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
    chunks = [
        (deqa.BEFORE, "<s> ▁US ER : ▁How ▁would ▁you ▁rate ▁the ▁quality ▁of ▁this ▁image ? <0x0A>"),
        (deqa.AFTER, "▁ <0x0A> ASS IST ANT : ▁The ▁quality ▁of ▁the ▁image ▁is"),
        (deqa.LEVELS.values(), "▁excellent ▁good ▁fair ▁poor ▁bad"),
    ]
    for ids, text in chunks:
        for i, piece in zip(ids, text.split(" "), strict=True):
            assert pieces[i] in (f"piece{i}", piece)  # one number, one piece
            pieces[i] = piece
    if change:
        pieces[change] = "other"
    # per piece: 1 text, 2 score (four bytes), 3 kind (varint); behind them field 2, the trainer's settings
    body = b"".join(protobuf(1, protobuf(1, p.encode()) + b"\x15\0\0\x80\xbf" + b"\x18\x01") for p in pieces)
    return body + protobuf(2, b"\x08\xac\x02" + b"\x11" + bytes(8))


def save_deqa(folder, state, vocabulary=None):
    """As on the hub: two pickled shards, an index, config.json, tokenizer.model."""
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    halves = [dict(list(state.items())[i::2]) for i in (0, 1)]
    for name, half in zip(names, halves):
        torch.save(half, folder / name)
    index = {"weight_map": {key: name for name, half in zip(names, halves) for key in half}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(DEQA))
    (folder / "tokenizer.model").write_bytes(vocabulary or tokenizer_model())
    (folder / "configuration_mplug_owl2.py").write_text("raise SystemExit('remote code ran')")
    return folder


@pytest.fixture(scope="module")
def deqa_folder(tmp_path_factory):
    return save_deqa(tmp_path_factory.mktemp("deqa"), published_state())


def published_logits(state, config, pixels):
    """The published forward pass written out once more, on published names: logits (B, vocabulary) after the prompt."""
    linear = lambda x, name: F.linear(x, state[name + ".weight"], state.get(name + ".bias"))
    norm = lambda x, name, eps: F.layer_norm(x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"], eps)
    B = len(pixels)

    c = config["visual_config"]["visual_model"]
    D, heads, eps, name = c["hidden_size"], c["num_attention_heads"], c["layer_norm_eps"], "model.vision_model."
    x = F.conv2d(pixels, state[name + "embeddings.patch_embed.weight"], stride=c["patch_size"]).flatten(2).transpose(1, 2)
    x = torch.cat([state[name + "embeddings.cls_token"].expand(B, 1, D), x], 1) + state[name + "embeddings.position_embedding"]
    x = norm(x, name + "embeddings.pre_layernorm", eps)
    for i in range(c["num_hidden_layers"]):
        layer = f"{name}encoder.layers.{i}."
        qkv = linear(norm(x, layer + "input_layernorm", eps), layer + "self_attn.query_key_value")
        q, k, v = qkv.reshape(B, -1, heads, 3, D // heads).permute(3, 0, 2, 1, 4)
        attention = (q @ k.transpose(-1, -2) * (D // heads) ** -0.5).softmax(-1) @ v
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
        both, q_pos, k_pos = (
            torch.cat([x, seen], 1),
            state[layer + "attention.q_pos_embed"],
            state[layer + "attention.k_pos_embed"],
        )
        q = linear(x + q_pos, layer + "attention.query")
        k = linear(both + torch.cat([q_pos, k_pos]), layer + "attention.key")
        v = linear(both, layer + "attention.value")
        q, k, v = (y.view(B, -1, heads, D // heads).permute(0, 2, 1, 3) for y in (q, k, v))
        attention = (q @ k.transpose(-1, -2) / math.sqrt(D // heads)).softmax(-1) @ v
        x = x + linear(attention.permute(0, 2, 1, 3).reshape(B, -1, D), layer + "output.out_proj")
        h = norm(x, layer + "output.norm2", 1e-5)
        h = F.silu(linear(h, layer + "output.mlp.w1")) * linear(h, layer + "output.mlp.w3")
        x = x + linear(norm(h, layer + "output.mlp.ffn_ln", eps), layer + "output.mlp.w2")
    picture = torch.cat([linear(x, name + "visual_fc"), state[name + "vit_eos"].repeat(B, 1, 1)], 1)

    H, heads, groups = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    d = H // heads
    embed = lambda ids: state["model.embed_tokens.weight"][torch.tensor(ids)].expand(B, -1, -1)
    x = torch.cat([embed(deqa.BEFORE), picture, embed(deqa.AFTER)], 1)
    L = x.shape[1]
    way = torch.zeros(L, dtype=torch.long)
    way[len(deqa.BEFORE) : len(deqa.BEFORE) + picture.shape[1]] = 1  # which of the two weights each place uses
    rms = lambda x, w: x * (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt() * w
    rms_way = lambda x, name: rms(x, torch.stack([state[f"{name}.multiway.{m}.weight"] for m in (0, 1)])[way])
    linear_way = lambda x, name: torch.stack([linear(x, f"{name}.multiway.{m}") for m in (0, 1)])[
        way, :, torch.arange(L)
    ].transpose(0, 1)
    angle = torch.arange(L)[:, None] * config["rope_theta"] ** (-torch.arange(0, d, 2) / d)  # (L, d / 2)

    def rotate(y):  # (B, heads, L, d): pairs (j, j + d / 2) turn by the angle
        a, b = y.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        h = rms_way(x, layer + "input_layernorm")
        q = rotate(linear(h, layer + "self_attn.q_proj").view(B, L, heads, d).transpose(1, 2))
        k = rotate(linear_way(h, layer + "self_attn.k_proj").view(B, L, groups, d).transpose(1, 2))
        v = linear_way(h, layer + "self_attn.v_proj").view(B, L, groups, d).transpose(1, 2)
        k, v = (y.repeat_interleave(heads // groups, 1) for y in (k, v))
        weight = (q @ k.transpose(-1, -2) / math.sqrt(d)).masked_fill(torch.ones(L, L).triu(1).bool(), -math.inf)
        x = x + linear((weight.softmax(-1) @ v).transpose(1, 2).reshape(B, L, H), layer + "self_attn.o_proj")
        h = rms_way(x, layer + "post_attention_layernorm")
        h = F.silu(linear(h, layer + "mlp.gate_proj")) * linear(h, layer + "mlp.up_proj")
        x = x + linear(h, layer + "mlp.down_proj")
    return linear(rms(x[:, -1], state["model.norm.weight"]), "lm_head")


def test_deqa_is_the_published_forward_pass():
    state = published_state()
    model = deqa.build(DEQA, deqa.convert(state, DEQA)).eval()
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        got = deqa.level_logits(model, pixels)
    wanted = published_logits(state, DEQA, pixels)[:, [15129, 1781, 6534, 6460, 4319]]
    assert wanted.std(0).min() > 0.05  # the picture matters
    assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_deqa_end_to_end(deqa_folder, pictures):
    picture = pictures[1]  # 33 high, 47 wide: 7 rows of padding above, 7 below
    padded = Image.new("RGB", (47, 47), (122, 116, 104))
    padded.paste(picture, (0, 7))
    padded = torch.from_numpy(np.array(padded.resize((28, 28), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    pixels = (padded - MEAN[:, None, None]) / STD[:, None, None]
    wanted = published_logits(published_state(), DEQA, pixels[None])[:, [15129, 1781, 6534, 6460, 4319]]
    score = deqa.DeQA(weights=str(deqa_folder))([picture])
    assert_close(score, wanted.softmax(1) @ torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]), rtol=1e-4, atol=1e-4)


def test_the_expected_level():
    rows = torch.tensor([[7.0] * 5, [2.0, 1.0, 0.0, -1.0, -2.0], [200.0, 0, 0, 0, 0], [0, 0, 0, 0, 200.0]])
    assert_close(deqa.expected_level(rows), torch.tensor([3.0, 4.451941, 5.0, 1.0]), rtol=0, atol=1e-6)
    assert deqa.expected_level(rows.half()).dtype == torch.float32


def test_square_pads_with_the_mean_colour():
    red = deqa.square(Image.new("RGB", (3, 6), "red"))  # 1 column to the left, 2 to the right
    assert red.size == (6, 6)
    assert [red.getpixel((x, 0)) for x in (0, 1, 3, 4)] == [(122, 116, 104), (255, 0, 0), (255, 0, 0), (122, 116, 104)]
    assert deqa.square(Image.new("RGB", (6, 6), "red")).getcolors() == [(36, (255, 0, 0))]


def test_every_published_weight_of_the_7b_has_its_place():
    shapes = published_shapes(FULL)
    assert sum(math.prod(shape) for shape in shapes.values()) == pytest.approx(8.2e9, rel=0.01)
    published = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    published["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.empty(64, device="meta")  # older files have it
    converted = deqa.convert(published, FULL)
    assert sum(t.numel() for t in converted.values()) == sum(math.prod(shape) for shape in shapes.values())
    model = deqa.build(FULL, converted)  # load_state_dict is strict: names and shapes
    assert set(model.state_dict()) == set(converted)


def test_conversion_can_be_undone():
    published, heads = published_state(), DEQA["visual_config"]["visual_model"]["num_attention_heads"]
    converted = dict(deqa.convert(published, DEQA))
    undone = {}
    for name, tensor in published.items():
        new = name
        if name.startswith("model.vision_model."):
            for old, replacement in deqa.RENAMED.items():
                new = new.replace(old, replacement)
        if ".query_key_value." in name:
            parts = [converted.pop(new.replace("query_key_value", x)) for x in ("q_proj", "k_proj", "v_proj")]
            undone[name] = torch.stack([p.unflatten(0, (heads, -1)) for p in parts], 1).flatten(0, 2)
        else:
            undone[name] = converted.pop(new).view(tensor.shape)
    assert not converted
    for name, tensor in published.items():
        assert torch.equal(undone[name], tensor), name


@pytest.mark.parametrize("change", ["too few", "too many", "another shape", "a shard gone", "another tokenizer", "code"])
def test_deqa_refuses_other_weights(change, tmp_path, pictures):
    state, vocabulary = dict(published_state()), None
    if change == "too few":
        del state["model.norm.weight"]
    if change == "too many":
        state["model.extra.weight"] = torch.zeros(2)
    if change == "another shape":
        state["lm_head.weight"] = torch.zeros(31999, 32)
    if change == "another tokenizer":
        vocabulary = tokenizer_model(change=deqa.LEVELS["poor"])
    save_deqa(tmp_path, state, vocabulary)
    if change == "a shard gone":
        (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    if change == "code":  # a pickle that would run something

        class Evil:
            def __reduce__(self):
                return open, (str(tmp_path / "was here"), "w")

        torch.save({"model.norm.weight": Evil()}, tmp_path / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(ValueError, match="deqa: cannot load.*hf download zhiyuanyou/DeQA-Score-Mix3") as error:
        deqa.DeQA(weights=str(tmp_path))(pictures[:1])
    assert "\n" not in str(error.value) and not (tmp_path / "was here").exists()


# ---- OCR: the formula


@pytest.mark.parametrize(
    "read, score",
    [("HELLO world", 1.0), ("xxHello World!!", 1.0), ("Helo World", 0.9), ("", 0.0), ("hell o wor1d", 0.9),
     ("zzzzzzzzzzzzzzzzzzzzzzzz", 0.0), ("Hello\nWorld", 0.9), ("Hello, World", 0.9)],
)  # fmt: skip
def test_the_papers_formula(read, score):
    assert ocr.score_text(read, "Hello World") == pytest.approx(score)


@pytest.mark.parametrize(
    "read, target, score, with_nfkc",
    [("E=mc²", "E=mc²", 1, 1), ("e=MC2", "E=mc²", 0.8, 1), ("CAFÉ", "café", 1, 1), ("cafe", "café", 0.75, 0.75),
     ("½ off", "½ OFF", 1, 1), ("H₂O", "H₂O", 1, 1), ("H2O", "H₂O", 2 / 3, 1), ("ＯＰＥＮ", "open", 0, 1),
     ("你好", "你好吗", 2 / 3, 2 / 3), ("don't", "don’t", 0.8, 0.8)],
)  # fmt: skip
def test_targets_beyond_ascii(read, target, score, with_nfkc):
    assert ocr.score_text(read, target) == pytest.approx(score)
    assert ocr.score_text(read, target, nfkc=True) == pytest.approx(with_nfkc)


def test_edit_distance_against_its_definition():
    @cache
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = ("".join(rng.choice(list("abc"), rng.integers(0, 8))) for _ in range(2))
        assert ocr.edit_distance(a, b) == slow(a, b)


def test_the_quoted_text():
    assert ocr.quoted('a sign "Hi there" and "another"') == "Hi there"


@pytest.mark.parametrize(
    "prompt", ["a cat", 'one quote " only', 'an empty "" one', 'only "  " spaces', "typographic “quotes”", ""]
)
def test_a_prompt_without_a_quoted_text_is_an_error(prompt, pictures):
    with pytest.raises(ValueError, match="quotes no text"):
        ocr.OCR()(pictures[:1], [prompt])


# ---- OCR: before and after the networks


def blank(height=256, width=512):
    return np.zeros((height, width), np.float32)


def test_a_box_grows_by_the_rule():
    # 300 x 40 pixels are 299 x 39 from first to last; 1.5 * area / perimeter = 1.5 * 299 * 39 / 676 = 25.875 outwards
    page = blank()
    page[100:140, 80:380] = 0.9
    (quad,) = ocr.find_lines(page, 256, 512)
    assert quad.tolist() == [[54, 74], [405, 74], [405, 165], [54, 165]]
    (double,) = ocr.find_lines(page, 512, 1024)  # the picture was twice the map
    assert double.tolist() == [[108, 148], [810, 148], [810, 330], [108, 330]]


def test_boxes_stop_at_the_edge_of_the_picture():
    page = blank()
    page[0:50, 0:512] = 0.9
    (quad,) = ocr.find_lines(page, 256, 512)
    assert quad.tolist() == [[0, 0], [511, 0], [511, 83], [0, 83]]  # 49 + 1.5 * 511 * 49 / 1120 = 82.53


def test_reading_order():
    page = blank(512, 512)
    boxes = {"c": (300, 20), "b": (104, 260), "a": (110, 20), "d": (306, 300), "e": (420, 5)}  # a and b: one row, 6 apart
    for y, x in boxes.values():
        page[y : y + 24, x : x + 150] = 0.95
    corners = [quad[0] for quad in ocr.find_lines(page, 512, 512)]
    found = [min(boxes, key=lambda name: abs(boxes[name][1] - x - 15) + abs(boxes[name][0] - y - 15)) for x, y in corners]
    assert found == list("abcde")


@pytest.mark.parametrize("value, size, seen", [(0.59, 40, 0), (0.61, 40, 1), (0.9, 3, 0), (0.9, 8, 1)])
def test_what_is_no_line(value, size, seen):
    page = blank()
    page[100 : 100 + size, 80 : 80 + 2 * size] = value
    page[5, 5] = page[7, 100] = 1.0  # specks
    assert len(ocr.find_lines(page, 256, 512)) == seen
    assert ocr.find_lines(blank(), 256, 512) == []


@pytest.mark.parametrize("degrees", [-40, -12, 5, 30])
def test_a_tilted_line(degrees):
    y, x = np.mgrid[:256, :512]
    a = math.radians(degrees)
    along, across = np.array([math.cos(a), math.sin(a)]), np.array([-math.sin(a), math.cos(a)])
    from_centre = np.stack([x - 256, y - 128], -1)
    w, h = 180, 24
    page = ((abs(from_centre @ along) <= w / 2) & (abs(from_centre @ across) <= h / 2)).astype(np.float32)
    (quad,) = ocr.find_lines(page, 256, 512)
    grow = 1.5 * w * h / (2 * (w + h))
    signs = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    wanted = [[256, 128] + s * (w / 2 + grow) * along + t * (h / 2 + grow) * across for s, t in signs]
    assert_close(torch.tensor(quad), torch.tensor(np.array(wanted)), rtol=0, atol=2.5)  # a drawn edge is up to a pixel off


@pytest.mark.parametrize("density", [0.05, 0.3, 0.55])
def test_components_against_flooding(density):
    bitmap = np.random.default_rng(0).random((23, 31)) < density
    left, wanted = {(x, y) for y, x in zip(*np.nonzero(bitmap))}, []
    while left:
        region = edge = {left.pop()}
        while edge:
            edge = {(x + i, y + j) for x, y in edge for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left, region = left - edge, region | edge
        wanted.append((len({y for _, y in region}), *np.array(sorted(region)).min(0), *np.array(sorted(region)).max(0)))
    got = [(len(set(points[:, 1])), *points.min(0), *points.max(0)) for points in ocr.components(bitmap)]
    assert sorted(map(tuple, got)) == sorted(map(tuple, wanted))


def test_the_smallest_rectangle_against_all_angles():
    rng = np.random.default_rng(1)
    for _ in range(20):
        points = np.round(rng.normal(size=(12, 2)) * [20, 6] @ np.linalg.qr(rng.normal(size=(2, 2)))[0])
        turned = [points @ [[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]] for a in np.linspace(0, math.pi / 2, 5000)]
        areas = [np.ptp(p, axis=0).prod() for p in turned]
        rectangle = ocr.smallest_rectangle(points)
        assert rectangle[2].prod() == pytest.approx(min(areas), rel=2e-3) and rectangle[2].prod() <= min(areas) + 1e-6
        inside = ocr.corners(rectangle, grow=1e-6)
        for a, b in zip(inside, np.roll(inside, -1, 0)):  # every point is on one side of each edge
            cross = (b - a)[0] * (points - a)[:, 1] - (b - a)[1] * (points - a)[:, 0]
            assert (cross >= 0).all() or (cross <= 0).all()
    assert ocr.smallest_rectangle(np.array([[4.0, 7.0]]))[2].tolist() == [0, 0]  # a single pixel
    assert ocr.smallest_rectangle(np.array([[1.0, 1.0], [2.0, 2.0], [5.0, 5.0]]))[2].min() == pytest.approx(0, abs=1e-9)


def test_cutting_out_a_straight_line_copies_its_pixels():
    pixels = (noise(90, 120, seed=4) * 255).round()
    crop = ocr.cut(pixels, np.array([[10.0, 20], [110, 20], [110, 50], [10, 50]]))
    assert torch.equal(crop, pixels[:, 20:50, 10:110])


def test_an_upright_line_is_laid_down():
    pixels = (noise(90, 120, seed=4) * 255).round()
    crop = ocr.cut(pixels, np.array([[10.0, 5], [30, 5], [30, 85], [10, 85]]))  # 20 wide, 80 high
    assert torch.equal(crop, torch.from_numpy(np.rot90(pixels[:, 5:85, 10:30].numpy(), axes=(1, 2)).copy()))


def test_a_tilted_line_is_straightened():
    a = math.radians(20)
    along, across = np.array([math.cos(a), math.sin(a)]), np.array([-math.sin(a), math.cos(a)])
    y, x = np.mgrid[:200, :300]
    ramp = np.stack([x, y], -1) @ along + 3 * np.stack([x, y], -1) @ across  # bright along the line, three times so across it
    start = np.array([60.0, 40.0])
    quad = np.array([start, start + 120 * along, start + 120 * along + 30 * across, start + 30 * across])
    crop = ocr.cut(torch.from_numpy(ramp).float().expand(3, -1, -1) / 4, quad)
    v, u = np.mgrid[: crop.shape[1], : crop.shape[2]]
    assert abs(crop.shape[1] - 30) <= 1 and abs(crop.shape[2] - 120) <= 1
    assert_close(crop[0].double(), torch.from_numpy((start @ along + 3 * start @ across + u + 3 * v) / 4), rtol=0, atol=1.5)


def test_lines_for_the_reader_keep_their_shape():
    mean = std = torch.full((3, 1, 1), 0.5)
    line = ocr.for_reader(torch.full((3, 24, 100), 255.0), mean, std)  # 200 of 320 columns
    assert line.shape == (3, 48, 320)
    assert (line[..., :200] == 1).all() and (line[..., 200:] == 0).all()
    assert ocr.for_reader(torch.zeros(3, 24, 400), mean, std).shape == (3, 48, 800)
    assert ocr.for_reader(torch.zeros(3, 10, 5000), mean, std).shape == (3, 48, 3200)
    assert ocr.for_reader(torch.zeros(3, 7, 5), mean, std).shape == (3, 48, 320)


@pytest.mark.parametrize(
    "size, shape",
    [((512, 512), (512, 512)), ((1024, 1024), (960, 960)), ((33, 47), (32, 32)), ((70, 1500), (32, 960)), ((8, 8), (32, 32))],
)
def test_sizes_for_the_detector(size, shape):
    assert ocr.for_detector(torch.zeros(3, *size)).shape == (3, *shape)


def test_the_detector_sees_blue_green_red():
    pixels = torch.tensor([255.0, 0.0, 51.0])[:, None, None].expand(3, 32, 32)
    wanted = [(0.2 - 0.485) / 0.229, (0 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert_close(ocr.for_detector(pixels)[:, 3, 4], torch.tensor(wanted))


def test_ctc():
    letters = ["", "a", "b", "c", " "]
    path = [1, 1, 0, 1, 2, 0, 3, 4, 1, 1]  # a a - a b - c _ a a
    sure = [0.9, 0.4, 0.99, 0.95, 0.9, 0.99, 0.92, 0.95, 0.9, 0.5]
    steps = np.full((10, 5), 0.01)
    steps[range(10), path] = sure
    text, confidence = ocr.decode(steps, letters)
    assert text == "aabc a" and confidence == pytest.approx(0.92)
    assert ocr.decode(np.eye(5)[[0, 0, 0]], letters) == ("", 0.0)


def test_the_alphabet_in_its_three_forms():
    full = ["", "a", "b", " "]
    assert ocr.alphabet(["a", "b"], 4) == ocr.alphabet(["a", "b", " "], 4) == full and ocr.alphabet(full, 4) == full
    with pytest.raises(ValueError, match="5 letters for 4 outputs"):
        ocr.alphabet(list("abcde"), 4)


# ---- OCR: the networks

LETTERS = list("abcdefghijklmnopqrstuvwxyz0123456789²é")


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory):
    """A detector of random weights, in love with text: it takes a whole picture for one line."""
    torch.manual_seed(0)
    model = PPOCRV5MobileDetForObjectDetection(PPOCRV5MobileDetConfig())
    model.head.conv_final.bias.data.fill_(4.0)
    folder = tmp_path_factory.mktemp("detector")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reader_folder(tmp_path_factory):
    """A reader of random weights, sure of what it reads."""
    torch.manual_seed(0)
    blocks = [[[3, 16, 32, 1, False]], [[3, 32, 64, [2, 1], False]], [[3, 64, 128, [1, 2], False]],
              [[3, 128, 256, [2, 1], False]], [[5, 256, 512, [2, 1], True]]]  # fmt: skip
    backbone = {"model_type": "pp_lcnet_v3", "scale": 0.25, "block_configs": blocks, "divisor": 8,
                "out_features": ["stage2", "stage3", "stage4", "stage5"]}  # fmt: skip
    config = PPOCRV5MobileRecConfig(
        backbone_config=backbone, hidden_size=24, num_attention_heads=2, head_out_channels=len(LETTERS) + 2
    )
    model = PPOCRV5MobileRecForTextRecognition(config)
    for parameter in model.parameters():
        if parameter.ndim == 4:  # convolutions: keep the signal alive through all the layers
            torch.nn.init.kaiming_normal_(parameter)
    model.head.head.weight.data.normal_(0, 8.0)
    folder = tmp_path_factory.mktemp("reader")
    model.save_pretrained(folder)
    settings = {"character_list": LETTERS, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def test_reading_end_to_end(detector_folder, reader_folder, pictures):
    reward = ocr.OCR(detector=str(detector_folder), reader=str(reader_folder))
    texts = reward.read(pictures)
    assert all(texts) and len(set(texts)) > 2  # something is read everywhere, and not the same thing
    detector, reader = reward.model
    # pictures[0] is 64 x 64: nothing to resize for the detector
    pixels = torch.from_numpy(np.array(pictures[0])).permute(2, 0, 1).float()
    bgr = ocr.for_detector(pixels)  # held to its rule above
    with torch.no_grad():
        assert detector(bgr[None]).last_hidden_state.min() > 0.6  # one line, the whole picture up to 63
        line = F.interpolate(pixels[None, :, :63, :63], (48, 48), mode="bilinear").round() / 127.5 - 1
        steps = reader(F.pad(line, (0, 320 - 48))).last_hidden_state[0]
    assert steps.shape == (40, len(LETTERS) + 2)  # 320 columns, an eighth of them places
    assert texts[0] == ocr.decode(steps.numpy(), ["", *LETTERS, " "])[0]
    target = texts[0].replace(" ", "")
    assert reward([pictures[0]], [f'a sign that says "{target}"']).tolist() == [1.0]


@pytest.fixture(scope="module")
def server_folders(tmp_path_factory):
    """The server models of PP-OCRv5, of random weights: other networks, with the same inputs and outputs."""
    torch.manual_seed(0)
    net = {"stem_channels": [3, 8, 8], "embedding_size": 8, "stage_in_channels": [8, 16, 16, 16], "depths": [1] * 4,
           "stage_mid_channels": [8] * 4, "stage_out_channels": [16] * 4, "stage_num_blocks": [1] * 4,
           "stage_numb_of_layers": [1] * 4, "hidden_sizes": [16] * 4}  # fmt: skip
    stages = {"model_type": "hgnet_v2", "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    block = {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0]}
    for name, k in (("long", 7), ("mid", 5), ("short", 3)):
        block[f"vertical_long_to_small_conv_{name}ratio"] = [[k, 1], [1, 1], [k // 2, 0]]
        block[f"horizontal_small_to_long_conv_{name}ratio"] = [[1, k], [1, 1], [0, k // 2]]
        block[f"symmetric_conv_long_{name}ratio"] = [k, 1, k // 2]
    detector = PPOCRV5ServerDetForObjectDetection(PPOCRV5ServerDetConfig(
        backbone_config=net | stages, neck_out_channels=16, intraclass_block_config=block, scale_factor_list=[1, 2, 4, 8],
        kernel_list=[3, 2, 2],
    ))  # fmt: skip
    for layer in (detector.head.binarize_head.conv_final, detector.head.local_refinement_module.convolution_final):
        layer.bias.data.fill_(6.0)  # text everywhere
    backbone = PPOCRV5ServerRecConfig().backbone_config.to_dict() | net
    reader = PPOCRV5ServerRecForTextRecognition(
        PPOCRV5ServerRecConfig(
            backbone_config=backbone, hidden_size=24, num_attention_heads=2, head_out_channels=len(LETTERS) + 2
        )
    )
    spread_out(reader).head.head.weight.data.normal_(0, 64.0)  # sure of what it reads
    folders = tmp_path_factory.mktemp("server_det"), tmp_path_factory.mktemp("server_rec")
    for model, folder in zip((detector, reader), folders):
        model.save_pretrained(folder)
    (folders[1] / "preprocessor_config.json").write_text(json.dumps({"character_list": LETTERS}))
    return folders


def test_the_server_models_fit_too(server_folders, pictures):
    reward = ocr.OCR(detector=str(server_folders[0]), reader=str(server_folders[1]))
    texts = reward.read(pictures)
    assert all(texts) and all(set(text) <= {*LETTERS, " "} for text in texts)
    assert reward.read(pictures[3:]) == texts[3:]


def test_text_is_read_in_float32_whatever_the_caller_does(detector_folder, reader_folder, pictures):
    """Under autocast and with TF32 on, as many training loops have it: the same numbers, and the caller's settings stay."""
    reward = ocr.OCR(detector=str(detector_folder), reader=str(reader_folder))
    texts, seen = reward.read(pictures), []
    for model in reward.model:
        model.register_forward_hook(
            lambda *given: seen.append(
                (given[2].last_hidden_state.dtype, torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
            )
        )
    torch.set_float32_matmul_precision("high")
    before = torch.backends.cudnn.allow_tf32
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert reward.read(pictures) == texts
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        assert set(seen) == {(torch.float32, "highest", False)}
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32 == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_doubtful_lines_are_dropped(detector_folder, reader_folder, pictures, monkeypatch):
    reward = ocr.OCR(detector=str(detector_folder), reader=str(reader_folder))
    monkeypatch.setattr(ocr, "CONFIDENT", 1.1)
    assert reward.read(pictures[:2]) == ["", ""] and reward(pictures[:1], ['"ab"']).tolist() == [0.0]


def test_other_models_than_ppocrv5_are_refused(clip_folder, detector_folder, tmp_path, pictures):
    with pytest.raises(ValueError, match="ocr: cannot load .*hf download"):
        ocr.OCR(detector=str(clip_folder), reader=str(clip_folder))(pictures[:1], ['"a"'])
    with pytest.raises(ValueError, match="no engine 'tesseract'"):
        ocr.OCR(engine="tesseract")


def test_a_reader_without_its_alphabet_is_refused(detector_folder, reader_folder, tmp_path, pictures):
    PPOCRV5MobileRecForTextRecognition.from_pretrained(reader_folder).save_pretrained(tmp_path)
    reward = ocr.OCR(detector=str(detector_folder), reader=str(tmp_path))
    with pytest.raises(ValueError, match="no usable alphabet"):
        reward(pictures[:1], ['"a"'])
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"character_list": ["a", "b"]}))
    with pytest.raises(ValueError, match="no usable alphabet .*2 letters for 40 outputs"):
        reward(pictures[:1], ['"a"'])
    assert reward.model is None


@pytest.mark.parametrize("which", [0, 1])
def test_a_network_that_gives_nan_gives_no_score(which, detector_folder, reader_folder, pictures):
    """It would find no text, or other letters, and score 0."""
    reward = ocr.OCR(detector=str(detector_folder), reader=str(reader_folder))
    prompts = asked(reward, pictures)
    with torch.no_grad():
        [parameter.fill_(math.nan) for parameter in reward.model[which].parameters()]
    with pytest.raises(ValueError, match="ocr: a network's output is not finite"):
        reward(pictures, prompts)


def test_the_papers_engine(monkeypatch, pictures):
    """PaddleOCR 2.x as it answers: per page a list of [corners, (text, confidence)], or None."""
    seen = []

    class PaddleOCR:
        def __init__(self, **settings):
            assert settings == {"lang": "en", "use_angle_cls": False, "use_gpu": False, "show_log": False}

        def ocr(self, image, cls):
            seen.append(image)
            return [None if image.shape[0] == 33 else [[[[0, 0]] * 4, ("Hello ", 0.9)], [[[0, 9]] * 4, ("W0rld", 0.6)]]]

    monkeypatch.setitem(sys.modules, "paddleocr", types.SimpleNamespace(PaddleOCR=PaddleOCR, __version__="2.9.1"))
    scores = ocr.OCR(engine="paddleocr")(pictures[:2], ['"Hello World"', '"Hello World"'])
    assert_close(scores, torch.tensor([0.9, 0.0]))
    assert np.array_equal(seen[0], np.array(pictures[0]))  # red first
    monkeypatch.setitem(sys.modules, "paddleocr", types.SimpleNamespace(__version__="3.2.0"))
    with pytest.raises(ValueError, match="3.2.0 is not the engine of the paper; pip install paddleocr==2.9.1"):
        ocr.OCR(engine="paddleocr")(pictures[:1], ['"a"'])
    monkeypatch.setitem(sys.modules, "paddleocr", None)
    with pytest.raises(ValueError, match="needs that package.*pip install paddleocr==2.9.1"):
        ocr.OCR(engine="paddleocr")(pictures[:1], ['"a"'])


def test_training_prompts():
    prompts = ocr.make_prompts(500, seed=1)
    assert len(set(prompts)) == 500 and prompts == ocr.make_prompts(500, seed=1) != ocr.make_prompts(500, seed=2)
    texts = [ocr.quoted(prompt) for prompt in prompts]
    assert all(prompt.count('"') == 2 for prompt in prompts) and all(2 <= len(text) <= 29 for text in texts)
    assert 12 < np.mean([len(text) for text in texts]) < 20  # 16.8 in flow_grpo's test set
    kept = {ocr.quoted(p).lower() for p in ocr.make_prompts(500, seed=1, exclude=[f'x "{t.upper()}"' for t in texts[:50]])}
    assert not kept & {t.lower() for t in texts[:50]}
    assert ocr.make_prompts(0) == []


# ---- Monitors


def test_edge_density():
    step = torch.zeros(3, 3, 16, 20)
    step[0, :, :, 7:] = 1.0  # one upright edge: the columns on both sides of it
    step[1, :, :8] = 0.5
    step[2, :, ::2] = 0.2  # stripes below the threshold
    assert_close(monitors.edge_density(step), torch.tensor([2 / 20, 2 / 16, 0.0]))
    assert 0.05 < monitors.edge_density(noise(64, 64)[None]).item() < 0.5


def test_colour_entropy():
    images = torch.zeros(3, 3, 8, 8)
    images[1, :, :4] = 1.0  # half black, half white: 1 bit
    for k in range(8):  # eight colours, one a row: 3 bits
        images[2, :, k] = torch.tensor([k & 1, k >> 1 & 1, k >> 2]).float()[:, None]
    assert_close(monitors.colour_entropy(images), torch.tensor([0.0, 1.0, 3.0]))
    assert monitors.colour_entropy(torch.rand(1, 3, 256, 256)).item() == pytest.approx(9, abs=0.05)


def test_diversity():
    black, white, grey = (torch.full((3, 40, 56), v) for v in (0.0, 1.0, 0.5))
    images, prompts = torch.stack([black, white, grey, white, grey]), ["a", "b", "a", "b", "c"]
    assert_close(monitors.diversity(images, prompts), torch.tensor([0.5, 0.0, 0.5, 0.0, math.nan]), equal_nan=True)
    mixed = monitors.diversity(torch.stack([black, white, grey]), ["a"] * 3)
    assert_close(mixed, torch.tensor([0.75, 0.75, 0.5]))
    order = [2, 0, 4, 3, 1]
    shuffled = monitors.diversity(images[order], [prompts[i] for i in order])
    assert_close(shuffled, monitors.diversity(images, prompts)[order], equal_nan=True)


@pytest.mark.parametrize("monitor", [monitors.edge_density, monitors.colour_entropy, monitors.diversity])
def test_monitors_take_none_or_one_and_refuse_the_rest(monitor):
    assert monitor(torch.empty(0, 3, 9, 9), []).shape == (0,)
    assert monitor(torch.rand(1, 3, 9, 13), ["a"]).shape == (1,)
    assert monitor.higher_is_better is None and monitor.range[0] == 0 and monitor.name == monitor.__name__
    for images in (torch.rand(1, 3, 9, 9) * 2 - 1, torch.full((1, 3, 9, 9), math.nan), torch.zeros(1, 1, 9, 9), [1, 2]):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            monitor(images, ["a"])


# ---- With the published weights


def fetched(reward):
    """The reward with its weights, or a skipped test that says how to fetch them."""
    reward.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        reward.load()
    except ValueError as error:
        pytest.skip(str(error))
    return reward


def drawing(colour):
    image = Image.new("RGB", (512, 512), "white")
    ImageDraw.Draw(image).ellipse((100, 100, 412, 412), fill=colour)
    return image


@pytest.mark.slow
@pytest.mark.parametrize("make, low, high", [(pickscore.PickScore, 10, 30), (clipscore.CLIPScore, 0.2, 1.4)])
def test_the_right_prompt_scores_higher(make, low, high):
    reward, images = fetched(make()), [drawing("red"), drawing("red"), drawing("blue"), drawing("blue")]
    scores = reward(images, ["a red circle", "a blue circle", "a red circle", "a blue circle"])
    assert scores[0] > scores[1] and scores[3] > scores[2] and low < scores.min() and scores.max() < high
    assert_close(reward.model.logit_scale.exp().item(), 100.0, rtol=0.01, atol=0.0)


@pytest.mark.slow
def test_the_published_aesthetic_head():
    reward = fetched(aesthetic.Aesthetic())
    w, b = reward.w.cpu(), reward.b.cpu()
    assert_close(torch.stack([w.norm(), b]), torch.tensor([17.995625, 5.236646]), rtol=1e-5, atol=1e-5)
    assert_close(F.normalize(torch.arange(768.0).sin(), dim=0) @ w + b, torch.tensor(5.867869), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_deqa_prefers_a_clean_picture():
    reward = fetched(deqa.DeQA())
    clean = drawing("red")
    spoilt = np.array(clean) + np.random.default_rng(0).normal(0, 90, (512, 512, 3))
    scores = reward([clean, Image.fromarray(spoilt.clip(0, 255).astype(np.uint8))])
    assert scores[0] > scores[1] + 0.5 and scores.min() >= 1 and scores.max() <= 5


@pytest.mark.slow
def test_printed_texts_are_read():
    reward, font = fetched(ocr.OCR()), ImageFont.load_default(36)
    prompts, images = ocr.make_prompts(64), []
    for prompt in prompts:
        image = Image.new("RGB", (640, 256), "white")
        ImageDraw.Draw(image).text((20, 100), ocr.quoted(prompt), font=font, fill="black")
        images.append(image)
    assert reward(images, prompts).mean() >= 0.98
