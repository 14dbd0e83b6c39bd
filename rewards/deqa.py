"""DeQA-Score: image quality whatever the prompt, from how a language model would finish a sentence. 1 to 5.

    from rewards.deqa import DeQA
    scores = DeQA(device="cuda")(images)  # (B,) SD3.5-Medium 4.07 in the paper

The model (mPLUG-Owl2, 7B) reads "USER: How would you rate the quality of this image? <image> ASSISTANT: The quality of
the image is" and the score is the expectation of 5, 4, 3, 2, 1 under the probabilities of excellent, good, fair, poor,
bad as the next word (DeQA-Score, arXiv 2501.11561; src/evaluate/scorer.py). The paper's tables are on this scale;
Flow-GRPO's reward server returns a fifth of it.

Why a port: the published code patches LLaMA globally and does not import under transformers 5. Nothing of it runs here
(no remote code). Put together from parts of transformers:
    picture 448 x 448 -> CLIP ViT-L/14, all 1025 tokens normalised    CLIPVisionModel, weights renamed by `convert`
    -> 64 learned queries attend to them, six layers, + 1 end token   Abstractor
    -> 65 places in a LLaMA whose key, value and norm weights differ for words and picture   LlamaForCausalLM + Multiway
tests/test_rewards.py holds it against a plain rewriting of the published forward pass, on random weights.

Weights: zhiyuanyou/DeQA-Score-Mix3 (MIT; LLaMA 2 terms for its base), pickled shards, read with weights_only.
    hf download zhiyuanyou/DeQA-Score-Mix3
Not checked against the real weights here. float32 takes 33 GB; the authors run float16, half of that.
"""

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import cached_file

FETCH = "hf download zhiyuanyou/DeQA-Score-Mix3"
# One constant prompt, so its tokens are written out: no tokenizer is needed, and the picture's place is known.
# `check_vocabulary` compares them with the checkpoint's own tokenizer.model whenever that is loaded.
BEFORE = [1, 3148, 1001, 29901, 1128, 723, 366, 6554, 278, 11029, 310, 445, 1967, 29973, 13]
AFTER = [29871, 13, 22933, 9047, 13566, 29901, 450, 11029, 310, 278, 1967, 338]
LEVELS = {"excellent": 15129, "good": 1781, "fair": 6534, "poor": 6460, "bad": 4319}
SPELLED = {  # SentencePiece writes a space as ▁ and a newline as its byte
    "<s>▁USER:▁How▁would▁you▁rate▁the▁quality▁of▁this▁image?<0x0A>": BEFORE,
    "▁<0x0A>ASSISTANT:▁The▁quality▁of▁the▁image▁is": AFTER,
    **{"▁" + word: [token] for word, token in LEVELS.items()},
}


class DeQA:
    """Callable (images, prompts=None, metadata=None) -> (B,) float32 on the CPU. images: see `as_pictures`.

    device: where the model lives once it is needed (first call); `reward.model = None` drops it again.
    weights: hub id or directory; never downloaded here, ValueError with the command where it is missing.
    dtype: default torch.float16 on a GPU, as the authors run it, torch.float32 on a CPU.
    batch: images per forward pass; scores do not depend on it beyond rounding."""

    name, higher_is_better = "deqa", True
    range = (1.0, 5.0)

    def __init__(
        self,
        device: torch.device | str = "cpu",
        weights: str | Path = "zhiyuanyou/DeQA-Score-Mix3",
        dtype: torch.dtype | None = None,
        batch: int = 8,
    ) -> None:
        self.device, self.weights, self.dtype, self.batch, self.model = device, weights, dtype, batch, None

    def load(self) -> None:
        try:
            folder = Path(cached_file(self.weights, "config.json", local_files_only=True)).parent
            config = json.loads((folder / "config.json").read_text())
            check_vocabulary(folder / "tokenizer.model")
            dtype = self.dtype or (torch.float16 if torch.device(self.device).type == "cuda" else torch.float32)
            model = build(config, convert(read_checkpoint(folder), config), dtype)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]  # torch lists missing and unexpected weights over several lines
            raise ValueError(f"deqa: cannot load {self.weights} ({reason}); fetch it with: {FETCH}") from error
        side = config["visual_config"]["visual_model"]["image_size"]
        self.processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
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
            pixels = self.processor(pictures[i : i + self.batch], return_tensors="pt").pixel_values  # (b, 3, 448, 448)
            logits = level_logits(self.model, pixels.to(self.device, self.model.dtype))  # (b, 5)
            scores.append(expected_level(logits).cpu())
        return torch.cat(scores)


def level_logits(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Logits (B, 5) of the five words after the prompt, best level first; pixels (B, 3, S, S)."""
    core = model.model
    tokens = core.vision_model(pixels).last_hidden_state  # (B, 1 + patches, D), before the last norm
    picture = core.visual_abstractor(core.vision_model.post_layernorm(tokens))  # (B, 65, hidden)
    words = [torch.tensor([ids] * len(pixels), device=pixels.device) for ids in (BEFORE, AFTER)]
    before, after = (core.embed_tokens(w) for w in words)  # (B, 15, hidden), (B, 12, hidden)
    sequence = torch.cat([before, picture, after], 1)  # (B, 92, hidden)
    logits = model(inputs_embeds=sequence, use_cache=False, logits_to_keep=1).logits  # (B, 1, vocabulary)
    return logits[:, -1, list(LEVELS.values())]


def expected_level(logits: torch.Tensor) -> torch.Tensor:
    """(B, 5) logits of excellent … bad -> (B,) expectation of 5 … 1 under their softmax."""
    return logits.float().softmax(1) @ torch.arange(5.0, 0.0, -1.0, device=logits.device)


def square(picture: Image.Image) -> Image.Image:
    """Padded to a square with CLIP's mean colour, int(mean * 255), the picture in the middle (scorer.py)."""
    side = max(picture.size)
    padded = Image.new("RGB", (side, side), (122, 116, 104))
    padded.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return padded


class Multiway(nn.Module):
    """Two copies of a layer, one for the places of words and one for those of the picture (modeling_llama2.py)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.multiway = nn.ModuleList([layer, copy.deepcopy(layer)])  # 0 words, 1 picture, as in the checkpoint

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, 15 words + picture + 12 words, D)
        words, picture = self.multiway
        first, last = len(BEFORE), x.shape[1] - len(AFTER)
        return torch.cat([words(x[:, :first]), picture(x[:, first:last]), words(x[:, last:])], 1)


class AbstractorLayer(nn.Module):
    """Queries attend to themselves and the picture's tokens; then a gated MLP. Names as in the checkpoint."""

    def __init__(self, config: dict, queries: int) -> None:
        super().__init__()
        D, E, inner = config["hidden_size"], config["encoder_hidden_size"], config["intermediate_size"]
        attention = nn.ModuleDict({"query": nn.Linear(D, D), "key": nn.Linear(E, D), "value": nn.Linear(E, D)})
        attention.register_buffer("q_pos_embed", torch.zeros(queries, D))
        attention.register_buffer("k_pos_embed", torch.zeros((config.get("grid_size") or 32) ** 2 + 1, D))
        mlp = nn.ModuleDict({"w1": nn.Linear(D, inner), "w2": nn.Linear(inner, D), "w3": nn.Linear(D, inner)})
        mlp["ffn_ln"] = nn.LayerNorm(inner, eps=config["layer_norm_eps"])
        output = nn.ModuleDict({"out_proj": nn.Linear(D, D), "norm2": nn.LayerNorm(D), "mlp": mlp})
        self.crossattention = nn.ModuleDict(
            {"attention": attention, "output": output, "norm1": nn.LayerNorm(D), "normk": nn.LayerNorm(E)}
        )
        self.heads = config["num_attention_heads"]

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:  # (B, 64, D), (B, 1025, E)
        attention, output = self.crossattention["attention"], self.crossattention["output"]
        x = self.crossattention["norm1"](x)  # also what the residual adds to
        both = torch.cat([x, self.crossattention["normk"](tokens)], 1)  # (B, 64 + 1025, D)
        places = torch.cat([attention.q_pos_embed, attention.k_pos_embed])  # (64 + 1025, D)
        split = lambda y: y.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, N, D) -> (B, heads, N, D / heads)
        q = split(attention["query"](x + attention.q_pos_embed))
        k, v = split(attention["key"](both + places)), split(attention["value"](both))
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, 64, D)
        x = x + output["out_proj"](found)
        mlp, y = output["mlp"], output["norm2"](x)
        return x + mlp["w2"](mlp["ffn_ln"](F.silu(mlp["w1"](y)) * mlp["w3"](y)))


class Abstractor(nn.Module):
    """1025 tokens of the picture -> 64 learned queries + 1 end token, in the language model's space (visual_encoder.py)."""

    def __init__(self, config: dict, hidden: int) -> None:
        super().__init__()
        queries, D = config["num_learnable_queries"], config["hidden_size"]
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList([AbstractorLayer(config, queries) for _ in range(config["num_hidden_layers"])])}
        )
        self.visual_fc = nn.Linear(D, hidden)
        self.query_embeds = nn.Parameter(torch.zeros(1, queries, D))
        self.vit_eos = nn.Parameter(torch.zeros(1, 1, hidden))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # (B, 1025, E)
        x = self.query_embeds.expand(len(tokens), -1, -1)
        for layer in self.encoder["layers"]:
            x = layer(x, tokens)
        return torch.cat([self.visual_fc(x), self.vit_eos.expand(len(tokens), -1, -1)], 1)  # (B, 65, hidden)


def build(config: dict, state: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The model with the converted weights `state`; every weight must be there, in its shape, and none too many."""
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    llama = LlamaConfig(
        **{name: config[name] for name in [*names.split(), "rms_norm_eps", "max_position_embeddings"]},
        rope_parameters={"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)},
    )
    vision, abstractor = config["visual_config"]["visual_model"], config["visual_config"]["visual_abstractor"]
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size layer_norm_eps"
    clip = CLIPVisionConfig(**{name: vision[name] for name in names.split()}, hidden_act="quick_gelu")
    with torch.device("meta"):  # no memory and no random numbers: the checkpoint's tensors take these places
        model = LlamaForCausalLM(llama)
        model.model.vision_model = CLIPVisionModel(clip)
        model.model.visual_abstractor = Abstractor(abstractor, llama.hidden_size)
        for layer in model.model.layers:
            layer.self_attn.k_proj, layer.self_attn.v_proj = Multiway(layer.self_attn.k_proj), Multiway(layer.self_attn.v_proj)
            layer.input_layernorm = Multiway(layer.input_layernorm)
            layer.post_attention_layernorm = Multiway(layer.post_attention_layernorm)
    model.load_state_dict({key: tensor.to(dtype) for key, tensor in state.items()}, strict=True, assign=True)
    # What is computed, not stored, was left on "meta"
    model.model.rotary_emb = LlamaRotaryEmbedding(llama)
    model.model.vision_model.embeddings.position_ids = torch.arange((clip.image_size // clip.patch_size) ** 2 + 1)[None]
    return model


# A published name contains the left side; CLIPVisionModel's name has the right side in its place. All in vision_model.
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
    """Published weights by name -> the names and shapes of `build`. One to one, but for the picture encoder's joint
    query_key_value, which becomes three. Only LLaMA's rotary_emb.inv_freq, a computed table, is left out."""
    heads = config["visual_config"]["visual_model"]["num_attention_heads"]
    state = {}
    for key, tensor in published.items():
        if key.endswith("rotary_emb.inv_freq"):
            continue
        if not key.startswith("model.vision_model."):
            state[key] = tensor
            continue
        if ".query_key_value." in key:
            # rows are ordered (heads, 3, D / heads): each head's query, key and value together
            parts = tensor.unflatten(0, (heads, 3, -1)).unbind(1)  # 3 x (heads, D / heads, ...)
            for name, part in zip(("q_proj", "k_proj", "v_proj"), parts):
                state[key.replace("query_key_value", name)] = part.flatten(0, 1).contiguous()
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
    """All shards of a directory as one dict on the CPU. A shard named in the index and not there is an error."""
    index = folder / "pytorch_model.bin.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["pytorch_model.bin"]
    state = {}
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():  # nothing outside the folder
            raise ValueError(f"there is no shard {name!r} in {folder}")
        state |= torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
    return state


def check_vocabulary(path: Path) -> None:
    """The token numbers above must spell the prompt and the five words in this tokenizer.model, else ValueError."""
    pieces = []
    for number, piece in fields(path.read_bytes()):  # ModelProto (sentencepiece_model.proto): field 1 holds the pieces ...
        if number == 1:
            pieces.append(dict(fields(piece))[1].decode())  # ... and field 1 of a piece its text
    for text, ids in SPELLED.items():
        spelled = "".join(pieces[i] for i in ids) if max(ids) < len(pieces) else "nothing"
        if spelled != text:
            raise ValueError(f"{path}: tokens {ids} spell {spelled!r} there, not {text!r}: another tokenizer")


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a protobuf message; value is an int, or bytes for anything longer."""
    at = 0

    def varint():
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
        size = {1: 8, 5: 4}.get(tag & 7) or varint()  # fixed sizes; everything else tells its length
        yield tag >> 3, message[at : at + size]
        at += size


def as_pictures(images: torch.Tensor | Sequence[Image.Image]) -> list[Image.Image]:
    """(B, 3, H, W) floats in [0, 1], rounded to bytes as flow_grpo's training does, or PIL images -> RGB PIL images."""
    if isinstance(images, torch.Tensor):
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:] or not images.is_floating_point():
            raise ValueError(f"images: (B, 3, H, W) floats in [0, 1] are needed, not {images.dtype} {tuple(images.shape)}")
        if len(images) and not (images.amin() >= -1e-3 and images.amax() <= 1 + 1e-3):  # so written, nan fails too
            raise ValueError(f"images must lie in [0, 1]; these span {images.amin():.3g} to {images.amax():.3g}")
        pixels = (images.detach().float() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(p) for p in pixels]
    pictures = []
    for i, image in enumerate(images):
        try:
            pictures.append(image.convert("RGB"))
        except (AttributeError, OSError, SyntaxError) as error:
            raise ValueError(f"image {i} cannot be decoded ({error}); a PIL image of a whole file is needed") from error
    return pictures
