"""Images a second of each scorer of rewards/, one image at a time and in batches: random weights in the published shapes.

    python tests/benchmark_rewards.py                      # what a CPU can run: minutes
    python tests/benchmark_rewards.py --device cuda        # with DeQA, and batches up to 64

All that a score takes is in the time: preparing the pictures, the networks (float32 without TF32; DeQA on a GPU float16),
and what comes after them. Random networks find nothing, so what they find is arranged: three cats an image for GenEval,
whose colours are asked for, and two lines an image for OCR.
"""

import argparse
import contextlib
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from tqdm import tqdm
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Mask2FormerModel,
    PPOCRV5MobileDetConfig,
    PPOCRV5MobileDetForObjectDetection,
    PPOCRV5MobileRecConfig,
    PPOCRV5MobileRecForTextRecognition,
)

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from test_rewards import FULL, letter_tokenizer, published_shapes

from rewards import aesthetic, clipscore, deqa, geneval, ocr, pickscore

PROMPT = 'a red cat beside a sign that says "Hello World"'
METADATA = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]}


def clip(text, vision, projection, device):
    """(hidden, layers) of both towers, heads of 64 or 80, an inner width of four times the hidden one."""
    size = lambda hidden, layers, heads: {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * hidden
    }  # fmt: skip
    ends = {"vocab_size": 49408, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    vision = size(*vision, 16) | {"patch_size": 14, "image_size": 224}
    config = CLIPConfig(text_config=size(*text, text[0] // 64) | ends, vision_config=vision, projection_dim=projection)
    return CLIPModel(config).eval().to(device)


large = lambda device: clip((768, 12), (1024, 24), 768, device)
picture_processor = lambda side: CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def make_pickscore(device):
    scorer = pickscore.PickScore(device)
    scorer.model, scorer.tokenizer = clip((1024, 24), (1280, 32), 1024, device), letter_tokenizer()
    scorer.processor = picture_processor(224)
    return scorer


def make_clipscore(device):
    scorer = clipscore.CLIPScore(device)
    scorer.model, scorer.tokenizer = large(device), letter_tokenizer()
    return scorer


def make_aesthetic(device):
    scorer = aesthetic.Aesthetic(device)
    scorer.model, scorer.processor = large(device), picture_processor(224)
    scorer.w, scorer.b = torch.randn(768, device=device), torch.zeros((), device=device)
    return scorer


def make_geneval(device):
    scorer = geneval.GenEval(device=device, mode="official")
    detector = Mask2FormerModel(geneval.detector_config()).eval().to(device)

    def three_cats(states):  # (B, Q, 256) -> (B, Q, 81)
        logits = torch.zeros(*states.shape[:2], 81, device=states.device)
        logits[:, :3, geneval.CLASSES.index("cat")] = logits[:, 3:, 80] = 20.0
        return logits

    scorer.model, scorer.tokenizer, scorer.classifiers = (detector, three_cats, large(device)), letter_tokenizer(), {}
    return scorer


def make_ocr(device):
    def two_lines(model, inputs, output):
        page = torch.zeros_like(output.last_hidden_state)  # (B, 1, h, w)
        h, w = page.shape[-2:]
        for top in (h // 5, h // 2):
            page[..., top : top + h // 10, w // 8 : -w // 8] = 0.9
        output.last_hidden_state = page
        return output

    config = PPOCRV5MobileRecConfig()
    backbone = config.backbone_config.to_dict()
    for stage, stride in zip(backbone["block_configs"][1:], ([1, 1], [2, 1], [1, 2], [2, 1])):  # the published file's
        stage[0][3] = stride
    backbone["block_configs"][4][2][3] = [2, 1]
    config = PPOCRV5MobileRecConfig(backbone_config=backbone | {"scale": 0.95})
    detector = PPOCRV5MobileDetForObjectDetection(PPOCRV5MobileDetConfig()).eval().to(device)
    detector.register_forward_hook(two_lines)
    scorer = ocr.OCR(device)
    scorer.model = detector, PPOCRV5MobileRecForTextRecognition(config).eval().to(device)
    scorer.letters, scorer.scale = ocr.alphabet("a" * 18383, 18385), [torch.full((3, 1, 1), 0.5)] * 2
    return scorer


def make_deqa(device):
    scorer, shapes = deqa.DeQA(device), published_shapes(FULL)
    state = {name: torch.randn(shape, dtype=torch.float16, device=device) * 0.02 for name, shape in shapes.items()}
    scorer.model = deqa.build(FULL, deqa.convert(state, FULL), torch.float16).eval().to(device)
    scorer.processor = picture_processor(448)
    return scorer


SCORERS = {
    "geneval": (make_geneval, "Mask2Former Swin-S at 800 x 800, CLIP L/14"),
    "ocr": (make_ocr, "PP-OCRv5 mobile"),
    "pickscore": (make_pickscore, "CLIP H/14"),
    "clipscore": (make_clipscore, "CLIP L/14"),
    "aesthetic": (make_aesthetic, "CLIP L/14"),
    "deqa": (make_deqa, "mPLUG-Owl2 7B at 448 x 448"),
}


def outside_networks(scorer, images, device):
    """Seconds an image that a call spends outside its networks: pictures, boxes, letters; what a GPU would wait for."""
    state = {"depth": 0, "seconds": 0.0}

    def clock():
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def enter(module, inputs):
        state["began"] = state["began"] if state["depth"] else clock()
        state["depth"] += 1

    def leave(module, inputs, output):
        state["depth"] -= 1
        if not state["depth"]:
            state["seconds"] += clock() - state["began"]

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    whole = seconds(scorer, images, device, 0)
    [hook.remove() for hook in hooks]
    return (whole - state["seconds"]) / len(images)


def seconds(scorer, images, device, budget):
    """Median time of a call on all these images, of as many calls as the budget (s) allows, at least one."""
    scorer.batch, times = len(images), []
    while not times or (sum(times) < budget and len(times) < 20):
        began = time.perf_counter()
        scorer(images, [PROMPT] * len(images), [METADATA] * len(images))
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--scorers", nargs="+", choices=SCORERS, default=list(SCORERS))
    parser.add_argument("--batches", nargs="+", type=int, help="default: 1 2 4 8 on a CPU, 1 to 64 on a GPU")
    parser.add_argument("--size", type=int, default=512, help="of the images, in pixels (default: 512)")
    parser.add_argument(
        "--budget",
        type=float,
        default=5.0,
        help="seconds a batch size, at most about 4 times that (default: 5)",
    )
    args = parser.parse_args()
    batches = args.batches or ([1, 2, 4, 8] if args.device == "cpu" else [1, 2, 4, 8, 16, 32, 64])
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(max(batches), 3, 16, 16, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (args.size, args.size), mode="bicubic").clamp(0, 1)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, images of {args.size} x {args.size}, random weights\n")
    titles = ["scorer", "networks", "images / s, one at a time", "best batch", "images / s", "ratio"]
    titles += ["ms an image outside the networks", "peak GB"]
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    for name in tqdm(args.scorers, "scorers", disable=None):
        make, networks = SCORERS[name]
        if name == "deqa" and args.device == "cpu":  # 33 GB and minutes an image
            tqdm.write(f"| {name} | {networks} | not run here | | | | | |")
            continue
        torch.manual_seed(0)
        with torch.device(args.device):
            scorer = make(args.device)
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            took = {1: seconds(scorer, images[:1], args.device, 0)}  # a warm-up
            for batch in batches:
                if batch <= 2 or batch * min(took[b] / b for b in took) < 4 * args.budget:
                    with contextlib.suppress(torch.OutOfMemoryError):
                        took[batch] = seconds(scorer, images[:batch], args.device, args.budget)
        best = min((b for b in took if b > 1), key=lambda b: took[b] / b, default=1)
        outside = 1000 * outside_networks(scorer, images[:best], args.device)
        peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if args.device == "cuda" else "not measured"
        rates = f"{1 / took[1]:.3g} | {best} | {best / took[best]:.3g} | {took[1] * best / took[best]:.2f}"
        rates += f" | {outside:.0f} | {peak}"
        tqdm.write(f"| {name} | {networks} | {rates} |")
        del scorer


if __name__ == "__main__":
    main()
