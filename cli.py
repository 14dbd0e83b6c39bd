"""What the scripts do before torch is imported: flags, files and one-line errors. Standard library, and the hub where asked."""

import argparse
import functools
import json
import os
import re
import sys
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its start-up notices on a missing torchvision concern nobody here

TASKS = ("geneval", "ocr", "deqa", "pickscore")


def fail(message):
    """One line (what is wrong, which flag or file, what would be right) and exit code 2. Nothing has been written."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind every flag; the description as it is written in the script."""


def make_parser(doc):
    """argparse that also reads flags from a file (`@recipes/NAME.args`, # starts a comment) and fails in one line."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=Help, fromfile_prefix_chars="@", allow_abbrev=False)
    parser.convert_arg_line_to_args = lambda line: line.split("#")[0].split()
    parser.error = fail
    return parser


def pairs(items, flag, number=False):
    """["geneval=A", …] -> {"geneval": "A", …}, or to floats."""
    out = {}
    for item in items or ():
        key, equals, value = item.partition("=")
        if not (key and equals and value):
            fail(f"{flag} {item}: expected NAME={'NUMBER' if number else 'VALUE'}")
        if key in out:
            fail(f"{flag}: {key} is given twice")
        try:
            out[key] = float(value) if number else value
        except ValueError:
            fail(f"{flag} {item}: {value!r} is not a number")
    return out


def read_prompts(path, flag="--prompts"):
    """A prompt file -> (prompts, metadata). .txt: a prompt a line. .jsonl: an object with "prompt" a line, the rest of
    it is the metadata that a scorer may want. Empty lines are skipped."""
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{flag}: cannot read {path} ({getattr(error, 'strerror', None) or 'not UTF-8'})")
    if not lines:
        fail(f"{flag}: {path} holds no prompt")
    if not str(path).endswith(".jsonl"):
        return [line.strip() for line in lines], [{} for _ in lines]
    try:
        metadata = [json.loads(line) for line in lines]
        return [str(m["prompt"]) for m in metadata], metadata
    except (json.JSONDecodeError, KeyError, TypeError):
        fail(f'{flag}: {path} is not JSON lines with a "prompt" in each')


def prompt_files(given, tasks, split, flag="--prompts"):
    """{task: file}: the --prompts given, the miniature's own for the other tasks."""
    for task in given:
        if task not in tasks:
            fail(f"{flag}: unknown task {task!r}: this run has {', '.join(tasks)}")
    files = {task: given.get(task, f"toy/prompts/{task}_{split}.txt") for task in tasks}
    for task, file in files.items():
        if not Path(file).is_file():
            fail(f"no {split} prompts for task {task!r}: {file} is not a file; give {flag} {task}=FILE")
    return files


def at_least(low):
    """argparse type: a whole number of at least `low`."""

    def number(text):
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low}")
        return int(text)

    return number


positive = at_least(1)


def model_flags(parser):
    """The base model and how it is held: the same flags in every script."""
    flag = parser.add_argument_group("base model").add_argument
    flag(
        "--model",
        default="toy",
        metavar="DIR|HUB",
        help="base pipeline: a directory that diffusers loads, or ORG/NAME[@REVISION]",
    )
    flag("--dtype", choices=("fp32", "bf16", "fp16"), help="of the frozen backbone; default fp32 on a CPU and bf16 on a GPU: "
         "its range is that of fp32, while fp16 overflows beyond 65504, for GPUs without bf16. The trained LoRA, the sampler's "
         "states, log-probs and KL are fp32 always")  # fmt: skip
    flag("--compile", action="store_true", help="torch.compile: minutes at the start, faster afterwards (meant for GPUs)")
    flag("--no_t5", action="store_true", help="leave the third text encoder out (SD3.5: 9.5 GB to fetch; long prompts suffer)")
    flag("--text_length", type=positive, default=128, help="T5 tokens, at most what the tokenizer allows")
    flag("--cache_embeddings", metavar="DIR", help="keep text embeddings here; prompts found here need no text encoder")
    flag("--size", type=positive, help="image side in pixels; default the model's own")


# What is fetched from a hub repository: the parts of a diffusers pipeline (not the single-file copies beside them), a LoRA.
PIPELINE = ("model_index.json", *(f"{n}/*" for n in ("transformer", "vae", "scheduler")),
            *(f"{n}{i}/*" for n in ("tokenizer", "text_encoder") for i in ("", "_2", "_3")))  # fmt: skip
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors")


def hub_id(path):
    """ORG/NAME or ORG/NAME@REVISION, unless ORG is a folder here: then it is a path."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", path)) and not Path(path.split("/")[0]).exists()


@functools.cache
def fetch(path, flag, files):
    """A directory as it is; a hub id as the directory of its snapshot, fetched once, of those `files` (patterns) alone.

    The hub's own rules hold: HF_TOKEN or `hf auth login` for gated models, HF_HUB_OFFLINE=1 for the cache alone."""
    if not hub_id(path):
        return path
    from huggingface_hub import errors, snapshot_download

    name, _, revision = path.partition("@")
    try:
        return snapshot_download(name, revision=revision or None, allow_patterns=list(files))
    except errors.GatedRepoError:
        fail(f"{flag} {path}: gated; accept its licence at https://huggingface.co/{name}, then run `hf auth login`")
    except errors.RevisionNotFoundError:
        fail(f"{flag} {path}: the hub has no revision {revision!r} of {name}")
    except errors.RepositoryNotFoundError:
        fail(f"{flag} {path}: neither a directory here nor a model on the hub (or a private one: run `hf auth login`)")
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        why = str(error).splitlines()[0][:100]
        fail(f"{flag} {path}: no directory here, nothing in the hub's cache, no hub ({why}); try `hf download {name}`")


def check_model(path, flag="--model"):
    """A pipeline of the right kind, if it is here; a hub id is looked up when it is loaded."""
    if hub_id(path):
        return
    try:
        kind = json.loads((Path(path) / "model_index.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        fail(f"{flag} {path}: not a diffusers pipeline (no model_index.json in it)")
    if kind != "StableDiffusion3Pipeline":
        fail(f"{flag} {path}: a {kind}; this code trains Stable Diffusion 3 and 3.5 (StableDiffusion3Pipeline)")


def check_adapter(path, flag):
    """An adapter is a directory in PEFT format (adapter_config.json) or in diffusers format, or a hub id of one."""
    if not hub_id(path) and not any((Path(path) / name).is_file() for name in ADAPTER[1:]):
        fail(f"{flag} {path}: not an adapter (a directory with adapter_model.safetensors or pytorch_lora_weights.safetensors)")


def check_train_steps(args):
    """--train_steps -> the list of steps that may be trained, and how many of them in an iteration."""
    kind, _, number = args.train_steps.partition(":")
    try:
        first = list(range(args.steps - 1))
        named = {"first": first, "random": first, "all": [*first, args.steps - 1]}
        eligible = named.get(kind) or sorted({int(i) for i in kind.split(",")})
        count = int(number) if kind == "random" else len(eligible)
    except ValueError:
        fail(f"--train_steps {args.train_steps}: expected first, all, random:K or a list such as 0,2,5")
    if not 1 <= count <= len(eligible) or not 0 <= eligible[0] <= eligible[-1] < args.steps:
        fail(f"--train_steps {args.train_steps}: there are {args.steps} steps, numbered from 0")
    if args.noise_kind == "cps" and args.noise > 0 and args.steps - 1 in eligible:
        fail("--train_steps: the last cps step has no noise, so no KL; leave it out")
    args.eligible_steps, args.trained_steps = eligible, count


def check_out(out, resume=False, overwrite=False):
    """A run never lands on anything else: the folder must be new or empty, unless it is a run and --resume or
    --overwrite says what to do with it."""
    used = (Path(out) / "args.json").exists()
    if resume and overwrite:
        fail("--resume and --overwrite: choose one")
    if resume and not used:
        fail(f"--resume: there is no run in {out}")
    if not used and Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        fail(f"--out {out} is not an empty folder, and no run either: choose another")
    if used and not (resume or overwrite):
        fail(f"--out {out} already holds a run: choose another folder, or --resume it, or --overwrite it")


def save_json(path, value):
    """Beside it first, then renamed: a reader sees the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    beside.replace(path)
