"""Images per second of each scorer of rewards/, one at a time and in batches, with random weights.

    python experiments/benchmark_rewards.py                # what a CPU can run: minutes
    python experiments/benchmark_rewards.py --device cuda  # with DeQA, and batches up to 64

The weights have the published shapes. A time contains all that a score takes: preparing the
pictures, the networks, what comes after them. Random networks find nothing, so this is arranged:
three cats in an image for GenEval, whose colours are asked for, two lines for OCR, and for UniDet
a label that all 1,000 proposals get. vqa_1 and vqa_8: BLIP-VQA with so many questions an image.

On a CPU one thread is used, and its own time counts, not that of others on the machine.
"""

import argparse
import contextlib
import functools
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers as hf
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.published_networks import DEQA_7B, deqa_shapes, letter_tokenizer
from experiments.published_unidet import depth_config
from rewards import aesthetic, blip_vqa, clipscore, depth, deqa, geneval, geneval_convert, hpsv2
from rewards import imagereward, ocr, pickscore, t2i_compbench, unidet
from rewards.geneval_rules import CLASSES
from rewards.images import as_pictures

PROMPT = 'a red cat beside a sign that says "Hello World"'
PROMPTS = {
    "t2i_color": "a green bench and a blue bowl",
    "t2i_numeracy": "two people and three cups",
}
PROMPTS |= {"t2i_3d": "a man in front of a chair", "t2i_numeracy": "two people and three cups"}
METADATA = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]}


def clip(text, vision, projection):
    """text, vision: (hidden size, layers, heads)."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    text, vision = (dict(zip(names, sizes)) for sizes in (text, vision))
    for config in (text, vision):
        config["intermediate_size"] = 4 * config["hidden_size"]
    text |= {"vocab_size": 49408, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    vision |= {"patch_size": 14, "image_size": 224}
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)
    return hf.CLIPModel(config).eval()


def large():
    return clip((768, 12, 12), (1024, 24, 16), 768)


def processor(side):
    crop = {"height": side, "width": side}
    return hf.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=crop)


def make_pickscore(scorer):
    scorer.model, scorer.tokenizer = clip((1024, 24, 16), (1280, 32, 16), 1024), letter_tokenizer()
    scorer.processor = processor(224)


def make_clipscore(scorer):
    scorer.model, scorer.tokenizer = large(), letter_tokenizer()


def make_hpsv2(scorer):
    scorer.model, scorer.tokenizer = clip((1024, 24, 16), (1280, 32, 16), 1024), letter_tokenizer()


def bert_tokenizer():
    """30,522 words as BERT has, of which only letters are read."""
    letters = [chr(code) for code in range(97, 123)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    words += [f"##{letter}" for letter in letters]
    words += [f"[unused{n}]" for n in range(30522 - len(words))]
    return hf.BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def make_imagereward(scorer):
    scorer.model = imagereward.make_network(imagereward.make_config()).eval()
    scorer.tokenizer = bert_tokenizer()


def blip():
    return blip_vqa.make_network(blip_vqa.make_config()).eval(), bert_tokenizer()


def make_binding(scorer):
    scorer.model = blip()


class Questions:
    """BLIP-VQA with a fixed number of questions an image, as long as T2I-CompBench's."""

    def __init__(self, number, device):
        self.device, self.questions, self.batch = device, ["a red car?"] * number, 8

    def __call__(self, images, prompts, metadata):
        questions = [self.questions] * len(images)
        return blip_vqa.ask(self.model, as_pictures(images), questions, self.batch)


def make_unidet(device):
    network = unidet.Network().eval()
    for predictor in network.roi_heads["box_predictor"]:
        torch.nn.init.zeros_(predictor["cls_score"].weight)
        torch.nn.init.constant_(predictor["cls_score"].bias, -6.0)
        predictor["cls_score"].bias.data[unidet.LABELS.index("person")] = 0.0
    detector = unidet.UniDet(device)
    detector.model = network
    return detector


def make_numeracy(scorer):
    scorer.model = make_unidet(scorer.device)


def make_spatial(scorer):
    estimator = depth.Depth(scorer.device)
    estimator.model = hf.DPTForDepthEstimation(depth_config()).eval()
    estimator.model.dpt.embeddings.image_size = (depth.SIDE, depth.SIDE)
    scorer.model = make_unidet(scorer.device), estimator


def make_aesthetic(scorer):
    scorer.model, scorer.processor = large(), processor(224)
    scorer.w, scorer.b = torch.randn(768), torch.zeros(())


def make_geneval(scorer):
    def three_cats(states):  # (B, Q, 256) -> (B, Q, 81)
        logits = torch.zeros(*states.shape[:2], 81, device=states.device)
        logits[:, :3, CLASSES.index("cat")] = logits[:, 3:, 80] = 20.0
        return logits

    detector = hf.Mask2FormerModel(geneval_convert.detector_config()).eval()
    scorer.model, scorer.mode = (detector, three_cats, large()), "official"
    scorer.tokenizer, scorer.classifiers = letter_tokenizer(), {}


def ocr_networks():
    """PP-OCRv5 mobile in the published shapes, with random weights."""
    backbone = hf.PPOCRV5MobileRecConfig().backbone_config.to_dict() | {"scale": 0.95}
    blocks = backbone["block_configs"]  # with the strides of the published file
    for stage, stride in zip(blocks[1:], ([1, 1], [2, 1], [1, 2], [2, 1])):
        stage[0][3] = stride
    blocks[4][2][3] = [2, 1]
    config = hf.PPOCRV5MobileRecConfig(backbone_config=backbone)
    reader = hf.PPOCRV5MobileRecForTextRecognition(config).eval()
    return hf.PPOCRV5MobileDetForObjectDetection(hf.PPOCRV5MobileDetConfig()).eval(), reader


def make_ocr(scorer):
    def two_lines(model, inputs, output):
        page = torch.zeros_like(output.last_hidden_state)  # (B, 1, h, w)
        h, w = page.shape[-2:]
        for top in (h // 5, h // 2):
            page[..., top : top + h // 10, w // 8 : -w // 8] = 0.9
        output.last_hidden_state = page
        return output

    detector, reader = (ocr.fuse(network) for network in ocr_networks())
    detector.register_forward_hook(two_lines)
    scorer.model, scorer.letters = (detector, reader), ocr.alphabet("a" * 18383, 18385)
    scorer.scale = [torch.full((3, 1, 1), 0.5, device="cpu")] * 2


def make_deqa(scorer):
    shapes = deqa_shapes(DEQA_7B).items()
    state = {name: torch.randn(shape, dtype=torch.float16) * 0.02 for name, shape in shapes}
    scorer.model = deqa.build(DEQA_7B, deqa.convert(state, DEQA_7B), torch.float16).eval()
    scorer.model.to(scorer.device)
    scorer.processor = processor(448)


SCORERS = {
    "geneval": (geneval.GenEval, make_geneval, "Mask2Former Swin-S at 800 x 800, CLIP L/14"),
    "ocr": (ocr.OCR, make_ocr, "PP-OCRv5 mobile"),
    "pickscore": (pickscore.PickScore, make_pickscore, "CLIP H/14"),
    "clipscore": (clipscore.CLIPScore, make_clipscore, "CLIP L/14"),
    "aesthetic": (aesthetic.Aesthetic, make_aesthetic, "CLIP L/14"),
    "imagereward": (imagereward.ImageReward, make_imagereward, "BLIP L/16 at 224, BERT"),
    "hpsv2": (hpsv2.HPSv2, make_hpsv2, "CLIP H/14"),
    "vqa_1": (functools.partial(Questions, 1), make_binding, "BLIP B/16 at 480, BERT"),
    "vqa_8": (functools.partial(Questions, 8), make_binding, "BLIP B/16 at 480, BERT"),
    "t2i_color": (
        functools.partial(t2i_compbench.AttributeBinding, "color"),
        make_binding,
        "BLIP B/16 at 480, BERT",
    ),
    "t2i_numeracy": (t2i_compbench.Numeracy, make_numeracy, "UniDet R50 at 479 x 479"),
    "t2i_3d": (
        functools.partial(t2i_compbench.Spatial3D, "official"),
        make_spatial,
        "UniDet R50, DPT-Hybrid at 480 x 480",
    ),
    "deqa": (deqa.DeQA, make_deqa, "mPLUG-Owl2 7B at 448 x 448"),
}
TITLES = ["scorer", "networks", "images / s, one at a time", "best batch", "images / s", "ratio"]
TITLES += ["ms an image outside the networks", "peak GB"]


def clock(device):
    if device == "cpu":
        return time.process_time()  # of one thread, see main
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds(scorer, images, budget=0.0):
    """Median time of a call on all these images, of as many calls as the budget (s) allows."""
    set_batch(scorer, len(images))
    times, prompts = [], [scorer.prompt] * len(images)
    while not times or (sum(times) < budget and len(times) < 20):
        began = clock(scorer.device)
        scorer(images, prompts, [METADATA] * len(images))
        times.append(clock(scorer.device) - began)
    return statistics.median(times)


def set_batch(scorer, batch):
    """Of a scorer, and of the detectors that T2I-CompBench's scorers hold as their model."""
    scorer.batch = batch
    models = [scorer.model]
    if isinstance(scorer.model, tuple):
        models = scorer.model
    for model in models:
        if isinstance(model, unidet.UniDet | depth.Depth):
            model.batch = batch


def outside_networks(scorer, images):
    """Seconds of a call outside its networks: pictures, boxes, letters. A GPU waits for them."""
    nested, inside, began = 0, 0.0, 0.0

    def enter(module, inputs):
        nonlocal nested, began
        if nested == 0:
            began = clock(scorer.device)
        nested += 1

    def leave(module, inputs, output):
        nonlocal nested, inside
        nested -= 1
        if nested == 0:
            inside += clock(scorer.device) - began

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    whole = seconds(scorer, images)
    for hook in hooks:
        hook.remove()
    return whole - inside


def measure(name, images, batches, device, budget):
    """One row of the table."""
    kind, make, networks = SCORERS[name]
    if name == "deqa" and device == "cpu":  # 33 GB and minutes for an image
        return [name, networks, "not run here", "", "", "", "", ""]
    torch.manual_seed(0)
    scorer = kind(device=device)
    scorer.prompt = PROMPTS.get(name, PROMPT)
    with torch.device(device):
        make(scorer)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    took = {1: seconds(scorer, images[:1])}  # a warm-up; below it is measured again
    for batch in batches:
        fastest = min(took[b] / b for b in took)
        if batch <= 2 or batch * fastest < 4 * budget:
            with contextlib.suppress(torch.OutOfMemoryError):
                took[batch] = seconds(scorer, images[:batch], budget)
    best = min((b for b in took if b > 1), key=lambda b: took[b] / b, default=1)
    outside = 1000 * outside_networks(scorer, images[:best]) / best
    peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if device == "cuda" else "not measured"
    rates = [f"{1 / took[1]:.3g}", str(best), f"{best / took[best]:.3g}"]
    return [name, networks, *rates, f"{took[1] * best / took[best]:.2f}", f"{outside:.0f}", peak]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("--device", choices=("cpu", "cuda"), default="cpu")
    flag("--scorers", nargs="+", choices=SCORERS, default=list(SCORERS))
    flag("--batches", nargs="+", type=int, help="default: 1 2 4 8 on a CPU, 1 to 64 on a GPU")
    flag("--size", type=int, default=512, help="of the images, in pixels (default: 512)")
    flag("--budget", type=float, default=5.0, help="seconds for a batch size (default: 5)")
    args = parser.parse_args()
    batches = args.batches or [1, 2, 4, 8]
    if args.device == "cuda" and not args.batches:
        batches += [16, 32, 64]
    coarse = torch.rand(max(batches), 3, 16, 16, generator=torch.Generator().manual_seed(0))
    size = (args.size, args.size)
    images = torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1)
    where = "CPU, one thread"
    if args.device == "cpu":
        torch.set_num_threads(1)
    else:
        where = torch.cuda.get_device_name()
    print(f"{where}, images of {args.size} x {args.size}, random weights\n")
    for row in (TITLES, ["---"] * len(TITLES)):
        print("| " + " | ".join(row) + " |")
    for name in args.scorers:
        row = measure(name, images, batches, args.device, args.budget)
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
