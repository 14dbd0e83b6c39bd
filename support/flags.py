"""Flags that several scripts share, and errors in one line. Imports the standard library only."""

import argparse
import contextlib
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

TASKS = ("geneval", "ocr", "deqa", "pickscore")


def one_line(text: object) -> str:
    """Escape newlines, control and format characters for printing."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def fail(message: str) -> NoReturn:
    """Print one line (what is wrong, where, what would be right); exit code 2."""
    print(f"error: {one_line(message)[:2000]}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def reason(error: Exception) -> str:
    """The first line of an exception's message, or else its type: for the end of our own error."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description keeps its line breaks; every flag shows its default."""


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and with files of flags, in which # starts a comment."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see --help)")

    def format_help(self) -> str:
        return re.sub(r"\s+\(default:\s+(None|False|{})\)", "", super().format_help())

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        return line.split("#")[0].split()

    def parse_args(self, *given) -> argparse.Namespace:
        try:
            return super().parse_args(*given)
        except (UnicodeDecodeError, RecursionError):
            fail("@FILE: a file of flags must be UTF-8 text and must not name itself")


def make_parser(doc: str | None) -> Parser:
    """A parser that also reads flags from a file: `@recipes/NAME.args`."""
    how = {"formatter_class": Help, "fromfile_prefix_chars": "@", "allow_abbrev": False}
    return Parser(description=doc, **how)


def at_least(low: int, high: int = 10**18) -> Callable[[str], int]:
    """argparse type: a whole number from `low` to `high`, which fits into 64 bits."""

    def whole(text):
        if not text.isdecimal() or len(text) > 19 or not low <= int(text) <= high:
            limits = f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {limits}")
        return int(text)

    return whole


positive, portion = at_least(1), at_least(1, 1000)  # portion: of the prompts, in --task_mix


def within(low: float, high: float = math.inf) -> Callable[[str], float]:
    """argparse type: a number from `low` to `high`."""

    def number(text):
        with contextlib.suppress(ValueError):
            value = float(text)
            if low <= value <= high and math.isfinite(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low:g} to {high:g}")

    return number


above_0, scale = within(1e-9), within(1)  # scale: of guidance


def lora_alpha(text: str) -> float | str:
    """argparse type: a LoRA's alpha; "rank" is that of loaders that read no alpha."""
    return text if text == "rank" else above_0(text)


class Pairs(argparse.Action):
    """NAME=VALUE ... -> {NAME: VALUE}, values of this `kind`; `bare` is the value of a lone NAME. A
    later flag overrules an earlier one name by name: the command line overrules a file of flags."""

    def __init__(self, *how, kind: Callable = str, bare: str = "", **more) -> None:
        super().__init__(*how, nargs="+", default={}, **more)
        self.kind, self.bare = kind, bare

    def __call__(self, parser, args, items, flag=None) -> None:
        values = {}
        for item in items:
            name, equals, value = item.partition("=")
            value = value if equals else self.bare
            if not (name and value):
                fail(f"{flag} {item}: expected NAME={'VALUE' if self.kind is str else 'NUMBER'}")
            if name in values:
                fail(f"{flag}: {name} is given twice")
            try:
                values[name] = self.kind(value)
            except argparse.ArgumentTypeError as error:
                fail(f"{flag} {item}: {error}")
        setattr(args, self.dest, getattr(args, self.dest) | values)


def model_flags(parser: argparse.ArgumentParser) -> None:
    """--model and how it is loaded: in every script that runs the model."""
    flag = parser.add_argument_group("base model").add_argument
    flag("--model", default="toy", metavar="DIR|HUB", help="a folder or ORG/NAME[@REVISION]")
    flag("--dtype", choices=("fp32", "bf16"), help="of the backbone; default bf16 on a GPU")
    flag("--checkpointing", action="store_true", help="recompute activations: saves memory")
    flag("--compile", action="store_true", help="torch.compile: slow start, then faster (GPU)")
    flag("--no_t5", action="store_true", help="no third text encoder (9.5 GB in SD3.5)")
    flag("--text_length", type=positive, default=128, help="T5 tokens per prompt")
    flag("--cache_embeddings", metavar="DIR", help="keep text embeddings in this folder")
    grids = {"choices": ("double", "single"), "default": "double"}
    flag("--time_grid", **grids, help="SD3's times shifted twice, as diffusers does, or once")
    flag("--size", type=positive, help="image side in pixels; default the model's own")


def reward_flags(flag: Callable) -> None:
    """The scorers: in every script that scores images."""
    flag("--rewards", default="toy", metavar="MODULE", help="Python module that has REWARDS")
    flag("--reward_device", help="of the scorers: cpu, cuda:1, ...; default the model's device")


def run_flags(flag: Callable) -> None:
    """How a run is scored, seeded, saved and resumed: in every training script."""
    reward_flags(flag)
    flag("--seed", type=at_least(0), default=0, help="of prompts, noise and fresh LoRAs")
    flag("--save_every", type=positive, default=20, help="iterations between checkpoints")
    flag("--keep", type=positive, default=2, help="number of newest checkpoints to keep")
    flag("--max_bad_steps", type=positive, default=10, help="stop at so many NaN updates in a row")
    flag("--resume", action="store_true", help="continue a run if there is one")
    flag("--overwrite", action="store_true", help="delete the run in --out and start again")


def check_folder(out: str | Path) -> None:
    """Fail before the work, not after it, if --out cannot be created or written into."""
    try:
        existing = next(p for p in (Path(out), *Path(out).absolute().parents) if p.exists())
    except OSError as error:  # for example, the name is too long
        fail(f"--out {out}: {error.strerror}; choose another folder")
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        fail(f"--out {out}: {existing} is no folder to write into; choose another")


def check_out(args: argparse.Namespace) -> None:
    """--out is new, empty, or a run to --resume or --overwrite."""
    if int(os.environ.get("RANK", 0)):  # rank 0 checks for all
        return
    out = Path(args.out)
    check_folder(out)
    is_run = (out / "args.json").exists()
    if args.resume and args.overwrite:
        fail("--resume and --overwrite: choose one")
    if is_run and not (args.resume or args.overwrite):
        fail(f"--out {out} already holds a run: --resume it, --overwrite it, or choose another")
    if not is_run and out.exists() and any(path.name != "lock" for path in out.iterdir()):
        fail(f"--out {out} is not empty and not a run: choose another folder")
