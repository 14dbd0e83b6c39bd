"""Stable Diffusion 3.5 Medium and its teachers as they lie on the hub: names of files, shards,
variants, config fields and keys, all with tiny random weights. tests/test_published_formats.py
feeds them to the loaders, from a cache of the hub and from a server that plays the hub.

The repository of the model is gated; its layout is that of copies, as the hub lists them:
ckpt/stable-diffusion-3.5-medium at e40d4eb (files and sizes, tokenizer_config.json),
frankjoshua/stable-diffusion-3.5-medium at b940f67 (text_encoders/ came with that commit) and at
b8c3970 (transformer/config.json), and the config.json of CLIP-L in Prgckwb/trpfrog-sd3.5-medium. A
LoRA's adapter_config.json is that of worstcoder/SD3.5M-DiffusionNFT-MultiReward, whose code is a
descendant of Flow-GRPO's; of jieliu/SD3.5M-FlowGRPO-GenEval the hub says that base model and
task_type are null there as well.

Not verified: the dtype of the LoRAs, and whether the four teachers have exactly these config
fields; model_index.json, scheduler_config.json and the VAE's config are those of SD3 Medium.
"""

import hashlib
import http.server
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

MODEL = "stabilityai/stable-diffusion-3.5-medium"
TEACHERS = ("jieliu/SD3.5M-FlowGRPO-GenEval", "jieliu/SD3.5M-FlowGRPO-Text")
TEACHERS += ("jieliu/SD3.5M-FlowGRPO-PickScore", "CostaliyA/SD3.5M-FlowGRPO-Deqa-Mix")
# Of 27.4 GB in these folders 16.3 are read: the .fp16 variants are left out.
READ = """model_index.json scheduler/scheduler_config.json transformer/config.json vae/config.json
    transformer/diffusion_pytorch_model.safetensors vae/diffusion_pytorch_model.safetensors
    text_encoder/config.json text_encoder/model.safetensors text_encoder_2/config.json
    text_encoder_2/model.safetensors text_encoder_3/config.json
    text_encoder_3/model-00001-of-00002.safetensors text_encoder_3/model-00002-of-00002.safetensors
    text_encoder_3/model.safetensors.index.json text_encoder_3/model.safetensors.index.fp16.json
    tokenizer/merges.txt tokenizer/special_tokens_map.json tokenizer/tokenizer_config.json
    tokenizer/vocab.json tokenizer_2/merges.txt tokenizer_2/special_tokens_map.json
    tokenizer_2/tokenizer_config.json tokenizer_2/vocab.json tokenizer_3/special_tokens_map.json
    tokenizer_3/spiece.model tokenizer_3/tokenizer.json tokenizer_3/tokenizer_config.json"""
READ = set(READ.split())
WIDTH, LETTERS = 16, "abcdefghijklmnopqrstuvwxyz"

# Of 24 layers; only the widths are tiny. So are a LoRA's names and number of layers the real ones.
TRANSFORMER = {"_class_name": "SD3Transformer2DModel", "_diffusers_version": "0.31.0.dev0"}
TRANSFORMER |= {"dual_attention_layers": [*range(13)], "attention_head_dim": 8}
TRANSFORMER |= {"caption_projection_dim": WIDTH, "in_channels": 16, "joint_attention_dim": 64}
TRANSFORMER |= {"num_attention_heads": 2, "num_layers": 24, "out_channels": 16, "patch_size": 2}
TRANSFORMER |= {"pooled_projection_dim": 2 * WIDTH, "pos_embed_max_size": 384}
TRANSFORMER |= {"qk_norm": "rms_norm", "sample_size": 128}
VAE = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "latent_channels": 16}
VAE |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "layers_per_block": 1}
VAE |= {"up_block_types": ("UpDecoderBlock2D",) * 4, "sample_size": 1024}
VAE |= {"use_quant_conv": False, "use_post_quant_conv": False}
VAE |= {"scaling_factor": 1.5305, "shift_factor": 0.0609}
INDEX = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.31.0.dev0"}
INDEX |= {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
INDEX |= {"text_encoder": ["transformers", "CLIPTextModelWithProjection"]}
INDEX |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
INDEX |= {"text_encoder_3": ["transformers", "T5EncoderModel"]}
INDEX |= {"tokenizer": ["transformers", "CLIPTokenizer"]}
INDEX |= {"tokenizer_2": ["transformers", "CLIPTokenizer"]}
INDEX |= {"tokenizer_3": ["transformers", "T5TokenizerFast"]}
INDEX |= {"transformer": ["diffusers", "SD3Transformer2DModel"]}
INDEX |= {"vae": ["diffusers", "AutoencoderKL"]}
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
SCHEDULER |= {"_diffusers_version": "0.29.0.dev0", "shift": 3.0}
LORA = {"alpha_pattern": {}, "base_model_name_or_path": None, "bias": "none", "r": 32}
LORA |= {"fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": "gaussian"}
LORA |= {"layer_replication": None, "layers_pattern": None, "layers_to_transform": None}
LORA |= {"loftq_config": {}, "lora_alpha": 64, "lora_dropout": 0.0, "megatron_config": None}
LORA |= {"megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA"}
LORA |= {"rank_pattern": {}, "revision": None, "task_type": None, "use_dora": False}
LORA |= {"use_rslora": False}
LORA["target_modules"] = [
    f"attn.{name}"
    for name in "to_add_out to_k to_out.0 add_v_proj add_q_proj to_q to_v add_k_proj".split()
]
LORA["auto_mapping"] = {
    "base_model_class": "SD3Transformer2DModel",
    "parent_library": "diffusers.models.transformers.transformer_sd3",
}


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content, indent=2))


def save_model(folder):
    """The repository of the model: the pipeline, its fp16 variants and the single files beside."""
    folder = Path(folder)
    torch.manual_seed(0)
    write(folder / "model_index.json", INDEX)
    write(folder / "scheduler/scheduler_config.json", SCHEDULER)
    for name, kind, how in (
        ("transformer", SD3Transformer2DModel, TRANSFORMER),
        ("vae", AutoencoderKL, VAE),
    ):
        how = {key: value for key, value in how.items() if key[0] != "_"}
        kind(**how).to(torch.bfloat16).save_pretrained(folder / name)
    write(folder / "transformer/config.json", TRANSFORMER)
    save_text_encoders(folder)
    save_clip_tokenizer(folder / "tokenizer", "<|endoftext|>")
    save_clip_tokenizer(folder / "tokenizer_2", "!")
    save_t5_tokenizer(folder / "tokenizer_3")
    others = "LICENSE.md README.md mmdit-x.png sd3.5_medium_demo.jpg sd3.5_medium.safetensors"
    others += " SD3.5M_example_workflow.json text_encoders/clip_g.safetensors"
    others += " text_encoders/clip_l.safetensors text_encoders/t5xxl_fp16.safetensors"
    for name in (others + " text_encoders/t5xxl_fp8_e4m3fn.safetensors .gitattributes").split():
        write(folder / name, "nothing reads this file")


def save_text_encoders(folder):
    """In half precision, T5 in two shards. The weights of the variants are zero."""
    ends = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "vocab_size": 64}
    clip = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2}
    clip |= {"num_attention_heads": 2, "projection_dim": WIDTH, "max_position_embeddings": 77}
    t5 = {"d_model": 64, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 2}
    t5 |= {"vocab_size": 64, "feed_forward_proj": "gated-gelu"}
    encoders = {name: CLIPTextModelWithProjection for name in ("text_encoder", "text_encoder_2")}
    for name, kind in (encoders | {"text_encoder_3": T5EncoderModel}).items():
        config = T5Config(**t5) if kind is T5EncoderModel else CLIPTextConfig(**clip, **ends)
        shards = {"max_shard_size": "70KB"} if kind is T5EncoderModel else {}
        kind(config).half().save_pretrained(folder / name, **shards)
        written = json.loads((folder / name / "config.json").read_text())
        written["torch_dtype"] = written.pop("dtype")  # as transformers 4 wrote it
        write(folder / name / "config.json", written | {"transformers_version": "4.46.1"})
        for file in list((folder / name).glob("*.safetensors")):
            zeros = {key: 0 * tensor for key, tensor in load_file(file).items()}
            save_file(zeros, file.with_name(file.name.replace("model", "model.fp16")))
    index = folder / "text_encoder_3/model.safetensors.index.json"
    variant = index.read_text().replace("model-", "model.fp16-")
    write(index.with_name("model.safetensors.index.fp16.json"), variant)


def save_clip_tokenizer(folder, pad):
    """CLIP's in its old files: no tokenizer.json."""
    words = ["<|startoftext|>", "!", "<|endoftext|>", *LETTERS, *(c + "</w>" for c in LETTERS)]
    write(folder / "vocab.json", {word: i for i, word in enumerate(words)})
    write(folder / "merges.txt", "#version: 0.2\n")
    how = {"lstrip": False, "rstrip": False, "single_word": False}
    start = how | {"content": "<|startoftext|>", "normalized": True}
    end = how | {"content": "<|endoftext|>", "normalized": False}
    special = {"bos_token": start, "eos_token": end, "unk_token": end}
    write(folder / "special_tokens_map.json", special | {"pad_token": how | {"content": pad}})
    config = {"add_prefix_space": False, "clean_up_tokenization_spaces": True}
    config |= {"do_lower_case": True, "errors": "replace", "model_max_length": 77}
    config |= {name: token["content"] for name, token in special.items()} | {"pad_token": pad}
    config["added_tokens_decoder"] = {"0": start | {"special": True}, "2": end | {"special": True}}
    write(folder / "tokenizer_config.json", config | {"tokenizer_class": "CLIPTokenizer"})


def save_t5_tokenizer(folder):
    """T5's with tokenizer.json beside spiece.model, which takes sentencepiece to read."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -3.0) for c in "▁" + LETTERS)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    end = ("</s>", 1)
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [end])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", "<extra_id_0>"])
    write(folder / "tokenizer.json", tokenizer.to_str())
    write(folder / "spiece.model", "nothing reads this file")
    ends = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    ends["additional_special_tokens"] = ["<extra_id_0>"]
    write(folder / "special_tokens_map.json", ends)
    config = {"add_prefix_space": True, "clean_up_tokenization_spaces": True, "extra_ids": 1}
    config |= {"legacy": True, "model_max_length": 512, "sp_model_kwargs": {}}
    write(folder / "tokenizer_config.json", ends | config | {"tokenizer_class": "T5Tokenizer"})


def save_teacher(folder, seed=0):
    """A teacher as peft saves it: what it adds to README.md and the config is the published one."""
    how = {key: value for key, value in TRANSFORMER.items() if key[0] != "_"}
    torch.manual_seed(seed)
    config = LoraConfig(r=32, lora_alpha=64, target_modules=LORA["target_modules"])
    wrapped = get_peft_model(SD3Transformer2DModel(**how), config)
    for name, parameter in wrapped.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    wrapped.save_pretrained(folder)
    write(Path(folder) / "adapter_config.json", LORA)


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub's answers about one repository, `folder`. A gated one lists its files, and refuses to
    hand them out. asked: the files that were downloaded."""

    folder, gated, asked = Path(), False, set()
    commit = "c" * 40

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        status, headers, body = 200, {}, b""
        if self.path.startswith("/api/"):
            about = {"id": "org/name", "sha": self.commit}
            if "/tree/" in self.path:
                about = self.files()
            body = json.dumps(about).encode()
        elif self.gated:
            status, headers = 403, {"X-Error-Code": "GatedRepo"}
        else:
            name = self.path.split(f"{self.commit}/")[1]
            self.asked.add(name)
            body = (self.folder / name).read_bytes()
            headers = {"ETag": hashlib.sha1(body).hexdigest(), "X-Repo-Commit": self.commit}
        self.send_response(status)
        for header in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(*header)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def files(self):
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        names = [str(path.relative_to(self.folder)) for path in files]
        return [{"type": "file", "path": name, "oid": "0", "size": 1} for name in names]

    def log_message(self, *_):
        pass


def publish(hub, name, save, *given):
    """A repository in a user's cache of the hub: models--ORG--NAME/{blobs,refs,snapshots}."""
    place = Path(hub) / f"models--{name.replace('/', '--')}"
    folder = place / "snapshots" / Hub.commit
    save(folder, *given)
    write(place / "refs/main", Hub.commit)
    (place / "blobs").mkdir()
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        blob = place / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        file.replace(blob)
        file.symlink_to(blob)
    return folder
