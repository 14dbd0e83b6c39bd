"""What the scripts do before torch is imported: flags, files and one-line errors. Standard library, and the hub where asked."""

import argparse
import difflib
import math
import os
import re
import socket
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

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


