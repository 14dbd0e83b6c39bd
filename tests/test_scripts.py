"""Every script end to end on tiny settings, alone and with two processes; bad input. python -m pytest tests/test_scripts.py"""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cli import TASKS

TINY = "--prompts_per_iteration 4 --group_size 2 --steps 3 --iterations 2 --eval_steps 2".split()
OPD = [*TINY, "--eval_prompts", "0", "--sample_every", "0"]


def call(monkeypatch, script, *flags):
    """Run a script's own main in this process: `python SCRIPT.py FLAGS`."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
    module = importlib.import_module(script)
    module.main(module.parse_args())


def shell(*words, processes=1):
    """The same in fresh processes, under torchrun where there are several."""
    if processes > 1:
        words = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *words)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=environment, timeout=300)


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


OBJECTIVES = ["ppo", "ppo-scalar", "ppo-published", "ppo-public-code", "kl", "trajectory", "ode", "sft"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_opd_trains_with_every_objective(monkeypatch, tmp_path, objective):
    start = {"sft": ["--init", "base", "--sft_images", 16]}.get(objective, [])
    call(monkeypatch, "train_opd", *OPD, "--objective", objective, "--out", tmp_path / "run", *start)
    log = metrics(tmp_path / "run")
    assert [line["iteration"] for line in log] == [0, 1]
    assert all(torch.tensor(list(line.values())).isfinite().all() for line in log)
    assert all(line["grad_norm"] > 0 for line in log)
    if objective != "sft":
        assert all(log[0][f"kl/{task}"] > 0 for task in TASKS)
    if objective.startswith("ppo"):
        assert log[0]["ratio_gap"] > 0  # the second update of an iteration sees a student that has moved
    assert (tmp_path / "run/adapter/pytorch_lora_weights.safetensors").exists() and (tmp_path / "run/curves.png").exists()
    assert all(t.isfinite().all() for t in weights(tmp_path / "run").values())


def test_the_ratio_is_one_before_the_first_update(monkeypatch, tmp_path):
    """One update an iteration: every ratio is that of an unchanged policy, up to the rounding of another batch shape."""
    call(monkeypatch, "train_opd", *OPD, "--updates", 1, "--out", tmp_path / "run")
    assert all(line["ratio_gap"] < 1e-4 and line["clip_fraction"] == 0 for line in metrics(tmp_path / "run"))


@pytest.mark.parametrize(
    "flags",
    [
        ["--rollout", "teacher", "--objective", "kl"],
        ["--train_steps", "random:1"],
        ["--train_steps", "0,2"],
        ["--mar_weight", "0", "--anchor", "nowhere"],
        ["--anchor", "base"],
        ["--guidance", "3"],
        ["--noise_kind", "cps"],
        ["--noise_kind", "dance"],
        ["--teacher_guidance", "ocr=1.5"],
        ["--task_mix", "geneval=3", "ocr=1", "deqa=1", "pickscore=1"],
        ["--init", "base", "--rank", "4"],
        ["--dtype", "bf16"],
        ["--checkpointing"],
        ["--guidance", "3", "--student_guidance", "1"],
        ["--no_t5", "--text_length", "8"],
        ["--label_batch", "3", "--micro_batch", "1"],
    ],
)
def test_opd_flags(monkeypatch, tmp_path, flags):
    call(monkeypatch, "train_opd", *OPD, "--iterations", 1, *flags, "--out", tmp_path / "run")
    line = metrics(tmp_path / "run")[0]
    assert line["grad_norm"] > 0 and all(value > 0 for key, value in line.items() if key.startswith("kl"))


def test_an_anchor_that_is_a_teacher_says_the_same_as_one_of_its_own(monkeypatch, tmp_path):
    """The default anchor is the deqa teacher: its adapter is not held twice, its own prompts are not labelled twice."""
    shutil.copytree("toy/adapters/deqa", tmp_path / "lora/copy")
    for anchor in ("toy/adapters/deqa", tmp_path / "lora/copy"):
        call(monkeypatch, "train_opd", *OPD, "--anchor", anchor, "--out", tmp_path / Path(anchor).name)
    one, two = metrics(tmp_path / "deqa"), metrics(tmp_path / "copy")
    assert one[0]["mar"] > 0
    for a, b in zip(one, two):
        assert all(b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6) for key in a if not key.startswith("seconds"))
    torch.testing.assert_close(weights(tmp_path / "deqa"), weights(tmp_path / "copy"))


def test_batches_of_any_size_give_the_same_student(monkeypatch, tmp_path):
    """Down to one state: a sample's steps need not be in one batch."""
    for size in (1, 128):
        flags = ["--iterations", 1, "--micro_batch", size, "--label_batch", size, "--out", tmp_path / str(size)]
        call(monkeypatch, "train_opd", *OPD, "--lr", "1e-4", *flags)
    torch.testing.assert_close(weights(tmp_path / "1"), weights(tmp_path / "128"), rtol=1e-3, atol=2e-5)
    kl = [metrics(tmp_path / str(size))[0]["kl/geneval"] for size in (1, 128)]
    assert kl[0] == pytest.approx(kl[1], rel=1e-3)


def test_opd_lowers_the_kl(monkeypatch, tmp_path):
    """Learning, not only running: on the same states the KL to the teachers is lower after the updates than before."""
    settings = "--group_size 8 --steps 4 --iterations 6 --mar_weight 0 --eval_prompts 0 --sample_every 0"
    call(monkeypatch, "train_opd", *settings.split(), "--out", tmp_path / "run")
    log = metrics(tmp_path / "run")
    before, after = (sum(line[f"{name}/{task}"] for line in log for task in TASKS) for name in ("kl_before", "kl_after"))
    assert after < before


def test_opd_needs_no_scorer_and_no_vae(monkeypatch, tmp_path):
    import model

    def refuse(*_):
        raise AssertionError("the training path decoded or scored an image")

    monkeypatch.setattr(model, "decode", refuse)
    call(monkeypatch, "train_opd", *OPD, "--rewards", "no_such_module", "--out", tmp_path / "run")


def test_opd_final_evaluation_and_pictures(monkeypatch, tmp_path, capsys):
    call(
        monkeypatch,
        "train_opd",
        *TINY,
        "--iterations",
        1,
        "--eval_prompts",
        6,
        "--sample_every",
        1,
        "--out",
        tmp_path / "run",
    )
    out = capsys.readouterr().out
    assert (
        "merged start" in out and "recorded" in out and "oracle" in out and "student - merged start" in out and "next:" in out
    )
    for name in ("table.md", "results.json", "grid.png", "samples/00001.png", "args.json"):
        assert (tmp_path / "run" / name).stat().st_size > 0


@pytest.mark.parametrize(
    "flags",
    [
        ["--reward", "ocr"],
        ["--reward", "deqa=0.4", "pickscore=0.6", "--tasks", "geneval", "ocr", "deqa", "pickscore"],
        ["--mix", "geneval=3", "ocr=1", "pickscore=1"],
        ["--reward", "ocr", "--window", "1", "--keep", "best"],
        ["--reward", "deqa", "--beta", "0.04", "--std", "group"],
        ["--reward", "ocr", "--init", "toy/adapters/merged"],
    ],
)
def test_teacher_trains(monkeypatch, tmp_path, flags):
    call(monkeypatch, "train_teacher", *TINY, "--eval_prompts", 4, "--eval_every", 2, *flags, "--out", tmp_path / "run")
    log = metrics(tmp_path / "run")
    if "deqa" in flags:  # after three noisy steps nothing is legible, but something is dirty
        assert all(line["grad_norm"] > 0 for line in log)
    assert len(log) == 2 and all(0 <= line["reward"] <= 1 for line in log) and any(k.startswith("test/") for k in log[-1])
    assert (tmp_path / "run/adapter/adapter_config.json").exists() and list((tmp_path / "run/samples").glob("*.png"))
    if "--beta" in flags:
        assert all("kl_base" in line for line in log)


def test_evaluate_is_deterministic_and_draws_the_grid(monkeypatch, tmp_path):
    pages = []
    for name in ("one", "two"):
        call(
            monkeypatch,
            "evaluate",
            "--models",
            "base",
            "ocr=toy/adapters/ocr",
            "--num_prompts",
            6,
            "--steps",
            2,
            "--out",
            tmp_path / name,
        )
        pages.append((tmp_path / name / "table.md").read_text())
    assert pages[0] == pages[1] and "GenEval" in pages[0] and "Average" in pages[0] and "| ocr |" in pages[0]
    assert (tmp_path / "one/grid.png").exists()
    results = json.loads((tmp_path / "one/results.json").read_text())["results"]
    assert results["base"]["geneval"]["n"] == 6 and 0 < results["base"]["average"]["mean"] < 1


def test_a_scorer_that_fails_is_not_scored_and_stops_a_teacher(monkeypatch, tmp_path, capsys):
    """Never a 0: evaluate.py leaves the metric out and says why, train_teacher.py stops with the scorer's name."""
    import toy

    def broken(images, prompts, metadata=None):
        raise ValueError("no weights here; fetch them with a command")

    broken.range = (0, 1)
    monkeypatch.setitem(toy.REWARDS, "ocr", broken)
    call(monkeypatch, "evaluate", "--num_prompts", 3, "--steps", 2, "--out", tmp_path / "table")
    assert "not scored: ocr: no weights here" in capsys.readouterr().out
    row = json.loads((tmp_path / "table/results.json").read_text())["results"]["base"]
    assert "ocr" not in row and "geneval" in row and "average" not in row
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, "train_teacher", *TINY, "--reward", "ocr", "--out", tmp_path / "run")
    assert stopped.value.code == 2 and "reward ocr cannot score: no weights here" in capsys.readouterr().err


def test_evaluate_paints_ones_own_prompt(monkeypatch, tmp_path):
    call(
        monkeypatch,
        "evaluate",
        "--models",
        "base",
        "toy/adapters/ocr",
        "--prompt",
        "sign reads K T in red",
        "--steps",
        2,
        "--out",
        tmp_path,
    )
    assert (tmp_path / "prompts.png").stat().st_size > 0


def test_resume_goes_on_where_it_stopped(monkeypatch, tmp_path):
    call(monkeypatch, "train_opd", *OPD, "--iterations", 3, "--out", tmp_path / "whole")
    call(monkeypatch, "train_opd", *OPD, "--iterations", 2, "--out", tmp_path / "parts")
    call(monkeypatch, "train_opd", *OPD, "--iterations", 3, "--out", tmp_path / "parts", "--resume")
    assert [line["iteration"] for line in metrics(tmp_path / "parts")] == [0, 1, 2]
    torch.testing.assert_close(weights(tmp_path / "parts"), weights(tmp_path / "whole"), rtol=0, atol=0)


@pytest.mark.parametrize(
    "script,flags",
    [
        ("train_opd", ["--eval_prompts", "0", "--sample_every", "0"]),
        ("train_teacher", ["--reward", "deqa", "--eval_every", "0"]),
    ],
)
def test_two_processes_give_the_curve_of_one(tmp_path, script, flags):
    common_flags = [
        f"{script}.py",
        *"--prompts_per_iteration 3 --group_size 4 --steps 3 --iterations 3 --eval_steps 2 --lr 1e-4".split(),
        *flags,
    ]
    for processes in (1, 2):
        done = shell(*common_flags, "--out", tmp_path / str(processes), processes=processes)
        assert done.returncode == 0, done.stderr
    assert all(line["grad_norm"] > 0 for line in metrics(tmp_path / "1"))  # there was something to disagree about
    torch.testing.assert_close(weights(tmp_path / "2"), weights(tmp_path / "1"), rtol=1e-4, atol=1e-5)
    for one, two in zip(metrics(tmp_path / "1"), metrics(tmp_path / "2")):
        for key in one.keys() - {"ratio_gap", "clip_fraction"}:
            if key.startswith("seconds"):
                continue
            assert two[key] == pytest.approx(one[key], rel=1e-2, abs=1e-4), key


@pytest.mark.slow
def test_two_machines_give_the_curve_of_one(tmp_path):
    """Two launchers with node ranks of their own, as on two machines that see one folder."""
    words = "train_opd.py --prompts_per_iteration 4 --group_size 4 --steps 3 --iterations 2 --lr 1e-4".split()
    words += ["--eval_prompts", "0", "--sample_every", "0", "--out"]
    assert shell(*words, tmp_path / "one").returncode == 0
    launch = [sys.executable, *"-m torch.distributed.run --nnodes=2 --nproc_per_node=1 --master_addr=127.0.0.1".split()]
    port = 29500 + os.getpid() % 1000
    nodes = [
        subprocess.Popen(
            [*launch, f"--master_port={port}", f"--node_rank={rank}", *words, str(tmp_path / "two")],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    ]
    assert [node.wait(timeout=300) for node in nodes] == [0, 0]
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-4, atol=1e-5)


def test_two_processes_give_the_table_of_one(tmp_path):
    for processes in (1, 2):
        done = shell("evaluate.py", "--num_prompts", 5, "--steps", 2, "--out", tmp_path / str(processes), processes=processes)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "1/table.md").read_text() == (tmp_path / "2/table.md").read_text()


@pytest.mark.parametrize("script", ["train_teacher", "merge", "train_opd", "evaluate", "toy"])
def test_help_is_quick_and_says_units_and_defaults(script):
    done = shell(f"{script}.py", "--help")
    assert done.returncode == 0 and "default" in done.stdout
    assert "torch" not in shell("-X", "importtime", f"{script}.py", "--help").stderr  # what would make it slow


BAD = {
    "train_opd": [
        (["--teacher", "zebra=toy/adapters/ocr"], "zebra"),
        (["--teacher", "ocr=nowhere"], "nowhere"),
        (["--teacher", "ocr"], "NAME=VALUE"),
        (["--teacher", "ocr=toy/adapters/ocr", "--teacher", "ocr=toy/adapters/ocr"], "twice"),
        (["--teacher", "ocr=toy/adapters/ocr", "--task_mix", "geneval=1"], "geneval"),
        (["--task_mix", "geneval=1"], "ocr"),
        (["--task_mix", "geneval=x"], "number"),
        (["--teacher_guidance", "zebra=2"], "zebra"),
        (["--prompts", "ocr=nowhere.txt"], "nowhere.txt"),
        (["--prompts", "zebra=toy/prompts/ocr_train.txt"], "zebra"),
        (["--init", "toy/vae"], "toy/vae"),
        (["--anchor", "toy/vae"], "toy/vae"),
        (["--model", "nowhere"], "nowhere"),
        (["--noise", "0"], "--noise"),
        (["--noise", "-1", "--objective", "kl"], "--noise"),
        (["--steps", "1"], "--steps"),
        (["--updates", "3"], "--updates"),
        (["--train_steps", "9"], "--train_steps"),
        (["--train_steps", "random:0"], "--train_steps"),
        (["--train_steps", "all", "--noise_kind", "cps"], "cps"),
        (["--rollout", "teacher"], "--rollout"),
        (["--objective", "sft", "--mar_weight", "0.1"], "--mar_weight"),
        (["--objective", "nonsense"], "--objective"),
        (["--itertions", "3"], "--itertions"),
        (["--out", "USED"], "--overwrite"),
        (["--out", "FULL", "--overwrite"], "--out"),
        (["--resume", "--overwrite"], "choose one"),
        (["--updates", "0"], "--updates"),
        (["--micro_batch", "x"], "--micro_batch"),
        (["--noise", "nan"], "--noise"),
        (["--rewards", "no_such_module"], "no_such_module"),
        (["--test_prompts", "ocr=nowhere.txt"], "--test_prompts"),
        (["--out", "NEW", "--resume"], "--resume"),
    ],
    "train_teacher": [
        ([], "--reward"),
        (["--reward", "ocr", "--mix", "ocr=1"], "--reward"),
        (["--reward", "ocr=x"], "number"),
        (["--reward", "zebra"], "zebra"),
        (["--reward", "ocr", "--tasks", "zebra"], "zebra"),
        (["--mix", "zebra=1"], "zebra"),
        (["--reward", "ocr", "--group_size", "1"], "--group_size"),
        (["--reward", "ocr", "--steps", "1"], "--steps"),
        (["--reward", "ocr", "--noise", "0"], "--noise"),
        (["--reward", "ocr", "--window", "8"], "--window"),
        (["--reward", "ocr", "--init", "nowhere"], "nowhere"),
        (["--reward", "ocr", "--out", "USED"], "--overwrite"),
    ],
    "toy": [(["--steps", "0"], "--steps"), (["--stage", "zebra"], "zebra")],
    "evaluate": [
        (["--model", "nowhere"], "nowhere"),
        (["--models", "nowhere"], "nowhere"),
        (["--models", "base", "base"], "base"),
        (["--tasks", "zebra"], "zebra"),
        (["--model_guidance", "zebra=1"], "zebra"),
        (["--steps", "0"], "--steps"),
        (["--out", "USED"], "--out"),
    ],
}


@pytest.mark.parametrize("script,flags,named", [(s, f, n) for s, cases in BAD.items() for f, n in cases])
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(monkeypatch, tmp_path, capsys, script, flags, named):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("not a run")
    (tmp_path / "used").mkdir()
    (tmp_path / "used/args.json").write_text("{}")
    places = {"USED": str(tmp_path / "used"), "FULL": str(tmp_path / "full"), "NEW": str(tmp_path / "new")}
    flags = [places.get(f, f) for f in flags]
    if "--out" not in flags:
        flags += ["--out", str(tmp_path / "new")]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, script, *flags)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_teacher_stops_the_real_process_in_one_line(tmp_path):
    """In a fresh process: nothing else on stderr, no traceback."""
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "adapter_model.safetensors").write_bytes(b"garbage" * 10)
    done = shell("train_opd.py", "--teacher", f"ocr={bad}", *OPD, "--out", tmp_path / "run")
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert len(done.stderr.strip().splitlines()) == 1 and "damaged" in done.stderr


def readme_commands():
    """Every command line of the README's code blocks, as words."""
    text = Path("README.md").read_text()
    lines = [line for block in re.findall(r"```\n(.*?)```", text, re.S) for line in block.splitlines()]
    commands = [part for line in lines if line.startswith(("python", "torchrun")) for part in line.split("#")[0].split("&&")]
    return [shlex.split(part) for part in commands]


def test_the_readmes_commands_parse(monkeypatch, tmp_path):
    """Scripts accept their flags as written (outputs of earlier commands stand in as the merged adapter); pip and pytest
    commands name files that exist."""
    commands = readme_commands()
    assert any("requirements.txt" in words for words in commands) and any("pytest" in words for words in commands)
    assert sum(words[-1] == "train_opd.py" for words in commands) >= 1  # the main job, without a flag
    for words in commands:
        script = next((word for word in words if word.endswith(".py")), None)
        if script is None or script == "toy.py":
            continue
        flags = [
            "toy/adapters/merged" if re.fullmatch(r"runs/(merged|opd/adapter)", w) else w
            for w in words[words.index(script) + 1 :]
        ]
        flags = [re.sub(r"=runs/.*", "=toy/adapters/merged", flag) for flag in flags]
        if "--out" not in flags:
            flags += ["--out", str(tmp_path / "new")]
        monkeypatch.setattr(sys, "argv", [script, *flags])
        importlib.import_module(script.removesuffix(".py")).parse_args()
