"""What the scripts do before torch is imported: flags, files and one-line errors. Standard library, and the hub where asked."""

import argparse
import functools
import json
import os
import re
import socket
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
    """{task: file}: the --prompts given, the miniature's own for the other tasks. A folder is one of Flow-GRPO's dataset/."""
    for task in given:
        if task not in tasks:
            fail(f"{flag}: unknown task {task!r}: this run has {', '.join(tasks)}")
    files = {task: given.get(task, f"toy/prompts/{task}_{split}.txt") for task in tasks}
    names = [f"{split}_metadata.jsonl", f"{split}.txt"] + ["evaluation_metadata.jsonl"] * (split == "test")  # GenEval's own
    for task, file in files.items():
        files[task] = file = next((str(Path(file, name)) for name in names if Path(file, name).is_file()), file)
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
    flag("--dtype", choices=("fp32", "bf16"), help="of the frozen backbone; default bf16 on a GPU, fp32 on a CPU. The trained "
         "LoRA, the sampler's states, log-probs and KL are fp32 always")  # fmt: skip
    flag("--no_t5", action="store_true", help="leave the third text encoder out (SD3.5: 9.5 GB to fetch; long prompts suffer)")
    flag("--text_length", type=positive, default=128, help="T5 tokens, at most what the tokenizer allows")
    flag("--cache_embeddings", metavar="DIR", help="keep text embeddings here; prompts found here need no text encoder")
    flag("--size", type=positive, help="image side in pixels; default the model's own")


def run_flags(flag):
    """How a run is repeated, saved, stopped and taken up again: the same flags in both training scripts."""
    flag("--seed", type=int, default=0, help="of prompts, noise and fresh weights")
    flag("--save_every", type=positive, default=20, help="iterations between checkpoints; Ctrl-C and errors save as well")
    flag("--keep", type=positive, default=2, help="checkpoints to keep, the newest ones")
    flag("--max_bad_steps", type=positive, default=10, help="stop after so many updates in a row with a NaN or infinite "
         "gradient; each is skipped")  # fmt: skip
    flag("--resume", nargs="?", const="newest", metavar="CHECKPOINT", help="go on with the run in --out from this folder in "
         "its checkpoints/; without a name: from the newest one that is not damaged")  # fmt: skip
    flag("--overwrite", action="store_true", help="replace the run in --out")


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


def check_out(args):
    """A run never lands on anything else: the folder must be new or empty, unless it is a run and --resume or
    --overwrite says what to do with it. Where torchrun starts a failed run anew (--max-restarts), it is resumed."""
    out = Path(args.out)
    if int(os.environ.get("RANK", 0)):  # the others follow rank 0
        return
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and (out / "lock").exists():
        if (out / "lock").read_text() == launcher():  # this launch made the run, or was allowed to go on with it
            args.resume, args.overwrite = "newest" if (out / "args.json").exists() else None, False
    used = (out / "args.json").exists()
    if args.resume and args.overwrite:
        fail("--resume and --overwrite: choose one")
    if args.resume and not used:
        fail(f"--resume: there is no run in {out}")
    if not used and out.exists() and (not out.is_dir() or any(p.name != "lock" for p in out.iterdir())):
        fail(f"--out {out} is not an empty folder, and no run either: choose another")
    if used and not (args.resume or args.overwrite):
        fail(f"--out {out} already holds a run: choose another folder, or --resume it, or --overwrite it")


def launcher():
    """Who started this process: the same for a process that torchrun has started anew."""
    return f"{socket.gethostname()} {os.getppid()}"


def save_json(path, value):
    """Beside it first, then renamed: a reader sees the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    beside.replace(path)


def find_images(path, task, tasks, file=None, number=0):
    """A folder given to `evaluate.py --scores_only` -> (files, prompts, metadata), an entry an image; see its docstring.

    file: the task's prompt file, where the folder lists no prompts; number: only its first lines, 0 = all. Exit 2 unless
    every prompt has an image, all have as many, and no image is left over."""
    folder = Path(path) / task
    if not folder.is_dir() and len(tasks) > 1:
        fail(f"--scores_only {path}: no folder {folder}; say with --tasks what it holds (of a single task, DIR itself)")
    folder = folder if folder.is_dir() else Path(path)
    own = folder / "metadata.jsonl"
    if own.is_file():
        prompts, metadata = (part[: number or None] for part in read_prompts(own, "--scores_only"))
        names = [line.get("file_name") for line in metadata]
        for n, name in enumerate(names):
            if not (isinstance(name, str) and (folder / name).is_file()):
                fail(f'{own}: line {n + 1} needs the "file_name" of an image that is there, not {name!r}')
        return [folder / name for name in names], prompts, metadata
    file = prompt_files({task: file} if file else {}, [task], "test")[task]
    prompts, metadata = (part[: number or None] for part in read_prompts(file))
    found, counts = [], {}
    for image in (image for pattern in ("*.*", "*/samples/*.*") for image in folder.glob(pattern)):
        if image.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
            line = image.relative_to(folder).parts[0].split(".")[0]
            if not (line.isascii() and line.isdecimal()):
                fail(f"{image}: its name is no line number, as 00000.png is; or list prompts and images in {own}")
            if not number or int(line) < number:
                found.append((int(line), image))
                counts[int(line)] = counts.get(int(line), 0) + 1
    for line in {**dict.fromkeys(range(len(prompts))), **counts}:
        wanted = max(counts.get(0, 0), 1) if line < len(prompts) else 0
        if counts.get(line, 0) != wanted:
            have = f"{counts.get(line, 0)} image(s) {line:05d}"
            fail(f"--scores_only {folder}: {have} where the {len(prompts)} prompts of {file} want {wanted}")
    lines, files = zip(*sorted(found))
    return list(files), [prompts[n] for n in lines], [metadata[n] for n in lines]
