"""Adapters: reading, switching, and what we save loads everywhere. python -m pytest tests/test_adapters.py"""

import shutil

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

import support.lora as adapters
import support.model as model

LAYER = "transformer_blocks.0.attn.to_q"


@pytest.fixture
def pipe():
    return model.load_pipeline("toy", torch.device("cpu"))


def make(pipe, name, rank=4, alpha=12, seed=0):
    """A fresh adapter with a non-zero B."""
    adapters.add_adapter(pipe.transformer, name, rank=rank, alpha=alpha)
    parameters = adapters.adapter_parameters(pipe.transformer, name)
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return parameters


def predict(pipe, name):
    text = model.embed_prompts(pipe, ["red circle", "blue square"], 8)
    x = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), adapters.adapter(pipe.transformer, name):
        return model.velocity(pipe.transformer, x, 0.5, text, torch.tensor([1, 2]), 1.0)


def saved(pipe, path, **kwargs):
    parameters = make(pipe, "made", **kwargs)
    adapters.save_adapter(path, parameters, pipe.transformer.peft_config["made"])
    return predict(pipe, "made")


def test_round_trip_through_our_files(pipe, tmp_path):
    expected = saved(pipe, tmp_path / "a")
    adapters.add_adapter(pipe.transformer, "again", adapters.read_adapter(tmp_path / "a", "--init"), path="a", flag="--init")
    torch.testing.assert_close(predict(pipe, "again"), expected)
    assert not torch.allclose(predict(pipe, None), expected)


def test_stock_diffusers_loads_what_we_save(pipe, tmp_path):
    """load_lora_weights fails silently on foreign layouts, and takes alpha = rank without metadata: compare outputs."""
    expected = saved(pipe, tmp_path / "a", rank=4, alpha=12)
    stock = StableDiffusion3Pipeline.from_pretrained("toy")
    stock.load_lora_weights(tmp_path / "a")
    text = model.embed_prompts(pipe, ["red circle", "blue square"], 8)
    x = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        v = model.velocity(stock.transformer, x, 0.5, text, torch.tensor([1, 2]), 1.0)
    torch.testing.assert_close(v, expected)


def test_peft_loads_what_we_save(pipe, tmp_path):
    from peft import PeftModel

    expected = saved(pipe, tmp_path / "a")
    stock = StableDiffusion3Pipeline.from_pretrained("toy")
    wrapped = PeftModel.from_pretrained(stock.transformer, tmp_path / "a")
    text = model.embed_prompts(pipe, ["red circle", "blue square"], 8)
    x = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        v = model.velocity(wrapped.base_model.model, x, 0.5, text, torch.tensor([1, 2]), 1.0)
    torch.testing.assert_close(v, expected)


def test_a_save_that_fails_leaves_what_was_there(pipe, tmp_path, monkeypatch):
    """The disk is full after the first of the files: none of them is replaced, nothing is left beside."""
    saved(pipe, tmp_path / "a")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.*")}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StableDiffusion3Pipeline, "save_lora_weights", full)
    with pytest.raises(OSError, match="No space"):
        adapters.save_adapter(tmp_path / "a", make(pipe, "other", seed=1), pipe.transformer.peft_config["other"])
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.*")} == before


def test_other_layouts_are_read(pipe, tmp_path):
    """diffusers' own file alone, PEFT keys with an adapter name in them, and fp16 under keys without PEFT's prefix."""
    saved(pipe, tmp_path / "a")
    first = adapters.read_adapter(tmp_path / "a", "--init")
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a/pytorch_lora_weights.safetensors", tmp_path / "b")
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    tensors = load_file(tmp_path / "c/adapter_model.safetensors")
    save_file(
        {k.replace(".weight", ".default.weight"): t for k, t in tensors.items()},
        tmp_path / "c/adapter_model.safetensors",
    )
    shutil.copytree(tmp_path / "a", tmp_path / "d")
    halves = {k.removeprefix("base_model.model."): t.half() for k, t in tensors.items()}
    assert halves.keys().isdisjoint(tensors)
    save_file(halves, tmp_path / "d/adapter_model.safetensors")
    for other, tolerance in (("b", 0), ("c", 0), ("d", 1e-3)):
        second = adapters.read_adapter(tmp_path / other, "--init")
        assert first.keys() == second.keys()
        for layer in first:
            torch.testing.assert_close(second[layer], first[layer], rtol=tolerance, atol=tolerance)


def test_what_others_publish_is_read(pipe, tmp_path):
    """Written by stock libraries: peft's own folder, as Flow-GRPO and Flow-OPD publish theirs (rank 32, alpha 64), and
    diffusers' file with the LoRA's numbers and, as older ones are, without."""
    from peft import LoraConfig, get_peft_model

    stock = StableDiffusion3Pipeline.from_pretrained("toy")
    config = LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian", target_modules=adapters.LORA_TARGETS)
    wrapped = get_peft_model(stock.transformer, config)
    for name, parameter in wrapped.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    text, x = model.embed_prompts(pipe, ["red circle", "blue square"], 8), torch.randn(2, 8, 8, 8)
    with torch.no_grad():
        expected = model.velocity(wrapped.base_model.model, x, 0.5, text, torch.tensor([1, 2]), 1.0)
    wrapped.save_pretrained(tmp_path / "peft")
    tensors = load_file(tmp_path / "peft/adapter_model.safetensors")
    assert all(key.startswith("base_model.model.transformer_blocks.") for key in tensors) and len(tensors) == 62
    halves = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path / "new", halves, transformer_lora_adapter_metadata={"r": 32, "lora_alpha": 64}
    )
    StableDiffusion3Pipeline.save_lora_weights(tmp_path / "old", halves)
    for folder, alpha in (("peft", None), ("new", None), ("old", 64)):
        layers = adapters.read_adapter(tmp_path / folder, "--teacher ocr", alpha)
        adapters.add_adapter(pipe.transformer, folder, layers, path=folder, flag="--teacher ocr")
        with torch.no_grad(), adapters.adapter(pipe.transformer, folder):
            torch.testing.assert_close(model.velocity(pipe.transformer, x, 0.5, text, torch.tensor([1, 2]), 1.0), expected)
    with pytest.raises(SystemExit):  # without alpha nothing is guessed
        adapters.read_adapter(tmp_path / "old", "--teacher ocr")


def test_ranks_may_differ_between_adapters_and_layers(pipe, tmp_path):
    make(pipe, "four", rank=4)
    make(pipe, "seven", rank=7)
    layers = {
        LAYER: (torch.randn(3, 128), torch.randn(128, 3), 2.0),
        LAYER.replace("to_q", "to_k"): (torch.randn(5, 128), torch.randn(128, 5), 0.5),
    }
    adapters.add_adapter(pipe.transformer, "mixed", layers, path="x", flag="--init")
    for layer, (A, B, scaling) in layers.items():
        module = pipe.transformer.get_submodule(layer)
        torch.testing.assert_close(module.scaling["mixed"], scaling)
        torch.testing.assert_close(module.get_delta_weight("mixed"), scaling * B @ A)


def test_switching_leaves_requires_grad_and_the_active_adapter(pipe):
    make(pipe, "teacher")
    student = make(pipe, "student", seed=1)
    for parameter in student.values():
        parameter.requires_grad_(True)
    before = {k: p.requires_grad for k, p in pipe.transformer.named_parameters()}
    outputs = [predict(pipe, name) for name in ("student", "teacher", None, "student")]
    assert {k: p.requires_grad for k, p in pipe.transformer.named_parameters()} == before
    torch.testing.assert_close(outputs[0], outputs[3])
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[1], outputs[2])
    with adapters.adapter(pipe.transformer, "student"):
        text = model.embed_prompts(pipe, ["red circle"], 8)
        model.velocity(pipe.transformer, torch.randn(1, 8, 8, 8), 0.5, text, torch.tensor([1]), 1.0).sum().backward()
    assert sum(p.grad is not None for p in student.values()) > 0
    assert not any(p.grad is not None for k, p in pipe.transformer.named_parameters() if ".student." not in k)


def test_one_zero_layer_is_a_warning_with_its_name(pipe, tmp_path, capsys):
    saved(pipe, tmp_path / "a")
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    tensors[f"base_model.model.{LAYER}.lora_B.weight"].zero_()
    tensors["base_model.model.transformer_blocks.3.attn.add_q_proj.lora_B.weight"].zero_()  # always zero in SD3: no warning
    save_file(tensors, tmp_path / "a/adapter_model.safetensors")
    adapters.read_adapter(tmp_path / "a", "--init")
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and LAYER in lines[0]
