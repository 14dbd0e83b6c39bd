"""Runs that are killed go on as if nothing had happened: checkpoints, and whatever may interrupt a run.

A checkpoint is everything that the next iteration depends on: the student, its average, the optimizer, the number of
iterations done. Prompts and noise are functions of (seed, iteration, sample), so there is no generator state to save.
"""

import argparse
import contextlib
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn, TextIO

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from support.lora import save_adapter
from support.flags import fail, launcher, read_json, save_json
from support.run import cut_log, gather, sha256

# ----------------------------------------------------------------------------------------------------------
# Folders that are whole or not there
# ----------------------------------------------------------------------------------------------------------


def publish(beside: Path, final: Path) -> None:
    """A finished folder gets its name. What it holds is on the disk by then, not only in the system's memory: after a
    power cut the folder is there as a whole, or not at all."""
    for path in (*beside.rglob("*"), beside):
        sync(path)
    old = final.with_name(f"tmp_old_{final.name}")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)  # a folder cannot be renamed onto another
    os.replace(beside, final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: str | Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish_adapter(source: str | Path, final: Path) -> None:
    """A copy of an adapter under another name, by the same rule."""
    beside = final.with_name(f"tmp_{final.name}")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(source, beside)
    publish(beside, final)


def checksums(folder: Path) -> dict[str, str]:
    """{file: SHA-256} of all files in a folder, but for the list itself."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "checksums.json")
    return {str(f.relative_to(folder)): sha256(f) for f in files}


def whole(checkpoint: Path) -> bool:
    """Is it as it was saved? The names in its list are compared, never opened."""
    with contextlib.suppress(OSError, ValueError):
        return read_json((checkpoint / "checksums.json").read_text()) == checksums(checkpoint)
    return False


def checkpoints(run: str | Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = (p for p in (Path(run) / "checkpoints").glob("step_*") if p.name[5:].isdecimal())
    return sorted(found, key=lambda p: int(p.name[5:]))


# ----------------------------------------------------------------------------------------------------------
# The beginning of a run, or of its second half
# ----------------------------------------------------------------------------------------------------------


def begin_run(
    args: argparse.Namespace,
    harmless: str,
    files: list[tuple[str, str | Path]],
    rank: int,
    student: dict[str, torch.nn.Parameter],
    ema: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    config: LoraConfig,
) -> tuple[int, "Saver"]:
    """Make the run folder, or put a checkpoint back (all ranks participate). Returns the iterations done and the Saver.

    --resume compares the flags, except the `harmless` ones (a string of names) that do not change the mathematics, and
    the contents of `files` [(role, path), …]: a teacher may have moved, but not changed."""
    run, harmless = Path(args.out), harmless.split() + "out resume overwrite iterations save_every keep max_bad_steps".split()
    checkpoint, state, lock = None, {}, None
    if rank == 0:
        flags = {k: v for k, v in vars(args).items() if k not in harmless}
        state = {"flags": flags, "files": [(role, sha256(path)) for role, path in files if Path(path).exists()]}
        run.mkdir(parents=True, exist_ok=True)
        lock = lock_run(run)
        if args.resume:
            checkpoint = choose_checkpoint(run, args.resume, state)
        for path in run.iterdir() if args.overwrite else ():
            if path.name not in ("lock", "args.json"):  # they tell that this is a run
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        save_json(run / "args.json", vars(args))
        (run / "samples").mkdir(exist_ok=True)
        cut_log(run, int(checkpoint.name[5:]) if checkpoint else 0)
    checkpoint = gather(checkpoint)[0]
    if checkpoint:
        tensors = load_file(checkpoint / "state.safetensors")
        with torch.no_grad():
            for k, p in student.items():
                p.copy_(tensors[f"student.{k}"])
                ema[k].copy_(tensors[f"ema.{k}"])
                names = [n for n in ("step", "exp_avg", "exp_avg_sq") if f"optimizer.{n}.{k}" in tensors]
                if names:
                    optimizer.state[p] = {n: tensors[f"optimizer.{n}.{k}"].to(p.device) for n in names}
    return int(checkpoint.name[5:]) if checkpoint else 0, Saver(args, rank, student, ema, optimizer, config, state, lock)


def lock_run(run: Path) -> TextIO:
    """One process at a time writes into a run. The lock goes with the process, however that ends."""
    lock = open(run / "lock", "a")
    with contextlib.suppress(ImportError):  # Windows has no such lock
        import fcntl

        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fail(f"--out {run}: another process is writing into this run; wait for it, or choose another folder")
    lock.truncate(0)
    lock.write(launcher())
    lock.flush()
    return lock


def choose_checkpoint(run: Path, wanted: str, state: dict) -> Path | None:
    """The checkpoint named, or the newest that is whole; None where there is none yet. One made with other flags or
    files is refused."""
    found = [c for c in reversed(checkpoints(run)) if wanted == "newest" or c.resolve() == Path(wanted).resolve()]
    if wanted != "newest" and not found:
        fail(f"--resume {wanted}: not one of this run's checkpoints ({run}/checkpoints/step_N)")
    if not found:
        print(f"{run} has no checkpoint yet: starting at the beginning")
        return None
    checkpoint = next((c for c in found if whole(c)), None)
    if checkpoint is None and wanted != "newest":
        fail(f"--resume {wanted}: damaged, its checksums differ; without a name the newest good one is taken")
    if checkpoint is None:
        fail(f"--resume: none of the checkpoints in {run} is whole; nothing was touched; --overwrite starts anew")
    for damaged in found[: found.index(checkpoint)]:
        print(f"warning: {damaged} is damaged: its checksums differ; trying the one before it", file=sys.stderr)
    try:
        saved = read_json((checkpoint / "state.json").read_text())
        flags, saved_files = dict(saved["flags"]), [tuple(map(str, file)) for file in saved["files"]]
    except (ValueError, KeyError, TypeError):
        fail(f"--resume: {checkpoint}/state.json is not one that this code writes")
    changed = [f"--{k}" for k, v in state["flags"].items() if k not in flags or flags[k] != v]
    changed += dict.fromkeys(role for role, _ in sorted(set(state["files"]) ^ set(saved_files)))
    if changed or state["files"] != saved_files:
        what = ", ".join(changed) or "the order of the teachers"
        fail(f"--resume: {what} changed since {checkpoint} was saved; resume with the same")
    for newer in checkpoints(run):
        if int(newer.name[5:]) > int(checkpoint.name[5:]):  # damaged, or the run goes back behind it: out of the way
            os.replace(newer, newer.with_name(f"unused_{newer.name}"))
    return checkpoint


# ----------------------------------------------------------------------------------------------------------
# Saving, whatever happens
# ----------------------------------------------------------------------------------------------------------


class Saver:
    """`keep` copies the last completed iteration to host memory, `save` writes that copy as a checkpoint.

    Ctrl-C, SIGTERM, SIGUSR1 and errors make rank 0 write it too. Nothing has to be finished first, so the 30 seconds that
    launchers grant are enough for iterations of any length; on the other ranks a signal ends the process. Signals are
    awaited in a thread of its own: Python's handlers run in the main thread, which may be waiting for a process that is
    gone. A second Ctrl-C exits at once; what is half written then is never taken for a checkpoint."""

    def __init__(
        self,
        args: argparse.Namespace,
        rank: int,
        student: dict[str, torch.nn.Parameter],
        ema: dict[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        config: LoraConfig,
        state: dict,
        lock: TextIO | None,
    ) -> None:
        self.run, self.kept, self.rank, self.state, self.lock = Path(args.out), args.keep, rank, state, lock
        self.student, self.ema, self.optimizer, self.config = student, ema, optimizer, config
        self.ready, self.saving, self.interrupts = None, threading.RLock(), 0
        self.read, self.write = os.pipe()
        os.set_blocking(self.write, False)
        self.wakeup = signal.set_wakeup_fd(self.write)  # every signal's number is written here as soon as it arrives
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
        self.handlers = {number: signal.signal(number, self.count) for number in numbers}
        sys.excepthook = self.failed
        threading.Thread(target=self.wait, args=(numbers,), daemon=True).start()

    def keep(self, iterations: int) -> None:
        """The state after that many iterations, in host memory (rank 0)."""
        if self.rank == 0:
            tensors = {}
            for k, p in self.student.items():
                tensors |= {f"student.{k}": p, f"ema.{k}": self.ema[k]}
                tensors |= {f"optimizer.{n}.{k}": v for n, v in self.optimizer.state.get(p, {}).items()}
            copies = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
            with self.saving:
                self.ready = iterations, copies

    def save(self) -> None:
        """checkpoints/step_N: adapter/ (the average, for use) and the full training state; the oldest ones go (rank 0)."""
        with self.saving:
            if not self.ready:
                return
            iterations, tensors = self.ready
            final = self.run / "checkpoints" / f"step_{iterations}"
            beside = final.with_name(f"tmp_{final.name}")
            if whole(final):
                return
            shutil.rmtree(beside, ignore_errors=True)
            try:
                average = {k.removeprefix("ema."): t for k, t in tensors.items() if k.startswith("ema.")}
                save_adapter(beside / "adapter", average, self.config)
                save_file(tensors, beside / "state.safetensors")
                save_json(beside / "state.json", {"iteration": iterations, **self.state})
                save_json(beside / "checksums.json", checksums(beside))
                publish(beside, final)
            except (OSError, SafetensorError) as error:  # the disk is full: what was saved before is still there
                shutil.rmtree(beside, ignore_errors=True)
                newest = next((c.name for c in reversed(checkpoints(self.run))), "none")
                print(file=sys.stderr)  # ends the progress bar's line
                fail(f"--out {self.run}: cannot save {final.name} ({error}); the newest is {newest}; make room, then --resume")
            for old in checkpoints(self.run)[: -self.kept]:
                gone = old.with_name(f"tmp_{old.name}")  # half deleted is no checkpoint
                shutil.rmtree(gone, ignore_errors=True)
                os.replace(old, gone)
                shutil.rmtree(gone)

    def give_up(self, message: str) -> NoReturn:
        """Save what was last good and stop."""
        self.save()
        print(file=sys.stderr)
        fail(message)

    def count(self, number: int, frame: FrameType | None) -> None:
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:
            os._exit(128 + number)

    def wait(self, numbers: list[int]) -> None:
        """The thread: one of the signals ends the process as it would any other (exit code 130 for Ctrl-C), after saving."""
        while received := os.read(self.read, 1):
            if (number := received[0]) in numbers:
                try:
                    self.save_and_say()
                finally:
                    os._exit(128 + number)
        os.close(self.read)

    def failed(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """An error that nobody caught: its own message first."""
        sys.__excepthook__(kind, error, trace)
        self.save_and_say()

    def save_and_say(self) -> None:
        if self.rank == 0:
            with self.saving:  # the main thread goes on meanwhile, but keeps nothing newer
                self.save()
                what = f"saved after {self.ready[0]} iterations" if self.ready else "nothing to save yet"
            print(f"\nstopped; {what}; go on with the same command and --resume", file=sys.stderr, flush=True)

    def close(self) -> None:
        """After the loop: Ctrl-C is Ctrl-C again. The lock goes with the object."""
        sys.excepthook = sys.__excepthook__
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.wakeup)
        os.close(self.write)  # the thread reads the end, and ends
