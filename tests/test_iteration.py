"""Two iterations of every training script against experiments/slow_loops.py.

The same adapter, the same average and every number of the log. Each row changes flags whose effect
the first row does not show. Where a row has tests or samples, they are those of the average."""

import importlib
import json
import math
import re

import pytest
import torch
from conftest import call, codes_of, fork, linux
from safetensors.torch import load_file
from torch.testing import assert_close

from experiments import slow_loops as reference
from support.flags import TASKS


def flags_of(values):
    """{"teacher_guidance": {"ocr": 1.5}, "lr": 1e-3} -> ["--teacher_guidance", "ocr=1.5", ...]."""
    words = []
    for name, value in values.items():
        if name == "skip":
            continue
        if name == "trained":
            name, value = "train_steps", ",".join(map(str, value))
        if name == "random_steps":
            name, value = "train_steps", f"random:{value}"
        if name in ("anchor", "init") and value != "base":
            value = f"toy/adapters/{value}"
        if name == "tasks" and "reward" not in values:
            name, value = "teacher", {task: f"toy/adapters/{task}" for task in value}
        words.append(f"--{name}")
        if isinstance(value, dict):
            words += [f"{key}={number}" for key, number in value.items()]
        elif isinstance(value, tuple):
            words += value
        else:
            words.append(str(value))
    return words


def skip_updates(script, numbers, patch):
    """The clipping reports infinity, or NaN, for the updates of these numbers, from 1."""
    if not numbers:
        return
    module, count = importlib.import_module(script), 0
    clip = module.clip_grad_norm_

    def clip_or_fail(parameters, largest):
        nonlocal count
        count += 1
        norm = clip(parameters, largest)
        if count not in numbers:
            return norm
        return torch.tensor([math.inf, math.nan][count % 2])

    patch.setattr(module, "clip_grad_norm_", clip_or_fail)


def compare(run, models, log):
    """Adam turns the rounding of tiny gradients into visible steps of single entries: a tensor may
    differ by 5 % of the way that training moved it."""
    state = load_file(max((run / "checkpoints").glob("step_*")) / "state.safetensors")
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    for name, tensor in adapter.items():  # published at scale 1: the student's 2 is inside B
        state[name.replace("base_model.model", "adapter")] = tensor / (1 + ("lora_B" in name))
    student = {name: p.detach() for name, p in models.named.items()}
    published = models.best or models.average
    wanted = (("student.", student), ("average.", models.average), ("adapter.", published))
    for prefix, tensors in wanted:
        for name, tensor in tensors.items():
            moved = (tensor - models.start[name]).norm()
            assert (state[prefix + name] - tensor).norm() <= 0.05 * moved + 1e-6, prefix + name
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == len(log)
    for line, expected in zip(lines, log):
        line = {name: value for name, value in line.items() if not name.startswith("seconds")}
        assert line.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, float):
                value = pytest.approx(value, rel=2e-3, abs=2e-6)
            assert line[name] == value, name


SMALL = {"prompts_per_iteration": 2, "group_size": 2, "steps": 4, "iterations": 2}
TWO_TASKS = {"tasks": ("ocr", "deqa")}
DECAY = {"lr": 1.0, "grad_norm": 1e-10}  # AdamW's epsilon and weight decay outweigh such gradients
OPD = {  # values for the reference and the script, and flags of the script alone
    "ppo": (
        {"clip_range": 0.01, "grad_norm": 0.01, "mar_weight": 0.5, "ema_every": 2, "skip": (2, 3)},
        "--micro_batch 3 --label_batch 5 --max_bad_steps 2",
    ),
    "guidance and shares": (
        {"guidance": 1.3, "student_guidance": 1.1, "updates": 1, "seed": 3}
        | {"step_weights": "equal"}
        | {"teacher_guidance": {"ocr": 1.6, "deqa": 1.2}}
        | {"task_mix": {"ocr": 2, "geneval": 1, "deqa": 1, "pickscore": 1}},
        "--micro_batch 4 --sample_every 2 --eval_prompts 2 --eval_steps 2",
    ),
    "kl, random steps, dance": (
        {"objective": "kl", "noise_kind": "dance", "noise": 0.4, "anchor": "base", "lr": 3e-4}
        | {"guidance": 1.2, "student_guidance": 1.0, "random_steps": 2},
        "",
    ),
    "cps, some steps": (
        {"noise_kind": "cps", "noise": 0.5, "anchor": "ocr", "ema_decay": 0.1, "updates": 1}
        | {"trained": (0, 2), **TWO_TASKS, **DECAY},
        "",
    ),
    "ode": (
        TWO_TASKS | {"objective": "ode", "noise": 0.0, "init": "ocr", "step_weights": "equal"},
        "",
    ),
    "trajectory": (TWO_TASKS | {"objective": "trajectory", "clip_range": 1e-4}, ""),
}
for objective in ("ppo-scalar", "ppo-published", "ppo-public-code"):
    short = {"prompts_per_iteration": 1, "steps": 3, "iterations": 1, "tasks": ("ocr",)}
    OPD[objective] = (short | {"objective": objective, "clip_range": 1e-5}, "")


@pytest.mark.parametrize("row", OPD)
def test_opd(monkeypatch, row, tmp_path):
    values, more, grids = SMALL | OPD[row][0], OPD[row][1], []
    models, log = reference.opd(**values)
    skip_updates("train_opd", values.get("skip", ()), monkeypatch)
    monkeypatch.setattr("train_opd.picture_grid", lambda *given: grids.append(given))
    words = [*flags_of(values), "--eval_prompts", 0, "--sample_every", 0, *more.split()]
    call(monkeypatch, "train_opd", *words, "--out", tmp_path / "run")
    compare(tmp_path / "run", models, log)
    assert len(grids) == ("--sample_every" in more)
    if grids:
        check_samples(*grids[0], models, values)
        check_report(tmp_path / "run", models, values)


def check_samples(file, columns, shown, models, values):
    """Two prompts of each task, with noise that depends on seed and prompt alone."""
    assert file.endswith("samples/00002.png")  # after two iterations
    assert shown == [prompt for task in TASKS for prompt in sorted(reference.read(task))[:2]]
    items = [(prompt, (values["seed"], "sample", prompt)) for prompt in shown[3:5]]
    expected = reference.pictures(models, models.average, items, 2, values["student_guidance"])
    assert_close(list(columns["student"][3:5]), expected, rtol=0, atol=2e-3)


def check_report(run, models, values):
    """The table at the end: start and average on the first test prompts, in 8-bit pictures."""
    results = json.loads((run / "results.json").read_text())["results"]
    means, gain = reference.report(models, values["guidance"], values["student_guidance"])
    for (name, task), mean in means.items():
        assert results[name][task]["n"] == 2
        assert results[name][task]["mean"] == pytest.approx(mean, abs=2e-3), (name, task)
    line = re.search(r"student - merged start: (\S+) ± (\S+) in", (run / "table.md").read_text())
    assert [float(line[1]), float(line[2])] == pytest.approx(gain, abs=1e-3)


GRPO = {
    "one task": (
        {"reward": {"ocr": 1.0}, "beta": 0.5, "std": "group", "updates": 3, "clip_range": 1e-4}
        | {"eval_every": 1, "eval_prompts": 2, "eval_steps": 2, "skip": (3, 4)},
        "--micro_batch 2 --final best --max_bad_steps 2",
    ),
    "mix and window": (
        {"mix": {"geneval": 3, "ocr": 1}, "mix_quality": 0.3, "window": 2, "window_end": 3}
        | {"steps": 5, "guidance": 1.2, "grad_norm": 0.01, "ema_every": 2, "seed": 7}
        | {"eval_every": 2, "eval_prompts": 2, "eval_steps": 2},
        "--micro_batch 5 --label_batch 3",
    ),
    "weighted rewards": (
        {"reward": {"deqa": 0.8, "pickscore": 0.4}, "tasks": ("ocr", "deqa"), "noise_kind": "cps"}
        | {"noise": 0.4, "ema_decay": 0.3, "eval_every": 3, "eval_prompts": 1, "eval_steps": 2}
        | DECAY,
        "",
    ),
}


@pytest.mark.parametrize("row", GRPO)
def test_grpo(monkeypatch, row, tmp_path):
    values, more = GRPO[row]
    values = SMALL | {"group_size": 3, "updates": 1, "init": "merged"} | values
    models, log = reference.grpo(**values)
    skip_updates("train_teacher", values.get("skip", ()), monkeypatch)
    call(monkeypatch, "train_teacher", *flags_of(values), *more.split(), "--out", tmp_path / "run")
    compare(tmp_path / "run", models, log)


SFT = {"sft_images": 5, "batch": 3, "eval_steps": 2, "iterations": 3, "init": "merged"} | TWO_TASKS
SFT_ROWS = {
    "skipped": (
        {"grad_norm": 0.1, "ema_every": 2, "skip": (2,), "seed": 4},
        "--micro_batch 2 --max_bad_steps 2",
    ),
    "guidance and shares": (
        {"guidance": 1.3, "teacher_guidance": {"ocr": 1.6}, "task_mix": {"ocr": 2, "deqa": 1}}
        | {"ema_decay": 0.1, **DECAY},
        "--label_batch 2",
    ),
}


@pytest.mark.parametrize("row", SFT_ROWS)
def test_sft(monkeypatch, row, tmp_path):
    values, more = SFT_ROWS[row]
    models, log = reference.sft(**SFT, **values)
    skip_updates("train_sft", values.get("skip", ()), monkeypatch)
    words = [*flags_of(SFT | values), *more.split(), "--eval_prompts", "0"]
    call(monkeypatch, "train_sft", *words, "--out", tmp_path / "run")
    compare(tmp_path / "run", models, log)
    if row == "skipped":  # a run that goes on has its images already
        monkeypatch.setattr("train_sft.sample_latents", None)
        call(monkeypatch, "train_sft", *words, "--out", tmp_path / "run", "--resume")


def flags_in_rows(script):
    """{"--lr", ...}: what test_flags.py need not look at."""
    tables = {"train_opd": OPD, "train_teacher": GRPO, "train_sft": SFT_ROWS}
    words = flags_of(TWO.get(script, {})) + ["--eval_prompts"]
    for values, more in tables.get(script, {}).values():
        words += [*flags_of(values), *more.split()]
    return {word for word in words if word.startswith("--")}


NINE = SMALL | {"prompts_per_iteration": 3, "group_size": 3, "updates": 3, "steps": 3}
TWO = {  # nine samples, four and five; three images, one and two
    "train_opd": NINE | TWO_TASKS,
    "train_teacher": NINE
    | {"mix": {"ocr": 2, "deqa": 1}, "init": "merged", "skip": (6,)}
    | {"eval_every": 2, "eval_prompts": 1, "eval_steps": 2},
    "train_sft": SFT,
}


@linux
@pytest.mark.parametrize("script", TWO)
def test_two_processes(monkeypatch, tmp_path, script):
    values, log, run = TWO[script], tmp_path / "log.txt", tmp_path / "run"
    words = [*flags_of(values), "--micro_batch", 2, "--out", run]
    if script != "train_teacher":
        words += ["--eval_prompts", 0]
    skip_updates(script, values.get("skip", ()), monkeypatch)
    assert codes_of(fork(2, log, call, monkeypatch, script, *words)) == [0, 0], log.read_text()
    loops = {"train_opd": reference.opd, "train_teacher": reference.grpo}
    compare(run, *loops.get(script, reference.sft)(**values))


@linux
def test_two_processes_make_the_table_of_one(monkeypatch, tmp_path):
    words, log = "--tasks ocr geneval --num_prompts 5 --steps 2 --out".split(), tmp_path / "log.txt"
    call(monkeypatch, "evaluate", *words, tmp_path / "one")
    pids = fork(2, log, call, monkeypatch, "evaluate", *words, tmp_path / "two")
    assert codes_of(pids) == [0, 0], log.read_text()
    for name in ("table.md", "images/base/ocr/00004.png", "grid.png"):
        one, two = (tmp_path / run / name for run in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
