"""ImageReward: how much people would prefer this image for this prompt, from a BLIP that sees both.

    from rewards.imagereward import ImageReward
    scores = ImageReward(device="cuda")(images, prompts)  # (B,), about -2.3 to 2

ViT-L/16 turns the image into 197 vectors. BERT reads the prompt with cross-attention to them. Five
linear layers turn its [CLS] vector h into a number, which is standardised (ImageReward.py):

    score = (MLP(h) - 0.16717362830052426) / 1.0333394966054072

There is no activation between the layers, so together they are one affine map w h + b. The prompt
is cut at 33 word pieces. Image i is scored with prompt i; the package's `inference_rank`, given
lists of both, scores every image with every prompt. Flow-OPD's table has 1.02 to 1.36, not divided.

Weights: ImageReward.pt of zai-org/ImageReward (Apache-2.0; its SHA-256 is checked), converted once.
Tokenizer: google-bert/bert-base-uncased (Apache-2.0). FETCH below is the command for both.
Checked here: the original's forward pass, written as plain functions, on random weights. The real
weights were not at hand. The four scores that the repository publishes are in a test marked slow.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import BertTokenizer, BlipConfig, BlipTextModel, BlipVisionModel

from rewards import blip
from rewards.images import as_pictures

FILE, WEIGHTS = "ImageReward.pt", "weights/imagereward"
SHA256 = "d71dc8d4912bc633c06ab8ef1ef6a81e8199d4369f14b47b29baf1d19de561f6"
REFUSED = {}
TOKENIZER = "google-bert/bert-base-uncased"
FETCH = (
    f"hf download zai-org/ImageReward {FILE} --local-dir weights"
    f" && python -m rewards.convert imagereward weights/{FILE} --out {WEIGHTS}"
    f" && hf download {TOKENIZER} --include 'tokenizer*.json' --include vocab.txt"
)
SCORE_MEAN, SCORE_STD = 0.16717362830052426, 1.0333394966054072
LENGTH = 35  # tokens of a prompt, [CLS] and [SEP] included
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
LAYERS = (0, 2, 4, 6, 7)  # of the MLP; the numbers between them are dropout


class ImageReward:
    """Callable (images, prompts, metadata=None) -> (B,) float32 on the CPU.

    images: see `as_pictures`.
    device: where the model is loaded at the first call; `reward.model = None` drops it again.
    weights: folder that rewards.convert wrote; tokenizer: hub id or folder. Nothing is downloaded:
    where one is missing, ValueError names the command.
    batch: images per forward pass; it changes scores by no more than rounding.
    sha256: hash of the .pt that the weights must come from; None accepts any."""

    name, higher_is_better = "imagereward", True
    range = (-2.3, 2.0)  # the usual values, not bounds: 0 is the mean of the training pairs

    def __init__(
        self,
        device: torch.device | str = "cpu",
        weights: str | Path = WEIGHTS,
        tokenizer: str | Path = TOKENIZER,
        batch: int = 32,
        sha256: str | None = SHA256,
    ) -> None:
        self.device = device
        self.weights = weights
        self.vocabulary = tokenizer
        self.batch = batch
        self.sha256 = sha256
        self.model = None

    def load(self) -> None:
        try:
            file = Path(self.weights) / "model.safetensors"
            with safe_open(file, "pt") as tensors:
                source = (tensors.metadata() or {}).get("source_sha256")
            config = BlipConfig.from_pretrained(self.weights, local_files_only=True)
            with torch.device("meta"):  # no memory, no random numbers: the file's tensors go here
                model = make_network(config)
            model.load_state_dict(load_file(file), strict=True, assign=True)
            self.tokenizer = BertTokenizer.from_pretrained(self.vocabulary, local_files_only=True)
        except Exception as error:
            what = f"{self.weights}, {self.vocabulary}"
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"imagereward: cannot load {what} ({reason}); {FETCH}") from error
        if self.sha256 and source != self.sha256:
            what = f"{self.weights} was not converted from {FILE}"
            raise ValueError(f"imagereward: {what}; {FETCH}")
        # BLIP's own [DEC] and [ENC] follow BERT's words; ImageReward uses neither.
        if len(self.tokenizer) + 2 != config.text_config.vocab_size:
            what = f"{self.vocabulary} and {self.weights} differ in vocabulary"
            raise ValueError(f"imagereward: {what}; {FETCH}")
        # What is computed and not stored is still on "meta".
        positions = torch.arange(config.text_config.max_position_embeddings)
        model["text_encoder"].embeddings.position_ids = positions[None]
        self.model = model.eval().requires_grad_(False).to(self.device)

    @torch.no_grad()
    def __call__(
        self,
        images: torch.Tensor | Sequence[Image.Image],
        prompts: Sequence[str],
        metadata: Sequence[dict] | None = None,
    ) -> torch.Tensor:
        pictures, prompts = as_pictures(images), list(prompts)
        if len(pictures) != len(prompts):
            counts = f"{len(pictures)} images and {len(prompts)} prompts"
            raise ValueError(f"imagereward: {counts}; give one prompt per image")
        if pictures and self.model is None:
            self.load()
        scores = [torch.empty(0)]
        for i in range(0, len(pictures), self.batch):
            side = self.model["vision_model"].config.image_size
            prepared = [prepare(picture, side) for picture in pictures[i : i + self.batch]]
            pixels = torch.stack(prepared).to(self.device)  # (b, 3, 224, 224)
            seen = self.model["vision_model"](pixels).last_hidden_state  # (b, 197, 1024)
            tokens = self.tokenizer(
                prompts[i : i + self.batch],
                padding="max_length",
                truncation=True,
                max_length=LENGTH,
                return_tensors="pt",
            ).to(self.device)
            read = self.model["text_encoder"](
                tokens.input_ids,
                attention_mask=tokens.attention_mask,
                encoder_hidden_states=seen,
            ).last_hidden_state  # (b, 35, 768)
            reward = self.model["head"](read[:, 0])[:, 0]  # at [CLS]
            scores.append(((reward - SCORE_MEAN) / SCORE_STD).cpu())
        return torch.cat(scores)


def prepare(picture: Image.Image, side: int) -> torch.Tensor:
    """RGB picture of any size -> (3, side, side): the shorter side to `side`, the centre cut out.

    Of an odd number of surplus pixels torchvision's crop rounds the half to an even number;
    CLIPImageProcessor rounds it down, which can be a pixel further."""
    W, H = picture.size
    short = min(W, H)
    w, h = int(side * W / short), int(side * H / short)
    left, top = round((w - side) / 2), round((h - side) / 2)
    picture = picture.resize((w, h), Image.Resampling.BICUBIC)
    picture = picture.crop((left, top, left + side, top + side))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255  # (3, side, side)
    return (pixels - MEAN) / STD


# ---- For rewards/convert.py


def make_config() -> BlipConfig:
    """BLIP large at 224. Two of transformers' defaults are not BLIP's: eps and the 8 text heads."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision |= {"num_attention_heads": 16, "image_size": 224, "layer_norm_eps": 1e-6}
    text = {"num_attention_heads": 12, "encoder_hidden_size": 1024}
    return BlipConfig(vision_config=vision, text_config=text)


def make_network(config: BlipConfig) -> torch.nn.ModuleDict:
    """BLIP's two encoders, and the MLP as one linear layer."""
    return torch.nn.ModuleDict(
        {
            "vision_model": BlipVisionModel(config.vision_config),
            "text_encoder": BlipTextModel(config.text_config, add_pooling_layer=False),
            "head": torch.nn.Linear(config.text_config.hidden_size, 1),
        }
    )


def convert(content: dict) -> dict[str, torch.Tensor]:
    """The published file -> the network's weights: 294 of the vision encoder, 316 of the text
    encoder, 2 of the head. vision_proj and text_proj served BLIP's training and are left out."""
    state = {key.removeprefix("blip."): tensor for key, tensor in content.items()}
    for unused in ("vision_proj", "text_proj"):
        del state[f"{unused}.weight"], state[f"{unused}.bias"]
    w, b = fold(state)
    return blip.rename(state) | {"head.weight": w, "head.bias": b}


def fold(state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes the five layers out of `state`: as one affine map w (1, 768), b (1,), in float64."""
    w = torch.eye(state["mlp.layers.0.weight"].shape[1], dtype=torch.float64)
    b = torch.zeros(len(w), dtype=torch.float64)
    for layer in LAYERS:
        weight = state.pop(f"mlp.layers.{layer}.weight").double()
        bias = state.pop(f"mlp.layers.{layer}.bias").double()
        w, b = weight @ w, weight @ b + bias  # (outer, 768), (outer,)
    return w.float(), b.float()
