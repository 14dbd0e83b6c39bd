"""Checkpoints: a run that is stopped at any instant goes on as if nothing had happened.

A checkpoint holds all that the next iteration depends on: student, average, optimizer and the
number of iterations done. Prompts and noise are functions of (seed, iteration, sample), so there is
no generator state to save.
"""

import argparse
import contextlib
import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, TextIO

import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from support.files import ADAPTER, fetch, read_json, save_json
from support.flags import fail, launcher
from support.lora import save_adapter
from support.metrics import cut_log, read_log
from support.model import TEXT
from support.run import gather, rank_and_world, sha256

# The flags that do not change the weights; --resume compares all others. Of flags that name files
# it compares the contents of the files.
HARMLESS = """
    model teacher init anchor prompts test_prompts out resume overwrite iterations save_every keep
    max_bad_steps sample_every eval_every eval_prompts eval_steps reward_device on_reward_error
    micro_batch label_batch checkpointing compile cache_embeddings dry_run
""".split()

# ---- Folders that are complete or absent


def publish(beside: Path, final: Path) -> None:
    """Give a finished folder its name once its contents are on the disk: after a power cut the
    folder is complete or absent."""
    for path in (*beside.rglob("*"), beside):
        sync(path)
    old = final.with_name(f"tmp_old_{final.name}")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)  # a folder cannot be renamed onto another
    os.replace(beside, final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def checksums(folder: Path) -> dict[str, str]:
    """{file: SHA-256} of all files in a folder except the list itself."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "checksums.json")
    return {str(f.relative_to(folder)): sha256(f) for f in files}


def whole(checkpoint: Path) -> bool:
    """Does a checkpoint match its checksums? The names in its list are never opened."""
    with contextlib.suppress(OSError, ValueError):
        return read_json((checkpoint / "checksums.json").read_text()) == checksums(checkpoint)
    return False


def number_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def checkpoints(run: str | Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = [p for p in Path(run).glob("checkpoints/step_*") if p.name[5:].isdecimal()]
    return sorted(found, key=number_of)


# ---- The start of a run, new or resumed


def begin_run(args: argparse.Namespace, pipe, student, average, optimizer) -> tuple[int, "Saver"]:
    """Create the run folder or restore a checkpoint; every process calls it. Returns the number of
    iterations done and the Saver. student, average: {"LAYER.lora_A.weight": parameter}."""
    saver, run = Saver(args, pipe, student, average, optimizer), Path(args.out)
    checkpoint, start = None, 0
    if saver.rank == 0:
        run.mkdir(parents=True, exist_ok=True)
        saver.lock, saver.origin = lock_run(run), origin_of(args, pipe)
        if args.resume:
            checkpoint = choose_checkpoint(run, args.resume, saver.origin)
        if args.overwrite:
            empty(run)
        (run / "samples").mkdir(exist_ok=True)
        save_json(run / "args.json", vars(args))
        cut_log(run, number_of(checkpoint) if checkpoint else 0)
    checkpoint = gather(checkpoint)[0]
    if checkpoint:
        start = number_of(checkpoint)
        saver.restore(load_file(checkpoint / "state.safetensors"))
    saver.catch_signals()
    return start, saver


def lock_run(run: Path) -> TextIO:
    """Let one process at a time write into a run. The lock ends with the process."""
    lock = open(run / "lock", "a")
    with contextlib.suppress(ImportError):  # Windows has no such lock
        import fcntl

        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fail(f"--out {run}: another process is writing into this run; wait, or choose another")
    lock.truncate(0)
    lock.write(launcher())
    lock.flush()
    return lock


def empty(run: Path) -> None:
    """Delete a run except for the files that identify its folder as a run."""
    for path in run.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in ("lock", "args.json"):
            path.unlink()


def origin_of(args: argparse.Namespace, pipe: StableDiffusion3Pipeline) -> dict:
    """{name: value} of all that the weights depend on: flags, and the SHA-256 of model, adapters
    and prompts, which may move but not change."""
    origin = {f"--{name}": value for name, value in vars(args).items() if name not in HARMLESS}
    adapters = {f"teacher {task}": path for task, path in getattr(args, "teacher", {}).items()}
    adapters |= {"init": args.init, "anchor": getattr(args, "anchor", "base")}
    files = {part: f"{pipe.name_or_path}/{part}" for part in ("transformer", *TEXT)}
    files |= {role: fetch(path, "", ADAPTER) for role, path in adapters.items() if path != "base"}
    files |= {f"prompts {task}": path for task, path in args.prompts.items()}
    origin |= {role: sha256(path) for role, path in files.items() if Path(path).exists()}
    return origin | {"the order of the tasks": list(args.prompts)}


def choose_checkpoint(run: Path, wanted: str, origin: dict) -> Path | None:
    """The checkpoint named, or the newest complete one; None if there is none yet. Fails, and
    changes nothing, if it is damaged or was made from something else."""
    found = list(reversed(checkpoints(run)))
    if wanted != "newest":
        found = [c for c in found if c.resolve() == Path(wanted).resolve()]
        if not found:
            fail(f"--resume {wanted}: not a checkpoint of this run ({run}/checkpoints/step_N)")
    elif not found:
        print(f"{run} has no checkpoint yet: starting from the beginning")
        return None
    checkpoint = next((c for c in found if whole(c)), None)
    if checkpoint is None:
        names = ", ".join(c.name for c in found)
        fail(f"--resume: damaged (checksums differ): {names}; nothing was changed")
    for damaged in found[: found.index(checkpoint)]:
        print(f"warning: {damaged} is damaged (checksums differ)", file=sys.stderr)
    try:
        saved = {**read_json((checkpoint / "state.json").read_text())["origin"]}
    except (ValueError, KeyError, TypeError):
        fail(f"--resume: {checkpoint}/state.json was not written by this version of the code")
    changed = [what for what in {**origin, **saved} if origin.get(what, "") != saved.get(what, "")]
    if changed:
        names = ", ".join(changed)
        fail(f"--resume: {names} changed since {checkpoint} was saved; resume with the same")
    for newer in checkpoints(run):
        if number_of(newer) > number_of(checkpoint):
            os.replace(newer, newer.with_name(f"unused_{newer.name}"))
    return checkpoint


# ---- Saving

SIGNALS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGUSR1")]


class Saver:
    """Keeps the last completed iteration in host memory; writes it as a checkpoint when it is due,
    and when a signal or an error ends the run. Only rank 0 writes.

    A thread waits for signals, because the main thread may be waiting for a process that is gone.
    It saves at once: the 30 seconds that launchers grant suffice for iterations of any length."""

    def __init__(self, args, pipe, student, average, optimizer) -> None:
        self.args, self.run, self.rank = args, Path(args.out), rank_and_world()[0]
        self.student, self.average, self.optimizer = student, average, optimizer
        self.config = pipe.transformer.peft_config["student"]
        self.kept = None  # (iterations, tensors) of the last completed iteration
        self.saving = threading.RLock()

    def tensors(self) -> dict[str, torch.Tensor]:
        """{name: tensor} of all that the next iteration depends on."""
        found = {}
        for name, parameter in self.student.items():
            found[f"student.{name}"], found[f"average.{name}"] = parameter, self.average[name]
            for moment, tensor in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer.{moment}.{name}"] = tensor
        return found

    @torch.no_grad()
    def restore(self, saved: dict[str, torch.Tensor]) -> None:
        """Put saved tensors back in place."""
        for key, tensor in saved.items():
            if key.startswith("optimizer."):
                _, moment, name = key.split(".", 2)
                parameter = self.student[name]
                copy = tensor.to(parameter.device, copy=True)
                self.optimizer.state[parameter][moment] = copy
        for key, tensor in self.tensors().items():
            tensor.copy_(saved[key])

    def iteration_done(self, iterations: int, bad_updates: int) -> None:
        """Keep the state after this many iterations and save it if it is due. bad_updates: how many
        updates in a row had a NaN or infinite gradient; too many end the run."""
        if self.rank == 0:
            tensors = self.tensors().items()
            copies = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors}
            with self.saving:
                self.kept = iterations, copies
            if iterations % self.args.save_every == 0 or iterations == self.args.iterations:
                self.save()
        if bad_updates >= self.args.max_bad_steps:
            self.give_up(f"{bad_updates} updates in a row had a NaN or infinite gradient")

    def save(self) -> None:
        """Write checkpoints/step_N: adapter/ (the average, ready for use) and the training state.
        Then delete the oldest."""
        with self.saving:
            if not self.kept:
                return
            iterations, tensors = self.kept
            final = self.run / "checkpoints" / f"step_{iterations}"
            if whole(final):
                return
            for unfinished in final.parent.glob("tmp_*"):  # of a process that was killed
                shutil.rmtree(unfinished)
            beside = final.with_name(f"tmp_{final.name}")
            with self.full_disk(final.name, beside):
                average = {name: tensors[f"average.{name}"] for name in self.average}
                save_adapter(beside / "adapter", average, self.config)
                save_file(tensors, beside / "state.safetensors")
                save_json(beside / "state.json", {"iteration": iterations, "origin": self.origin})
                save_json(beside / "checksums.json", checksums(beside))
                publish(beside, final)
            for old in checkpoints(self.run)[: -self.args.keep]:
                half_deleted = old.with_name(f"tmp_{old.name}")  # not a checkpoint any more
                os.replace(old, half_deleted)
                shutil.rmtree(half_deleted)

    @contextlib.contextmanager
    def full_disk(self, what: str, beside: Path) -> Iterator[None]:
        """Fail in one line if writing fails; what was saved before is still there."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            shutil.rmtree(beside, ignore_errors=True)
            names = ["none", *(c.name for c in checkpoints(self.run))]
            how = f"the newest checkpoint is {names[-1]}; make room, then --resume"
            print(file=sys.stderr)  # ends the progress bar's line
            fail(f"--out {self.run}: cannot save {what} ({error}); {how}")

    def give_up(self, message: str) -> NoReturn:
        """Save the last good state and stop, on every process."""
        try:
            if self.rank == 0:
                self.save()
                print(file=sys.stderr)
                fail(message)
        finally:
            gather(None)  # the others wait: when one exits, torchrun ends all
        raise SystemExit(2)

    def keep_best(self, score: float) -> None:
        """Write the average as best/ if it scores higher than every "test" in the log."""
        if self.rank == 0:
            scores = [line["test"] for line in read_log(self.run) if line.get("test") is not None]
            beside = self.run / "tmp_best"
            if score > max(scores, default=-math.inf):
                with self.full_disk("best", beside):
                    save_adapter(beside, self.average, self.config)
                    publish(beside, self.run / "best")

    def finish(self) -> None:
        """After the loop: publish adapter/, a copy of the newest checkpoint's, or with --final best
        of best/. Signals have their usual effect again."""
        self.close()
        if not self.optimizer.state:
            self.give_up("every update was skipped: all gradients were NaN or infinite")
        if self.rank == 0:
            source, beside = checkpoints(self.run)[-1] / "adapter", self.run / "tmp_adapter"
            if getattr(self.args, "final", "last") == "best" and (self.run / "best").is_dir():
                source = self.run / "best"
            with self.full_disk("adapter", beside):
                shutil.rmtree(beside, ignore_errors=True)
                shutil.copytree(source, beside)
                publish(beside, self.run / "adapter")

    def catch_signals(self) -> None:
        self.read, self.write = os.pipe()
        os.set_blocking(self.write, False)
        self.wakeup = signal.set_wakeup_fd(self.write)  # a signal's number arrives here at once
        self.handlers = {number: signal.signal(number, self.interrupt) for number in SIGNALS}
        sys.excepthook = self.report_error
        threading.Thread(target=self.wait, daemon=True).start()

    def close(self) -> None:
        sys.excepthook = sys.__excepthook__
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.wakeup)
        os.close(self.write)  # the thread reads the end and stops

    def interrupt(self, number, frame) -> None:
        """While the thread saves, a second Ctrl-C ends the process."""
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    def wait(self) -> None:
        """The thread: save, then end the process with the signal's usual exit code."""
        while received := os.read(self.read, 1):
            if received[0] in SIGNALS:
                try:
                    self.save_and_report()
                finally:
                    os._exit(128 + received[0])
        os.close(self.read)

    def report_error(self, kind, error, trace) -> None:
        sys.__excepthook__(kind, error, trace)  # its own message first
        self.save_and_report()

    def save_and_report(self) -> None:
        if self.rank == 0:
            with self.saving:  # nothing newer is kept meanwhile
                self.save()
                done = f"saved after {self.kept[0]} iterations" if self.kept else "nothing to save"
            how = "continue with the same command and --resume"
            print(f"\nstopped; {done}; {how}", file=sys.stderr, flush=True)
