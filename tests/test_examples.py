"""The examples as a user starts them: tiny here, at full size with --slow."""

import itertools
import re
import runpy
import sys
from unittest import mock

import pytest
import torch
from conftest import ROOT
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from peft import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file

import losses


@pytest.fixture
def example(monkeypatch, capsys):
    """Run examples/NAME.py with flags in this process: what it printed."""

    def run(name, *flags):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        runpy.run_path(f"examples/{name}.py", run_name="__main__")
        return capsys.readouterr().out

    return run


def arrow(text, words):
    """The two numbers of "WORDS before -> after"."""
    number = r"([-+.\de]+)"
    match = re.search(rf"{re.escape(words)} {number}.*? -> {number}", text)
    return [float(n) for n in match.groups()]


def test_examples_import_the_two_maths_modules_alone():
    """A user copies an example with sde.py and losses.py, and nothing else of this project."""
    project = {path.stem for path in ROOT.glob("*.py")} | {"support", "rewards", "toy"}
    for path in ROOT.glob("examples/*.py"):
        imports = re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
        used = {"to_tensorboard": set(), "schedule": {"sde"}}.get(path.stem, {"losses", "sde"})
        assert project & {*imports} == used, path


def test_the_schedule_is_that_of_the_trained_model(example, tmp_path):
    """Ten steps of SD3.5: the last time before 0, and the weight of the last trained step."""
    out = example("schedule", "--out", tmp_path).splitlines()
    assert out[0].endswith("0.278 0.00893 0") and out[3].endswith("0.429 0.25 0")
    shares = [sum(map(float, line.split("%")[1].split())) for line in (out[2], out[5])]
    assert shares == pytest.approx([100, 100], abs=0.4)
    assert Image.open(tmp_path / "schedule.png").width == 1050


def test_flow2d_takes_every_objective(example, tmp_path):
    tiny = ("--teacher_steps", 8, "--iterations", 2, "--samples", 8)
    out = example("flow2d", "--objectives", *losses.OBJECTIVES, *tiny, "--out", tmp_path)
    assert out.count("KL to the teachers") == len(losses.OBJECTIVES)
    assert all(kl > 0 for kl in arrow(out, "KL to the teachers"))
    assert Image.open(tmp_path / "flow2d.png").width > 1000


@pytest.mark.slow
def test_flow2d_learns_with_ppo_and_not_with_ppo_published(example, tmp_path):
    lines = example("flow2d", "--out", tmp_path).splitlines()
    lines = {line.split()[0]: line for line in lines}
    before, after = arrow(lines["ppo"], "KL to the teachers")
    assert after < before / 10
    assert arrow(lines["ppo-published"], "KL to the teachers")[1] > 10 * after
    for name, task in itertools.product(("ppo", "ppo-published"), ("ring", "cross")):
        match = re.search(rf"{task} (\d+)% -> (\d+)% \(teacher (\d+)%\)", lines[name])
        base, student, teacher = map(int, match.groups())
        closed = (student - base) / (teacher - base)  # the share of the gap
        assert closed > 0.75 if name == "ppo" else closed < 0.25


def test_flux_runs(example, tmp_path):
    out = example("flux", "--iterations", 1, "--samples", 2, "--steps", 3, "--out", tmp_path)
    assert arrow(out, "KL to the teachers:")[0] > 0
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert saved and all(tensor.isfinite().all() for tensor in saved.values())


def test_flux_packs_like_diffusers():
    flux = runpy.run_path("examples/flux.py")
    x = torch.randn(2, 4, 8, 6)
    packed = FluxPipeline._pack_latents(x, 2, 4, 8, 6)
    torch.testing.assert_close(flux["pack"](x), packed)
    torch.testing.assert_close(flux["unpack"](packed, 8, 6), x)
    assert flux["MU"] == pytest.approx(calculate_shift(flux["H"] * flux["W"] // 4))


@pytest.mark.slow
def test_flux_learns(example, tmp_path):
    """The KL is a squared distance: a quarter of it is half of the way to the teachers."""
    before, after = arrow(example("flux", "--out", tmp_path), "KL to the teachers:")
    assert after < before / 4


def test_own_reward_runs(example, tmp_path):
    example("own_reward", "--iterations", 1, "--group_size", 2, "--steps", 3, "--out", tmp_path)
    assert Image.open(tmp_path / "before_after.png").size == (8 * 32 * 4, 2 * 32 * 4)
    pipe = StableDiffusion3Pipeline.from_pretrained("toy")
    pipe.load_lora_weights(tmp_path)
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    loaded = get_peft_model_state_dict(pipe.transformer, adapter_name="default_0")
    for name, weight in loaded.items():
        torch.testing.assert_close(weight, saved.pop(f"transformer.{name}"))
    assert not saved and pipe.transformer.peft_config["default_0"].lora_alpha == 32


@pytest.mark.slow
def test_own_reward_rises(example, tmp_path):
    """By two standard deviations of the base's images: the average is one of the reddest before."""
    out = example("own_reward", "--out", tmp_path)
    before, after = arrow(out, "reward:")
    assert after > before + 2 * float(re.search(r"deviation ([\d.]+)", out)[1])


def test_to_tensorboard_hands_on_every_number(example, monkeypatch, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 7, "loss": 0.5, "kl/ocr": null}\n')
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package := mock.MagicMock())
    example("to_tensorboard", tmp_path)
    board = package.SummaryWriter.return_value.__enter__.return_value
    board.add_scalar.assert_called_once_with("loss", 0.5, 7)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # not installed
    with pytest.raises(SystemExit, match="2"):
        example("to_tensorboard", tmp_path)
