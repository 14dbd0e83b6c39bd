"""Prompts, models, adapters and images that a user names: each is checked before it is used."""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from support.flags import fail, reason

FAULTS = (OSError, ValueError, KeyError, TypeError, AttributeError)  # of a file's contents


def read_json(text: str) -> Any:
    """json.loads, but nesting that is too deep is a ValueError like other faults of the text."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def save_json(path: str | Path, value: object) -> None:
    """Write beside, then rename: a reader sees the old file or the new one, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    beside.replace(path)


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Give an empty folder to write into, which then replaces `folder`. Its contents reach the disk
    before its name does: after a power cut there is the old folder or the new one."""
    folder = Path(folder).resolve()
    beside, old = folder.with_name(f"{folder.name}.tmp"), folder.with_name(f"{folder.name}.old")
    shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
    beside.mkdir(parents=True)
    try:
        yield beside
        sync(*beside.rglob("*"), beside)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():  # a folder cannot be renamed onto another
            os.replace(folder, old)
        os.replace(beside, folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def sync(*paths: Path) -> None:
    """Wait until files and folders are on the disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def sha256(path: str | Path) -> str:
    """Of a file, or of the model files in a folder: contents count, names do not."""
    files, kinds = [Path(path)], (".safetensors", ".json", ".txt", ".model")
    if files[0].is_dir():
        files = sorted(file for file in files[0].rglob("*") if file.suffix in kinds)
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:  # streamed: a text encoder has 10 GB
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def check_prompt(prompt: str, where: str) -> None:
    """Any text is a prompt. A NUL or half a surrogate pair is not text: no tokenizer takes it."""
    if "\0" in prompt or any("\ud800" <= c <= "\udfff" for c in prompt):
        fail(f"{where} is not text: it holds a NUL or half a surrogate pair; expected UTF-8")


def read_prompts(path: str | Path, flag: str = "--prompts") -> tuple[list[str], list[dict]]:
    """A UTF-8 file -> (prompts, metadata), in its order. Empty lines are skipped.

    .txt: one prompt per line. .jsonl: one object per line, with a text as its "prompt"; the object
    is the metadata for scorers. A prompt that the file holds twice is drawn twice as often."""
    kind = Path(path).suffix.lower()
    if kind not in (".txt", ".jsonl"):
        fail(f'{flag}: {path}: expected .txt (prompts) or .jsonl (objects with "prompt")')
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # \r\n and \r count as \n
    except (OSError, ValueError) as error:
        fail(f"{flag}: cannot read {path} ({getattr(error, 'strerror', None) or 'not UTF-8'})")
    prompts, metadata = [], []
    for number, line in enumerate(lines, 1):
        where, prompt, about = f"{flag}: line {number} of {path}", line.strip(), {}
        if not prompt:
            continue
        if kind == ".jsonl":
            try:
                about = read_json(line)
                prompt = about["prompt"]
                if not prompt.strip():
                    raise ValueError("empty")
            except FAULTS:
                fail(f'{where} is not a JSON object with a text as its "prompt"')
        check_prompt(prompt, where)
        prompts.append(prompt)
        metadata.append(about)
    if not prompts:
        fail(f"{flag}: {path} holds no prompt")
    return prompts, metadata


def prompt_files(
    given: dict[str, str], tasks: Collection[str], split: str, model: str, flag="--prompts"
) -> dict[str, str]:
    """{task: file}, given or else the model's. split: "train" or "test". A given path may also be a
    folder of Flow-GRPO's dataset/."""
    for task in given:
        if task not in tasks:
            fail(f"{flag}: unknown task {task!r}: this run has {', '.join(tasks)}")
    names = [f"{split}_metadata.jsonl", f"{split}.txt"]
    names += ["evaluation_metadata.jsonl"] * (split == "test")  # GenEval's own
    files = {}
    for task in tasks:
        if not re.fullmatch(r"[\w-]+", task):  # images and adapters are named after it
            fail(f"task {task!r}: a task's name is made of letters, digits, _ and -")
        file = given.get(task, f"{model}/prompts/{task}_{split}.txt")
        candidates = [str(Path(file, name)) for name in names] + [file]
        files[task] = next(filter(os.path.isfile, candidates), None)
        if files[task] is None:
            fail(f"no {split} prompts for {task!r}: {file} is not a file; give {flag} {task}=FILE")
    return files


# What is downloaded: the parts of a diffusers pipeline (not the single files beside them), a LoRA.
TEXT = "tokenizer tokenizer_2 tokenizer_3 text_encoder text_encoder_2 text_encoder_3".split()
PARTS = ("transformer", "vae", "scheduler", *TEXT)  # --no_t5 leaves out those with _3
KINDS = "*.json *.txt *.model *model.safetensors *model-*.safetensors".split()  # no .fp16 variants
PIPELINE = ("model_index.json", *(f"{part}/{kind}" for part in PARTS for kind in KINDS))
WEIGHTS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
ADAPTER = ("adapter_config.json", *WEIGHTS)


def hub_id(path: str) -> bool:
    """ORG/NAME or ORG/NAME@REVISION, unless ORG is a folder here or the path has a .. in it."""
    named = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", path) and ".." not in path
    return bool(named) and not os.path.exists(path.split("/")[0])


@functools.cache
def fetch(path: str, flag: str, files: tuple[str, ...]) -> str:
    """A folder as it is; a hub id as the folder of its snapshot, with `files` (patterns) alone.

    HF_TOKEN or `hf auth login` opens gated models, HF_HUB_OFFLINE=1 uses the cache alone."""
    if not hub_id(path):
        return path
    from huggingface_hub import errors, snapshot_download

    where, (name, _, revision) = f"{flag} {path}", path.partition("@")
    try:
        return snapshot_download(name, revision=revision or None, allow_patterns=list(files))
    except errors.GatedRepoError:
        fail(f"{where}: gated; accept its licence on huggingface.co, then run `hf auth login`")
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
        fail(f"{where}: neither a folder nor on the hub (if private: `hf auth login`)")
    except (OSError, errors.HfHubHTTPError) as error:
        fail(f"{where}: no folder, and no answer ({reason(error)}); once online, it is downloaded")


def check_model(path: str, flag: str = "--model") -> None:
    """A folder holds a Stable Diffusion 3 pipeline in safetensors. A hub id is checked later."""
    if hub_id(path):
        return
    folder, where, euler = Path(path), f"{flag} {path}", "FlowMatchEulerDiscreteScheduler"
    try:
        index = read_json((folder / "model_index.json").read_text(encoding="utf-8"))
        kind, sampler = index["_class_name"], index.get("scheduler", ["", euler])[1]
        file = folder / "scheduler" / "scheduler_config.json"
        config = read_json(file.read_text()) if file.is_file() else {}
        unlike = [key for key in ("invert_sigmas", "stochastic_sampling") if config.get(key)]
    except FAULTS:
        fail(f"{where}: not a diffusers pipeline (no usable model_index.json in it)")
    if kind != "StableDiffusion3Pipeline":
        fail(f"{where}: a {kind}; this code trains StableDiffusion3Pipeline (3 and 3.5)")
    if sampler != euler or unlike:
        found = " with ".join([sampler, *unlike])
        fail(f"{where}: its scheduler is {found}; this code samples as {euler} does")


def check_adapter(path: str, flag: str) -> None:
    """A folder holds a LoRA in PEFT's format or diffusers'. A hub id is checked later."""
    wanted, where = f"a folder with {' or '.join(WEIGHTS)}", f"{flag} {path}"
    if hub_id(path) or any(os.path.isfile(f"{path}/{name}") for name in WEIGHTS):
        return
    if any(os.path.isfile(f"{path}/adapter/{name}") for name in WEIGHTS):
        fail(f"{where}: a run, not an adapter; did you mean {path}/adapter?")
    fail(f"{where}: no adapter there; it is {wanted} (a .bin can run code: it is never opened)")
