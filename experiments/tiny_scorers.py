"""The scorers of rewards/ with tiny random networks, for the tests. Their files lie in a folder as
they are published or converted, so scorers find and load them as they would the real ones.

    tiny = save(folder)
    scores = tiny["pickscore"](batch=2)(images, prompts)
"""

from functools import partial
from unittest import mock

import numpy as np

from experiments import published_networks as networks
from rewards import geneval, geneval_convert, geneval_detector, hpsv2, imagereward
from rewards.aesthetic import Aesthetic
from rewards.clipscore import CLIPScore
from rewards.deqa import DeQA
from rewards.images import as_pictures
from rewards.ocr import OCR
from rewards.pickscore import PickScore


class GenEval(geneval.GenEval):
    """With pictures at a tenth of their size for the detector: a hundred times faster."""

    def detect(self, *given):
        with mock.patch.object(geneval_detector, "EDGES", (133, 80)):
            return super().detect(*given)


def save(folder):
    """{name: what makes this scorer; it takes the scorer's own options}."""
    quality = {}
    for module in (hpsv2, imagereward):
        name = module.__name__.removeprefix("rewards.")
        quality[name] = networks.publish(module, folder, networks.quality_state(name))
    networks.save_clip(folder / "clip")
    networks.save_clip(folder / "clip_224", side=224, patch=32)
    networks.save_head(folder / "head.pth")
    for name in ("deqa", "lines", "letters"):
        (folder / name).mkdir()
    networks.save_deqa(folder / "deqa", networks.deqa_state())
    networks.save_text_detector(folder / "lines")
    networks.save_reader(folder / "letters")
    save_objects(folder / "objects")
    clip, objects = {"weights": folder / "clip"}, {"weights": folder / "objects"}
    objects |= {"clip": folder / "clip_224"}
    return {
        "geneval": partial(GenEval, **objects),
        "geneval_official": partial(GenEval, **objects, mode="official"),
        "ocr": partial(OCR, detector=folder / "lines", reader=folder / "letters"),
        "deqa": partial(DeQA, weights=folder / "deqa"),
        "pickscore": partial(PickScore, **clip, tokenizer=folder / "clip"),
        "clipscore": partial(CLIPScore, **clip),
        "aesthetic": partial(Aesthetic, **clip, head=folder / "head.pth", sha256=None),
        "imagereward": partial(imagereward.ImageReward, **quality["imagereward"]),
        "hpsv2": partial(hpsv2.HPSv2, **quality["hpsv2"]),
    }


def save_objects(folder, digest=geneval_detector.SHA256 + "0" * 56):
    """GenEval's detector, converted from its published names. digest: of the .pth it came from."""
    config = networks.tiny_detector_config()
    converted = geneval_convert.convert(networks.detector_state(), config)
    geneval_convert.save_detector(converted, config, folder, digest)


# ---- What a scorer can judge, with different scores for different pictures


def inputs(scorer, pictures, prompts):
    """(prompts, metadata), one of each for every picture."""
    metadata = [{}] * len(pictures)
    if scorer.name == "ocr":
        prompts = quoting(scorer, pictures, prompts)
    if scorer.name == "geneval":
        metadata = describing(scorer, pictures)
    return prompts, metadata


def quoting(scorer, pictures, prompts):
    """Each prompt with what the scorer reads in quotes; every second time it lacks some letters."""
    texts = [text.replace(" ", "") for text in scorer.read(pictures)]
    missing = ["" if i % 2 == 0 else "!" * (3 * i) for i in range(len(texts))]
    return [f'{prompt} "{text}{end}"' for prompt, text, end in zip(prompts, texts, missing)]


def describing(scorer, pictures):
    """Of a class and a colour that the scorer finds: one thing, or one more than there are."""
    arrays = [np.array(picture) for picture in as_pictures(pictures)]
    if scorer.mode == "reward_server":
        arrays = [geneval.as_jpeg(array) for array in arrays]
    found = scorer.detect(arrays, [0.3] * len(arrays))
    assert sum(map(bool, found)) > len(arrays) / 2  # it does find things
    names = [min(objects, key=lambda n: len(objects[n]), default="cat") for objects in found]
    request = lambda name: {"class": name, "count": 1, "color": "red"}
    lines = [{"tag": "colors", "include": [request(name)]} for name in names]
    scorer.name_colours(arrays, found, lines)
    for i, (name, line) in enumerate(zip(names, lines)):
        things = found[i].get(name, [{"colour": "red"}])
        count = 1 if i % 2 == 0 else len(things) + 1
        line["include"][0] |= {"count": count, "color": things[0]["colour"]}
    return lines
