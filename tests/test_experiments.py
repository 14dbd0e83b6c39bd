"""experiments/: the committed report is what the committed records give, the held-out scores, the driver end to end."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import losses
import toy
from experiments import heldout, miniature, records, report

ROOT = Path(__file__).resolve().parents[1]


def test_the_report_follows_from_the_records_alone(tmp_path):
    """Byte for byte, and with every figure that the document shows."""
    shutil.copytree(ROOT / "experiments" / "results", tmp_path / "results")
    report.write(tmp_path / "results")
    text = (tmp_path / "RESULTS.md").read_text()
    assert text == (ROOT / "experiments" / "RESULTS.md").read_text(), "run python experiments/miniature.py --report"
    shown = {line.split("(")[-1].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    assert shown and all((tmp_path / name).is_file() and (ROOT / "experiments" / name).is_file() for name in shown)


def test_the_report_says_what_has_not_run(tmp_path):
    (tmp_path / "results").mkdir()
    report.write(tmp_path / "results")
    assert report.MISSING in (tmp_path / "RESULTS.md").read_text()


def test_records_are_of_the_plan():
    """Every record was made with the flags that the plan has now, and has a name in the tables."""
    jobs = {f"{job.name}_seed{job.seed}": job for job in miniature.plan(Path("runs/miniature"))}
    assert len(jobs) == len(miniature.plan(Path("runs/miniature")))  # no two runs of one name
    for file in (ROOT / "experiments" / "results").glob("*_seed*.json"):
        assert miniature.recorded(jobs[file.stem], file.parent), file.stem
    assert {job.name for job in jobs.values()} - {"gradients", "base", "teacher_pickscore"} <= set(records.LABELS)
    assert all(str(iterations) in toy.ADAPTERS[name] for name, (iterations, *_) in records.SHIPPED.items())


def test_the_scripts_accept_every_planned_command(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for job in miniature.plan(tmp_path):  # what other runs start from
        (tmp_path / f"{job.name}_seed{job.seed}").mkdir()
        (tmp_path / f"{job.name}_seed{job.seed}" / "adapter").symlink_to(ROOT / "toy" / "adapters" / "merged")
    (tmp_path / "prompts").mkdir()
    shutil.copy("toy/prompts/ocr_train.txt", tmp_path / "prompts" / "all.txt")
    once = {(job.script, *job.flags): job for job in miniature.plan(tmp_path)}
    for job in once.values():
        if job.script in ("train_opd.py", "train_teacher.py", "merge.py"):
            monkeypatch.setattr(sys, "argv", [job.script, *job.flags, "--out", str(tmp_path / "run"), "--overwrite"])
            importlib.import_module(job.script.removesuffix(".py")).parse_args()


def test_a_mistyped_flag_is_one_line(monkeypatch, capsys):
    for flags in (["--budget", "x"], ["--threads", "0"], ["--only", "everything"], ["--bad"]):
        monkeypatch.setattr(sys, "argv", ["miniature.py", *flags])
        with pytest.raises(SystemExit) as stopped:
            miniature.parse_args()
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.startswith("error:") and error.count("\n") == 1


@pytest.mark.parametrize("kept", ["opd_merge merge_mix merged", "opd_small geneval ocr deqa pickscore", "opd_merge base"])
def test_the_report_stands_on_any_part_of_the_records(tmp_path, kept):
    (tmp_path / "results").mkdir()
    for file in (ROOT / "experiments" / "results").glob("*_seed*.json"):
        if file.stem.rpartition("_seed")[0] in kept.split():
            shutil.copy(file, tmp_path / "results")
    report.write(tmp_path / "results")
    assert report.MISSING in (tmp_path / "RESULTS.md").read_text()


def test_held_out_scores_see_what_they_are_for():
    """Blur softens edges and nothing else does; dirt is noise; one picture for all samples has no variety."""
    prompts = ["red circle and blue square", "three green triangles"] * 8
    clean = heldout.draw(prompts)
    blurred = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(clean, (1, 1, 1, 1), mode="replicate"), 3, 1)
    dirty = (clean + 0.05 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    grey = clean * 0.4 + 0.3  # less contrast, edges as hard
    assert heldout.edges(clean).mean() > 0.95 > 0.75 > heldout.edges(blurred).mean()
    torch.testing.assert_close(heldout.edges(grey), heldout.edges(clean))
    assert heldout.noise(clean).max() == 0 < 5 < heldout.noise(dirty).min()
    assert heldout.distance(0.5 * clean, "geneval").mean() > 2 * heldout.distance(clean, "geneval").mean()
    same = clean[:2].repeat(8, 1, 1, 1)
    assert heldout.variety(same, prompts).max() < 1e-3 < 0.1 < heldout.variety(clean, prompts).mean()


def test_prompts_out_of_distribution_were_never_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    seen = {prompt for prompts in toy.all_prompts().values() for prompt in prompts}
    for task, file in heldout.write_prompts(tmp_path).items():
        prompts = Path(file).read_text().splitlines()
        if task != "variety":
            assert len(prompts) == 64 and not seen & set(prompts)
            words = {w.lower() for prompt in seen for w in prompt.split()}  # words are known, and the miniature reads seven
            assert all(len(p.split()) <= 7 and {w.lower() for w in p.split()} <= words for p in prompts)
            assert heldout.REWARDS[task](heldout.draw(prompts[:2]), prompts[:2]).isfinite().all()


def test_a_random_teacher_is_the_average_of_all():
    """The KL to a teacher drawn at random and the KL to the mean of their means have one gradient: no run of its own."""
    generator = torch.Generator().manual_seed(0)
    mean, *teachers = torch.randn(5, 3, 2, 4, 4, generator=generator)
    mean.requires_grad_(True)
    (drawn,) = torch.autograd.grad(sum(losses.opd_kl(mean, t, 0.3)[0] for t in teachers) / len(teachers), mean)
    (averaged,) = torch.autograd.grad(losses.opd_kl(mean, sum(teachers) / len(teachers), 0.3)[0], mean)
    torch.testing.assert_close(drawn, averaged)


@pytest.mark.slow
def test_quick_runs_everything_and_goes_on_where_it_stopped(tmp_path):
    shutil.rmtree(ROOT / "runs" / "miniature_quick", ignore_errors=True)
    command = [sys.executable, "experiments/miniature.py", "--quick"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    first = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    records = sorted((ROOT / "runs" / "miniature_quick" / "results").glob("*.json"))
    assert len(records) == 3 and "3 of 3" in first.stdout
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "1 of" not in again.stdout and "3 records" in again.stdout  # nothing was run a second time
