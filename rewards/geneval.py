"""GenEval: are the objects of the prompt in the image, in the right number, colour and place?

    from rewards.geneval import GenEval
    scorer = GenEval(device="cuda")            # loads nothing yet
    scorer(images, prompts, metadata)          # (B,) rewards
    scorer.judge(images, metadata)             # per image: tag, official and strict verdict, reward

The benchmark of arXiv 2310.11513. A Mask2Former finds the objects (geneval_detector.py), CLIP
names their colours (here), rules compare them with the prompt's metadata (geneval_rules.py).
geneval_convert.py converts the detector's published weights; geneval_prompts.py writes training
prompts. Two modes:

    official        djghosh13/geneval evaluation/evaluate_images.py; the score is 0 or 1
    reward_server   yifan123/reward-server gen_eval.py, with which Flow-GRPO and Flow-OPD train; the
                    score is softened. Four peculiarities of upstream are kept: images become JPEGs;
                    the detector gets red and blue exchanged (RGB passed on as BGR); CLIP runs with
                    GELU for QuickGELU; a violated position earns .75 (`position_slip`)

Weights: GenEval's detector (Apache-2.0; geneval_detector.FETCH has the command) and
openai/clip-vit-large-patch14 (MIT). GenEval itself is MIT. Not checked here against the real
weights. Images are scored in float32 with TF32 off, because every decision hangs on a threshold.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from rewards.geneval_detector import WEIGHTS, find_objects, load_detector
from rewards.geneval_rules import COLOURS, check_metadata, official, softened
from rewards.images import as_pictures, exact_float32

CLIP = "openai/clip-vit-large-patch14"
FETCH_CLIP = (
    f"hf download {CLIP} --include '*.json' --include merges.txt --include model.safetensors"
)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # evaluate_images.py: an object's score must exceed this
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}",
             "a photo of a {colour} object")  # fmt: skip


class GenEval:
    """Callable (images, prompts, metadata) -> (B,) float32 on the CPU.

    The score is the softened reward, at most 1, or 0 / 1 with mode="official".
    images: see `as_pictures`; metadata: a line of GenEval's for each; prompts are not read.
    weights: the folder that geneval_convert.py made; clip: hub id or folder. Nothing is downloaded.
    Both are loaded at the first image, onto `device`; `scorer.model = None` drops them again.
    batch: images per forward pass; it does not change scores.
    ValueError, one line, where weights are missing or wrong, and where images or metadata cannot be
    scored."""

    name, higher_is_better = "geneval", True
    range = (0.0, 1.0)  # the scale, not bounds: with 1 wanted and 4 found the softened reward is -2

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
        self.device = device
        self.weights = weights
        self.clip = clip
        self.mode = mode
        self.position_slip = position_slip
        self.batch = batch
        self.model = None

    def load(self) -> None:
        detector, head = load_detector(self.weights, self.device)
        try:
            clip, self.tokenizer = load_clip(self.clip, gelu=self.mode == "reward_server")
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            what = f"cannot load CLIP from {self.clip} ({reason})"
            raise ValueError(f"geneval: {what}; fetch it: {FETCH_CLIP}") from error
        clip.to(self.device).eval().requires_grad_(False)
        self.classifiers = {}
        self.model = (detector, head, clip)

    def detect(self, arrays: list[np.ndarray], thresholds: Sequence[float]) -> list[dict]:
        """(H, W, 3) uint8 arrays, a threshold for each -> the objects of each image."""
        if self.model is None:
            self.load()
        detector, head, _ = self.model
        swap = self.mode == "reward_server"
        return find_objects(detector, head, arrays, thresholds, swap, self.batch, self.device)

    @torch.no_grad()
    def colour_classifier(self, name: str) -> torch.Tensor:
        """(10, D): for each colour the normalised mean of three normalised text embeddings.

        This is clip_benchmark's zero-shot classifier."""
        if name not in self.classifiers:
            texts = []
            for colour in COLOURS:
                texts += [template.format(colour=colour, name=name) for template in TEMPLATES]
            tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
            clip = self.model[2]
            rows = clip.get_text_features(**tokens.to(self.device)).pooler_output  # (30, D)
            rows = F.normalize(rows, dim=-1).view(len(COLOURS), len(TEMPLATES), -1)
            self.classifiers[name] = F.normalize(rows.mean(1), dim=-1)
        return self.classifiers[name]

    @torch.no_grad()
    def name_colours(
        self, arrays: list[np.ndarray], found: list[dict], metadata: Sequence[dict]
    ) -> None:
        """Fill in "colour" of the objects of every class whose colour the metadata asks for."""
        targets = []
        for array, objects, line in zip(arrays, found, metadata):
            for name in {request["class"] for request in line["include"] if "color" in request}:
                targets += [(array, name, thing) for thing in objects.get(name, [])]
        clip = self.model[2]
        for start in range(0, len(targets), 64):
            chosen = targets[start : start + 64]
            crops = torch.stack([crop_object(array, thing) for array, _, thing in chosen])
            crops = crops.to(self.device)  # (N, 3, 224, 224)
            with exact_float32(self.device):
                features = clip.get_image_features(pixel_values=crops).pooler_output  # (N, D)
                if not features.isfinite().all():  # argmax would name a colour all the same
                    advice = "check the device and fetch it again"
                    raise ValueError(f"geneval: CLIP's output is not finite; {advice}")
                for (_, name, thing), feature in zip(chosen, features):
                    similarity = self.colour_classifier(name) @ feature  # argmax needs no norm
                    thing["colour"] = COLOURS[similarity.argmax()]

    def check(self, prompts: Sequence[str] | None, metadata: Sequence[dict]) -> None:
        """ValueError, one line, where metadata cannot be judged. To be called before sampling."""
        for i, line in enumerate(metadata):
            check_metadata(line, i)

    def judge(
        self, images: torch.Tensor | Sequence[Image.Image], metadata: Sequence[dict]
    ) -> list[dict]:
        """-> for each image {"tag", "correct" (official), "strict", "soft"}.

        All three rules get the objects that this mode finds."""
        self.check(None, metadata)
        arrays = [np.array(picture) for picture in as_pictures(images)]
        if len(arrays) != len(metadata):
            counts = f"{len(arrays)} images and {len(metadata)} lines of metadata"
            raise ValueError(f"geneval: {counts}; give one line per image")
        if not arrays:
            return []
        if self.mode == "reward_server":
            arrays = [as_jpeg(array) for array in arrays]
        counting = [line["tag"] == "counting" for line in metadata]
        thresholds = [COUNTING_THRESHOLD if strict else THRESHOLD for strict in counting]
        found = self.detect(arrays, thresholds)
        self.name_colours(arrays, found, metadata)
        results = []
        for objects, line in zip(found, metadata):
            reward, strict = softened(objects, line, self.position_slip)
            result = {"tag": line["tag"], "correct": official(objects, line)}
            results.append(result | {"strict": strict, "soft": reward})
        return results

    def __call__(
        self,
        images: torch.Tensor | Sequence[Image.Image],
        prompts: Sequence[str],
        metadata: Sequence[dict],
    ) -> torch.Tensor:
        if len(prompts) != len(metadata):
            counts = f"{len(prompts)} prompts and {len(metadata)} lines of metadata"
            raise ValueError(f"geneval: {counts}; give one line per prompt")
        key = "correct" if self.mode == "official" else "soft"
        return torch.tensor([float(result[key]) for result in self.judge(images, metadata)])


def as_jpeg(array: np.ndarray) -> np.ndarray:
    """What flow_grpo's client sends: a JPEG at Pillow's defaults (quality 75, 4:2:0)."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG")
    return np.array(Image.open(buffer))


# ---- Colours: CLIP on the object alone, against grey


def load_clip(clip: str | Path, gelu: bool) -> tuple[CLIPModel, CLIPTokenizer]:
    """CLIP in float32 and its tokenizer. OSError where the folder lacks something.

    gelu: open_clip 2.29 and later builds OpenAI's weights with GELU, and only warns about it."""
    config = CLIPConfig.from_pretrained(clip, local_files_only=True)
    if gelu:
        config.text_config.hidden_act = config.vision_config.hidden_act = "gelu"
    tokenizer = CLIPTokenizer.from_pretrained(clip, local_files_only=True)
    model, info = CLIPModel.from_pretrained(
        clip,
        config=config,
        local_files_only=True,
        use_safetensors=True,
        dtype=torch.float32,
        output_loading_info=True,
    )
    missing = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
    if missing:  # transformers would use random weights in their place
        raise OSError(f"it lacks {missing[0]}")
    # After an incomplete download transformers makes an empty tokenizer.
    if len(tokenizer) != config.text_config.vocab_size:
        raise OSError("tokenizer and model differ in vocabulary")
    return model, tokenizer


def crop_object(array: np.ndarray, found: dict) -> torch.Tensor:
    """(H, W, 3) uint8 and an object -> (3, 224, 224): its box, with #999 around the object."""
    picture, mask = Image.fromarray(array), Image.fromarray(found["mask"])
    alone = Image.composite(picture, Image.new("RGB", picture.size, "#999"), mask)
    return clip_pixels(alone.crop(tuple(round(v) for v in found["box"])))


def clip_pixels(picture: Image.Image) -> torch.Tensor:
    """CLIP's preprocessing as torchvision does it: PIL -> (3, 224, 224).

    transformers' own rounds the crop's offset down; torchvision rounds it."""
    w, h = picture.size
    if w <= h:
        size = (224, int(224 * h / w))
    else:
        size = (int(224 * w / h), 224)
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = (int(round((edge - 224) / 2)) for edge in picture.size)
    crop = np.array(picture.crop((left, top, left + 224, top + 224)))
    x = torch.from_numpy(crop).permute(2, 0, 1).float() / 255
    return (x - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
