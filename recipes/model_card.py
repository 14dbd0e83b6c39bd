"""The model card of an adapter. With it the folder is ready to share:

    hf upload ORG/NAME runs/sd35m_opd/adapter .

Every stage calls write_card where it publishes an adapter, and again when it has scores. The hub
reads the front matter: base model, licence, tags, and in "widget" the prompts and pictures that
<Gallery /> shows (its documentation: "Model Card components").
"""

import argparse
import json
import math
import re
import shlex
import shutil
import sys
from pathlib import Path

from huggingface_hub import ModelCardData
from PIL import Image

from support.files import ADAPTER, fetch, hub_id, read_json, save_json
from support.metrics import read_log
from support.run import rank_and_world

METHODS = {
    "train_teacher": "trained by GRPO on rewards (Flow-GRPO, arXiv 2505.05470)",
    "merge": "merged from other adapters",
    "train_sft": "fine-tuned on images that its teachers sampled",
    "train_opd": "trained by Flow-OPD (arXiv 2605.08063): on-policy distillation of its teachers",
}


def write_card(folder: Path, args: argparse.Namespace, scores: str = "") -> None:
    """Put README.md and pictures into an adapter's folder and name the base model in its config.

    args: of the script that made the adapter; the run's pictures and rewards are in args.out."""
    base, _, revision = base_of(args).partition("@")
    complete_config(folder / "adapter_config.json", base, revision)
    iterations, rewards = published(args)
    widget = copy_pictures(Path(args.out), folder / "pictures", iterations)
    parts = ["---", front_matter(base, widget), "---", "", f"# {Path(args.out).resolve().name}", ""]
    method = METHODS.get(Path(sys.argv[0]).stem, "")
    parts += [f"A LoRA for {base or 'Stable Diffusion 3'}, {method}.", "", *sources(args), ""]
    parts += ["<Gallery />", ""] if widget else []
    parts += ["## How to load it", "", "```python", *usage(base, revision, args, widget), "```", ""]
    parts += ["## How it was made", "", "```", command(), "```", ""]
    if scores or rewards:
        parts += ["## Scores", "", scores or rewards, ""]
    parts += ["## Licence", "", "That of the base model, from which this adapter is derived."]
    beside = folder / "README.tmp"
    beside.write_text("\n".join(parts) + "\n", encoding="utf-8")
    beside.replace(folder / "README.md")


def base_of(args: argparse.Namespace) -> str:
    """The base model: --model, or what the adapters of a merge agree on; "" if that is unknown."""
    found = [getattr(args, "model", "")]
    if hasattr(args, "adapters"):
        found = [base_of_adapter(path) for path in args.adapters]
    base = found[0] if len({*found}) == 1 else ""
    in_cache = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", base)
    return "/".join(in_cache.groups()) if in_cache else base


def base_of_adapter(path: str) -> str:
    """The model that its config names, else the one it lies in, as toy/adapters/ocr does, or ""."""
    file = Path(fetch(path, "--adapters", ADAPTER), "adapter_config.json")
    config = read_json(file.read_text(encoding="utf-8")) if file.is_file() else {}
    model = file.parent.parent.parent
    inside = str(model) if (model / "model_index.json").is_file() else ""
    return config.get("base_model_name_or_path") or inside


def complete_config(file: Path, base: str, revision: str) -> None:
    """Name the base model. There is no task_type that fits: with any that peft 0.21.2 knows,
    PeftModel passes input_ids to the transformer. The hub warns of null, so the key is left out."""
    config = read_json(file.read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": base or None, "revision": revision or None}
    config.pop("task_type", None)
    save_json(file, config)


def published(args: argparse.Namespace) -> tuple[int, str]:
    """The iterations of the published adapter (the last or the best) and its test rewards."""
    log = read_log(args.out) or [{"iteration": -1}]
    line = log[-1]
    if getattr(args, "final", "last") == "best":
        line = max(log, key=lambda line: line.get("test") or -math.inf)
    rewards = [f"- {name}: {value}" for name, value in line.items() if name.startswith("test/")]
    if rewards:
        rewards = ["Mean rewards on the test prompts, from 0 to 1:", "", *rewards]
    return line["iteration"] + 1, "\n".join(rewards)


def copy_pictures(run: Path, folder: Path, iterations: int) -> list[dict]:
    """Cut at most 8 pictures of the student out of the grid of these iterations, or of grid.png.
    Returns the front matter's "widget"."""
    shutil.rmtree(folder, ignore_errors=True)
    widget = []
    for file in sorted(run.glob(f"samples/*{iterations:05d}.png")) or run.glob("grid.png"):
        with Image.open(file) as grid:
            for column, prompt, *box in json.loads(grid.info.get("pictures", "[]")):
                if column != "student" or len(widget) == 8:
                    continue
                name = f"{len(widget)}.png"
                folder.mkdir(exist_ok=True)
                grid.crop(box).save(folder / name)
                widget.append({"text": prompt, "output": {"url": f"{folder.name}/{name}"}})
    return widget


def front_matter(base: str, widget: list[dict]) -> str:
    """YAML. The licence is the base model's; Stability AI's cards call theirs as below."""
    tags = ["text-to-image", "diffusers", "lora", "template:sd-lora", "flow-opd"]
    about = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": tags}
    about["license"], about["license_name"] = "other", "that-of-the-base-model"
    if hub_id(base):
        link = f"https://huggingface.co/{base}"
        about |= {"base_model": base, "base_model_relation": "adapter", "license_link": link}
    if base.startswith("stabilityai/stable-diffusion-3"):
        about |= {"license_name": "stabilityai-ai-community"}
        about["license_link"] += "/blob/main/LICENSE.md"
    if widget:
        about["widget"] = widget
    return ModelCardData(**about).to_yaml()


def sources(args: argparse.Namespace) -> list[str]:
    """What the adapter was made from, a line each."""
    given, lines = vars(args), []
    lines += [f"- teacher of {task}: {path}" for task, path in given.get("teacher", {}).items()]
    lines += [f"- merged: {path}" for path in given.get("adapters", [])]
    rewards = given.get("reward") or given.get("mix") or {}
    lines += [f"- reward: {name}, weight {weight:g}" for name, weight in rewards.items()]
    if "init" in given:
        lines.append(f"- started from: {given['init']}")
    return lines


def usage(base: str, revision: str, args: argparse.Namespace, widget: list[dict]) -> list[str]:
    """Lines of Python: stock diffusers with the settings of the run's own pictures."""
    given = vars(args)
    model, adapter = repr(base or "BASE MODEL"), f"{args.out}/adapter"
    if hasattr(args, "adapters"):  # of a merge --out is the adapter, not a run
        adapter = args.out
    if revision:
        model += f", revision={revision!r}"
    if given.get("no_t5"):
        model += ", text_encoder_3=None, tokenizer_3=None"
    prompt, steps = widget[0]["text"] if widget else "a red circle", given.get("eval_steps")
    guidance = given.get("student_guidance") or given.get("guidance")
    how = {"num_inference_steps": steps, "guidance_scale": guidance}
    how |= {"height": given.get("size"), "width": given.get("size")}
    how |= {"max_sequence_length": given.get("text_length")}
    words = [repr(prompt), *(f"{name}={value}" for name, value in how.items() if value)]
    if given.get("time_grid") == "single":
        words.append(f"sigmas=[1 - i / {steps} for i in range({steps})]")
    return [
        "import torch",
        "from diffusers import StableDiffusion3Pipeline",
        "",
        f"pipe = StableDiffusion3Pipeline.from_pretrained({model}, dtype=torch.bfloat16)",
        f"pipe.load_lora_weights({adapter!r})  # or ORG/NAME, once this folder is uploaded",
        'pipe.to("cuda" if torch.cuda.is_available() else "cpu")',
        "image = pipe(",
        *(f"    {word}," for word in words),
        ").images[0]",
    ]


def command() -> str:
    """The command of this process, and on how many processes it ran."""
    words = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
    _, world = rank_and_world()
    return f"python {shlex.join([Path(sys.argv[0]).name, *words])}    # {world} process(es)"
