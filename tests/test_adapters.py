"""support/lora.py: reading, switching, and what we save loads everywhere."""

import argparse
import shutil

import pytest
import torch
from conftest import predict
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import train_opd
from support import lora

LAYER = "transformer_blocks.0.attn.to_q"
FILE = "adapter_model.safetensors"


def make(transformer, name, rank=4):
    """A fresh LoRA with a B that is not zero: its parameters."""
    lora.add_adapter(transformer, name, rank=rank, alpha=12)
    parameters = lora.adapter_parameters(transformer, name)
    for parameter in parameters.values():
        torch.nn.init.normal_(parameter, std=0.1)
    return parameters


def predict_with(transformer, text, name):
    with torch.no_grad(), lora.use(transformer, name):
        return predict(transformer, text)


def save(transformer, folder, name="made"):
    lora.save_adapter(folder, make(transformer, name), transformer.peft_config[name])


def test_what_we_save_loads_in_ours_in_peft_and_in_diffusers(pipe, text, tmp_path):
    """By outputs: diffusers fails in silence, and without metadata takes alpha = rank."""
    save(pipe.transformer, tmp_path / "a")
    expected = predict_with(pipe.transformer, text, "made")
    assert not torch.allclose(expected, predict_with(pipe.transformer, text, None))
    lora.load_adapter(pipe.transformer, "again", tmp_path / "a", "--init")
    assert_close(predict_with(pipe.transformer, text, "again"), expected)
    stock = StableDiffusion3Pipeline.from_pretrained("toy")
    stock.load_lora_weights(tmp_path / "a")
    assert_close(predict(stock.transformer, text), expected)
    stock = StableDiffusion3Pipeline.from_pretrained("toy")
    PeftModel.from_pretrained(stock.transformer, tmp_path / "a")  # changes the transformer in place
    assert_close(predict(stock.transformer, text), expected)


def test_other_layouts_are_read(pipe, tmp_path, capsys):
    """diffusers' file alone; the LoRA's name in the keys; fp16 under keys without PEFT's prefix."""
    save(pipe.transformer, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / FILE)
    for name in ("named", "half"):
        shutil.copytree(tmp_path / "a", tmp_path / name)
    named = {key.replace(".weight", ".default.weight"): t for key, t in tensors.items()}
    save_file(named, tmp_path / "named" / FILE)
    halves = {key.removeprefix("base_model.model."): t.half() for key, t in tensors.items()}
    save_file(halves, tmp_path / "half" / FILE)
    shutil.copytree(
        tmp_path / "a", tmp_path / "diffusers", ignore=shutil.ignore_patterns("adapter*")
    )
    expected = lora.read_adapter(tmp_path / "a", "--init")
    for name, tolerance in (("diffusers", 0), ("named", 0), ("half", 1e-3)):
        found = lora.read_adapter(tmp_path / name, "--init")
        assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert capsys.readouterr().err == ""
    for layer in (LAYER, "transformer_blocks.3.attn.add_q_proj"):  # SD3 never reads the second
        tensors[f"base_model.model.{layer}.lora_B.weight"].zero_()
    save_file(tensors, tmp_path / "named" / FILE)
    lora.read_adapter(tmp_path / "named", "--init")
    warning = capsys.readouterr().err
    assert LAYER in warning and len(warning.splitlines()) == 1


def test_what_others_publish_is_read(pipe, text, tmp_path):
    """Written by stock libraries: PEFT's folder, as Flow-GRPO and Flow-OPD publish theirs (rank 32,
    alpha 64), and diffusers' file with the LoRA's alpha and, like older ones, without."""
    stock = StableDiffusion3Pipeline.from_pretrained("toy")
    config = LoraConfig(r=32, lora_alpha=64, target_modules=lora.LORA_TARGETS)
    wrapped = get_peft_model(stock.transformer, config)
    for name, parameter in wrapped.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    expected = predict(stock.transformer, text)
    wrapped.save_pretrained(tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / FILE)
    tensors = {key.removeprefix("base_model.model."): t for key, t in tensors.items()}
    numbers = {"transformer_lora_adapter_metadata": {"r": 32, "lora_alpha": 64}}
    stock.save_lora_weights(tmp_path / "new", tensors, **numbers)
    stock.save_lora_weights(tmp_path / "old", tensors)
    for name, alpha in (("peft", None), ("new", None), ("old", 64)):
        lora.load_adapter(pipe.transformer, name, tmp_path / name, "--teacher ocr", alpha)
        assert_close(predict_with(pipe.transformer, text, name), expected)
    with pytest.raises(SystemExit):  # without alpha nothing is guessed
        lora.read_adapter(tmp_path / "old", "--teacher ocr")


def test_use_switches_and_restores(pipe, text):
    """The gradient flags stay as they are, also in nested use and after an error."""
    transformer = pipe.transformer
    make(transformer, "teacher")
    for parameter in make(transformer, "student").values():
        parameter.requires_grad_(True)
    flags = {name: p.requires_grad for name, p in transformer.named_parameters()}
    active = predict(transformer, text)  # the LoRA added last
    alone = {name: predict_with(transformer, text, name) for name in ("student", "teacher", None)}
    assert torch.equal(alone["student"], active)
    assert len({v.sum().item() for v in alone.values()}) == 3  # they differ
    with lora.use(transformer, "teacher"):
        with pytest.raises(KeyError), lora.use(transformer, None):
            assert torch.equal(predict(transformer, text), alone[None])
            with lora.use(transformer, "student"):
                assert torch.equal(predict(transformer, text), alone["student"])
            assert torch.equal(predict(transformer, text), alone[None])
            raise KeyError
        assert torch.equal(predict(transformer, text), alone["teacher"])
    assert torch.equal(predict(transformer, text), active)
    assert {name: p.requires_grad for name, p in transformer.named_parameters()} == flags
    with lora.use(transformer, "student"):
        predict(transformer, text).sum().backward()
    trained = {name for name, p in transformer.named_parameters() if p.grad is not None}
    assert trained and all(".student." in name for name in trained)


def test_ranks_differ_and_layers_may_be_missing(pipe, text):
    """A LoRA of two layers equals a change of these two weights; all other layers are the base."""
    make(pipe.transformer, "whole", rank=7)
    layers = {LAYER: (torch.randn(3, 128), 0.1 * torch.randn(128, 3), 2.0)}
    layers[LAYER.replace("_q", "_v")] = (torch.randn(5, 128), 0.1 * torch.randn(128, 5), 0.5)
    lora.add_adapter(pipe.transformer, "part", layers)
    stock = StableDiffusion3Pipeline.from_pretrained("toy")
    for layer, (A, B, scaling) in layers.items():
        stock.transformer.get_submodule(layer).weight.data += scaling * B @ A
    found, expected = predict_with(pipe.transformer, text, "part"), predict(stock.transformer, text)
    assert_close(found, expected)
    assert not torch.allclose(found, predict_with(pipe.transformer, text, None))


@pytest.mark.parametrize("init", ("base", "toy/adapters/ocr"))
def test_the_student_starts_as_its_average(pipe, text, init):
    transformer, base = pipe.transformer, predict(pipe.transformer, text)
    args = argparse.Namespace(init=init, seed=0, rank=4, alpha=8)
    student, average = lora.add_student(transformer, args)
    assert_close(student, average, rtol=0, atol=0)
    trained = {name for name, p in transformer.named_parameters() if p.requires_grad}
    assert len(trained) == len(student) and all(".student." in name for name in trained)
    assert torch.allclose(predict(transformer, text), base) == (init == "base")


def test_the_anchor_may_be_a_teacher(pipe):
    teachers = {task: f"toy/adapters/{task}" for task in ("ocr", "deqa")}
    args = argparse.Namespace(mar_weight=0.02, teacher_guidance={"ocr": 2.0}, teacher=teachers)
    wanted = {"base": None, "toy/adapters/deqa": "teacher_deqa", "toy/adapters/ocr": "anchor"}
    for args.anchor, name in wanted.items():  # a teacher with its own guidance is no anchor
        assert train_opd.load_anchor(pipe.transformer, args) == name
