"""Files from strangers: adapters, prompts, models, flags. Each is read right, or refused in one
line with exit code 2. Nothing else happens: no hang, no file written, no code run.

    python -m pytest tests/test_hostile.py           # the same inputs every time
    python -m pytest tests/test_hostile.py --slow    # twenty times as many, new ones every time
"""

import contextlib
import io
import json
import math
import os
import shutil
import struct
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call, model_args
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from rewards import deqa, scoring, tables
from support import files, lora, model

CPU = torch.device("cpu")
SLOW = "--slow" in sys.argv


def fuzz(examples, **strategies):
    """@given with so many inputs, at most 20 s for one; with --slow twenty times as many."""
    how = {"deadline": 20_000, "database": None, "suppress_health_check": list(HealthCheck)}
    how |= {"max_examples": examples * (20 if SLOW else 1), "derandomize": not SLOW}
    return lambda test: settings(**how)(given(**strategies)(test))


def attempt(load, *args):
    """(what `load` returns, ""), or (None, the line of its refusal). Any other end fails."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return load(*args), ""
    except SystemExit as stopped:
        (line,) = printed.getvalue().splitlines()
        assert stopped.code == 2 and line.startswith("error: ")
        assert line.isprintable() and len(line) < 2010
        return None, line


def refused(load, *args):
    return attempt(load, *args)[1]


def encoded(text):
    return text.encode("utf-8", "surrogatepass")


def utf8(text):
    return text.encode("utf-8", "replace").decode()


# Text with half surrogate pairs and control characters; JSON with NaN and numbers beyond a float.
ODD_TEXT = ["", "\0", "\ud800", "a\u2028b", "../../x", "x" * 9999]
TEXT = st.text(st.characters(codec=None), max_size=30) | st.sampled_from(ODD_TEXT)
NUMBER = st.integers() | st.floats() | st.sampled_from([10**400, -1, 0, 1e308, True])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
NESTED = '{"prompt":' + "[" * 100_000  # a RecursionError in Python's json
BROKEN_JSON = [NESTED, "", "null", "{", "NaN", "1e400", "\ufeff{}", "9" * 5000]
AS_JSON = JSON.map(json.dumps) | st.sampled_from(BROKEN_JSON)


# ---- Adapters

torch.manual_seed(0)
BACKBONE = SD3Transformer2DModel(
    sample_size=4, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
    num_attention_heads=1, caption_projection_dim=8, joint_attention_dim=8,
    pooled_projection_dim=8, pos_embed_max_size=2, qk_norm="rms_norm",
).requires_grad_(False)  # fmt: skip
BLOCK = "transformer_blocks.0"
LAYERS = [f"{BLOCK}.attn.to_q", f"{BLOCK}.attn.add_q_proj", "transformer_blocks.1.attn.to_k"]
LAYER = LAYERS[0]  # linear, 8 x 8, as all of them
ODD_LAYERS = ["", BLOCK, f"{BLOCK}.attn.norm_q", "pos_embed.proj", "proj_out", "a\nb", "x" * 9999]
ODD_LAYERS += [f"{LAYER}.base_layer", f"{LAYER}.lora_A.other", "__class__", "to_q"]
DTYPES = "float32 float16 bfloat16 float64 int8 int64 bool uint8 float8_e4m3fn float8_e5m2".split()
ENDLESS = ["(a+)+$", "(.*)*x", ".*.*.*.*.*.*.*.*.*b", "to_q|(x+x+)+y", "[", "(?P<", "\\", "*"]
PATTERNS = st.dictionaries(st.sampled_from([*LAYERS, *ENDLESS, "to_q"]) | TEXT, NUMBER, max_size=3)
ODD_CONFIG = {"alpha_pattern": PATTERNS | JSON, "use_rslora": st.booleans() | JSON}
CONFIGS = st.fixed_dictionaries({"lora_alpha": st.just(8) | JSON}, optional=ODD_CONFIG)
CONFIGS = st.sampled_from(['{"lora_alpha": 8}', "null"]) | CONFIGS.map(json.dumps) | AS_JSON
HEADERS = st.none() | st.builds(lambda text: {"lora_adapter_metadata": utf8(text)}, AS_JSON)


def pair_of(layer, rank=2):
    A = torch.linspace(-1, 1, 8 * rank).view(rank, 8)
    return {f"{layer}.lora_A.weight": A, f"{layer}.lora_B.weight": (2 * A.T).contiguous()}


def damaged(data):
    """Bytes with a flipped bit, cut short, with another length of the header, or noise."""
    place = st.integers(0, len(data) - 1)
    flip = lambda n, bit: data[:n] + bytes([data[n] ^ 1 << bit]) + data[n + 1 :]
    cut = place.map(lambda n: data[:n])
    header = st.integers(0, 2**64 - 1).map(lambda length: struct.pack("<Q", length) + data[8:])
    return st.builds(flip, place, st.integers(0, 7)) | cut | header | st.binary(max_size=200)


@st.composite
def adapters(draw):
    """The bytes of a safetensors file: right, damaged, or with an odd layer or tensor."""
    tensors = {}
    for layer in draw(st.lists(st.sampled_from(LAYERS), unique=True)):
        tensors |= pair_of(layer, draw(st.integers(1, 4)))
    fault = draw(st.sampled_from(["none", "none", "layer", "tensor", "bytes"]))
    if fault == "layer":
        tensors |= pair_of(draw(st.sampled_from(ODD_LAYERS) | TEXT))
    if fault == "tensor":
        key = draw(st.sampled_from([*tensors, f"{LAYER}.lora_A.weight"]) | TEXT)
        shape = draw(st.just([2, 8]) | st.lists(st.integers(0, 9), max_size=4))
        value = draw(st.sampled_from([1, math.nan, math.inf, 1e30]))
        dtype = getattr(torch, draw(st.sampled_from(DTYPES)))
        tensors[key] = torch.full(shape, float(value)).to(dtype)
    data = save({utf8(key): tensor for key, tensor in tensors.items()}, draw(HEADERS))
    return draw(damaged(data)) if fault == "bytes" else data


NAMES = st.sampled_from(["adapter_model.safetensors", "pytorch_lora_weights.safetensors"])


@fuzz(200, weights=adapters(), config=CONFIGS, name=NAMES)
def test_adapters_are_read_right_or_refused(weights, config, name):
    """Refused, or finite float32 is read and the backbone gets scaling * B A."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / name).write_bytes(weights)
        if config != "null":  # diffusers has it in the header
            (Path(place) / "adapter_config.json").write_bytes(encoded(config))
        layers, _ = attempt(lora.read_adapter, place, "--init")
        assert {path.name for path in Path(place).iterdir()} <= {name, "adapter_config.json"}
    for A, B, scaling in (layers or {}).values():
        assert A.dtype == B.dtype == torch.float32 and A.isfinite().all() and B.isfinite().all()
        assert len(A) == B.shape[1] > 0 and 0 < scaling < math.inf
    if layers and attempt(lora.add_adapter, BACKBONE, "stranger", layers) == (None, ""):
        modules = {layer: BACKBONE.get_submodule(layer) for layer in layers}
        deltas = {layer: m.get_delta_weight("stranger") for layer, m in modules.items()}
        BACKBONE.delete_adapters("stranger")
        for layer, (A, B, scaling) in layers.items():
            torch.testing.assert_close(deltas[layer], scaling * B @ A, rtol=1e-4, atol=1e-4)


def write_adapter(folder, config='{"lora_alpha": 8}', **changes):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(save(pair_of(LAYER) | changes))
    (folder / "adapter_config.json").write_text(config)
    return folder, "--init"


def test_values_and_alphas_that_are_no_numbers_are_refused(tmp_path):
    """1e30 is finite in most formats, but what it does to a velocity is not."""
    for value in (math.nan, math.inf, -math.inf, 1e30):
        bad = {f"{LAYER}.lora_A.weight": torch.full((2, 8), value, dtype=torch.bfloat16)}
        assert "nan, infinity" in refused(lora.read_adapter, *write_adapter(tmp_path, **bad))
    for alpha in ("-8", "0", "1e400", "NaN", '"8"', "[8]", "true", "9" * 400, "{}"):
        pattern = '{"lora_alpha": 8, "alpha_pattern": {"to_q": %s}}' % alpha
        for config in ('{"lora_alpha": %s}' % alpha, pattern):
            assert "alpha" in refused(lora.read_adapter, *write_adapter(tmp_path, config))
    assert "alpha" in refused(lora.read_adapter, *write_adapter(tmp_path), -1.0)  # --teacher_alpha
    twice = {f"transformer.{LAYER}.lora_A.weight": torch.zeros(2, 8)}  # the last one would count
    assert "once each" in refused(lora.read_adapter, *write_adapter(tmp_path, **twice))


def test_alpha_pattern_is_read_as_peft_reads_it(tmp_path):
    """A key is a whole name or the end of one, from a dot on. An expression is not tried."""
    named = ["to_q", "attn.to_q", LAYER, f"^{LAYER}", f"^{LAYER}$", r"attn\.to_q", "attn.to.q"]
    for key in (*named, "o_q", "^to_q", "attn", f"{LAYER}x", *ENDLESS):
        config = json.dumps({"lora_alpha": 8, "alpha_pattern": {key: 2}})
        layers, line = attempt(lora.read_adapter, *write_adapter(tmp_path, config))
        assert ("is an expression" in line) == (key in ENDLESS), key
        assert not layers or layers[LAYER][2] == (2 if key in named else 8) / 2, key


def test_pickles_pipes_and_circular_links_are_not_opened(tmp_path):
    mark = tmp_path / "unpickled"
    bomb = f"cposix\nsystem\n(S'touch {mark}'\ntR."  # unpickled, it leaves a file behind
    cases = [
        ("adapter_model.bin", lambda file: file.write_text(bomb)),
        ("pytorch_lora_weights.bin", lambda file: file.write_text(bomb)),
        ("adapter_model.safetensors", os.mkfifo),  # a pipe blocks its reader
        ("adapter_model.safetensors", lambda file: file.symlink_to(file)),
    ]
    for name, make in cases:
        make(tmp_path / name)
        assert "a .bin can run code" in refused(lora.read_adapter, tmp_path, "--init")
        (tmp_path / name).unlink()
    assert not mark.exists()


# ---- Prompts


def read(data, name="prompts.txt"):
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / name).write_bytes(data)
        result, _ = attempt(files.read_prompts, f"{place}/{name}")
    for prompt, about in zip(*(result or ((), ())), strict=True):
        assert prompt.strip() and prompt.encode() and "\0" not in prompt and type(about) is dict
    return result


OBJECTS = st.fixed_dictionaries({"prompt": TEXT | JSON}, optional={"tag": JSON})
LINES = (TEXT | OBJECTS.map(json.dumps) | AS_JSON).map(encoded) | st.binary(max_size=20)
ENDS = st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n", b"\xe2\x80\xa8"])
MARKS = st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe"])


@fuzz(100, lines=st.lists(LINES, max_size=4), end=ENDS, mark=MARKS)
def test_prompt_files_are_read_or_refused(lines, end, mark):
    for name in ("prompts.txt", "prompts.jsonl"):
        read(mark + end.join(lines), name)


def test_prompts_as_people_write_them():
    long = "very " * 2000 + "long"
    text = f"\ufeffred circle\r\n\r\n  猫と犬\t\r\nred circle\n\u200bعربى\n\n{long}\nno end"
    expected = ["red circle", "猫と犬", "red circle", "\u200bعربى", long, "no end"]
    assert read(text.encode())[0] == expected


ODD_PROMPTS = ["a\nb", "tab\there", "bell\x07", "\x1b[31mred\x1b[0m", "猫と犬"]
ODD_PROMPTS += ["עברית \u202e", "a\u2028b", "e\u0301" * 50, "🦄" * 200, "very " * 2000]
ODD_PROMPTS += ["x" * 9999, "<|endoftext|></s>", "%s {0} $HOME", "../../x", "\ufffe", "red"]


def test_any_prompt_is_embedded(monkeypatch, tmp_path):
    """Each in its own finite row, the same from the cache. No prompt becomes the name of a file."""
    args = model_args(cache_embeddings=str(tmp_path))
    pipe = model.load_pipeline(args, CPU)
    table = model.embed_prompts(pipe, ODD_PROMPTS + ODD_PROMPTS[:3], args)
    assert len(table["rows"]) == 1 + len(ODD_PROMPTS) == len(table["embeds"])
    assert table["embeds"].isfinite().all() and table["pooled"].isfinite().all()
    cached = sorted(tmp_path.rglob("*.safetensors"))
    assert all(len(file.stem) == 64 for file in cached)
    cached[0].write_bytes(b"noise" * 9)  # such a row is made again
    again = [model.embed_prompts(pipe, ODD_PROMPTS, args)]
    monkeypatch.setattr(StableDiffusion3Pipeline, "encode_prompt", None)  # from the cache alone
    again.append(model.embed_prompts(model.load_pipeline(args, CPU), ODD_PROMPTS, args))
    torch.testing.assert_close(again, [table, table])


def test_odd_prompts_through_a_whole_run(monkeypatch, tmp_path):
    """Training, samples, evaluation: the log is JSON, and every file lies where it should."""
    about = {"file_name": "../../outside", "path": "/outside"}
    file, out = tmp_path / "odd.jsonl", tmp_path / "run"
    file.write_text("\n".join(json.dumps(about | {"prompt": p}) for p in ODD_PROMPTS))
    words = "--prompts_per_iteration 2 --group_size 2 --steps 2 --iterations 1 --eval_steps 2"
    words += f" --sample_every 1 --eval_prompts 4 --prompts ocr={file} --test_prompts ocr={file}"
    words += f" --teacher ocr=toy/adapters/ocr --out {out}"
    call(monkeypatch, "train_opd", *words.split())
    json.loads((out / "metrics.jsonl").read_text())  # one line
    assert (out / "samples/00001.png").stat().st_size > 0 and (out / "table.md").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"odd.jsonl", "run"}


# ---- Models


@pytest.fixture
def copy(tmp_path):
    """A copy of the miniature in which a test changes something."""
    skip = shutil.ignore_patterns("adapters", "prompts", "*.py", "*.png", "results.json")
    return Path(shutil.copytree(ROOT / "toy", tmp_path / "toy", ignore=skip))


def load_all(folder):
    args = model_args(model=str(folder))
    return model.embed_prompts(model.load_pipeline(args, CPU), ["red circle"], args)


def rewrite(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


CODE = "transformer/mine text_encoder/mine tokenizer_3/mine scheduler/mine transformer/diffusers"
CODE += " text_encoder/transformers vae/this ./pipeline ./None auto_map/mine _class_name/mine"


@pytest.mark.parametrize("part, module", [word.split("/") for word in CODE.split()])
def test_no_code_in_a_model_folder_is_run(copy, part, module):
    """A component's own module, a module called like a library, a pipeline.py, auto_map: the model
    is loaded without it, or refused."""
    mark = copy.parent / "executed"
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Cls:\n    pass\n"
    for place in (copy, *(path for path in copy.iterdir() if path.is_dir())):
        (place / f"{module}.py").write_text(code)
    index = {} if module in ("diffusers", "transformers") else {part: [module, "Cls"]}
    if part == "auto_map":
        names = ("AutoModel", "AutoConfig", "AutoTokenizer")
        for file in [*copy.glob("*/config.json"), *copy.glob("*/tokenizer_config.json")]:
            rewrite(file, auto_map=dict.fromkeys(names, "mine.Cls"))
    elif part != ".":
        rewrite(copy / "model_index.json", **index)
    sys.modules.pop("this", None)
    table, _ = attempt(load_all, copy)
    assert not mark.exists() and "this" not in sys.modules
    if part in ("auto_map", ".") and module != "None":  # diffusers refuses a None.py
        assert table is not None


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_3"])
@pytest.mark.parametrize("fault", ["missing", "nan", "shape", "config", "pickle"])
def test_a_damaged_model_is_refused(copy, part, fault):
    """transformers alone would draw missing weights at random; diffusers would leave them empty."""
    (file,) = (copy / part).glob("*.safetensors")
    tensors = load_file(file)
    key = sorted(tensors)[len(tensors) // 2]
    tensor = tensors.pop(key)
    changes = {"missing": {}, "nan": {key: tensor * math.nan}, "shape": {key: torch.zeros(3, 3)}}
    tensors |= changes.get(fault, {key: tensor})
    save_file(tensors, file, metadata={"format": "pt"})
    if fault == "config":
        odd = {"sample_size": "x", "num_layers": [], "vocab_size": None}
        (copy / part / "config.json").write_text(json.dumps(odd))
    if fault == "pickle":  # the right weights, but in a format that can run code
        name = "pytorch_model" if file.stem == "model" else file.stem
        torch.save(tensors, copy / part / f"{name}.bin")
        file.unlink()
    assert "error: --model" in refused(load_all, copy)


@fuzz(60, recorded=st.fixed_dictionaries({"flags": JSON, "results": JSON}) | JSON)
def test_a_strangers_recorded_results_are_shown_or_left_out(recorded):
    """MODEL/results.json is read at the end of a run, when an exception would be worst."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "results.json").write_text(json.dumps(recorded))
        tables.table(scoring.read_recorded(place)[1])


def test_deqas_index_leads_to_no_file_outside(tmp_path):
    (tmp_path / "in").mkdir()
    torch.save({"a": torch.ones(1)}, tmp_path / "outside.bin")
    for name in ("../outside.bin", str(tmp_path / "outside.bin")):
        index = json.dumps({"weight_map": {"a": name}})
        (tmp_path / "in/pytorch_model.bin.index.json").write_text(index)
        with pytest.raises(ValueError, match="no shard"):
            deqa.read_checkpoint(tmp_path / "in")
