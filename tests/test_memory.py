"""The dry run's numbers against a real run; out of memory; compiled blocks.

python -m pytest tests/test_memory.py"""

import os
import re
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import call, shell

import train_opd
from experiments import cost
from recipes import memory
from support import files, lora, model
from support.run import take_gradients

CPU = torch.device("cpu")
OPD = "--prompts_per_iteration 4 --group_size 2 --steps 3 --iterations 1".split()
OPD += ["--eval_prompts", 0, "--sample_every", 0]


def parse(*flags):
    """As for a run that is new, whatever runs/ holds."""
    words = ["train_opd.py", "--out", f"runs/never-{os.getpid()}", *flags]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        return train_opd.parse_args()


BATCHES = ["--label_batch 3 --micro_batch 1 --guidance 3", "--anchor base --updates 1"]


@pytest.mark.parametrize("more", BATCHES)
def test_the_largest_batches_are_those_of_a_real_iteration(monkeypatch, tmp_path, more):
    flags = [*OPD, *more.split(), "--out", tmp_path / "run"]
    promised = memory.largest_batch(parse(*flags))
    made, real = {True: [0], False: [0]}, model.velocity

    def counted(transformer, x, *rest):
        made[torch.is_grad_enabled()].append(len(x))
        return real(transformer, x, *rest)

    monkeypatch.setattr(model, "velocity", counted)
    monkeypatch.setattr(train_opd, "self_checks", lambda *words: None)
    call(monkeypatch, "train_opd", *flags)
    assert promised["update"] == max(made[True])
    assert max(promised["rollout"], promised["labels"]) == max(made[False])


def real_model(args):
    pipe = model.load_pipeline(args, CPU)
    return pipe.transformer, train_opd.load_loras(args, pipe.transformer)[0]


def test_the_bytes_are_those_of_a_real_model():
    """Of its weights, and of the tensors alive in a forward and a backward pass: to the byte."""
    flags = [*OPD, "--dtype", "bf16", "--checkpointing", "--guidance", 2]
    args = parse(*flags, "--micro_batch", 2, "--label_batch", 8)
    held, extra = memory.phases(args, train_opd.load_loras, "toy", CPU)
    transformer, student = real_model(args)
    parts = ("transformer", "LoRA", "student")
    weights = [size for name, (_, _, size) in held.items() if name.startswith(parts)]
    assert sum(weights) == memory.size_of(transformer)
    assert held["Adam's two moments"][-1] == 2 * sum(p.numel() * 4 for p in student.values())
    tokens = 17  # one of CLIP and 16 of T5
    assert extra["device", "update"] == memory.peak_of(
        transformer, 2, 8, tokens, 2.0, CPU, backward=True
    )
    assert extra["device", "labels"] == memory.peak_of(transformer, 8, 8, tokens, 2.0, CPU)


def test_what_is_held_when_and_where(monkeypatch):
    """On a GPU the VAE waits in the host's memory until it decodes; files are mapped there."""
    monkeypatch.setattr(memory, "peak_of", lambda *_, **__: 0)  # which takes seconds
    flags = "--prompts ocr=toy/prompts/ocr_train.txt --teacher ocr=toy/adapters/ocr".split()
    flags = [*OPD, *flags]
    pipe = model.load_pipeline(parse(), CPU)
    vae, table = memory.size_of(pipe.vae), pipe.transformer.pos_embed.pos_embed.numel() * 4
    for more, where in (([], "host"), (["--sample_every", 1], "device")):
        args = parse(*flags, "--dtype", "bf16", *more)
        held, extra = memory.phases(args, train_opd.load_loras, "toy", CPU)
        assert held["VAE, float32"] == (where, "rollout" if more else "loading", vae)
    bf16, row = held["transformer, bfloat16"][-1], 2 * (17 * 128 + 128)
    file = Path("toy/transformer/diffusion_pytorch_model.safetensors").stat().st_size  # float32
    on_gpu, host = (memory.in_all(held, extra, place) for place in ("device", "host"))
    assert host["loading"] == bf16 + file + table
    assert held["text embeddings"] == ("host", "rollout", row * (1 + 4 + 2))
    assert on_gpu["text"] > bf16 and {"loading", "saving"}.isdisjoint(on_gpu)
    held, extra = memory.phases(parse(*flags), train_opd.load_loras, "toy", CPU)
    weights = memory.size_of(pipe.transformer)  # in the precision of the file: mapped, not copied
    assert memory.in_all(held, extra, "device", "host")["loading"] == weights + vae + table


def test_a_gpu_that_is_not_here_is_said(monkeypatch, capsys):
    sizes = {"Adam's two moments": ("device", "rollout", 1), "text embeddings": ("host", "text", 1)}
    monkeypatch.setattr(memory, "phases", lambda *_: (sizes, {("device", "update"): 1}))
    for flags, line in ((["--dtype", "bf16"], "counted for one"), ([], "counted for a CPU")):
        call(monkeypatch, "train_opd", *OPD, *flags, "--dry_run")
        out = capsys.readouterr().out
        assert line in out and ("GPU's memory" in out) == bool(flags)


def test_the_bytes_are_what_the_allocator_gives():
    """By another way of counting: torch's profiler records every allocation."""
    transformer, _ = real_model(parse())
    counted = memory.peak_of(transformer, 40, 8, 17, 1.0, CPU, backward=True)
    for parameter in transformer.parameters():
        parameter.grad = None
    text = {"embeds": torch.zeros(1, 17, 128), "pooled": torch.zeros(1, 128)}
    words = (torch.zeros(40, 8, 8, 8), 0.5, text, torch.zeros(40, dtype=torch.long), 1.0)
    with lora.use(transformer, "student"), torch.profiler.profile(profile_memory=True) as profile:
        model.velocity(transformer, *words).square().mean().backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert counted == pytest.approx(peak, rel=0.05)


def test_a_dry_run_fetches_no_weight_of_the_model_and_leaves_nothing(monkeypatch, tmp_path, capsys):
    def snapshot_download(name, revision=None, allow_patterns=None):
        source = Path("toy/adapters/ocr" if name == "some/lora" else "toy")
        for file in source.rglob("*"):
            to = tmp_path / "hub" / name / file.relative_to(source)
            wanted = [fnmatch(file.relative_to(source), pattern) for pattern in allow_patterns]
            if file.is_file() and any(wanted):
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, to)
        return str(tmp_path / "hub" / name)

    files.fetch.cache_clear()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    words = ["--model", "some/model", "--teacher", "ocr=some/lora", "--anchor", "some/lora"]
    words += ["--prompts", "ocr=toy/prompts/ocr_train.txt", "--init", "base"]
    words += ["--test_prompts", "ocr=toy/prompts/ocr_test.txt", "--out", tmp_path / "run"]
    call(monkeypatch, "train_opd", *words, "--dry_run")
    files.fetch.cache_clear()
    out = capsys.readouterr().out
    parts = "transformer, float32|Adam|loaded|embedded|rollout|labels|update|saving|samples"
    assert all(part in out for part in f"{parts}|counted for a CPU|An estimate".split("|"))
    fetched = tmp_path / "hub/some/model"
    assert (fetched / "transformer/config.json").is_file()
    assert not list(fetched.rglob("*.safetensors")) and not (tmp_path / "run").exists()


# ---- Out of memory


def lacking(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nsecond line")


@pytest.mark.parametrize("script, place", [("train_opd", "sde.log_prob"), ("evaluate", "sde.step")])
def test_out_of_memory_is_one_line(monkeypatch, tmp_path, capsys, script, place):
    flags = {"train_opd": OPD, "evaluate": ["--num_prompts", 2]}[script]
    monkeypatch.setattr(place, lacking)
    monkeypatch.setattr("train_opd.self_checks", lambda *words: None)
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, script, *flags, "--out", tmp_path / "run")
    errors = [text for text in capsys.readouterr().err.splitlines() if "error" in text]
    assert stopped.value.code == 2 and len(errors) == 1 and "2.00 GiB" in errors[0]
    assert "--checkpointing" in errors[0]


JOBS = (("teacher_ocr", False), ("student", False), ("student", True))


@pytest.mark.slow
def test_compiled_blocks_agree_and_stop_compiling(monkeypatch):
    """Two LoRAs, with and without gradient, batches of two sizes: a second round compiles none."""
    monkeypatch.setattr(model, "COMPILER", "eager")
    (plain, exact), (fast, student) = real_model(parse()), real_model(parse("--compile"))
    text = {"embeds": torch.randn(1, 17, 128), "pooled": torch.randn(1, 128)}
    graphs = []
    for _ in range(2):
        for n, name, grad in ((n, *job) for n in (4, 3) for job in JOBS):
            x, rows = torch.randn(n, 8, 8, 8), torch.zeros(n, dtype=torch.long)
            v = []
            for transformer in (plain, fast):
                with torch.set_grad_enabled(grad), lora.use(transformer, name):
                    v.append(model.velocity(transformer, x, 0.5, text, rows, 1.0))
            torch.testing.assert_close(v[1], v[0], rtol=1e-4, atol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0
    for tensor in v:
        tensor.square().mean().backward()
    gradients = [take_gradients(list(p.values())) for p in (exact, student)]
    assert gradients[0].any()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_full_size_runs_with_small_widths(tmp_path):
    done = shell("experiments/full_size.py", "--tiny", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("  holds: ") > 20 and "| opd | update |" in done.stdout


@pytest.mark.slow
def test_the_cost_table_is_what_cost_py_counts(monkeypatch, capsys):
    """A row of recipes/README.md against its command."""
    cost.count_recipe("sd35m_opd_24gb", [])
    out, text = capsys.readouterr().out, Path("recipes/README.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| `sd35m_opd_24gb`"))
    *cells, seconds, iterations, hours = [cell.strip() for cell in row.split("|")[2:-1]]
    numbers = re.findall(r"^\| (?:rollout|labels|update) \| \d+ \| ([\d.]+)", out, re.M)
    together = re.search(r"\| together \| \| ([\d.]+) \| ([\d.]+)", out)
    assert cells == [re.search(r"(\d+) images", out)[1], *numbers, together[1]]
    assert seconds == f"{float(together[2]):.0f}"
    assert f"{iterations} iterations: {hours} hours at the rate" in out and float(hours) <= 10
