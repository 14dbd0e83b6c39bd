"""The scorers of the paper's tables by name, for `--rewards rewards`.

    python evaluate.py --rewards rewards --tasks ocr --prompts ocr=data/ocr_test.txt …

Nothing is loaded until a scorer is first called. A reward and a metric are the same function:
`REWARDS["pickscore"](images, prompts, metadata) -> scores (B,)`.
"""

import support  # noqa: F401  quiets what follows
from rewards.aesthetic import Aesthetic
from rewards.clipscore import CLIPScore
from rewards.deqa import DeQA
from rewards.geneval import GenEval
from rewards.ocr import OCR
from rewards.pickscore import PickScore

REWARDS = {
    "geneval": GenEval(),  # the softened reward; the published column fits it
    "geneval_official": GenEval(mode="official"),
    "ocr": OCR(),
    "deqa": DeQA(),
    "pickscore": PickScore(),
    "clipscore": CLIPScore(),
    "aesthetic": Aesthetic(),
}
