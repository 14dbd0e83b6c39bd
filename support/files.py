"""Files that users give: prompts, models, adapters, pictures. Each is checked before torch is imported."""

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
    """json.loads, where too deep a nesting is a ValueError like any other fault of the text."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def check_prompt(prompt: str, where: str) -> None:
    """Any text is a prompt. A NUL (UTF-16, or no text at all) and half a surrogate pair, which no tokenizer takes, are not."""
    if "\0" in prompt or any("\ud800" <= c <= "\udfff" for c in prompt):
        fail(f"{where} is not text: it holds a NUL or half a surrogate pair; expected UTF-8")


def read_prompts(path: str | Path, flag: str = "--prompts") -> tuple[list[str], list[dict]]:
    """A UTF-8 file -> (prompts, metadata), in its order. .txt: a prompt a line, without the spaces around it. .jsonl: an
    object with "prompt", a text that is not empty, a line; the whole object is the metadata that a scorer may want, and
    nothing in it is ever taken for a path. Lines end in LF, CRLF or CR; empty ones are skipped. A prompt that stands there
    twice is drawn twice as often.

    Tokenizer and scorer get a prompt as it is written, in any script, with newlines and control characters that JSON may
    hold, and of any length (the text encoders read its first 77 CLIP tokens and --text_length T5 tokens). Where it is
    shown, it is made one line. What is not text is refused, see check_prompt."""
    kind = Path(path).suffix.lower()
    if kind not in (".txt", ".jsonl"):
        fail(f'{flag}: {path}: expected a .txt, a prompt a line, or a .jsonl, an object with "prompt" a line')
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        fail(f"{flag}: cannot read {path} ({getattr(error, 'strerror', None) or 'not UTF-8'})")
    prompts, metadata = [], []
    for number, line in enumerate(lines, 1):
        if not (prompt := line.strip()):
            continue
        where, more = f"{flag}: line {number} of {path}", {}
        if kind == ".jsonl":
            try:
                more = read_json(line)
                prompt = more["prompt"]
            except (ValueError, KeyError, TypeError):
                prompt = None
            if not isinstance(prompt, str) or not prompt.strip():
                fail(f'{where} is not a JSON object with a text as its "prompt"')
        check_prompt(prompt, where)
        prompts.append(prompt)
        metadata.append(more)
    if not prompts:
        fail(f"{flag}: {path} holds no prompt")
    return prompts, metadata


def prompt_files(
    given: Iterable[str] | None, tasks: Collection[str], split: str, model: str, flag: str = "--prompts"
) -> dict[str, str]:
    """["geneval=A", …] -> {task: file}: the --prompts given, for the other tasks the model's own. A folder is one of
    Flow-GRPO's dataset/."""
    given = pairs(given, flag, overrule=True)
    for task in given:
        if task not in tasks:
            fail(f"{flag}: unknown task {task!r}: this run has {', '.join(tasks)}")
    for task in tasks:
        if not re.fullmatch(r"[\w-]+", task):  # pictures and adapters are named after it
            fail(f"task {task!r}: a task's name is made of letters, digits, _ and -")
    files = {task: given.get(task, f"{model}/prompts/{task}_{split}.txt") for task in tasks}
    names = [f"{split}_metadata.jsonl", f"{split}.txt"] + ["evaluation_metadata.jsonl"] * (split == "test")  # GenEval's own
    for task, file in files.items():
        files[task] = file = next((str(Path(file, name)) for name in names if os.path.isfile(f"{file}/{name}")), file)
        if not os.path.isfile(file):
            fail(f"no {split} prompts for task {task!r}: {file} is not a file; give {flag} {task}=FILE")
    return files

# What is fetched from a hub repository: the parts of a diffusers pipeline (not the single-file copies beside them), a LoRA.
PIPELINE = ("model_index.json", *(f"{n}/*" for n in ("transformer", "vae", "scheduler")),
            *(f"{n}{i}/*" for n in ("tokenizer", "text_encoder") for i in ("", "_2", "_3")))  # fmt: skip

ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors")


def hub_id(path: str) -> bool:
    """ORG/NAME or ORG/NAME@REVISION, unless ORG is a folder here, or .. stands in it: then it is a path."""
    known = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", path) and ".." not in path
    return bool(known) and not os.path.exists(path.split("/")[0])


@functools.cache
def fetch(path: str, flag: str, files: tuple[str, ...]) -> str:
    """A directory as it is; a hub id as the directory of its snapshot, fetched once, of those `files` (patterns) alone.

    The hub's own rules hold: HF_TOKEN or `hf auth login` for gated models, HF_HUB_OFFLINE=1 for the cache alone."""
    if not hub_id(path):
        return path
    from huggingface_hub import errors, snapshot_download

    name, _, revision = path.partition("@")
    try:
        return snapshot_download(name, revision=revision or None, allow_patterns=list(files))
    except errors.HFValidationError:
        fail(f"{flag} {path}: neither a directory here nor a name that the hub allows")
    except errors.GatedRepoError:
        fail(f"{flag} {path}: gated; accept its licence at https://huggingface.co/{name}, then run `hf auth login`")
    except errors.RevisionNotFoundError:
        fail(f"{flag} {path}: the hub has no revision {revision!r} of {name}")
    except errors.RepositoryNotFoundError:
        fail(f"{flag} {path}: neither a directory here nor a model on the hub (or a private one: run `hf auth login`)")
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        fail(
            f"{flag} {path}: no directory here, nothing in the hub's cache, no hub ({reason(error)}); try `hf download {name}`"
        )


def check_model(path: str, flag: str = "--model") -> None:
    """A pipeline of the right kind, if it is here; a hub id is looked up when it is loaded."""
    if hub_id(path):
        return
    try:
        kind = read_json((Path(path) / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        fail(f"{flag} {path}: not a diffusers pipeline (no usable model_index.json in it)")
    if kind != "StableDiffusion3Pipeline":
        fail(f"{flag} {path}: a {kind}; this code trains Stable Diffusion 3 and 3.5 (StableDiffusion3Pipeline)")
    for index in Path(path).glob("*/*.index.json"):  # of weights in several files
        try:
            shards = read_json(index.read_text(encoding="utf-8"))["weight_map"].values()
            outside = [name for name in shards if Path(name).name != name]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            fail(f"{flag} {path}: {index.parent.name}/{index.name} is damaged; fetch it again")
        if outside:
            fail(f"{flag} {path}: {index.parent.name}/{index.name} names a file outside its folder: {outside[0]}")
    for part in ("transformer", "vae"):  # with neither there is no weight to open: --dry_run fetches none
        if any(Path(path, part).glob("*.bin")) and not any(Path(path, part).glob("*.safetensors")):
            fail(f"{flag} {path}: no safetensors in {part}; a pickle (.bin) can run code and is not opened")


def check_adapter(path: str, flag: str) -> None:
    """An adapter is a directory in PEFT format (adapter_config.json) or in diffusers format, or a hub id of one."""
    if hub_id(path) or any(os.path.isfile(f"{path}/{name}") for name in ADAPTER[1:]):
        return
    if any(os.path.isfile(f"{path}/adapter/{name}") for name in ADAPTER[1:]):
        fail(f"{flag} {path}: a run, not an adapter; did you mean {path}/adapter?")
    if any(os.path.isfile(f"{path}/{Path(name).stem}.bin") for name in ADAPTER[1:]):
        fail(f"{flag} {path}: its weights are pickled (.bin), and a pickle can run code: not opened; take the safetensors")
    fail(f"{flag} {path}: not an adapter (a directory with {' or '.join(ADAPTER[1:])})")


def save_json(path: str | Path, value: object) -> None:
    """Beside it first, then renamed: a reader sees the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    beside.replace(path)


def find_images(
    path: str, task: str, tasks: Collection[str], model: str, file: str | None = None, number: int = 0
) -> tuple[list[Path], list[str], list[dict]]:
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
    file = prompt_files([f"{task}={file}"] if file else [], [task], "test", model)[task]
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
            have = f"{counts.get(line, 0)} image(s) of prompt {line:05d}, not {wanted}; {file} has {len(prompts)} prompts"
            fail(f"--scores_only {folder}: {have} (--num_prompts N takes the first N)")
    lines, files = zip(*sorted(found))
    return list(files), [prompts[n] for n in lines], [metadata[n] for n in lines]


@contextlib.contextmanager
def written_beside(folder: str | Path) -> Iterator[Path]:
    """Gives a folder to write into, beside `folder`; its files take their places there when all are whole, else none does."""
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
