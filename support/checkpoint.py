"""Checkpoints: a run that is stopped at any instant goes on as if nothing had happened.

A checkpoint holds everything that the next iteration depends on: student, average, optimizer and
the number of iterations done. Prompts and noise are functions of (seed, iteration, sample), so
there is no generator state to save.
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
from diffusers import StableDiffusion3Pipeline
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from support.files import ADAPTER, fetch, read_json, save_json
from support.flags import fail, launcher
from support.lora import save_adapter
from support.metrics import cut_log
from support.model import TEXT
from support.run import gather, rank_and_world, sha256

# Flags that --resume does not compare, because the weights do not depend on them. Of the files
# that some of them name it compares the contents instead (`compared_files`).
HARMLESS = """
    model teacher init anchor prompts test_prompts out resume overwrite iterations save_every keep
    max_bad_steps sample_every eval_every eval_prompts eval_steps reward_device on_reward_error
    micro_batch label_batch checkpointing compile cache_embeddings dry_run
""".split()

# --------------------------------------------------------------------------------------------------
# Folders that are complete or absent
# --------------------------------------------------------------------------------------------------


def publish(beside: Path, final: Path) -> None:
    """Give a finished folder its name, after its contents have reached the disk: after a power cut
    the folder is complete or absent."""
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
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksums(folder: Path) -> dict[str, str]:
    """{file: SHA-256} of all files in a folder except the list itself."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "checksums.json")
    return {str(f.relative_to(folder)): sha256(f) for f in files}


def whole(checkpoint: Path) -> bool:
    """Does the checkpoint match its checksums? The names in its list are never opened."""
    with contextlib.suppress(OSError, ValueError):
        return read_json((checkpoint / "checksums.json").read_text()) == checksums(checkpoint)
    return False


def iterations_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def checkpoints(run: str | Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = [p for p in Path(run).glob("checkpoints/step_*") if p.name[5:].isdecimal()]
    return sorted(found, key=iterations_of)


# --------------------------------------------------------------------------------------------------
# The start of a run, new or resumed
# --------------------------------------------------------------------------------------------------


def begin_run(
    args: argparse.Namespace,
    pipe: StableDiffusion3Pipeline,
    student: dict[str, torch.nn.Parameter],
    average: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> tuple[int, "Saver"]:
    """Create the run folder, or restore a checkpoint (every process takes part). Returns the number
    of iterations done and the Saver. student, average: {"LAYER.lora_A.weight": parameter}."""
    run, checkpoint, saver = Path(args.out), None, Saver(args, pipe, student, average, optimizer)
    if saver.rank == 0:
        run.mkdir(parents=True, exist_ok=True)
        saver.lock = lock_run(run)
        saver.origin = {
            "flags": {name: value for name, value in vars(args).items() if name not in HARMLESS},
            "files": [(role, sha256(path)) for role, path in compared_files(args, pipe)],
        }
        if args.resume:
            checkpoint = choose_checkpoint(run, args.resume, saver.origin)
        if args.overwrite:
            empty(run)
        save_json(run / "args.json", vars(args))
        (run / "samples").mkdir(exist_ok=True)
        cut_log(run, iterations_of(checkpoint) if checkpoint else 0)
    checkpoint = gather(checkpoint)[0]
    if checkpoint:
        saver.restore(load_file(checkpoint / "state.safetensors"))
    saver.catch_signals()
    return iterations_of(checkpoint) if checkpoint else 0, saver


def lock_run(run: Path) -> TextIO:
    """Let only one process at a time write into a run. The lock ends with the process."""
    lock = open(run / "lock", "a")
    with contextlib.suppress(ImportError):  # Windows has no such lock
        import fcntl

        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fail(f"--out {run}: another process is writing into this run; "
                 "wait for it, or choose another folder")  # fmt: skip
    lock.truncate(0)
    lock.write(launcher())
    lock.flush()
    return lock


def empty(run: Path) -> None:
    """Delete a run's files, except those by which it is recognised as a run."""
    for path in run.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in ("lock", "args.json"):
            path.unlink()


def compared_files(args: argparse.Namespace, pipe: StableDiffusion3Pipeline) -> list[tuple]:
    """[(role, path)]: the model, adapters and prompts that this run is made from. --resume compares
    their contents: a teacher may have moved, but not changed."""
    adapters = {f"teacher {task}": path for task, path in getattr(args, "teacher", {}).items()}
    adapters |= {"init": args.init, "anchor": getattr(args, "anchor", "base")}
    files = [(part, f"{pipe.name_or_path}/{part}") for part in ("transformer", *TEXT)]
    files += [(role, fetch(p, "", ADAPTER)) for role, p in adapters.items() if p != "base"]
    files += [(f"prompts {task}", path) for task, path in args.prompts.items()]
    return [(role, path) for role, path in files if Path(path).exists()]


def choose_checkpoint(run: Path, wanted: str, origin: dict) -> Path | None:
    """The checkpoint named, or the newest complete one; None if the run has none yet. A checkpoint
    of other flags or files is refused; nothing has been changed by then."""
    found = list(reversed(checkpoints(run)))
    if wanted != "newest":
        found = [c for c in found if c.resolve() == Path(wanted).resolve()]
        if not found:
            fail(f"--resume {wanted}: not a checkpoint of this run ({run}/checkpoints/step_N)")
        if not whole(found[0]):
            fail(f"--resume {wanted}: damaged, its checksums differ; "
                 "--resume without a name takes the newest complete one")  # fmt: skip
    if not found:
        print(f"{run} has no checkpoint yet: starting from the beginning")
        return None
    checkpoint = next((c for c in found if whole(c)), None)
    if checkpoint is None:
        fail(f"--resume: all checkpoints in {run} are damaged; nothing was changed; "
             "--overwrite starts again")  # fmt: skip
    for damaged in found[: found.index(checkpoint)]:
        print(f"warning: {damaged} is damaged: its checksums differ; "
              "trying the one before it", file=sys.stderr)  # fmt: skip
    check_origin(checkpoint, origin)
    for newer in checkpoints(run):
        if iterations_of(newer) > iterations_of(checkpoint):
            os.replace(newer, newer.with_name(f"unused_{newer.name}"))
    return checkpoint


def check_origin(checkpoint: Path, now: dict) -> None:
    """Refuse to resume with other flags, or with files of other contents."""
    try:
        saved = read_json((checkpoint / "state.json").read_text())
        flags, files = dict(saved["flags"]), [(str(role), str(sha)) for role, sha in saved["files"]]
    except (ValueError, KeyError, TypeError):
        fail(f"--resume: {checkpoint}/state.json was not written by this code")
    names = [*now["flags"], *(name for name in flags if name not in now["flags"])]
    changed = [f"--{k}" for k in names if flags.get(k, "?") != now["flags"].get(k, "?")]
    changed += dict.fromkeys(role for role, _ in sorted(set(files) ^ set(now["files"])))
    if not changed and files != now["files"]:
        changed = ["the order of the teachers"]
    if changed:
        fail(f"--resume: {', '.join(changed)} changed since {checkpoint} was saved; "
             "resume with the same")  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Saving
# --------------------------------------------------------------------------------------------------


class Saver:
    """Keeps the last completed iteration in host memory and writes it as a checkpoint when it is
    due, and when a signal (Ctrl-C, SIGTERM, SIGUSR1) or an error ends the run.

    Only rank 0 writes. A signal waits for nothing but the writing, so the 30 seconds that launchers
    grant suffice for iterations of any length. A thread waits for signals: Python's own handlers
    run in the main thread, which may be waiting for a process that is gone. A second Ctrl-C exits
    at once; a half-written folder is never taken for a checkpoint."""

    def __init__(self, args, pipe, student, average, optimizer) -> None:
        self.args, self.run, self.rank = args, Path(args.out), rank_and_world()[0]
        self.student, self.average, self.optimizer = student, average, optimizer
        self.config = pipe.transformer.peft_config["student"]
        self.lock, self.origin = None, {}
        self.kept = None  # (iterations, tensors) of the last completed iteration
        self.saving = threading.RLock()  # the thread and the main thread never save at once
        self.interrupts = 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that the next iteration depends on, by name."""
        found = {}
        for name, parameter in self.student.items():
            found[f"student.{name}"] = parameter
            found[f"average.{name}"] = self.average[name]
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer.{key}.{name}"] = value
        return found

    @torch.no_grad()
    def restore(self, saved: dict[str, torch.Tensor]) -> None:
        """The reverse: a checkpoint's tensors into student, average and optimizer."""
        for name, parameter in self.student.items():
            parameter.copy_(saved[f"student.{name}"])
            self.average[name].copy_(saved[f"average.{name}"])
        parameters = self.student
        for key, value in saved.items():
            kind, _, rest = key.partition(".")
            if kind == "optimizer":
                moment, _, name = rest.partition(".")
                state = self.optimizer.state[parameters[name]]
                state[moment] = value.to(parameters[name].device)

    def iteration_done(self, iterations: int, bad_updates: int) -> None:
        """Keep the state after this many iterations; save it if it is due. bad_updates: how many
        updates in a row had a NaN or infinite gradient; with too many the run ends."""
        if self.rank == 0:
            tensors = self.tensors().items()
            copies = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors}
            with self.saving:
                self.kept = iterations, copies
            if iterations % self.args.save_every == 0 or iterations == self.args.iterations:
                self.save()
        if bad_updates >= self.args.max_bad_steps:
            self.give_up(f"{bad_updates} updates in a row had a NaN or infinite gradient; "
                         "metrics.jsonl names their prompts")  # fmt: skip

    def save(self) -> None:
        """Write checkpoints/step_N: adapter/ (the average, ready for use) and the training state.
        Then delete the oldest."""
        with self.saving:
            if not self.kept:
                return
            iterations, tensors = self.kept
            final = self.run / "checkpoints" / f"step_{iterations}"
            beside = final.with_name(f"tmp_{final.name}")
            if whole(final):
                return
            shutil.rmtree(beside, ignore_errors=True)
            prefix = "average."
            average = {k[len(prefix) :]: t for k, t in tensors.items() if k.startswith(prefix)}
            try:
                save_adapter(beside / "adapter", average, self.config)
                save_file(tensors, beside / "state.safetensors")
                save_json(beside / "state.json", {"iteration": iterations, **self.origin})
                save_json(beside / "checksums.json", checksums(beside))
                publish(beside, final)
            except (OSError, SafetensorError) as error:  # the disk is full
                shutil.rmtree(beside, ignore_errors=True)
                self.cannot_save(final.name, error)
            for old in checkpoints(self.run)[: -self.args.keep]:
                half_deleted = old.with_name(f"tmp_{old.name}")  # never taken for a checkpoint
                shutil.rmtree(half_deleted, ignore_errors=True)
                os.replace(old, half_deleted)
                shutil.rmtree(half_deleted)

    def cannot_save(self, what: str, error: Exception) -> NoReturn:
        newest = next((c.name for c in reversed(checkpoints(self.run))), "none")
        print(file=sys.stderr)  # ends the progress bar's line
        fail(f"--out {self.run}: cannot save {what} ({error}); the newest checkpoint is {newest}; "
             "make room, then --resume")  # fmt: skip

    def finish(self, best: Path | None = None) -> None:
        """The end of the loop: signals have their usual effect again, and adapter/ is published:
        that of the newest checkpoint, or the folder `best` if it exists."""
        self.release_signals()
        if not self.optimizer.state:
            self.give_up("every update was skipped: all gradients were NaN or infinite; "
                         "metrics.jsonl names their prompts")  # fmt: skip
        if self.rank == 0:
            source = best if best and best.is_dir() else checkpoints(self.run)[-1] / "adapter"
            beside = self.run / "tmp_adapter"
            try:
                shutil.rmtree(beside, ignore_errors=True)
                shutil.copytree(source, beside)
                publish(beside, self.run / "adapter")
            except (OSError, shutil.Error) as error:
                self.cannot_save("adapter", error)

    def give_up(self, message: str) -> NoReturn:
        """Save the last good state and stop, on every process."""
        try:
            if self.rank == 0:
                self.save()
                print(file=sys.stderr)
                fail(message)
        finally:
            gather(None)  # the others wait: torchrun ends rank 0 as soon as one of them exits
        raise SystemExit(2)

    # ---------------------------------------------------------------------------- signals and errors

    def catch_signals(self) -> None:
        self.read, self.write = os.pipe()
        os.set_blocking(self.write, False)
        self.wakeup = signal.set_wakeup_fd(self.write)  # a signal's number arrives here at once
        names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
        numbers = [getattr(signal, name) for name in names]
        self.handlers = {number: signal.signal(number, self.count) for number in numbers}
        sys.excepthook = self.failed
        threading.Thread(target=self.wait, args=(numbers,), daemon=True).start()

    def release_signals(self) -> None:
        sys.excepthook = sys.__excepthook__
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.wakeup)
        os.close(self.write)  # the thread reads the end and stops

    def count(self, number: int, frame: FrameType | None) -> None:
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:
            os._exit(128 + number)

    def wait(self, numbers: list[int]) -> None:
        """The thread: save, then end the process with the signal's usual exit code."""
        while received := os.read(self.read, 1):
            if received[0] in numbers:
                try:
                    self.save_and_report()
                finally:
                    os._exit(128 + received[0])
        os.close(self.read)

    def failed(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """An uncaught error: print its own message first."""
        sys.__excepthook__(kind, error, trace)
        self.save_and_report()

    def save_and_report(self) -> None:
        if self.rank == 0:
            with self.saving:  # the main thread goes on meanwhile, but keeps nothing newer
                self.save()
                done = f"saved after {self.kept[0]} iterations" if self.kept else "nothing to save"
            print(f"\nstopped; {done}; continue with the same command and --resume",
                  file=sys.stderr, flush=True)  # fmt: skip
