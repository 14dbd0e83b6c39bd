"""The scorers of the paper's tables by name, for `--rewards rewards`. Nothing is loaded until a scorer is first called.

    python evaluate.py --rewards rewards --tasks geneval ocr pickscore deqa --prompts geneval=data/geneval_test.jsonl …

A reward is a metric is a function: `REWARDS["pickscore"](images, prompts, metadata) -> scores (B,)`. Every file beside this
one stands alone and can be copied.
"""

from rewards.aesthetic import Aesthetic
from rewards.clipscore import CLIPScore
from rewards.deqa import DeQA
from rewards.geneval import GenEval
from rewards.ocr import OCR
from rewards.pickscore import PickScore

REWARDS = {
    "geneval": GenEval(),  # the softened reward: what trains, and what the published GenEval column fits
    "geneval_official": GenEval(mode="official"),
    "ocr": OCR(),
    "deqa": DeQA(),
    "pickscore": PickScore(),
    "clipscore": CLIPScore(),
    "aesthetic": Aesthetic(),
}
