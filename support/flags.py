"""What the scripts do before torch is imported: flags, files and one-line errors. Standard library, and the hub where asked."""

import argparse
import contextlib
import difflib
import functools
import json
import math
import os
import re
import shutil
import socket
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its start-up notices on a missing torchvision concern nobody here

TASKS = ("geneval", "ocr", "deqa", "pickscore")


def one_line(text: object) -> str:
    """For people to look at: what would break or hide a line (newlines, control and format characters) as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def fail(message: str) -> NoReturn:
    """One line (what is wrong, which flag or file, what would be right) and exit code 2."""
    print(f"error: {one_line(message)[:2000]}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def reason(error: Exception) -> str:
    """The first line of an exception's message, or its kind: for the end of an error of ours."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults behind the flags that have one; the script's opening above them, its prose fitted to the terminal."""

    def _get_help_string(self, action):
        told = action.default in (None, False) or "default" in (action.help or "")
        return action.help if told else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action):
        kind = getattr(action.type, "__name__", "")
        return {"whole": "N", "number": "X", "finite": "X"}.get(kind, action.dest.upper())

    def _fill_text(self, text, width, indent):
        parts = re.split(r"\n(?=\n| {4}| ?\d+\. )", text)  # paragraphs, numbered items, lines of code
        for n, part in enumerate(parts):
            if not part.startswith("    "):
                hang = "   " if part.lstrip()[:1].isdecimal() else ""
                filled = textwrap.fill(" ".join(part.split()), width, subsequent_indent=hang)
                parts[n] = "\n" * part.startswith("\n") + filled
        return "\n".join(parts)


class Parser(argparse.ArgumentParser):
    """argparse that fails in one line, and whose files of flags name no further files: one could name itself."""

    def error(self, message: str) -> NoReturn:
        if typed := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            known = list(self._option_string_actions)
            near = [flag for flag in known if flag.startswith(typed[1])] or difflib.get_close_matches(typed[1], known, 1)
            message += "".join(f"; did you mean {flag}?" for flag in near[:1])
        fail(message)

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        words = line.split("#")[0].split()
        for word in words:
            if word.startswith("@"):
                fail(f"{word}: a file of flags cannot name another; give both on the command line")
        return words

    def parse_args(self, *given) -> argparse.Namespace:
        try:
            return super().parse_args(*given)
        except UnicodeDecodeError:
            fail("@FILE: a file of flags is UTF-8 text, this one is not")


def make_parser(doc: str | None) -> Parser:
    """A parser that also reads flags from a file: `@recipes/NAME.args`, # starts a comment."""
    return Parser(description=doc, formatter_class=Help, fromfile_prefix_chars="@", allow_abbrev=False)


def pairs(items: Iterable[str] | None, flag: str, number: bool = False, overrule: bool = False) -> dict[str, str | float]:
    """["geneval=A", …] -> {"geneval": "A", …}, or to finite floats. overrule: of two for one name the later counts, so that
    the command line overrules a file of flags."""
    out = {}
    for item in items or ():
        key, equals, value = item.partition("=")
        if not (key and equals and value):
            fail(f"{flag} {item}: expected NAME={'NUMBER' if number else 'VALUE'}")
        if key in out and not overrule:
            fail(f"{flag}: {key} is given twice")
        try:
            out[key] = float(value) if number else value
        except ValueError:
            fail(f"{flag} {item}: {value!r} is not a number")
        if number and not math.isfinite(out[key]):
            fail(f"{flag} {item}: {value!r} is not a finite number")
    return out


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


def at_least(low: int) -> Callable[[str], int]:
    """argparse type: a whole number of at least `low` that fits into 63 bits."""

    def whole(text):
        if not text.isdecimal() or len(text) > 18 or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low} and at most 18 digits")
        return int(text)

    return whole


def finite(text: str) -> float:
    """argparse type: a number, neither nan nor infinite."""
    try:
        if math.isfinite(number := float(text)):
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")


def within(low: float, high: float = math.inf) -> Callable[[str], float]:
    """argparse type: a number from `low` to `high`."""

    def number(text):
        if not low <= (value := finite(text)) <= high:
            to = f" to {high:g}" if high < math.inf else " on"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low:g}{to}")
        return value

    return number


positive = at_least(1)


def model_flags(parser: argparse.ArgumentParser) -> None:
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


def reward_flags(flag: Callable) -> None:
    """Which scorers, and where they run: the same flags in every script that scores."""
    flag("--rewards", default="toy", help="Python module whose REWARDS holds the scorers by name")
    flag("--reward_device", metavar="DEVICE", help="where scorers with weights run: cpu, cuda:1; default the model's device")


def run_flags(flag: Callable) -> None:
    """How a run is repeated, saved, stopped and taken up again: the same flags in both training scripts."""
    flag("--seed", type=at_least(0), default=0, help="of prompts, noise and fresh weights")
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


def check_train_steps(args: argparse.Namespace) -> None:
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


def check_folder(out: str | Path) -> None:
    """--out can be made and written into, which is better known before the work than after it."""
    try:
        there = next(p for p in (Path(out), *Path(out).absolute().parents) if p.exists())
    except OSError as error:  # a name that is too long, for example
        fail(f"--out {out}: {error.strerror}; choose another folder")
    if not there.is_dir():
        fail(f"--out {out}: {there} is a file; choose a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        fail(f"--out {out}: no permission to write into {there}")


def check_out(args: argparse.Namespace) -> None:
    """A run never lands on anything else: the folder must be new or empty, unless it is a run and --resume or
    --overwrite says what to do with it. Where torchrun starts a failed run anew (--max-restarts), it is resumed."""
    out = Path(args.out)
    if int(os.environ.get("RANK", 0)):  # the others follow rank 0
        return
    check_folder(out)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and (out / "lock").exists():
        if (out / "lock").read_text() == launcher():  # this launch made the run, or was allowed to go on with it
            args.resume, args.overwrite = "newest" if (out / "args.json").exists() else None, False
    used = (out / "args.json").exists()
    if args.resume and args.overwrite:
        fail("--resume and --overwrite: choose one")
    if args.resume and not used:
        fail(f"--resume: there is no run in {out}")
    if not used and out.exists() and any(p.name != "lock" for p in out.iterdir()):
        fail(f"--out {out} is not an empty folder, and no run either: choose another")
    if used and not (args.resume or args.overwrite):
        fail(f"--out {out} already holds a run: choose another folder, or --resume it, or --overwrite it")


def launcher() -> str:
    """Who started this process: the same for a process that torchrun has started anew."""
    return f"{socket.gethostname()} {os.getppid()}"


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
