"""The examples as a user starts them: tiny here, at full size with --slow. python -m pytest tests/test_examples.py"""

import re
import runpy
import sys

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file

EVERY = "ppo ppo-scalar ppo-published ppo-public-code kl trajectory ode".split()


@pytest.fixture
def example(monkeypatch, capsys):
    """python examples/NAME.py FLAGS, in this process -> what it printed."""

    def run(name, *flags):
        monkeypatch.setattr(sys, "argv", [f"examples/{name}.py", *map(str, flags)])
        runpy.run_path(f"examples/{name}.py", run_name="__main__")
        return capsys.readouterr().out

    return run


def arrow(text, words):
    """The two numbers of "WORDS before -> after"."""
    number = r"([-+.\de]+)"
    return [float(n) for n in re.search(rf"{re.escape(words)} {number}.*? -> {number}", text).groups()]


def test_examples_use_nothing_but_the_two_maths_modules():
    """They are to be copied: of this repository they import sde.py and losses.py alone."""
    ours = {
        "adapters",
        "checkpoint",
        "checks",
        "cli",
        "common",
        "evaluate",
        "memory",
        "merge",
        "model",
        "rewards",
        "tables",
        "toy",
    }
    for name in ("flow2d", "flux", "own_reward"):
        words = re.findall(r"^(?:from|import) (\w+)", open(f"examples/{name}.py").read(), re.MULTILINE)
        assert {"losses", "sde"} <= set(words) and not ours & set(words)


def test_flow2d_runs(example, tmp_path):
    flags = ["--teacher_steps", 8, "--iterations", 2, "--samples", 8, "--out", tmp_path]
    out = example("flow2d", "--objectives", "ppo", "ode", *flags)
    assert all(kl > 0 for kl in arrow(out, "KL to the teachers"))
    assert Image.open(tmp_path / "flow2d.png").width > 1000


@pytest.mark.slow
def test_flow2d_takes_every_objective(example, tmp_path):
    flags = ["--teacher_steps", 8, "--iterations", 2, "--samples", 8, "--out", tmp_path]
    assert len(re.findall("KL to the teachers", example("flow2d", "--objectives", *EVERY, *flags))) == len(EVERY)


@pytest.mark.slow
def test_flow2d_shows_what_it_says(example, tmp_path):
    """The default objective closes most of the gap to both teachers; the one without an expected gradient does not."""
    lines = {line.split()[0]: line for line in example("flow2d", "--out", tmp_path).splitlines()}
    before, after = arrow(lines["ppo"], "KL to the teachers")
    assert after < before / 10
    assert arrow(lines["ppo-published"], "KL to the teachers")[1] > 10 * after
    for task in ("ring", "cross"):
        closed = {}
        for name in ("ppo", "ppo-published"):
            base, student, teacher = map(int, re.search(rf"{task} (\d+)% -> (\d+)% \(teacher (\d+)%\)", lines[name]).groups())
            closed[name] = (student - base) / (teacher - base)
        assert closed["ppo"] > 0.75 and closed["ppo-published"] < 0.25


def test_flux_runs(example, tmp_path):
    out = example("flux", "--iterations", 1, "--samples", 2, "--steps", 3, "--out", tmp_path)
    assert arrow(out, "KL to the teachers:")[0] > 0
    assert all(t.isfinite().all() for t in load_file(tmp_path / "pytorch_lora_weights.safetensors").values())


@pytest.mark.slow
def test_flux_packs_as_diffusers_does_and_learns(example, tmp_path):
    """The KL is a squared distance: a quarter of it is half of the way to the teachers."""
    from diffusers import FluxPipeline
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    flux = runpy.run_path("examples/flux.py")
    x = torch.randn(2, 4, 8, 6)
    packed = FluxPipeline._pack_latents(x, 2, 4, 8, 6)
    torch.testing.assert_close(flux["pack"](x), packed)
    torch.testing.assert_close(flux["unpack"](packed, 8, 6), x)
    assert flux["MU"] == pytest.approx(calculate_shift(flux["H"] * flux["W"] // 4))
    before, after = arrow(example("flux", "--out", tmp_path), "KL to the teachers:")
    assert after < before / 4


def test_own_reward_runs(example, tmp_path):
    example("own_reward", "--iterations", 1, "--group_size", 2, "--steps", 3, "--out", tmp_path)
    assert Image.open(tmp_path / "before_after.png").size == (8 * 32 * 4, 2 * 32 * 4)
    pipe = StableDiffusion3Pipeline.from_pretrained("toy")
    pipe.load_lora_weights(tmp_path)
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    for name, weight in get_peft_model_state_dict(pipe.transformer, adapter_name="default_0").items():
        torch.testing.assert_close(weight, saved.pop(f"transformer.{name}"))
    assert not saved and pipe.transformer.peft_config["default_0"].lora_alpha == 32


@pytest.mark.slow
def test_own_reward_rises(example, tmp_path):
    """By two standard deviations of the base's pictures: the average picture is one that was among its reddest."""
    out = example("own_reward", "--out", tmp_path)
    before, after = arrow(out, "reward:")
    assert after > before + 2 * float(re.search(r"deviation ([\d.]+)", out)[1])
