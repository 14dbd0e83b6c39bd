"""T2I-CompBench's colour, shape, texture, numeracy and 3D-spatial scores, in one environment.

    from rewards.t2i_compbench import AttributeBinding, Numeracy, Spatial3D
    AttributeBinding("color", device="cuda")(images, prompts)  # (B,), each in 0 … 1
    Numeracy(device="cuda")(images, prompts)
    Spatial3D(device="cuda")(images, prompts)

The benchmark of arXiv 2307.06350 and its ++ edition (Karine-Huang/T2I-CompBench, MIT):

    t2i_color       product over the prompt's noun phrases of BLIP's P(yes) to "a red car?"
    t2i_shape       the same for "an oval mirror?"
    t2i_texture     the same for "a wooden floor?"
    t2i_numeracy    mean over the objects of 1/2 (found) + 1/2 (found as often as asked)
    t2i_3d          1/4 score(X) + 1/4 score(Y) + 1/2 place; the place is min(1, 2 IoU) if the mean
                    depths of X and Y are in the right order, else 0
    t2i_3d_fixed    the same, with depth taken inside the objects' boxes. Upstream takes it at the
                    place mirrored at the diagonal, and so does t2i_3d.

Networks: blip_vqa.py, unidet.py and depth.py, which name their weights and licences, and what was
checked. Rules, with all that upstream does unexpectedly: t2i_rules.py. A category has 300 prompts,
each with ten images. The benchmark's other categories (2D-spatial, non-spatial, complex) are not
here.

t2i_export.py writes images for upstream's own scripts and compares the scores image by image. That
comparison has not been made: no real weights were at hand.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

from rewards import blip_vqa, depth, unidet
from rewards.images import as_pictures
from rewards.t2i_rules import binding_score, numeracy_score, questions, relation, requested
from rewards.t2i_rules import spatial_score


class AttributeBinding:
    """Callable (images, prompts, metadata=None) -> (B,) float32 on the CPU.

    attribute: "color", "shape" or "texture"; the prompts must be the benchmark's of this category.
    images: see `as_pictures`.
    device: where BLIP is loaded at the first call; `reward.model = None` drops it again.
    weights, tokenizer: folders or hub ids, see `blip_vqa.load`. Nothing is downloaded.
    batch: images per forward pass; it changes scores by no more than rounding."""

    higher_is_better = True
    range = (0.0, 1.0)

    def __init__(
        self,
        attribute: str,
        device: torch.device | str = "cpu",
        weights: str | Path = blip_vqa.WEIGHTS,
        tokenizer: str | Path = blip_vqa.TOKENIZER,
        batch: int = 8,
    ) -> None:
        if attribute not in ("color", "shape", "texture"):
            raise ValueError(f"t2i: attribute {attribute!r} is not color, shape or texture")
        self.name = f"t2i_{attribute}"
        self.attribute = attribute
        self.device = device
        self.weights = weights
        self.vocabulary = tokenizer
        self.batch = batch
        self.model = None

    def load(self) -> None:
        self.model = blip_vqa.load(self.weights, self.vocabulary, self.device)

    def check(self, prompts: Sequence[str], metadata: Sequence[dict] | None = None) -> None:
        """ValueError, one line, for a prompt outside the benchmark. To call before sampling."""
        read(self.name, prompts, questions, self.attribute)

    def __call__(
        self,
        images: torch.Tensor | Sequence[Image.Image],
        prompts: Sequence[str],
        metadata: Sequence[dict] | None = None,
    ) -> torch.Tensor:
        asked = read(self.name, prompts, questions, self.attribute)
        pictures = pair(self.name, images, asked)
        if not pictures:
            return torch.empty(0)
        if self.model is None:
            self.load()
        answers = blip_vqa.ask(self.model, pictures, asked, self.batch)
        return torch.tensor([binding_score(yes) for yes in answers])


class Numeracy:
    """Callable (images, prompts, metadata=None) -> (B,) float32 on the CPU.

    images: see `as_pictures`.
    device: where UniDet is loaded at the first call; `reward.model = None` drops it again.
    weights: path of its .pth, see unidet.py. Nothing is downloaded.
    batch: images per forward pass."""

    name, higher_is_better = "t2i_numeracy", True
    range = (0.0, 1.0)

    def __init__(
        self,
        device: torch.device | str = "cpu",
        weights: str | Path = unidet.FILE,
        batch: int = 8,
    ) -> None:
        self.device = device
        self.weights = weights
        self.batch = batch
        self.model = None

    def load(self) -> None:
        self.model = unidet.UniDet(self.device, self.weights, self.batch)
        self.model.load()

    def check(self, prompts: Sequence[str], metadata: Sequence[dict] | None = None) -> None:
        """ValueError, one line, for a prompt that asks for no known object."""
        read(self.name, prompts, requested)

    def __call__(
        self,
        images: torch.Tensor | Sequence[Image.Image],
        prompts: Sequence[str],
        metadata: Sequence[dict] | None = None,
    ) -> torch.Tensor:
        requests = read(self.name, prompts, requested)
        pictures = pair(self.name, images, requests)
        if not pictures:
            return torch.empty(0)
        if self.model is None:
            self.load()
        found = self.model.detect(pictures)
        return torch.tensor([numeracy_score(*both) for both in zip(found, requests)])


class Spatial3D:
    """Callable (images, prompts, metadata=None) -> (B,) float32 on the CPU.

    images: see `as_pictures`.
    mode: "official", or "fixed", in which depth is looked up inside the objects' boxes.
    device: where UniDet and the depth network are loaded at the first call; `reward.model = None`
    drops them again.
    detector, estimator: their weights, see unidet.py and depth.py. Nothing is downloaded.
    batch: images per forward pass."""

    higher_is_better = True
    range = (0.0, 1.0)

    def __init__(
        self,
        mode: str = "official",
        device: torch.device | str = "cpu",
        detector: str | Path = unidet.FILE,
        estimator: str | Path = depth.MODEL,
        batch: int = 8,
    ) -> None:
        if mode not in ("official", "fixed"):
            raise ValueError(f"t2i_3d: mode {mode!r} is neither 'official' nor 'fixed'")
        self.name = {"official": "t2i_3d", "fixed": "t2i_3d_fixed"}[mode]
        self.mode = mode
        self.device = device
        self.detector = detector
        self.estimator = estimator
        self.batch = batch
        self.model = None

    def load(self) -> None:
        detector = unidet.UniDet(self.device, self.detector, self.batch)
        estimator = depth.Depth(self.device, self.estimator, self.batch)
        detector.load()
        estimator.load()
        self.model = detector, estimator

    def check(self, prompts: Sequence[str], metadata: Sequence[dict] | None = None) -> None:
        """ValueError, one line, for a prompt without a 3D relation."""
        read(self.name, prompts, relation)

    def __call__(
        self,
        images: torch.Tensor | Sequence[Image.Image],
        prompts: Sequence[str],
        metadata: Sequence[dict] | None = None,
    ) -> torch.Tensor:
        relations = read(self.name, prompts, relation)
        pictures = pair(self.name, images, relations)
        if not pictures:
            return torch.empty(0)
        if self.model is None:
            self.load()
        detector, depths = self.model
        rows = zip(detector.detect(pictures), depths.depth(pictures), relations)
        return torch.tensor([spatial_score(*row, self.mode) for row in rows])


def read(name: str, prompts: Sequence[str], rule: Callable, *more) -> list:
    """What a rule reads from each prompt. ValueError, one line, for one that it cannot read."""
    try:
        return [rule(prompt, *more) for prompt in prompts]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def pair(name: str, images: torch.Tensor | Sequence[Image.Image], asked: list) -> list[Image.Image]:
    """The images as pictures; there must be as many as prompts."""
    pictures = as_pictures(images)
    if len(pictures) != len(asked):
        counts = f"{len(pictures)} images and {len(asked)} prompts"
        raise ValueError(f"{name}: {counts}; give one prompt per image")
    return pictures
