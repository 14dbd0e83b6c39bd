"""support/lora.py: reading, switching, and what we save loads everywhere."""

import argparse
import contextlib
import json
import re
import shutil

import pytest
import torch
from conftest import call, load, predict
from diffusers import StableDiffusion3Pipeline
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from recipes.model_card import write_card
from rewards.pictures import as_picture, picture_grid
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
    lora.save_adapter(folder, make(transformer, name), 12 / 4)


def test_what_we_save_loads_in_ours_in_peft_and_in_diffusers(pipe, text, tmp_path):
    """By outputs: diffusers fails in silence, and takes alpha = rank where it finds no alpha."""
    save(pipe.transformer, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "pytorch_lora_weights.safetensors")
    save_file(tensors, tmp_path / "bare.safetensors")  # alpha was in the header
    expected = predict_with(pipe.transformer, text, "made")
    assert not torch.allclose(expected, predict_with(pipe.transformer, text, None))
    lora.load_adapter(pipe.transformer, "again", tmp_path / "a", "--init")
    assert_close(predict_with(pipe.transformer, text, "again"), expected)
    for source in (tmp_path / "a", tmp_path / "bare.safetensors"):
        stock = StableDiffusion3Pipeline.from_pretrained("toy")
        stock.load_lora_weights(source)
        assert_close(predict(stock.transformer, text), expected)
    stock = StableDiffusion3Pipeline.from_pretrained("toy")
    PeftModel.from_pretrained(stock.transformer, tmp_path / "a")  # changes the transformer in place
    assert_close(predict(stock.transformer, text), expected)


def test_other_layouts_are_read(pipe, tmp_path):
    """diffusers' file alone; the LoRA's name in the keys; fp16; the prefixes of DDP and compile."""
    save(pipe.transformer, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / FILE)
    bare = {key.removeprefix("base_model.model."): t for key, t in tensors.items()}
    layouts = {
        "named": {key.replace(".weight", ".default.weight"): t for key, t in tensors.items()},
        "half": {key: t.half() for key, t in bare.items()},
        "compiled": {f"base_model.model._orig_mod.{key}": t for key, t in bare.items()},
        "ddp": {f"module.transformer.{key}": t for key, t in bare.items()},
        "blocks": {key.replace(".attn", "._orig_mod.attn"): t for key, t in tensors.items()},
    }
    for name, renamed in layouts.items():
        shutil.copytree(tmp_path / "a", tmp_path / name)
        save_file(renamed, tmp_path / name / FILE)
    without_config = shutil.ignore_patterns("adapter*")
    shutil.copytree(tmp_path / "a", tmp_path / "diffusers", ignore=without_config)
    expected = lora.read_adapter(tmp_path / "a", "--init")
    for name in ("diffusers", *layouts):
        found, tolerance = lora.read_adapter(tmp_path / name, "--init"), 1e-3 * (name == "half")
        assert_close(found, expected, rtol=tolerance, atol=tolerance)


def of_peft(text, config):
    """peft's random LoRA on a stock pipeline -> (the pipeline, peft's model, its velocities)."""
    stock = StableDiffusion3Pipeline.from_pretrained("toy")
    wrapped = get_peft_model(stock.transformer, config)
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return stock, wrapped, predict(stock.transformer, text)


def test_what_others_publish_is_read(pipe, text, tmp_path):
    """Written by stock libraries: PEFT's folder, as Flow-GRPO and Flow-OPD publish theirs (rank 32,
    alpha 64), and diffusers' file with the LoRA's alpha and, like older ones, without."""
    config = LoraConfig(r=32, lora_alpha=64, target_modules=lora.LORA_TARGETS)
    stock, wrapped, expected = of_peft(text, config)
    wrapped.save_pretrained(tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / FILE)
    tensors = {key.removeprefix("base_model.model."): t for key, t in tensors.items()}
    numbers = {"transformer_lora_adapter_metadata": {"r": 32, "lora_alpha": 64}}
    stock.save_lora_weights(tmp_path / "new", tensors, **numbers)
    stock.save_lora_weights(tmp_path / "old", tensors)
    stock.transformer.peft_config["default"] = config
    stock.transformer.save_lora_adapter(tmp_path / "own", adapter_name="default")
    for key in ("lora_alpha", "ss_network_alpha"):
        (tmp_path / key).mkdir()
        save_file(tensors, tmp_path / key / FILE, metadata={key: "64.0"})
    told = ("peft", "new", "own", "lora_alpha", "ss_network_alpha")
    for name, alpha in (*((name, None) for name in told), ("old", 64)):
        lora.load_adapter(pipe.transformer, name, tmp_path / name, "--teacher ocr", alpha)
        assert_close(predict_with(pipe.transformer, text, name), expected)
    with pytest.raises(SystemExit):  # without alpha nothing is guessed
        lora.read_adapter(tmp_path / "old", "--teacher ocr")


def test_ranks_scalings_and_patterns_are_peft_own(pipe, text, tmp_path):
    """Layers of other rank and alpha, rank-stabilised or not; and without any alpha: diffusers'."""
    for stabilised in (False, True):
        config = LoraConfig(r=4, lora_alpha=6, use_rslora=stabilised)
        config.target_modules = ["to_q", "attn.to_v", "ff.net.2"]
        config.rank_pattern = {"to_v": 2, "transformer_blocks.1.attn.to_q": 3}
        config.alpha_pattern = {"transformer_blocks.1.attn.to_q": 9, "net.2": 1}
        _, wrapped, expected = of_peft(text, config)
        folder, name = tmp_path / str(stabilised), f"stranger_{stabilised}"
        wrapped.save_pretrained(folder)
        lora.load_adapter(pipe.transformer, name, folder, "--init")
        assert_close(predict_with(pipe.transformer, text, name), expected)
    tensors = load_file(folder / FILE)
    bare = {key.replace("base_model.model", "transformer"): t for key, t in tensors.items()}
    (tmp_path / "bare").mkdir()
    save_file(bare, tmp_path / "bare" / "pytorch_lora_weights.safetensors")
    stock = StableDiffusion3Pipeline.from_pretrained("toy")
    stock.load_lora_weights(tmp_path / "bare")
    lora.load_adapter(pipe.transformer, "bare", tmp_path / "bare", "--teacher ocr", "rank")
    expected = predict(stock.transformer, text)
    assert_close(predict_with(pipe.transformer, text, "bare"), expected)


CONFIGS = {  # the words of a refusal: what in a config is refused so ("": it is read)
    "": """
        "init_lora_weights": true | "init_lora_weights": false | "init_lora_weights": null
        "init_lora_weights": "gaussian" | "init_lora_weights": "eva" | "init_lora_weights": "mica"
        "init_lora_weights": "orthogonal"
        "use_dora": null | "layer_replication": null | "of_the_future": null
        "peft_type": "LORA", "bias": "none", "lora_dropout": 0.1, "task_type": "X"
    """,
    "has changed the base model too": """
        "init_lora_weights": "pissa" | "init_lora_weights": "pissa_niter_16"
        "init_lora_weights": "loftq" | "init_lora_weights": "new" | "init_lora_weights": "olora"
        "init_lora_weights": "corda" | "init_lora_weights": "lora_ga"
    """,
    "only plain LoRA": """
        "use_dora": true | "lora_bias": true | "bias": "all" | "layer_replication": [[0, 2]]
        "megatron_config": {"a": 1} | "trainable_token_indices": [1]
        "alora_invocation_tokens": [1] | "target_parameters": ["a"] | "peft_type": "LOHA"
        "modules_to_save": ["proj_out"] | "use_qalora": true | "of_the_future": {"a": 1}
    """,
}


@pytest.mark.parametrize("refusal", CONFIGS)
def test_only_plain_lora_on_the_unchanged_base_is_read(tmp_path, capsys, refusal):
    tensors = {f"{LAYER}.lora_A.weight": torch.ones(2, 128)}
    save_file(tensors | {f"{LAYER}.lora_B.weight": torch.ones(128, 2)}, tmp_path / FILE)
    for line in re.split(r" \| |\n\s*", CONFIGS[refusal].strip()):
        (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 4, %s}' % line)
        with pytest.raises(SystemExit) if refusal else contextlib.nullcontext():
            lora.read_adapter(tmp_path, "--init")
        err = capsys.readouterr().err
        assert refusal in err and (line.split('"')[1] in err) == bool(refusal), line


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_peft_saves_after_changing_the_base_is_refused(tmp_path, capsys, init):
    """It means something on the changed base only; in its keys it looks like any other LoRA."""
    stock = StableDiffusion3Pipeline.from_pretrained("toy")
    config = LoraConfig(r=4, init_lora_weights=init, target_modules=["attn.to_q"])
    get_peft_model(stock.transformer, config).save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        lora.read_adapter(tmp_path, "--init")
    assert "path_initial_model_for_weight_conversion" in capsys.readouterr().err


def test_a_lora_of_another_model_is_a_notice(tmp_path, capsys):
    shutil.copytree("toy/adapters/ocr", tmp_path / "ocr")
    file = tmp_path / "ocr" / "adapter_config.json"
    for base, notices in (("someone/toy", 0), (None, 0), ("some/other-model", 1)):
        config = json.loads(file.read_text()) | {"base_model_name_or_path": base}
        file.write_text(json.dumps(config))
        lora.load_adapter(load().transformer, "ocr", tmp_path / "ocr", "--init")
        assert capsys.readouterr().out.count("was made for some/other-model") == notices


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
    active.sum().backward()
    trained = {name for name, p in transformer.named_parameters() if p.grad is not None}
    assert trained and all(".student." in name for name in trained)


# ---- The model card

BASES = {  # base model: what is found as it in the card and in the config
    "stabilityai/stable-diffusion-3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "some/model@v2": "some/model",
    "/hub/models--some--my-model/snapshots/0abc/": "some/my-model",
    "toy": "toy",
}


@pytest.mark.parametrize("base", BASES)
def test_a_card_has_what_the_hub_shows(pipe, tmp_path, base):
    save(pipe.transformer, tmp_path / "adapter")
    images, prompts = torch.rand(2, 3, 128, 128), ["sign: \"A\" # 'B'", "ein Vögelchen 猫"]
    columns = {"start": images.flip(0), "student": images}
    picture_grid(tmp_path / "samples/00003.png", columns, prompts)
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 2, "test/ocr": 0.5, "loss": 1}\n')
    args = argparse.Namespace(model=base, out=str(tmp_path), eval_steps=2, guidance=1.0)
    write_card(tmp_path / "adapter", args)
    card = ModelCard.load(tmp_path / "adapter/README.md")
    hub = BASES[base] if "/" in BASES[base] else None
    assert card.data.base_model == hub and card.data.pipeline_tag == "text-to-image"
    assert (card.data.get("license_name") == "stabilityai-ai-community") == ("stab" in base)
    assert [shown["text"] for shown in card.data.widget] == prompts and "<Gallery />" in card.text
    for shown, image in zip(card.data.widget, images):
        with Image.open(tmp_path / "adapter" / shown["output"]["url"]) as picture:
            assert picture.tobytes() == as_picture(image).tobytes()
    assert "- test/ocr: 0.5\n" in card.text and "- loss" not in card.text
    if base == "toy":
        exec(re.search(r"```python\n(.*?)```", card.text, re.S)[1], {})
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == BASES[base]
    assert config["revision"] == ("v2" if "@" in base else None)
    wrapped = PeftModel.from_pretrained(load().transformer, tmp_path / "adapter")
    assert type(wrapped) is PeftModel  # not one of a language model
    lora.read_adapter(tmp_path / "adapter", "--init")


def test_a_merge_has_the_base_that_its_adapters_agree_on(tmp_path, monkeypatch):
    adapters = ["toy/adapters/ocr", "toy/adapters/deqa"]
    call(monkeypatch, "merge", "--adapters", *adapters, "--out", tmp_path / "a")
    own = shutil.copytree("toy/adapters/ocr", tmp_path / "own")
    call(monkeypatch, "merge", "--adapters", *adapters, own, "--out", tmp_path / "b")
    for name, base in (("a", "toy"), ("b", None)):
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == base
        assert "- merged: toy/adapters/deqa" in (tmp_path / name / "README.md").read_text()
