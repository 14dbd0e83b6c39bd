"""Runs that are killed, stopped, damaged or fed NaN. python -m pytest tests/test_resume.py

Most tests train a stand-in: five lines of loop around the real Saver, so that a run takes a moment.
The real scripts are resumed once each, and with --slow killed 20 times, in one process and in two.
"""

import argparse
import contextlib
import gc
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PROMPTS, ROOT, call, codes_of, fork, free_port, linux
from conftest import model_args, process_ends, shell, weights

from support import checkpoint, checks, lora, model
from support import run as run_module
from support.files import new_folder
from support.flags import check_out
from support.metrics import log_line, read_log
from support.run import all_reduce, generator, start_processes, stop_processes

BIT_IDENTICAL = {"rtol": 0, "atol": 0}


def stand_in(out, files, tasks=("ocr", "deqa"), bad=(), pause=0.0, fails=(), **flags):
    """A run whose gradient depends on the weights and the iteration, as a real one's does.

    files: a folder with what the run is made from; bad: the iterations with a NaN gradient; fails:
    the rank and the iteration of an error."""
    args = argparse.Namespace(out=str(out), resume=False, overwrite=False, iterations=5, keep=2)
    args.save_every, args.max_bad_steps, args.lr, args.micro_batch = 1, 2, 0.1, 8
    args.rank = args.alpha = 100
    args.mix, args.init, args.anchor, args.final = {"a": 1}, f"{files}/init", "base", "best"
    args.teacher = {task: f"{files}/teacher_{task}" for task in tasks}
    args.prompts = {task: f"{files}/{task}.txt" for task in tasks}
    vars(args).update(flags)
    _, world, _ = start_processes()
    check_out(args)
    names = [f"transformer_blocks.0.attn.to_q.lora_{half}.weight" for half in "AB"]
    student = {name: torch.nn.Parameter(torch.ones(100, 100)) for name in names}
    average = {name: torch.nn.Parameter(torch.ones(100, 100)) for name in names}
    pipe = SimpleNamespace(name_or_path=f"{files}/model")
    optimizer = torch.optim.AdamW(student.values(), lr=args.lr, fused=True)
    start, saver = checkpoint.begin_run(args, pipe, student, average, optimizer)
    bad_updates = 0
    for iteration in range(start, args.iterations):
        if (saver.rank, iteration) == fails:
            raise ValueError("only here")
        bad_updates = bad_updates + 1 if iteration in bad else 0
        if not bad_updates:
            for name, p in student.items():
                noise = torch.randn(p.shape, generator=generator(iteration, name))
                p.grad = all_reduce(p.detach() + noise) / world
            optimizer.step()
        for name, p in student.items():
            average[name].data.lerp_(p.data, 0.5)
        time.sleep(pause)
        if saver.rank == 0:
            saver.keep_best(-abs(iteration - 1.0))  # the best is that of iteration 1
            log_line(out, iteration, {"test": -abs(iteration - 1.0)})
        saver.iteration_done(iteration + 1, bad_updates)
    saver.finish()
    stop_processes()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    parts = ("model/transformer", "model/text_encoder_3")
    for name in ("teacher_ocr", "teacher_deqa", "init", *parts):
        (folder / name).mkdir(parents=True)
        (folder / name / "adapter_model.safetensors").write_text(name)
    for task in ("ocr", "deqa"):
        (folder / f"{task}.txt").write_text(f"{task}\n")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, files):
    """Five iterations, each with its checkpoint; tests work on copies."""
    run = tmp_path_factory.mktemp("finished") / "run"
    stand_in(run, files, keep=9)
    return run


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def contents(run):
    return {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file()}


def last(run):
    saved = checkpoint.load_file(checkpoint.checkpoints(run)[-1] / "state.safetensors")
    return {name: tensor.clone() for name, tensor in saved.items()}  # not a view of the file


def error_of(capsys, **words):
    """The single error line of a stand-in that must fail."""
    with pytest.raises(SystemExit) as stopped:
        stand_in(**words)
    assert stopped.value.code == 2
    process_ends()
    del stopped  # its traceback holds the lock
    gc.collect()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line[:7] == "error: "]
    return line


# ---- Checkpoints


def test_a_checkpoint_is_complete_and_the_newest_are_kept(run, files, tmp_path):
    """Files may move between two attempts, and flags that do not change the weights may change."""
    assert [c.name for c in checkpoint.checkpoints(run)] == [f"step_{n}" for n in range(1, 6)]
    state = json.loads((run / "checkpoints/step_5/state.json").read_text())
    for role in ("transformer", "text_encoder_3", "teacher ocr", "init", "prompts deqa"):
        assert len(state["origin"][role]) == 64
    assert state["iteration"] == 5 and state["origin"]["--lr"] == 0.1
    moved = shutil.copytree(files, tmp_path / "moved")
    stand_in(run, moved, iterations=7, resume=True, micro_batch=4)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_6", "step_7"]
    assert [line["iteration"] for line in read_log(run)] == list(range(7))


def test_the_adapter_is_the_newest_or_the_best(run, files):
    """The average of iteration 1, which scores best, or that of the last iteration."""
    file = "adapter_model.safetensors"
    best = checkpoint.load_file(run / "checkpoints/step_2/adapter" / file)
    adapter = checkpoint.load_file(run / "adapter" / file)
    torch.testing.assert_close(adapter, best, **BIT_IDENTICAL)
    for step in (9, 10):  # by number, not by name
        (run / f"checkpoints/step_{step}").mkdir()
    assert [c.name for c in checkpoint.checkpoints(run)][-2:] == ["step_9", "step_10"]
    stand_in(run, files, overwrite=True, final="last")
    for name, tensor in checkpoint.load_file(run / "adapter" / file).items():
        torch.testing.assert_close(last(run)[name.replace("base_model.model", "average")], tensor)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit": lambda c: flip(c / "state.safetensors"),
    "a missing file": lambda c: (c / "adapter/adapter_model.safetensors").unlink(),
    "a file too many": lambda c: (c / "more.json").write_text("{}"),
    "half a list": lambda c: os.truncate(c / "checksums.json", 50),
    "a path outside": lambda c: (c / "checksums.json").write_text('{"../../../args.json": "0"}'),
    "an empty folder": lambda c: (shutil.rmtree(c), c.mkdir()),
}


def test_damage_is_found(run):
    for n, damage in enumerate(DAMAGE.values()):
        copy = shutil.copytree(run / "checkpoints/step_5", run / f"copy_{n}")
        assert checkpoint.whole(copy)
        damage(copy)
        assert not checkpoint.whole(copy)


def test_a_new_folder_replaces_the_old_one_as_a_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "folder"
    for beside in (folder, tmp_path / "folder.tmp", tmp_path / "folder.old"):  # two of a killed run
        beside.mkdir()
        (beside / "old").write_text("old")
    for fails in (True, False):
        with contextlib.suppress(KeyError), new_folder(folder) as new:
            (new / "new").write_text("new")
            if fails:
                raise KeyError
        assert [path.name for path in folder.iterdir()] == ["old" if fails else "new"]
    assert list(tmp_path.iterdir()) == [folder]


def test_after_damage_an_older_checkpoint_ends_the_same(run, files, capsys):
    before = last(run)
    flip(run / "checkpoints/step_5/state.safetensors")
    (run / "checkpoints/step_6.tmp").mkdir()  # a save that was killed
    with open(run / "metrics.jsonl", "a") as log:
        log.write('{"iteration": 5, "lo')
    stand_in(run, files, resume=True)
    assert "step_5 is damaged" in capsys.readouterr().err
    assert [line["iteration"] for line in read_log(run)] == [0, 1, 2, 3, 4]
    torch.testing.assert_close(last(run), before, **BIT_IDENTICAL)
    shutil.rmtree(run / "checkpoints")
    stand_in(run, files, resume=True)
    assert "no checkpoint yet" in capsys.readouterr().out
    torch.testing.assert_close(last(run), before, **BIT_IDENTICAL)


CHANGED = {  # flags, or the file that holds something else
    "--lr": {"lr": 0.2},
    "--window": {"window": 1},
    "anchor": {"anchor": "toy/adapters/ocr"},
    "the order of the tasks": {"tasks": ("deqa", "ocr")},
    "teacher ocr": "teacher_ocr/adapter_model.safetensors",
    "transformer": "model/transformer/config.json",
    "prompts deqa": "deqa.txt",
}


def test_resume_refuses_other_mathematics_by_name(run, files, tmp_path, capsys):
    before = contents(run)
    for named, change in CHANGED.items():
        words = {"out": run, "files": shutil.copytree(files, tmp_path / named), "resume": True}
        if named.startswith(("teacher", "transformer", "prompts")):
            (words["files"] / change).write_text("another")
        else:
            words |= change
        line = error_of(capsys, **words, iterations=6)
        assert line.startswith(f"error: --resume: {named} changed since ") and "step_5" in line
    assert contents(run) == before


def test_one_process_at_a_time_writes(run, files, capsys, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    before = contents(run)
    with open(run / "lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another process" in error_of(capsys, out=run, files=files, overwrite=True)
    monkeypatch.setattr(checkpoint, "rank_and_world", lambda: (1, 2))
    stand_in(run, files, resume=True, iterations=7)  # a process other than rank 0
    assert contents(run) == before


@linux
@pytest.mark.parametrize("what, newest", [("step_6", "step_5"), ("adapter", "step_6")])
def test_a_full_disk_leaves_what_was_saved(run, files, capsys, monkeypatch, what, newest):
    """No file above 50 kB can be written, from the checkpoint or from the last line on."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    words = {"out": run, "files": files, "iterations": 6, "resume": True}
    if what == "adapter":
        close = checkpoint.Saver.close
        monkeypatch.setattr(checkpoint.Saver, "close", lambda self: (close(self), fill()))
    else:
        fill()
    try:
        line = error_of(capsys, **words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{what} (" in line and "File too large" in line and newest in line
    assert all(checkpoint.whole(c) for c in checkpoint.checkpoints(run))
    assert not list(run.rglob("*.tmp"))
    monkeypatch.undo()
    stand_in(**words)  # there is room again


# ---- NaN and infinity


def test_too_many_bad_updates_save_what_was_good_and_stop(run, files, capsys, tmp_path):
    words = {"out": tmp_path / "bad", "files": files, "save_every": 9, "bad": range(2, 9)}
    assert "2 updates in a row" in error_of(capsys, **words)
    good = checkpoint.load_file(run / "checkpoints/step_2/state.safetensors")
    for name in good:
        if not name.startswith("average"):  # that has moved on towards the student
            torch.testing.assert_close(last(tmp_path / "bad")[name], good[name], **BIT_IDENTICAL)


def test_a_run_without_a_good_update_fails_and_publishes_nothing(files, capsys, tmp_path):
    words = {"out": tmp_path / "bad", "files": files, "bad": range(9), "max_bad_steps": 9}
    assert "every update was skipped" in error_of(capsys, **words)
    assert not (tmp_path / "bad/adapter").exists()
    stand_in(**words | {"bad": (), "resume": True, "iterations": 6})  # it can go on
    assert (tmp_path / "bad/adapter").is_dir()


# ---- The real scripts

TINY = "--prompts_per_iteration 2 --group_size 2 --steps 3 --iterations 2 --save_every 1".split()
SCRIPTS = {
    "train_opd": [*TINY, "--eval_prompts", 0, "--sample_every", 0],
    "train_teacher": [*TINY, "--eval_every", 0, "--reward", "deqa"],
}


def steady(run):
    log = read_log(run)
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in log]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_resumed_script_ends_with_the_same_bits(monkeypatch, tmp_path, script):
    run = tmp_path / "run"
    call(monkeypatch, script, *SCRIPTS[script], "--out", run)
    before, log = weights(run), steady(run)
    shutil.rmtree(run / "checkpoints/step_2")
    call(monkeypatch, script, *SCRIPTS[script], "--out", run, "--resume")
    torch.testing.assert_close(weights(run), before, **BIT_IDENTICAL)
    assert steady(run) == log


# ---- Self-checks


def test_self_checks_see_silent_faults(capsys, monkeypatch):
    """Dropout: the model that updates is not the one that sampled. Teachers that teach nothing.
    With gradient, no batch is larger than an update's."""
    args = model_args(init=f"{ROOT}/toy/adapters/merged", rank=1, alpha=1, seed=0, keep=2, out="x")
    args.noise, args.noise_kind, args.eligible_steps, args.clip_range = 0.7, "flow", [0, 1], 0.2
    args.micro_batch = 3
    pipe = model.load_pipeline(args, torch.device("cpu"))
    student, _ = lora.add_student(pipe.transformer, args)
    for task in ("ocr", "deqa"):
        lora.load_adapter(pipe.transformer, f"teacher_{task}", f"toy/adapters/{task}", "--teacher")
    guidance = {"student": 1.0, "teacher_ocr": 2.0, "teacher_deqa": 1.0}
    text, grid = model.embed_prompts(pipe, PROMPTS, args), model.time_grid(pipe, 3)

    def lines(objective):
        args.objective = objective
        checks.self_checks(args, pipe, text, grid, PROMPTS, guidance, student)
        out, err = capsys.readouterr()
        return [re.search("disk|times|ratio|teachers", line)[0] for line in out.splitlines()], err

    assert lines("kl") == (["disk", "times", "teachers"], "")
    assert lines("ppo") == lines("ppo-scalar") == (["disk", "times", "ratio", "teachers"], "")
    real, dropout, sizes = model.velocity, torch.nn.functional.dropout, []

    def noisy(transformer, x, *words):
        sizes.extend([len(x)] * torch.is_grad_enabled())
        return dropout(real(transformer, x, *words), 0.1)

    monkeypatch.setattr(model, "velocity", noisy)
    assert lines("ppo")[1].startswith("WARNING: check: ratio")
    assert sizes == [3, 1]
    monkeypatch.setattr(model, "velocity", lambda transformer, x, *words: torch.ones_like(x))
    found, warning = lines("kl")
    assert found == ["disk", "times"]
    assert warning.startswith("WARNING: check: teachers") and warning.endswith("KL 0.0e+00\n")


def test_ctrl_c_amid_the_last_scores_is_one_line(capsys):
    def scoring(args):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run_module.guarded(scoring)(None)
    assert end.value.code == 130 and capsys.readouterr().err == "stopped; what was saved is kept\n"


# ---- Processes, stopped and killed


def train(script, out, *more, **words):
    """In this process: a stand-in, or a script's own main."""
    if script == "stand_in":
        return run_module.guarded(lambda _: stand_in(out, resume="--resume" in more, **words))(None)
    words = [*SCRIPTS[script], "--iterations", 100, "--out", out, *more]
    call(pytest.MonkeyPatch(), script, *words)


def lines(run):
    log = run / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def wait_for_lines(run, number, seconds=120):
    end = time.time() + seconds
    while lines(run) < number:
        assert time.time() < end, "nothing happened"
        time.sleep(0.001)


JOBS = [("train_opd", 1), ("train_opd", 2), ("train_teacher", 2)]
JOBS = [("stand_in", 1), ("stand_in", 2), *(pytest.param(*j, marks=pytest.mark.slow) for j in JOBS)]
SAVING = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]  # what makes rank 0 save


@linux
@pytest.mark.parametrize("script, world", JOBS)
def test_killed_and_resumed_it_ends_with_the_same_bits(files, tmp_path, script, world):
    """In turn all processes get SIGKILL while they load, rank 0 gets a signal that makes it save,
    or one gets SIGKILL at a random instant. The others end by themselves; the next one resumes."""
    draw, (run, whole, log) = random.Random(world), map(tmp_path.joinpath, ("run", "whole", "log"))
    kills, loading, words = 20, 1.0, {}
    if script == "stand_in":
        kills, loading, words = 6, 0.2, {"files": files, "iterations": 60, "save_every": 3}
    assert codes_of(fork(world, log, train, script, whole, **words)) == [0] * world
    if words:
        words["pause"] = 0.01
    for n in range(kills):
        before, number = lines(run), SAVING[n % 3] if n % 4 == 1 else signal.SIGKILL
        pids = victims = fork(world, log, train, script, run, "--resume", **words)
        if n % 4 == 0:
            time.sleep(draw.uniform(0, loading))
        else:  # inside an iteration or a save
            victims = pids[:1] if n % 4 == 1 else [draw.choice(pids)]
            wait_for_lines(run, before + 1)
            time.sleep(draw.uniform(0, 0.08))
        for pid in victims:
            os.kill(pid, number)
        codes = codes_of(pids)
        assert 0 not in codes and (n % 4 != 1 or codes[0] == 128 + number), log.read_text()
    assert "saved after" in log.read_text() and not (run / "adapter").exists()
    assert codes_of(fork(world, log, train, script, run, "--resume", **words)) == [0] * world
    torch.testing.assert_close(last(run), last(whole), **BIT_IDENTICAL)
    assert steady(run) == steady(whole)


@linux
def test_a_process_that_fails_prints_its_own_message_and_ends_the_others(files, tmp_path):
    """Rank 1 fails in iteration 3; rank 0 would wait for it, but saves and ends."""
    log, run = tmp_path / "log.txt", tmp_path / "run"
    words = {"files": files, "iterations": 99, "fails": (1, 3), "save_every": 50}
    assert codes_of(fork(2, log, train, "stand_in", run, **words)) == [2, 1]
    text = log.read_text()
    assert text.count("ValueError: only here") == 1 and "saved after 3 iterations" in text
    assert text.count("error: another process has stopped; its own message says why") == 1
    assert [c.name for c in checkpoint.checkpoints(run)] == ["step_3"]


# ---- torchrun: one launcher, or one on each of two machines that see one folder


def torchrun(folder, *words, machines=1):
    """The launchers. Each prints into folder/log_RANK.txt."""
    launch = "-m torch.distributed.run --master_addr=127.0.0.1".split()
    launch += [f"--nnodes={machines}", f"--master_port={free_port()}"]
    launchers = []
    for rank in range(machines):
        log = open(folder / f"log_{rank}.txt", "w")
        command = [sys.executable, *launch, f"--node_rank={rank}", *map(str, words)]
        how = {"cwd": ROOT, "stdout": log, "stderr": log, "start_new_session": True}
        launchers.append(subprocess.Popen(command, **how))
    return launchers


def kill_worker(launcher):
    children = Path(f"/proc/{launcher.pid}/task").glob("*/children")
    newest = " ".join(file.read_text() for file in children).split()[-1]
    os.kill(int(newest), signal.SIGKILL)


@linux
@pytest.mark.slow
def test_torchrun_restarts_and_resumes_what_was_killed(tmp_path):
    """A worker dies by kill -9. torchrun starts both again with the flags of the first time, which
    have --resume; at the end it hands a signal on to both, and rank 0 saves."""
    run, launch = tmp_path / "run", "--standalone --nproc_per_node=2 --max-restarts=2".split()
    words = [*SCRIPTS["train_opd"], "--iterations", 999, "--resume", "--out", run]
    (launcher,) = torchrun(tmp_path, *launch, "train_opd.py", *words)
    for number in (4, 12):
        wait_for_lines(run, number)
        kill_worker(launcher)
    wait_for_lines(run, 20)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=60) == 1
    saved = checkpoint.checkpoints(run)[-1]
    assert checkpoint.whole(saved) and int(saved.name[5:]) in (lines(run) - 1, lines(run))
    assert [line["iteration"] for line in read_log(run)] == list(range(lines(run)))


SFT = "--batch 6 --iterations 4 --sft_images 12 --eval_steps 2 --eval_prompts 0".split()
ON_TWO = {"train_opd": SCRIPTS["train_opd"], "train_sft": SFT}


@pytest.mark.slow
@pytest.mark.parametrize("script", ON_TWO)
def test_two_machines_give_the_curve_of_one(tmp_path, script):
    words = [f"{script}.py", *ON_TWO[script], "--lr", "1e-4", "--out"]
    assert shell(*words, tmp_path / "one").returncode == 0
    launchers = torchrun(tmp_path, *words, tmp_path / "two", machines=2)
    assert [launcher.wait(timeout=300) for launcher in launchers] == [0, 0]
    ends = weights(tmp_path / "two"), weights(tmp_path / "one")
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("script", ON_TWO)
def test_a_process_killed_on_one_machine_ends_the_other_within_a_minute(tmp_path, script):
    words = [*ON_TWO[script], "--iterations", 9999, "--save_every", 9999, "--out", tmp_path / "run"]
    launchers = torchrun(tmp_path, f"{script}.py", *words, machines=2)
    wait_for_lines(tmp_path / "run", 3)
    kill_worker(launchers[1])
    assert [launcher.wait(timeout=60) for launcher in launchers] == [1, 1]
    here, there = (file.read_text() for file in sorted(tmp_path.glob("log_*")))
    assert "error: another process has stopped" in here and "saved after" in here
    assert "SIGKILL" in there
