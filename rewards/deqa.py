"""DeQA-Score: image quality whatever the prompt, from 1 to 5.

    from rewards.deqa import DeQA
    scores = DeQA(device="cuda")(images)  # (B,); SD3.5-Medium has 4.07 in the paper

A language model that sees the image (mPLUG-Owl2, 7B) reads "USER: How would you rate the quality of
this image? <image> ASSISTANT: The quality of the image is". The score is the expectation of 5, 4,
3, 2, 1 under the probabilities of excellent, good, fair, poor, bad as the next word (DeQA-Score,
arXiv 2501.11561; src/evaluate/scorer.py). The paper's tables are on this scale; Flow-GRPO's reward
server returns a fifth of it.

Why a port: the published code patches LLaMA globally and cannot be imported under transformers 5.
Nothing of it runs here (no remote code). The model is put together from parts of transformers:
    CLIPVisionModel               image 448 x 448 -> CLIP ViT-L/14, all 1025 tokens, normalised;
                                  its weights are renamed by `convert`
    Abstractor                    64 learned queries attend to them, six layers; + 1 end token
    LlamaForCausalLM + Multiway   a LLaMA that reads these 65 in place of <image>; its key, value
                                  and norm weights differ between words and image
tests/test_rewards.py compares it with a plain rewriting of the published forward pass, on random
weights.

Weights: zhiyuanyou/DeQA-Score-Mix3 (MIT; LLaMA 2 terms for its base), pickled shards, read with
weights_only. FETCH below is the command that downloads them.
Not checked here against the real weights. float32 takes 33 GB; the authors run float16, half of it.
"""

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import cached_file

from rewards.images import as_pictures

MODEL = "zhiyuanyou/DeQA-Score-Mix3"
FETCH = f"hf download {MODEL}"
# The prompt never changes, so its tokens are written out: no tokenizer is needed.
# `check_vocabulary` compares them with the checkpoint's own tokenizer.model at every loading.
BEFORE = [1, 3148, 1001, 29901, 1128, 723, 366, 6554, 278, 11029, 310, 445, 1967, 29973, 13]
AFTER = [29871, 13, 22933, 9047, 13566, 29901, 450, 11029, 310, 278, 1967, 338]
LEVELS = {"excellent": 15129, "good": 1781, "fair": 6534, "poor": 6460, "bad": 4319}
SPELLED = {  # SentencePiece writes a space as ▁ and a newline as its byte
    "<s>▁USER:▁How▁would▁you▁rate▁the▁quality▁of▁this▁image?<0x0A>": BEFORE,
    "▁<0x0A>ASSISTANT:▁The▁quality▁of▁the▁image▁is": AFTER,
    **{"▁" + word: [token] for word, token in LEVELS.items()},
}


class DeQA:
    """Callable (images, prompts=None, metadata=None) -> (B,) float32 on the CPU.

    images: see `as_pictures`.
    device: where the model is loaded at the first call; `reward.model = None` drops it again.
    weights: hub id or folder. Nothing is downloaded: where it is missing, ValueError names the
    command.
    dtype: by default torch.float16 on a GPU, as the authors run it, and torch.float32 on a CPU.
    batch: images per forward pass; it changes scores by no more than rounding."""

    name, higher_is_better = "deqa", True
    range = (1.0, 5.0)

    def __init__(
        self,
        device: torch.device | str = "cpu",
        weights: str | Path = MODEL,
        dtype: torch.dtype | None = None,
        batch: int = 8,
    ) -> None:
        self.device = device
        self.weights = weights
        self.dtype = dtype
        self.batch = batch
        self.model = None

    def load(self) -> None:
        try:
            folder = Path(cached_file(self.weights, "config.json", local_files_only=True)).parent
            config = json.loads((folder / "config.json").read_text())
            check_vocabulary(folder / "tokenizer.model")
            dtype = self.dtype or default_dtype(self.device)
            model = build(config, convert(read_checkpoint(folder), config), dtype)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]  # torch lists weights over several lines
            what = f"cannot load {self.weights} ({reason})"
            raise ValueError(f"deqa: {what}; fetch it with: {FETCH}") from error
        side = config["visual_config"]["visual_model"]["image_size"]
        self.processor = CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )
        self.model = model.eval().to(self.device)

    @torch.no_grad()
    def __call__(
        self,
        images: torch.Tensor | Sequence[Image.Image],
        prompts: Sequence[str] | None = None,
        metadata: Sequence[dict] | None = None,
    ) -> torch.Tensor:
        pictures = [square(p) for p in as_pictures(images)]
        if pictures and self.model is None:
            self.load()
        scores = [torch.empty(0)]
        for i in range(0, len(pictures), self.batch):
            prepared = self.processor(pictures[i : i + self.batch], return_tensors="pt")
            pixels = prepared.pixel_values.to(self.device, self.model.dtype)  # (b, 3, 448, 448)
            logits = level_logits(self.model, pixels)  # (b, 5)
            scores.append(expected_level(logits).cpu())
        return torch.cat(scores)


def default_dtype(device: torch.device | str) -> torch.dtype:
    on_gpu = torch.device(device).type == "cuda"
    return torch.float16 if on_gpu else torch.float32


def level_logits(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Logits (B, 5) of the five words after the prompt, best level first; pixels (B, 3, S, S)."""
    core = model.model
    tokens = core.vision_model(pixels).last_hidden_state  # (B, 1 + patches, D), not yet normalised
    picture = core.visual_abstractor(core.vision_model.post_layernorm(tokens))  # (B, 65, hidden)

    def embed(ids: list[int]) -> torch.Tensor:
        return core.embed_tokens(torch.tensor([ids] * len(pixels), device=pixels.device))

    sequence = torch.cat([embed(BEFORE), picture, embed(AFTER)], 1)  # (B, 15 + 65 + 12, hidden)
    out = model(inputs_embeds=sequence, use_cache=False, logits_to_keep=1)
    return out.logits[:, -1, list(LEVELS.values())]


def expected_level(logits: torch.Tensor) -> torch.Tensor:
    """(B, 5) logits of excellent … bad -> (B,) expectation of 5 … 1 under their softmax."""
    return logits.float().softmax(1) @ torch.arange(5.0, 0.0, -1.0, device=logits.device)


def square(picture: Image.Image) -> Image.Image:
    """The picture in the middle of a square of CLIP's mean colour, int(mean * 255) (scorer.py)."""
    side = max(picture.size)
    padded = Image.new("RGB", (side, side), (122, 116, 104))
    padded.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return padded


class Multiway(nn.Module):
    """Two copies of a layer: one for words, one for the picture (modeling_llama2.py)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # 0 words, 1 picture, as in the checkpoint
        self.multiway = nn.ModuleList([layer, copy.deepcopy(layer)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, 15 words + picture + 12 words, D)."""
        words, picture = self.multiway
        first, last = len(BEFORE), x.shape[1] - len(AFTER)
        return torch.cat([words(x[:, :first]), picture(x[:, first:last]), words(x[:, last:])], 1)


class AbstractorLayer(nn.Module):
    """Queries attend to themselves and the picture's tokens; then a gated MLP.

    Names are those of the checkpoint."""

    def __init__(self, config: dict, queries: int) -> None:
        super().__init__()
        D, E = config["hidden_size"], config["encoder_hidden_size"]
        inner = config["intermediate_size"]
        places = (config.get("grid_size") or 32) ** 2 + 1  # the picture's tokens
        self.heads = config["num_attention_heads"]
        attention = nn.ModuleDict()
        attention["query"] = nn.Linear(D, D)
        attention["key"] = nn.Linear(E, D)
        attention["value"] = nn.Linear(E, D)
        attention.register_buffer("q_pos_embed", torch.zeros(queries, D))
        attention.register_buffer("k_pos_embed", torch.zeros(places, D))
        mlp = nn.ModuleDict()
        mlp["w1"] = nn.Linear(D, inner)
        mlp["w2"] = nn.Linear(inner, D)
        mlp["w3"] = nn.Linear(D, inner)
        mlp["ffn_ln"] = nn.LayerNorm(inner, eps=config["layer_norm_eps"])
        output = nn.ModuleDict({"out_proj": nn.Linear(D, D), "norm2": nn.LayerNorm(D), "mlp": mlp})
        self.crossattention = nn.ModuleDict({"attention": attention, "output": output})
        self.crossattention["norm1"] = nn.LayerNorm(D)
        self.crossattention["normk"] = nn.LayerNorm(E)

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """x (B, 64, D), tokens (B, 1025, E) -> (B, 64, D)."""

        def split(y: torch.Tensor) -> torch.Tensor:
            """(B, N, D) -> (B, heads, N, D / heads)"""
            return y.unflatten(2, (self.heads, -1)).transpose(1, 2)

        attention, output = self.crossattention["attention"], self.crossattention["output"]
        x = self.crossattention["norm1"](x)  # the residual adds to the normalised x
        both = torch.cat([x, self.crossattention["normk"](tokens)], 1)  # (B, 64 + 1025, D)
        positions = torch.cat([attention.q_pos_embed, attention.k_pos_embed])  # (64 + 1025, D)
        q = split(attention["query"](x + attention.q_pos_embed))
        k = split(attention["key"](both + positions))
        v = split(attention["value"](both))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, 64, D)
        x = x + output["out_proj"](attended)
        mlp, y = output["mlp"], output["norm2"](x)
        gated = F.silu(mlp["w1"](y)) * mlp["w3"](y)
        return x + mlp["w2"](mlp["ffn_ln"](gated))


class Abstractor(nn.Module):
    """1025 tokens of the picture -> 64 learned queries + 1 end token, as LLaMA reads them.

    Published as visual_encoder.py."""

    def __init__(self, config: dict, hidden: int) -> None:
        super().__init__()
        queries, D = config["num_learnable_queries"], config["hidden_size"]
        layers = [AbstractorLayer(config, queries) for _ in range(config["num_hidden_layers"])]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.visual_fc = nn.Linear(D, hidden)
        self.query_embeds = nn.Parameter(torch.zeros(1, queries, D))
        self.vit_eos = nn.Parameter(torch.zeros(1, 1, hidden))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, 1025, E) -> (B, 65, hidden)."""
        x = self.query_embeds.expand(len(tokens), -1, -1)
        for layer in self.encoder["layers"]:
            x = layer(x, tokens)
        return torch.cat([self.visual_fc(x), self.vit_eos.expand(len(tokens), -1, -1)], 1)


SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LLAMA = (*SIZES, "vocab_size", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings")
VISION = (*SIZES, "image_size", "patch_size", "layer_norm_eps")


def build(
    config: dict, state: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """The model with the converted weights `state`; names and shapes must fit exactly."""
    visual = config["visual_config"]
    rope = {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)}
    llama = LlamaConfig(**{name: config[name] for name in LLAMA}, rope_parameters=rope)
    clip = CLIPVisionConfig(
        **{name: visual["visual_model"][name] for name in VISION}, hidden_act="quick_gelu"
    )
    with torch.device("meta"):  # no memory, no random numbers: the checkpoint's tensors go here
        model = LlamaForCausalLM(llama)
        core = model.model
        core.vision_model = CLIPVisionModel(clip)
        core.visual_abstractor = Abstractor(visual["visual_abstractor"], llama.hidden_size)
        for layer in core.layers:
            layer.self_attn.k_proj = Multiway(layer.self_attn.k_proj)
            layer.self_attn.v_proj = Multiway(layer.self_attn.v_proj)
            layer.input_layernorm = Multiway(layer.input_layernorm)
            layer.post_attention_layernorm = Multiway(layer.post_attention_layernorm)
    converted = {key: tensor.to(dtype) for key, tensor in state.items()}
    model.load_state_dict(converted, strict=True, assign=True)
    # What is computed and not stored is still on "meta".
    core.rotary_emb = LlamaRotaryEmbedding(llama)
    positions = (clip.image_size // clip.patch_size) ** 2 + 1
    core.vision_model.embeddings.position_ids = torch.arange(positions)[None]
    return model


# In the names of vision_model, the left side becomes the right side.
RENAMED = {
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.patch_embed.": "embeddings.patch_embedding.",
    "embeddings.position_embedding": "embeddings.position_embedding.weight",
    "embeddings.pre_layernorm.": "pre_layrnorm.",
    ".self_attn.dense.": ".self_attn.out_proj.",
    ".input_layernorm.": ".layer_norm1.",
    ".post_attention_layernorm.": ".layer_norm2.",
}


def convert(published: dict[str, torch.Tensor], config: dict) -> dict[str, torch.Tensor]:
    """Published weights by name -> the names and shapes of `build`.

    One to one, with two exceptions: the vision model's joint query_key_value becomes three weights,
    and LLaMA's rotary_emb.inv_freq, a computed table, is left out."""
    heads = config["visual_config"]["visual_model"]["num_attention_heads"]
    state = {}
    for key, tensor in published.items():
        if key.endswith("rotary_emb.inv_freq"):
            continue
        if not key.startswith("model.vision_model."):
            state[key] = tensor
            continue
        if ".query_key_value." in key:
            # Rows are ordered (heads, 3, D / heads): each head's query, key and value together.
            projections = tensor.unflatten(0, (heads, 3, -1)).unbind(1)  # 3 x (heads, D / heads, …)
            for name, projection in zip(("q_proj", "k_proj", "v_proj"), projections):
                to = key.replace("query_key_value", name)
                state[to] = projection.flatten(0, 1).contiguous()
            continue
        for old, new in RENAMED.items():
            if old in key:
                key = key.replace(old, new)
                break
        if key.endswith("class_embedding"):
            tensor = tensor.flatten()  # (1, 1, D) -> (D,)
        elif key.endswith("position_embedding.weight"):
            tensor = tensor.squeeze(0)  # (1, N, D) -> (N, D)
        state[key] = tensor
    return state


def read_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """All shards of a folder as one dict on the CPU; a shard that is missing is an error."""
    index = folder / "pytorch_model.bin.index.json"
    names = {"pytorch_model.bin"}
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
    state = {}
    for name in sorted(names):
        if Path(name).name != name or not (folder / name).is_file():  # nothing outside the folder
            raise ValueError(f"there is no shard {name!r} in {folder}")
        state |= torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
    return state


def check_vocabulary(path: Path) -> None:
    """ValueError unless the tokens above spell the prompt and the five words in this file."""
    pieces = []
    # sentencepiece_model.proto: field 1 of the model holds the pieces, field 1 of a piece its text
    for number, piece in fields(path.read_bytes()):
        if number == 1:
            pieces.append(dict(fields(piece))[1].decode())
    for text, ids in SPELLED.items():
        spelled = "".join(pieces[i] for i in ids if i < len(pieces))
        if spelled != text:
            what = f"tokens {ids} spell {spelled!r} there, not {text!r}"
            raise ValueError(f"{path}: {what}: another tokenizer")


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a protobuf message; value is an int, or bytes if longer."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = message[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(tag & 7) or varint()  # others begin with their length
        yield tag >> 3, message[at : at + size]
        at += size
