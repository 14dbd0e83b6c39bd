"""experiments/: the report follows from the records, the plan, the held-out scores, the driver."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from experiments import heldout, miniature, records, report, sd35m
from experiments.plan import plan
from toy.build import ADAPTERS
from toy.world import all_prompts

FOLDER = ROOT / "experiments"
RUNS = Path("runs/miniature")


def test_the_report_follows_from_the_records_alone(tmp_path):
    """Byte for byte, and with every figure that the document shows."""
    shutil.copytree(FOLDER / "results", tmp_path / "results")
    report.write(tmp_path / "results")
    text = (tmp_path / "RESULTS.md").read_text()
    expected = (FOLDER / "RESULTS.md").read_text()
    assert text == expected, "run python experiments/miniature.py --report"
    shown = re.findall(r"^!\[.*\((.+)\)$", text, re.M)
    assert len(shown) == 10
    for name in shown:
        assert (tmp_path / name).is_file() and (FOLDER / name).is_file()


def test_the_report_names_what_has_not_run(tmp_path):
    (tmp_path / "results").mkdir()
    for pattern in ("none", "opd_merge_seed*", "merge_mix_seed*"):
        for file in (FOLDER / "results").glob(f"{pattern}.json"):
            shutil.copy(file, tmp_path / "results")
        report.write(tmp_path / "results")
        assert report.MISSING in (tmp_path / "RESULTS.md").read_text()


def test_records_are_of_the_plan(tmp_path):
    """Every record was made with the flags of the plan, and has a name in the tables."""
    jobs = {f"{job.name}_seed{job.seed}": job for job in plan(RUNS)}
    assert len(jobs) == len(plan(RUNS))  # no two runs have one name
    for file in (FOLDER / "results").glob("*_seed*.json"):
        assert miniature.recorded(jobs[file.stem], file.parent), file.stem
        record = json.loads(file.read_text()) | {"flags": ["--another"]}
        (tmp_path / file.name).write_text(json.dumps(record))
        assert not miniature.recorded(jobs[file.stem], tmp_path), file.stem
    names = {job.name for job in jobs.values()} - {"gradients", "base", "teacher_pickscore"}
    assert names <= set(records.LABELS)
    for name, (iterations, *_) in records.SHIPPED.items():
        assert str(iterations) in ADAPTERS[name]


def test_the_scripts_accept_every_planned_command(tmp_path, monkeypatch):
    for job in plan(tmp_path):  # what other runs start from
        run = f"{job.name}_seed{job.seed}"
        for made in (f"{run}/adapter", *(f"{run}.stages/{stage}" for stage in job.stages)):
            (tmp_path / made).parent.mkdir(exist_ok=True)
            (tmp_path / made).symlink_to(ROOT / "toy" / "adapters" / "merged")
    miniature.write_prompts(tmp_path / "prompts")
    for script, *flags in {(job.script, *job.flags) for job in plan(tmp_path)}:
        if script in (None, "experiments/gradients.py"):
            continue
        if script == "experiments/variants.py":  # the first word names a change
            flags = flags[1:]
        script = script.replace("experiments/variants", "train_opd")
        words = [*flags, *miniature.NO_REPORT.get(script, []), "--overwrite"]
        monkeypatch.setattr(sys, "argv", [script, *words, "--out", str(tmp_path / "run")])
        importlib.import_module(script.removesuffix(".py")).parse_args()


def test_held_out_scores_measure_what_they_are_for():
    """Blur softens edges, less contrast does not; dirt is noise; equal samples have no variety."""
    prompts = ["red circle and blue square", "three green triangles"] * 8
    clean = heldout.draw(prompts)
    padded = torch.nn.functional.pad(clean, (1, 1, 1, 1), mode="replicate")
    blurred = torch.nn.functional.avg_pool2d(padded, 3, 1)
    own = torch.Generator().manual_seed(0)
    dirty = (clean + 0.05 * torch.randn(clean.shape, generator=own)).clamp(0, 1)
    assert heldout.edges(clean).mean() > 0.95 > 0.75 > heldout.edges(blurred).mean()
    torch.testing.assert_close(heldout.edges(clean * 0.4 + 0.3), heldout.edges(clean))
    assert heldout.noise(clean).max() == 0 < 5 < heldout.noise(dirty).min()
    dark, bright = (heldout.distance(images, "geneval") for images in (0.5 * clean, clean))
    assert dark.mean() > 2 * bright.mean()
    assert heldout.variety(clean[:2].repeat(8, 1, 1, 1), prompts).max() < 1e-3
    assert heldout.variety(clean, prompts).mean() > 0.1


def test_prompts_out_of_distribution_are_in_no_training_set(tmp_path):
    """But the miniature knows their words, and reads no more than seven."""
    known = {prompt for prompts in all_prompts().values() for prompt in prompts}
    words = {word for prompt in known for word in prompt.lower().split()}
    files = heldout.write_prompts(tmp_path)
    files.pop("variety")
    for task, file in files.items():
        prompts = Path(file).read_text().splitlines()
        assert len(prompts) == 64 and not known & set(prompts)
        assert max(len(prompt.split()) for prompt in prompts) <= 7
        assert set(" ".join(prompts).lower().split()) <= words
        assert heldout.REWARDS[task](heldout.draw(prompts[:2]), prompts[:2]).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["profiler", "benchmark --group_size 2 --steps 2"])
def test_what_is_for_a_gpu_runs_with_small_widths(command, monkeypatch, capsys):
    module = importlib.import_module(f"experiments.{command.split()[0]}")
    monkeypatch.setattr(module, "save_pipeline", lambda to: sd35m.save_pipeline(to, sd35m.TINY))
    words = f"{command} --arch sd35m --size 32 --guidance 2 --micro_batch 8 --repeats 2"
    monkeypatch.setattr(sys, "argv", words.split())
    module.main()
    assert "update" in capsys.readouterr().out


@pytest.mark.slow
def test_quick_runs_everything_and_continues_where_it_stopped(tmp_path):
    ignored = shutil.ignore_patterns("runs", "data", ".*", "__pycache__")
    copy = shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored)
    command = [sys.executable, "experiments/miniature.py", "--quick"]
    run = lambda: subprocess.run(command, cwd=copy, capture_output=True, text=True, check=True)
    assert "3 of 3" in run().stdout
    assert len(list((copy / "runs/miniature_quick/results").glob("*.json"))) == 3
    again = run().stdout
    assert "1 of" not in again and "3 records" in again
