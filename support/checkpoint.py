"""Checkpoints: a run that is stopped at any instant goes on as if nothing had happened.

A checkpoint holds student, average, optimizer and the number of iterations done. Prompts and noise
are functions of (seed, iteration, sample), so there is no generator state to save.
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from recipes.model_card import write_card
from support.files import ADAPTER, TEXT, fetch, new_folder, read_json, save_json, sha256
from support.flags import fail
from support.lora import save_adapter
from support.metrics import cut_log, read_log
from support.run import gather, rank_and_world

# Flags that --resume does not compare: they do not change the weights, or they name files, whose
# contents it compares (origin_of).
HARMLESS = """
    model teacher init anchor prompts test_prompts out resume overwrite iterations save_every keep
    max_bad_steps sample_every eval_every eval_prompts eval_steps reward_device on_reward_error
    micro_batch label_batch checkpointing compile cache_embeddings dry_run
""".split()
SIGNALS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGUSR1")]


def checksums(folder: Path) -> dict[str, str]:
    """{file: SHA-256} of all files in a folder except the list itself."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "checksums.json")
    return {str(f.relative_to(folder)): sha256(f) for f in files}


def whole(checkpoint: Path) -> bool:
    """Does a checkpoint match its checksums? Files that its list names are never opened."""
    with contextlib.suppress(OSError, ValueError):
        return read_json((checkpoint / "checksums.json").read_text()) == checksums(checkpoint)
    return False


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = [p for p in run.glob("checkpoints/step_*") if p.name[5:].isdecimal()]
    return sorted(found, key=lambda checkpoint: int(checkpoint.name[5:]))


def begin_run(args: argparse.Namespace, pipe, student, average, optimizer) -> tuple[int, "Saver"]:
    """Create the run folder or restore a checkpoint; every process calls it. Returns the number of
    iterations done and the Saver. student, average: {"LAYER.lora_A.weight": parameter}."""
    saver, run, start = Saver(args, pipe, student, average, optimizer), Path(args.out), 0
    if saver.rank == 0:
        run.mkdir(parents=True, exist_ok=True)
        saver.lock, saver.origin = lock_run(run), origin_of(args, pipe)
        if args.resume:
            start = newest_checkpoint(run, saver.origin)
            if start > args.iterations:
                fail(f"--iterations {args.iterations}: {run} has {start}; give {start} or more")
        if args.overwrite:
            for path in set(run.iterdir()) - {run / "lock", run / "args.json"}:  # those mark a run
                remove = shutil.rmtree if path.is_dir() else os.unlink
                remove(path)
        for unfinished in run.glob("checkpoints/*.tmp"):  # of a process that was killed
            shutil.rmtree(unfinished)
        save_json(run / "args.json", vars(args))
        cut_log(run, start)
    start = gather(start)[0]
    if start:
        saver.restore(load_file(run / f"checkpoints/step_{start}/state.safetensors"))
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
    return lock


def origin_of(args: argparse.Namespace, pipe) -> dict:
    """{name: value} of all that the weights depend on: flags, and the SHA-256 of model, adapters
    and prompts, which may move but not change."""
    files = {part: f"{pipe.name_or_path}/{part}" for part in ("transformer", *TEXT)}
    files |= {f"prompts {task}": path for task, path in args.prompts.items()}
    adapters = {f"teacher {task}": path for task, path in getattr(args, "teacher", {}).items()}
    adapters |= {"init": args.init, "anchor": getattr(args, "anchor", "base")}
    files |= {role: fetch(path, "", ADAPTER) for role, path in adapters.items() if path != "base"}
    origin = {f"--{name}": value for name, value in vars(args).items() if name not in HARMLESS}
    origin |= {role: sha256(path) for role, path in files.items() if Path(path).exists()}
    return origin | {"the order of the tasks": list(args.prompts)}


def newest_checkpoint(run: Path, origin: dict) -> int:
    """The iterations of the newest complete checkpoint; 0 if there is no checkpoint. Fails, and
    changes nothing, if all are damaged or the newest was made from something else."""
    found = checkpoints(run)
    complete = [checkpoint for checkpoint in found if whole(checkpoint)]
    if not found:
        print(f"{run} has no checkpoint yet: starting from the beginning")
        return 0
    if not complete:
        fail(f"--resume: all in {run}/checkpoints are damaged (checksums differ); nothing changed")
    newest = complete[-1]
    try:
        saved = {**read_json((newest / "state.json").read_text())["origin"]}  # must be a dict
    except (ValueError, KeyError, TypeError):
        fail(f"--resume: {newest}/state.json was not written by this version of the code")
    changed = [what for what in {**origin, **saved} if origin.get(what, "") != saved.get(what, "")]
    if changed:
        what = ", ".join(changed)
        fail(f"--resume: {what} changed since {newest} was saved; resume with the same")
    for newer in found[found.index(newest) + 1 :]:
        print(f"warning: {newer} is damaged (checksums differ)", file=sys.stderr)
        shutil.rmtree(newer)
    return int(newest.name[5:])


class Saver:
    """Keeps the last completed iteration in host memory; writes it as a checkpoint when it is due,
    and when a signal or an error ends the run. Only rank 0 writes."""

    def __init__(self, args, pipe, student, average, optimizer) -> None:
        self.args, self.run, self.rank = args, Path(args.out), rank_and_world()[0]
        self.student, self.average, self.optimizer = student, average, optimizer
        self.scale = args.alpha / args.rank  # of the student's LoRA
        self.last, self.saving = None, threading.RLock()  # last: (iterations, tensors)

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
        for key, tensor in saved.items():
            kind, name = key.split(".", 1)
            if kind == "optimizer":
                moment, name = name.split(".", 1)
                parameter = self.student[name]
                self.optimizer.state[parameter][moment] = tensor.to(parameter.device, copy=True)
            else:
                weights = self.student if kind == "student" else self.average
                weights[name].copy_(tensor)

    def iteration_done(self, iterations: int, bad_updates: int) -> None:
        """Keep the state after this many iterations and save it if it is due. bad_updates: how many
        updates in a row had a NaN or infinite gradient; too many end the run."""
        if self.rank == 0:
            tensors = self.tensors().items()
            copies = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors}
            with self.saving:
                self.last = iterations, copies
            if iterations % self.args.save_every == 0 or iterations == self.args.iterations:
                self.save()
        if bad_updates >= self.args.max_bad_steps:
            self.give_up(f"{bad_updates} updates in a row had a NaN or infinite gradient")

    def save(self) -> None:
        """Write checkpoints/step_N: adapter/ (the average), training state. Delete the oldest."""
        with self.saving:
            if not self.last:
                return
            iterations, tensors = self.last
            name = f"checkpoints/step_{iterations}"
            if whole(self.run / name):
                return
            with self.written(name) as beside:
                average = {name: tensors[f"average.{name}"] for name in self.average}
                save_adapter(beside / "adapter", average, self.scale)
                save_file(tensors, beside / "state.safetensors")
                save_json(beside / "state.json", {"iteration": iterations, "origin": self.origin})
                save_json(beside / "checksums.json", checksums(beside))
            for old in checkpoints(self.run)[: -self.args.keep]:
                shutil.rmtree(old)  # half deleted, it no longer matches its checksums

    @contextlib.contextmanager
    def written(self, name: str) -> Iterator[Path]:
        """Gives a folder that becomes run/name when it is complete. A full disk ends the run."""
        try:
            with new_folder(self.run / name) as folder:
                yield folder
        except (OSError, SafetensorError) as error:
            newest = ["none", *(checkpoint.name for checkpoint in checkpoints(self.run))][-1]
            cure = f"the newest checkpoint is {newest}; make room, then --resume"
            print(file=sys.stderr)  # ends the progress bar's line
            fail(f"--out {self.run}: cannot save {name} ({error}); {cure}")

    def keep_best(self, score: float) -> None:
        """Write the average as best/ if it scores higher than every "test" in the log."""
        if self.rank == 0:
            scores = [line["test"] for line in read_log(self.run) if line.get("test") is not None]
            if score > max(scores, default=-math.inf):
                with self.written("best") as beside:
                    save_adapter(beside, self.average, self.scale)

    def finish(self) -> None:
        """After the loop: publish adapter/, a copy of the newest checkpoint's, or with --final best
        of best/. Signals have their usual effect again."""
        self.close()
        if not self.optimizer.state:
            self.give_up("every update was skipped: all gradients were NaN or infinite")
        if self.rank == 0:
            source = self.run / "best"
            if getattr(self.args, "final", "last") == "last" or not source.is_dir():
                source = checkpoints(self.run)[-1] / "adapter"
            with self.written("adapter") as beside:
                shutil.copytree(source, beside, dirs_exist_ok=True)
                write_card(beside, self.args)

    def give_up(self, message: str) -> NoReturn:
        """Save the last good state and stop, on every process."""
        if self.rank == 0:
            self.save()
            print(f"\nerror: {message}", file=sys.stderr, flush=True)
        gather(None)  # the others wait for rank 0: when one exits, torchrun ends all
        raise SystemExit(2)

    def catch_signals(self) -> None:
        """From here on signals and uncaught errors save before the process ends. A thread waits for
        signals: the main thread may be waiting for others, and launchers kill after 30 seconds."""
        self.read, self.write = os.pipe()
        os.set_blocking(self.write, False)
        self.wakeup = signal.set_wakeup_fd(self.write)  # a signal's number arrives here at once
        self.handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self.thread = threading.Thread(target=self.wait_for_signals, daemon=True)
        self.thread.start()
        sys.excepthook = self.report_error  # now: a thread keeps the hook of its creation

    def wait_for_signals(self) -> None:
        """What the thread does. The exit code is the signal's usual one."""
        while received := os.read(self.read, 1):
            if received[0] in SIGNALS:
                try:
                    self.stop()
                finally:
                    os._exit(128 + received[0])
        os.close(self.read)

    def report_error(self, *error) -> None:
        sys.__excepthook__(*error)  # its own message first
        self.stop()

    def stop(self) -> None:
        """Save, in any thread, and print how to continue."""
        if self.rank == 0:
            with self.saving:  # iteration_done waits
                self.save()
                done = f"saved after {self.last[0]} iterations" if self.last else "nothing to save"
            how = "continue with the same command, --resume in place of --overwrite"
            print(f"\nstopped; {done}; {how}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Give signals and errors their usual effect again."""
        sys.excepthook = sys.__excepthook__
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.wakeup)
        os.close(self.write)  # the thread reads the end and stops
        self.thread.join()
