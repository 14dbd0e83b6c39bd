"""Runs that are killed, stopped, damaged or fed NaN. python -m pytest tests/test_resume.py (--slow: kill -9, for minutes)"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import process_ends
from test_scripts import OPD, call, metrics, shell, weights

import support.checkpoint as checkpoint
import support.checks as checks
import support.run as common

BIT_IDENTICAL = {"rtol": 0, "atol": 0}


def train(monkeypatch, out, *flags):
    call(monkeypatch, "train_opd", *OPD, "--out", out, *flags)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Three iterations, each with its checkpoint; tests work on copies."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        train(monkeypatch, tmp_path_factory.mktemp("run") / "run", "--iterations", 3, "--save_every", 1, "--keep", 3)
    return tmp_path_factory.getbasetemp() / "run0" / "run"


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


# ---------------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_is_complete_and_the_newest_are_kept(monkeypatch, run):
    assert [c.name for c in checkpoint.checkpoints(run)] == ["step_1", "step_2", "step_3"]
    assert all(checkpoint.whole(c) for c in checkpoint.checkpoints(run))
    state = json.loads((run / "checkpoints/step_3/state.json").read_text())
    roles = [role for role, _ in state["files"]]
    for role in ("transformer", "text_encoder_3", "teacher ocr", "init", "anchor", "prompts ocr"):
        assert role in roles
    assert all(len(digest) == 64 for _, digest in state["files"]) and state["flags"]["lr"] == 1e-3 and state["iteration"] == 3
    train(monkeypatch, run, "--iterations", 5, "--save_every", 1, "--keep", 2, "--resume")
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_4", "step_5"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit": lambda c: flip(c / "state.safetensors"),
    "a cut file": lambda c: os.truncate(c / "state.safetensors", 1000),
    "a missing file": lambda c: (c / "adapter/adapter_model.safetensors").unlink(),
    "a file too many": lambda c: (c / "more.json").write_text("{}"),
    "no list": lambda c: (c / "checksums.json").unlink(),
    "half a list": lambda c: os.truncate(c / "checksums.json", 50),
    "a list that leads outside": lambda c: (c / "checksums.json").write_text('{"../../../args.json": "0"}'),
    "a list that is none": lambda c: (c / "checksums.json").write_text("[]"),
    "an empty folder": lambda c: (shutil.rmtree(c), c.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_recognised(run, damage):
    DAMAGE[damage](run / "checkpoints/step_3")
    assert not checkpoint.whole(run / "checkpoints/step_3") and checkpoint.whole(run / "checkpoints/step_2")


def test_the_checkpoint_before_a_damaged_one_is_taken_and_the_end_is_the_same(monkeypatch, finished, run, capsys):
    before = weights(run)
    flip(run / "checkpoints/step_3/state.safetensors")
    (run / "checkpoints/tmp_step_4").mkdir()  # a save that was killed
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + '{"iteration": 3, "lo')  # and a line
    train(monkeypatch, run, "--iterations", 3, "--resume")
    assert "step_3 is damaged" in capsys.readouterr().err
    assert [line["iteration"] for line in metrics(run)] == [0, 1, 2]
    torch.testing.assert_close(weights(run), before, **BIT_IDENTICAL)
    assert (run / "checkpoints/unused_step_3").is_dir()  # nothing that was saved is deleted unasked


def test_resume_from_a_named_checkpoint(monkeypatch, run, capsys):
    before = weights(run)
    train(monkeypatch, run, "--iterations", 3, "--resume", run / "checkpoints/step_1")
    torch.testing.assert_close(weights(run), before, **BIT_IDENTICAL)
    with pytest.raises(SystemExit) as stopped:
        train(monkeypatch, run, "--iterations", 3, "--resume", run / "checkpoints/step_7")
    assert stopped.value.code == 2 and "step_7" in capsys.readouterr().err


def test_a_run_without_a_checkpoint_starts_at_the_beginning(monkeypatch, run, capsys):
    before = weights(run)
    shutil.rmtree(run / "checkpoints")
    train(monkeypatch, run, "--iterations", 3, "--resume")
    assert "no checkpoint yet" in capsys.readouterr().out
    torch.testing.assert_close(weights(run), before, **BIT_IDENTICAL)


def copy_of_a_teacher(folder, change):
    shutil.copytree("toy/adapters/ocr", folder)
    if change:
        shutil.copy("toy/adapters/deqa/adapter_model.safetensors", folder / "adapter_model.safetensors")
    return ["--teacher", "geneval=toy/adapters/geneval", "--teacher", f"ocr={folder}", "--teacher", "deqa=toy/adapters/deqa",
            "--teacher", "pickscore=toy/adapters/pickscore"]  # fmt: skip


CHANGED = {
    "--lr": lambda tmp: ["--lr", 2e-3],
    "--seed": lambda tmp: ["--seed", 1],
    "--mar_weight": lambda tmp: ["--mar_weight", 0.1],
    "teacher ocr": lambda tmp: copy_of_a_teacher(tmp / "changed", True),
    "init": lambda tmp: ["--init", "toy/adapters/ocr"],
    "anchor": lambda tmp: ["--anchor", "base"],
    "prompts deqa": lambda tmp: ["--prompts", "deqa=toy/prompts/ocr_train.txt"],
    "teacher deqa": lambda tmp: ["--teacher", "ocr=toy/adapters/ocr"],
    "the order of the teachers": lambda tmp: [
        w for t in ("ocr", "geneval", "deqa", "pickscore") for w in ("--teacher", f"{t}=toy/adapters/{t}")
    ],
}


@pytest.mark.parametrize("named", CHANGED)
def test_resume_refuses_other_mathematics(monkeypatch, run, tmp_path, capsys, named):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as stopped:
        train(monkeypatch, run, "--iterations", 4, "--resume", *CHANGED[named](tmp_path))
    assert stopped.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: --resume: ") and named in line and "step_3" in line
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_harmless_flags_may_change_and_files_may_move(monkeypatch, run, tmp_path):
    teachers = copy_of_a_teacher(tmp_path / "moved", False)
    train(monkeypatch, run, "--iterations", 4, "--resume", "--micro_batch", 64, "--save_every", 3, "--keep", 1, *teachers)
    assert [line["iteration"] for line in metrics(run)] == [0, 1, 2, 3]


def test_two_runs_into_one_folder(monkeypatch, run, capsys):
    fcntl = pytest.importorskip("fcntl")
    with open(run / "lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
        for flag in ("--resume", "--overwrite"):
            with pytest.raises(SystemExit) as stopped:
                train(monkeypatch, run, "--iterations", 4, flag)
            assert stopped.value.code == 2 and "another process is writing" in capsys.readouterr().err
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE as on Linux")
def test_a_full_disk_leaves_the_checkpoint_before(monkeypatch, run, capsys):
    """No file above 300 kB can be written: what a full disk does, at the size of a checkpoint."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(SystemExit) as stopped:
            train(monkeypatch, run, "--iterations", 4, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2 and "cannot save step_4" in line and "File too large" in line and "step_3" in line
    assert [c.name for c in checkpoint.checkpoints(run) if checkpoint.whole(c)] == ["step_1", "step_2", "step_3"]
    assert not list((run / "checkpoints").glob("tmp_*"))
    process_ends()
    train(monkeypatch, run, "--iterations", 4, "--resume")  # room has been made


def test_the_lock_and_torchruns_restarts(monkeypatch, run):
    """A process that torchrun starts anew resumes its own run, and nobody else's."""
    from support.flags import check_out, launcher

    class Args:
        out, resume, overwrite = str(run), None, True

    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert (run / "lock").read_text() == launcher()
    check_out(Args)
    assert Args.resume == "newest" and not Args.overwrite
    (run / "lock").write_text("elsewhere 1")
    Args.resume, Args.overwrite = None, False
    with pytest.raises(SystemExit):
        check_out(Args)


# ----------------------------------------------------------------------------------------------------- NaN and infinity


def poison(monkeypatch, script, where, calls):
    """NaN or infinity at the given calls of the velocity, the loss or the gradient of a script."""
    import importlib

    module = importlib.import_module(script)
    holder, name = {
        "velocity": (module, "velocity"),
        "loss": (module, "grpo") if script == "train_teacher" else (module, "objective"),
        "gradient": (common, "take_gradients"),
    }[where]
    real, count = getattr(holder, name), iter(range(10**9))

    def spoiled(*args, **kwargs):
        out = real(*args, **kwargs)
        if next(count) not in calls:
            return out
        if where == "loss":
            return out[0] * float("inf"), out[1]
        return out * float("nan")

    monkeypatch.setattr(holder, name, spoiled)


@pytest.mark.parametrize("where", ["velocity", "loss", "gradient"])
def test_a_bad_update_is_skipped_counted_and_its_prompts_are_logged(monkeypatch, tmp_path, where):
    poison(monkeypatch, "train_opd", where, {3} if where == "gradient" else {12})
    monkeypatch.setattr("train_opd.self_checks", lambda *_: None)
    train(monkeypatch, tmp_path / "run", "--iterations", 4)
    log = metrics(tmp_path / "run")
    skipped = [line for line in log if "skipped_updates" in line]
    assert len(skipped) == 1 and 1 <= skipped[0]["skipped_updates"] <= 2
    assert len(skipped[0]["skipped_prompts"]) == 4 and all(isinstance(p, str) and p for p in skipped[0]["skipped_prompts"])
    assert len(log) == 4 and log[-1]["grad_norm"] > 0  # it went on
    assert all(t.isfinite().all() for t in weights(tmp_path / "run").values())


TEACHER = [*OPD[:8], "--eval_every", 0, "--reward", "deqa"]


@pytest.mark.parametrize("script,flags", [("train_opd", OPD), ("train_teacher", TEACHER)])
def test_too_many_bad_updates_save_what_was_good_and_stop(monkeypatch, tmp_path, capsys, script, flags):
    flags = [*flags, "--iterations", 4, "--max_bad_steps", 4, "--out"]
    call(monkeypatch, script, *flags, tmp_path / "good", "--save_every", 1, "--keep", 4)
    poison(monkeypatch, script, "gradient", range({"train_opd": 8, "train_teacher": 2}[script], 10**9))  # from iteration 1 on
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, script, *flags, tmp_path / "run")
    assert stopped.value.code == 2 and "4 updates in a row" in capsys.readouterr().err
    assert [line.get("skipped_updates") for line in metrics(tmp_path / "run")] == [None, 2, 2]
    saved = checkpoint.checkpoints(tmp_path / "run")[-1]
    good = checkpoint.checkpoints(tmp_path / "good")[0]
    state, expected = (checkpoint.load_file(c / "state.safetensors") for c in (saved, good))
    for key in expected:
        if key.startswith("student."):  # the average has moved on towards it
            torch.testing.assert_close(state[key], expected[key], **BIT_IDENTICAL)


def test_the_log_is_json_whatever_happens(tmp_path):
    common.log_line(tmp_path, {"iteration": 0, "loss": float("nan"), "norm": float("inf"), "prompts": ["a\nb"], "x": 1 / 3})
    refuse = lambda name: pytest.fail(f"{name} is not JSON")
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"iteration": 0, "loss": None, "norm": None, "prompts": ["a\nb"], "x": 0.333333}


# ---------------------------------------------------------------------------------------------------------- self-checks


def test_self_checks_print_a_line_each(monkeypatch, tmp_path, capsys):
    train(monkeypatch, tmp_path / "run", "--iterations", 1)
    out = capsys.readouterr()
    for start in ("disk", "step", "ratio", "teachers: KL to the student geneval", "teachers: the closest two", "labels"):
        assert out.out.count(f"check: {start}") == 1
    assert "WARNING" not in out.err


def test_self_checks_see_teachers_that_teach_nothing(monkeypatch, tmp_path, capsys):
    same = [w for task in ("geneval", "ocr") for w in ("--teacher", f"{task}=toy/adapters/ocr")]
    train(monkeypatch, tmp_path / "run", "--iterations", 1, *same, "--init", "toy/adapters/ocr")
    err = capsys.readouterr().err
    assert "WARNING: check: teachers: KL to the student geneval 0.0e+00" in err
    assert "WARNING: check: teachers: the closest two are geneval and ocr, KL 0.0e+00" in err


def test_self_checks_see_dropout(monkeypatch, tmp_path, capsys):
    """The classical fault: the model that updates is not the one that sampled."""
    real = checks.velocity
    monkeypatch.setattr(checks, "velocity", lambda *a: torch.nn.functional.dropout(real(*a), 0.1))
    train(monkeypatch, tmp_path / "run", "--iterations", 1)
    err = capsys.readouterr().err
    assert "WARNING: check: ratio" in err and "WARNING: check: labels" in err


@pytest.mark.parametrize("what", ["disk", "scheduler"])
def test_self_checks_stop_what_cannot_work(monkeypatch, tmp_path, capsys, what):
    if what == "disk":
        monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    else:
        real = checks.step
        monkeypatch.setattr(checks, "step", lambda *a: (real(*a)[0] + 1e-3, None))
    with pytest.raises(SystemExit) as stopped:
        train(monkeypatch, tmp_path / "run", "--iterations", 1)
    assert stopped.value.code == 2 and {"disk": "GB free", "scheduler": "Euler"}[what] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ real processes, killed

SMALL = "--prompts_per_iteration 4 --group_size 2 --steps 3".split()
LONG = ["train_opd.py", *SMALL, *"--eval_prompts 0 --sample_every 0 --save_every 3".split()]


def start(log, *words, processes=1):
    """In the background, with what it prints in a file."""
    if processes > 1:
        words = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *words)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "w") as file:
        words = [sys.executable, *map(str, words)]
        return subprocess.Popen(words, env=environment, start_new_session=True, stdout=file, stderr=subprocess.STDOUT)


def family(pid):
    """A process and its children, from /proc."""
    found = [pid]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) in found:
                found.append(int(stat.parent.name))
    return found


def lines(run):
    return len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0


def wait_until(condition, process, seconds=120):
    end = time.time() + seconds
    while not condition() and process.poll() is None:
        assert time.time() < end, "nothing happened"
        time.sleep(0.001)


def unfinished(run):
    """The folders that a save is writing or deleting, by inode; an earlier kill may have left some."""
    with contextlib.suppress(FileNotFoundError):
        return {entry.inode() for entry in os.scandir(run / "checkpoints") if entry.name.startswith("tmp_")}
    return set()


def kill_9(out, iterations, kills, seed, processes):
    """Start, kill -9 at a random instant (while loading, in mid-iteration, inside a save), resume, until it has been killed
    `kills` times; then let it end. Returns how many died inside a save."""
    draw, inside, log = random.Random(seed), 0, out.parent / "log.txt"
    for n in range(kills + 1):
        resume, before = ["--resume"] * (out / "args.json").exists(), unfinished(out)
        process = start(log, *LONG, "--iterations", iterations, "--out", out, *resume, processes=processes)
        if n == kills:
            assert process.wait(timeout=600) == 0, log.read_text()[-2000:]
            return inside
        if n % 5 == 0:
            time.sleep(draw.uniform(0, 8))
        else:
            done = lines(out)
            wait_until(lambda: lines(out) != done, process)
            time.sleep(draw.uniform(0, 3))
            if n % 5 in (2, 4):
                wait_until(lambda: unfinished(out) - before, process)
                time.sleep(draw.uniform(0, 0.01))
        assert process.poll() is None, f"it ended by itself before kill {n}: {log.read_text()[-2000:]}"
        for pid in family(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        inside += bool(unfinished(out) - before)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_20_instants_and_resumed_it_ends_with_the_same_weights(tmp_path, processes):
    iterations, seed = 120, 7
    whole = start(tmp_path / "log.txt", *LONG, "--iterations", iterations, "--out", tmp_path / "whole", processes=processes)
    assert whole.wait(timeout=900) == 0, (tmp_path / "log.txt").read_text()[-2000:]
    inside = kill_9(tmp_path / "killed", iterations, 20, seed, processes)
    print(f"{processes} process(es): 20 kills survived, {inside} of them inside a save")
    assert inside > 0
    torch.testing.assert_close(weights(tmp_path / "killed"), weights(tmp_path / "whole"), **BIT_IDENTICAL)
    steady = lambda run: [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in metrics(run)]
    assert steady(tmp_path / "killed") == steady(tmp_path / "whole")


@pytest.mark.slow
def test_resumed_with_another_number_of_processes(tmp_path):
    words = [*LONG, "--lr", "1e-4", "--out"]
    assert shell(*words, tmp_path / "one", "--iterations", 6).returncode == 0
    assert shell(*words, tmp_path / "two", "--iterations", 3).returncode == 0
    assert shell(*words, tmp_path / "two", "--iterations", 6, "--resume", processes=2).returncode == 0
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-4, atol=1e-5)


SIGNALS = [(name, processes) for name in ("SIGINT", "SIGTERM", "SIGUSR1") for processes in (1, 2)]


@pytest.mark.parametrize("name,processes", [pytest.param(*s, marks=[pytest.mark.slow] * (s != SIGNALS[2])) for s in SIGNALS])
def test_signals_save_the_last_completed_iteration(tmp_path, name, processes):
    """Nothing is due to be saved for long; the launcher (torchrun) or the process itself gets the signal."""
    number = getattr(signal, name)
    if name == "SIGUSR1" and processes > 1:
        pytest.skip("torchrun forwards SIGUSR1 where it is told to (--signals-to-handle)")
    words = [*LONG, "--save_every", "1000", "--iterations", "1000", "--out", tmp_path / "run"]
    process = start(tmp_path / "log.txt", *words, processes=processes)
    wait_until(lambda: lines(tmp_path / "run") >= 2, process)
    sent = time.time()
    process.send_signal(number)
    code = process.wait(timeout=60)
    log = (tmp_path / "log.txt").read_text()
    assert time.time() - sent < 30 and code == (128 + number if processes == 1 else 1), log[-2000:]
    (saved,) = checkpoint.checkpoints(tmp_path / "run")
    done = int(saved.name[5:])
    assert checkpoint.whole(saved) and done >= 1 and f"saved after {done} iterations" in log and "--resume" in log
    assert not (tmp_path / "run/adapter").exists()


@pytest.mark.slow
def test_a_second_ctrl_c_exits_at_once_and_harms_nothing(tmp_path):
    words = [*LONG, "--iterations", "1000", "--out", tmp_path / "run"]
    process = start(tmp_path / "log.txt", *words)
    wait_until(lambda: checkpoint.checkpoints(tmp_path / "run") and lines(tmp_path / "run") > 4, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == 130
    saved = checkpoint.checkpoints(tmp_path / "run")
    assert saved and all(checkpoint.whole(c) for c in saved)
    done = int(saved[-1].name[5:])
    again = shell(*LONG, "--iterations", done + 1, "--out", tmp_path / "run", "--resume")
    assert again.returncode == 0, again.stderr


FAILS_ON_RANK_1 = """
import os, time
class Scorer:
    range = (0, 1)
    def __call__(self, images, prompts, metadata=None):
        time.sleep(1)
        if os.environ.get("RANK") == "1":
            raise ValueError("the scorer of rank 1 is out of order")
        return images.flatten(1).mean(1)
REWARDS = {"deqa": Scorer()}
"""


@pytest.mark.slow
def test_a_rank_that_fails_brings_all_down_with_its_own_message(tmp_path, monkeypatch):
    (tmp_path / "failing_scorers.py").write_text(FAILS_ON_RANK_1)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = ["train_teacher.py", *SMALL, "--reward", "deqa", "--rewards", "failing_scorers", "--out", tmp_path / "run"]
    process = start(tmp_path / "log.txt", *words, processes=2)
    assert process.wait(timeout=90) == 1  # no time-out of a collective: those take minutes
    assert "reward deqa cannot score: the scorer of rank 1 is out of order" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_torchruns_restarts_resume_by_themselves(tmp_path):
    """A worker dies by kill -9; torchrun starts all of them anew, with the flags of the first time."""
    words = [*LONG, "--iterations", "30", "--out"]
    assert start(tmp_path / "log.txt", *words, tmp_path / "whole", processes=2).wait(timeout=300) == 0
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2"]
    process = start(tmp_path / "log.txt", *launch, *words, tmp_path / "run")
    for wanted in (4, 12):
        wait_until(lambda: lines(tmp_path / "run") >= wanted, process)
        os.kill(family(process.pid)[-1], signal.SIGKILL)
    assert process.wait(timeout=300) == 0, (tmp_path / "log.txt").read_text()[-3000:]
    torch.testing.assert_close(weights(tmp_path / "run"), weights(tmp_path / "whole"), **BIT_IDENTICAL)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_flat_over_200_iterations(tmp_path):
    process = start(tmp_path / "log.txt", *LONG, "--iterations", "200", "--out", tmp_path / "run")
    resident = {}
    while process.poll() is None:
        with contextlib.suppress(OSError, IndexError):
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            resident.setdefault(lines(tmp_path / "run"), pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
        time.sleep(0.05)
    assert process.returncode == 0
    early = max(value for n, value in resident.items() if 30 <= n < 60)
    late = max(value for n, value in resident.items() if 170 <= n < 200)
    print(f"resident memory: {early:.0f} MB in iterations 30 to 60, {late:.0f} MB in 170 to 200 ({late / early - 1:+.2%})")
    assert late < 1.02 * early
