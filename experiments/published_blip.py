"""BLIP's VQA as it was published (models/blip_vqa.py, vit.py, med.py of salesforce/BLIP): names and
shapes of its weights, and P(yes) to one question about one image, in plain functions. The tests
hold rewards/blip_vqa.py against it. The two encoders are those of published_networks.py.
"""

import string

import torch
import torch.nn.functional as F
from transformers import BertTokenizer

from experiments.published_networks import blip_image, blip_shapes, blip_text, random_state

VQA = dict(vision=(768, 12), text=(768, 12), side=480, words=30524)
# Yes, no and the two tokens of BLIP have fixed numbers, so the vocabulary keeps its size.
VQA_TINY = dict(vision=(24, 2), text=(24, 2), side=48, words=30524)
ENCODER, DECODER = "text_encoder.", "text_decoder.bert."


def vqa_shapes(vision, text, side, words):
    """{name: shape}: vision, text encoder, and a decoder that looks at the encoder's states."""
    shapes, width = blip_shapes(vision, text, side, words), text[0]
    decoder = blip_shapes(text, text, side, words)
    shapes |= {DECODER + k.removeprefix(ENCODER): v for k, v in decoder.items() if ENCODER in k}
    head = "text_decoder.cls.predictions."
    shapes |= {head + "bias": (words,), head + "decoder.bias": (words,)}
    shapes |= {head + "decoder.weight": (words, width)}
    for part, shape in {"dense": (width, width), "LayerNorm": (width,)}.items():
        shapes[f"{head}transform.{part}.weight"] = shape
        shapes[f"{head}transform.{part}.bias"] = (width,)
    return shapes


def vqa_state(sizes, seed=0):
    """Random weights, with the decoder's output tied to its word embeddings."""
    state, head = random_state(vqa_shapes(**sizes), seed), "text_decoder.cls.predictions."
    state[head + "decoder.weight"] = state[DECODER + "embeddings.word_embeddings.weight"].clone()
    state[head + "decoder.bias"] = state[head + "bias"].clone()
    return state


def vqa_yes(state, heads, pixels, ids):
    """pixels (3, H, W), ids of a question's tokens, [CLS] first -> P(yes), by the whole softmax."""
    image = blip_image(state, heads[0], pixels[None])  # (1, M, D)
    ids, mask = torch.tensor([30523, *ids[1:]]), torch.ones(1, len(ids))  # [ENC] for [CLS]
    encoder = {k: v for k, v in state.items() if ENCODER in k}
    seen = blip_text(encoder, heads[1], ids[None], mask, image)  # (1, L, D)
    decoder = {ENCODER + k.removeprefix(DECODER): v for k, v in state.items() if DECODER in k}
    start = torch.tensor([[30522]])
    x = blip_text(decoder, heads[1], start, torch.ones(1, 1), seen)[0, 0]  # (D,)
    head = "text_decoder.cls.predictions."
    weight, bias = (state[f"{head}transform.dense.{part}"] for part in ("weight", "bias"))
    x = F.gelu(F.linear(x, weight, bias))
    weight, bias = (state[f"{head}transform.LayerNorm.{part}"] for part in ("weight", "bias"))
    x = F.layer_norm(x, x.shape, weight, bias, 1e-12)
    logits = F.linear(x, state[head + "decoder.weight"], state[head + "decoder.bias"])
    yes, no = logits.softmax(0)[[2748, 2053]].tolist()
    return yes / (yes + no)


def save_vqa(folder):
    """file.pth with VQA_TINY, and a vocabulary of BERT's size that spells. Returns the state."""
    state = vqa_state(VQA_TINY)
    torch.save({"model": state}, f"{folder}/file.pth")
    words = [f"[unused{i}]" for i in range(30522)]
    words[:5] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "?"]
    words[100:126] = string.ascii_lowercase
    words[200:226] = ["##" + letter for letter in string.ascii_lowercase]
    words[2748], words[2053] = "yes", "no"
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return state


def tiny_config(config):
    """The published configuration with the sizes of VQA_TINY; heads and epsilons stay."""
    for part, size in (config.vision_config, "vision"), (config.text_config, "text"):
        part.hidden_size, part.num_hidden_layers = VQA_TINY[size]
        part.intermediate_size = 4 * part.hidden_size
    config.vision_config.image_size = VQA_TINY["side"]
    config.text_config.encoder_hidden_size = VQA_TINY["vision"][0]
    return config
