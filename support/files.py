"""Prompts, models, adapters and images that a user names: each is checked before it is used."""

import contextlib
import functools
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from support.flags import fail, pairs, reason


def read_json(text: str) -> Any:
    """json.loads, but nesting that is too deep is a ValueError like other faults of the text."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def save_json(path: str | Path, value: object) -> None:
    """Write beside, then rename: a reader sees the old file or the new one, never a half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    beside.replace(path)


@contextlib.contextmanager
def written_beside(folder: str | Path) -> Iterator[Path]:
    """Give an empty folder to write into. Its files move to `folder` when all are complete."""
    folder = Path(folder).resolve()
    beside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        folder.mkdir(exist_ok=True)
        for file in beside.iterdir():
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_prompt(prompt: str, where: str) -> None:
    """Any text is a prompt. A NUL or half a surrogate pair is not text: no tokenizer takes it."""
    if "\0" in prompt or any("\ud800" <= c <= "\udfff" for c in prompt):
        fail(f"{where} is not text: it holds a NUL or half a surrogate pair; expected UTF-8")


def read_prompts(path: str | Path, flag: str = "--prompts") -> tuple[list[str], list[dict]]:
    """A UTF-8 file -> (prompts, metadata), in its order. Empty lines are skipped.

    .txt: one prompt per line. .jsonl: one object per line, with a text as its "prompt"; the object
    is the metadata for scorers. A prompt that the file holds twice is drawn twice as often. The
    text encoders read a prompt's first 77 CLIP tokens and --text_length T5 tokens."""
    kind = Path(path).suffix.lower()
    if kind not in (".txt", ".jsonl"):
        fail(f'{flag}: {path}: expected .txt (prompts) or .jsonl (objects with "prompt")')
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # \r\n and \r count as \n
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        fail(f"{flag}: cannot read {path} ({why})")
    prompts, metadata = [], []
    for number, line in enumerate(lines, 1):
        where, prompt, about = f"{flag}: line {number} of {path}", line.strip(), {}
        if prompt and kind == ".jsonl":
            about = read_metadata(line, where)
            prompt = about["prompt"]
        if prompt:
            check_prompt(prompt, where)
            prompts.append(prompt)
            metadata.append(about)
    if not prompts:
        fail(f"{flag}: {path} holds no prompt")
    return prompts, metadata


def read_metadata(line: str, where: str) -> dict:
    """A line of a .jsonl file -> its object."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        about = read_json(line)
        if about["prompt"].strip():
            return about
    fail(f'{where} is not a JSON object with a text as its "prompt"')


def prompt_files(
    given: Iterable[str] | None, tasks: Collection[str], split: str, model: str, flag="--prompts"
) -> dict[str, str]:
    """["geneval=A", ...] -> {task: file}. Tasks without a file of their own use the model's.

    A may be a folder of Flow-GRPO's dataset/. split: "train" or "test"."""
    files = {task: f"{model}/prompts/{task}_{split}.txt" for task in tasks}
    for task, file in pairs(given, flag, overrule=True).items():
        if task not in files:
            fail(f"{flag}: unknown task {task!r}: this run has {', '.join(tasks)}")
        files[task] = file
    names = [f"{split}_metadata.jsonl", f"{split}.txt"]
    names += ["evaluation_metadata.jsonl"] * (split == "test")  # GenEval's own
    for task, file in files.items():
        if not re.fullmatch(r"[\w-]+", task):  # images and adapters are named after it
            fail(f"task {task!r}: a task's name is made of letters, digits, _ and -")
        found = [str(Path(file, name)) for name in names if os.path.isfile(f"{file}/{name}")]
        files[task] = (found or [file])[0]
        if not os.path.isfile(files[task]):
            fail(f"no {split} prompts for {task!r}: {file} is not a file; give {flag} {task}=FILE")
    return files


# What is downloaded: the parts of a diffusers pipeline (not the single files beside them), a LoRA.
PARTS = """transformer vae scheduler tokenizer tokenizer_2 tokenizer_3
           text_encoder text_encoder_2 text_encoder_3""".split()
PIPELINE = ("model_index.json", *(f"{part}/*" for part in PARTS))
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
        page = f"https://huggingface.co/{name}"
        fail(f"{where}: gated; accept its licence at {page}, then run `hf auth login`")
    except errors.RevisionNotFoundError:
        fail(f"{where}: the hub has no revision {revision!r} of {name}")
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        fail(f"{where}: neither a folder nor a model on the hub (if private: `hf auth login`)")
    except (OSError, errors.HfHubHTTPError) as error:
        missing = f"no folder, not in the hub's cache, and no answer from the hub ({reason(error)})"
        fail(f"{where}: {missing}; try `hf download {name}`")


def check_model(path: str, flag: str = "--model") -> None:
    """A folder holds a Stable Diffusion 3 pipeline in safetensors. A hub id is checked later."""
    if hub_id(path):
        return
    folder, where = Path(path), f"{flag} {path}"
    try:
        kind = read_json((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        fail(f"{where}: not a diffusers pipeline (no usable model_index.json in it)")
    if kind != "StableDiffusion3Pipeline":
        fail(f"{where}: a {kind}; this code trains StableDiffusion3Pipeline (3 and 3.5)")
    for file in folder.glob("*/*.index.json"):  # of weights in several files
        name = file.relative_to(folder)
        try:
            shards = read_json(file.read_text(encoding="utf-8"))["weight_map"].values()
            outside = [shard for shard in shards if Path(shard).name != shard]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            fail(f"{where}: {name} is damaged; download it again")
        if outside:
            fail(f"{where}: {name} names a file outside its folder: {outside[0]}")
    for part in ("transformer", "vae"):  # --dry_run downloads no weights: having none is fine
        kinds = {file.suffix for file in folder.glob(f"{part}/*")}
        if ".bin" in kinds and ".safetensors" not in kinds:
            fail(f"{where}: no safetensors in {part}; a pickle (.bin) can run code: not opened")


def check_adapter(path: str, flag: str) -> None:
    """A folder holds a LoRA in PEFT's format or diffusers'. A hub id is checked later."""
    names, where = f"a folder with {' or '.join(WEIGHTS)}", f"{flag} {path}"
    if hub_id(path) or any(os.path.isfile(f"{path}/{name}") for name in WEIGHTS):
        return
    if any(os.path.isfile(f"{path}/adapter/{name}") for name in WEIGHTS):
        fail(f"{where}: a run, not an adapter; did you mean {path}/adapter?")
    if any(os.path.isfile(f"{path}/{Path(name).stem}.bin") for name in WEIGHTS):
        fail(f"{where}: a pickle (.bin) can run code: not opened; expected {names}")
    fail(f"{where}: not an adapter, which is {names}")


def find_images(
    path: str, task: str, tasks: Collection[str], model: str, file: str | None = None, number=0
) -> tuple[list[Path], list[str], list[dict]]:
    """A folder of images -> (files, prompts, metadata), one entry per image.

    DIR/TASK (or DIR, for a single task) lists them in metadata.jsonl, or names each by its line in
    the prompt `file`, from 0: 00000.png or 00000/samples/0000.png. number: only the first lines;
    0 = all. Every prompt needs an image, all need equally many, and none may be left over."""
    folder, end = Path(path, task), number or None
    if not folder.is_dir() and len(tasks) > 1:
        fail(f"--scores_only {path}: no folder {folder}; give with --tasks what it holds")
    folder = folder if folder.is_dir() else Path(path)
    if (folder / "metadata.jsonl").is_file():
        return listed_images(folder, end)
    given = [f"{task}={file}"] if file else []
    file = prompt_files(given, [task], "test", model)[task]
    prompts, metadata = (part[:end] for part in read_prompts(file))
    images = {n: [] for n in range(len(prompts))}
    for image in sorted([*folder.glob("*.*"), *folder.glob("*/samples/*.*")]):
        if image.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            continue
        name = image.relative_to(folder).parts[0].split(".")[0]
        if not (name.isascii() and name.isdecimal()):
            fail(f"{image}: expected a line number as its name (00000.png), or a metadata.jsonl")
        if not number or int(name) < number:
            images.setdefault(int(name), []).append(image)
    files, order, wanted = [], [], max(len(images[0]), 1)
    for n, own in images.items():
        expected = wanted if n < len(prompts) else 0
        if len(own) != expected:
            has = f"{len(own)} image(s) of prompt {n:05d}, expected {expected}"
            lines = f"{file} has {len(prompts)} prompts (--num_prompts N takes the first N)"
            fail(f"--scores_only {folder}: {has}; {lines}")
        files += own
        order += [n] * len(own)
    return files, [prompts[n] for n in order], [metadata[n] for n in order]


def listed_images(folder: Path, end: int | None) -> tuple[list[Path], list[str], list[dict]]:
    """The same, from the first `end` lines of the folder's metadata.jsonl."""
    own = folder / "metadata.jsonl"
    prompts, metadata = (part[:end] for part in read_prompts(own, "--scores_only"))
    files = [folder / str(about.get("file_name")) for about in metadata]
    for n, file in enumerate(files, 1):
        if not file.is_file():
            fail(f'{own}: line {n} needs the "file_name" of an existing image, not {file.name!r}')
    return files, prompts, metadata
