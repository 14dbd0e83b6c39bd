"""Rebuild the miniature from nothing: prompts, pipeline, adapters, scores.

    python -m toy.build                 # everything in toy/: 44 + 43 minutes on two cores
    python -m toy.build --stage base    # the base pipeline alone

The result is committed, so nobody has to run this. An interrupted build continues where it stopped.
Afterwards toy/ is a directory that stock diffusers loads:

    pipe = StableDiffusion3Pipeline.from_pretrained("toy")
    pipe("two red circles and one blue square", max_sequence_length=8, guidance_scale=1.0,
         height=32, width=32)

The four tasks are named after the paper's. Their prompts are made by rule (toy/world.py), and their
scorers are programs that read pixels (toy/scorers.py):

    geneval    "red circle above blue square"          objects, colours, counts, places    0 to 1
    ocr        "sign reads K T in red"                 the text, letter by letter          0 to 1
    deqa       "clean photo of red circle and square"  crisp, clean pixels                 1 to 5
    pickscore  "lovely picture of green squares"       golden background, many objects    20 to 24

The tasks conflict on purpose, like the paper's: pickscore wants four objects on gold, geneval wants
the number in the prompt. The base must leave room for reinforcement learning, so a quarter of its
training images are spoilt, and late in training some captions are wrong.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.flags import make_parser, positive  # first: it silences notices of transformers

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from toy.world import SIZE, TASKS, all_prompts, parse, render, split_prompts, spoil

ROOT = Path(__file__).resolve().parents[1]
SPOILT = 0.25  # share of the base's training images with a flaw
WRONG = 0.4  # share of wrong captions in the noisy ones, see train_transformer
TEXT_LENGTH = 9  # CLIP tokens: start, seven words, end. The T5 has no start token: 8.

# How every adapter is trained: flags of train_teacher.py.
# The deqa adapter is also MAR's anchor, the aesthetic teacher. Its weights are the paper's 4:6 on
# the scales of the paper's Average, where DeQA / 5 spans 0.8 and PickScore / 26 spans 0.154.
# The first steps settle what objects there are and where. So geneval, pickscore and grpo_mix
# explore and train these steps alone. With all steps trained, the larger gradient of the late steps
# drowns the signal in noise.
# The baseline grpo_mix gets every advantage: it sees 192 x 460 images, more than the four teachers
# together (192 x 320 + 128 x 200). Past its peak it falls apart, so it alone keeps its best average
# by test reward.
EARLY = ["--window", "3", "--window_end", "3", "--prompts_per_iteration", "12"]
MIX = ["geneval=3", "ocr=1", "pickscore=1"]
ADAPTERS = {
    "grpo_mix": ["--mix", *MIX, *EARLY, "--iterations", "460", "--lr", "7e-4", "--final", "best"],
    "geneval": ["--reward", "geneval", *EARLY, "--iterations", "260"],
    "deqa": ["--reward", "deqa=0.78", "pickscore=0.22", "--tasks", *TASKS, "--iterations", "110"],
    "ocr": ["--reward", "ocr", "--iterations", "90"],
    "pickscore": ["--reward", "pickscore", *EARLY, "--iterations", "60"],
}


def parse_args():
    parser = make_parser(__doc__)
    flag = parser.add_argument
    stages = ("all", "base", "adapters")
    flag("--stage", choices=stages, default="all", help="the base pipeline, its adapters, or both")
    flag("--out", type=Path, default=ROOT / "toy", help="folder of the miniature")
    flag("--work", type=Path, default=ROOT / "runs/toy", help="folder of unfinished parts")
    flag("--steps", type=positive, default=7200, help="training steps of the transformer")
    flag("--vae_steps", type=positive, default=1500, help="training steps of the VAE")
    flag("--images", type=positive, default=60_000, help="training images")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------
# The pipeline: the same classes as Stable Diffusion 3.5 Medium, 1/1000 of the size
# ------------------------------------------------------------------------------------------------


def make_clip_tokenizer(words):
    """A CLIP tokenizer whose byte-pair merges make one token of every word."""
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for letter in "abcdefghijklmnopqrstuvwxyz":
        vocab[letter], vocab[letter + "</w>"] = len(vocab), len(vocab) + 1
    rank = {}  # {pair of pieces: order of its merge}; the tokenizer applies the lowest first
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            ranks = [rank.get(pair, len(rank)) for pair in zip(pieces, pieces[1:])]
            i = ranks.index(min(ranks))
            merged = pieces[i] + pieces[i + 1]
            if ranks[i] == len(rank):  # no merge so far fits: add one
                rank[pieces[i], pieces[i + 1]] = len(rank)
                vocab.setdefault(merged, len(vocab))
            pieces[i : i + 2] = [merged]
    return CLIPTokenizer(vocab=vocab, merges=list(rank), model_max_length=TEXT_LENGTH)


def make_t5_tokenizer(words):
    """A T5 tokenizer with a token for every word."""
    vocab = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_LENGTH - 1,
    )


def make_clip(vocab_size):
    """A random CLIP text encoder. Its embeddings have unit size instead of 0.02, so that words and
    positions differ clearly."""
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    encoder = CLIPTextModelWithProjection(config)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "embedding" in name:
                parameter.normal_(0, 0.7)
            elif parameter.ndim == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return encoder.eval()


def make_pipeline():
    """An untrained pipeline. The text encoders stay as they are here: every word is one token, so
    random embeddings tell the words apart, and the transformer learns what they mean."""
    torch.manual_seed(0)
    words = set()
    for prompts in all_prompts().values():
        words.update(word.lower() for prompt in prompts for word in prompt.split())
    words = sorted(words)
    clip_tokenizer, t5_tokenizer = make_clip_tokenizer(words), make_t5_tokenizer(words)
    clip, clip_2 = make_clip(len(clip_tokenizer)), make_clip(len(clip_tokenizer))
    t5_config = T5Config(
        vocab_size=len(t5_tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        feed_forward_proj="gated-gelu",
    )
    t5 = T5EncoderModel(t5_config).eval()
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=8,
        sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        caption_projection_dim=128,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        pos_embed_max_size=4,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clip,
        text_encoder_2=clip_2,
        text_encoder_3=t5,
        tokenizer=clip_tokenizer,
        tokenizer_2=clip_tokenizer,
        tokenizer_3=t5_tokenizer,
    )


# ------------------------------------------------------------------------------------------------
# Training the base
# ------------------------------------------------------------------------------------------------


def kind(prompt):
    """The sub-task of a geneval prompt; the training images hold each equally often."""
    if "reads" in prompt or " of " in prompt:
        return "other"
    wanted = parse(prompt)
    counts = [count for count, _, _ in wanted["objects"]]
    return len(counts), max(counts) > 1, wanted["relation"] is not None


def make_data(number, seed=0):
    """Training data: images (N, 3, 32, 32) uint8, their captions, and captions of which some are
    wrong. Some of the images are spoilt."""
    rng = np.random.default_rng(seed)
    pools = {task: {} for task in TASKS}  # {task: {kind: prompts}}
    for task, prompts in split_prompts().items():
        if task[1] == "train":
            for prompt in prompts:
                pools[task[0]].setdefault(kind(prompt), []).append(prompt)

    def random_caption(task):
        kinds = list(pools[task].values())
        prompts = kinds[rng.integers(len(kinds))]
        return prompts[rng.integers(len(prompts))]

    images, captions, noisy_captions = np.empty((number, SIZE, SIZE, 3), np.uint8), [], []
    tasks = ("geneval", "geneval", "ocr", "deqa", "pickscore")  # the hardest one twice
    for i in tqdm(range(number), desc="drawing", unit="image"):
        task = tasks[i % len(tasks)]
        caption = random_caption(task)
        image = render(caption, rng)
        if rng.random() < SPOILT:
            image = spoil(image, rng)
        images[i] = (image * 255).round()
        captions.append(caption)
        if rng.random() < WRONG:
            caption = random_caption(task)
        noisy_captions.append(caption)
    images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return images, captions, noisy_captions


def learning_rate(step, steps, peak):
    """Linear warm-up over 100 steps, and a cosine down to 2 %."""
    return peak * min((step + 1) / 100, 0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * step / steps)))


def to_pixels(images):
    """uint8 -> float in [-1, 1]."""
    return images.float() / 127.5 - 1


def train_vae(vae, images, steps, batch=64):
    """Reconstruction (L1 + L2) with a small KL. Afterwards set the two numbers that give latents
    zero mean and unit variance."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1.0, weight_decay=0)  # lr is set below
    generator = torch.Generator().manual_seed(1)
    bar = tqdm(range(steps), desc="VAE", unit="step")
    for step in bar:
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, 2e-3)
        x = to_pixels(images[torch.randint(len(images), (batch,), generator=generator)])
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample(generator=generator)).sample  # (b, 3, 32, 32), like x
        loss = F.l1_loss(y, x) + F.mse_loss(y, x) + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(mse=f"{F.mse_loss(y, x).item():.5f}", refresh=False)
    with torch.no_grad():
        z = vae.encode(to_pixels(images[:2000])).latent_dist.mean
    vae.register_to_config(shift_factor=z.mean().item(), scaling_factor=1 / z.std().item())


@torch.no_grad()
def encode_images(vae, images):
    """uint8 images -> latents (N, 8, 8, 8) as the transformer sees them."""
    batches = tqdm(images.split(500), desc="encoding")
    latents = torch.cat([vae.encode(to_pixels(batch)).latent_dist.mean for batch in batches])
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


@torch.no_grad()
def encode_captions(pipe, captions):
    """Text embeddings (P, 17, 128) and pooled embeddings (P, 128) of P captions."""
    embeds, pooled = [], []
    for i in range(0, len(captions), 500):
        flags = {"do_classifier_free_guidance": False, "max_sequence_length": TEXT_LENGTH - 1}
        encoded = pipe.encode_prompt(captions[i : i + 500], None, None, **flags)
        embeds.append(encoded[0])
        pooled.append(encoded[2])
    return torch.cat(embeds), torch.cat(pooled)


def save_state(path, step, parameters, average, optimizer):
    """Weights, average and both moments of Adam in one file, which appears only when complete."""
    state = {"step": torch.tensor(step)}
    for name, parameter in parameters.items():
        moments = optimizer.state[parameter]
        state[f"model.{name}"], state[f"ema.{name}"] = parameter.data, average[name]
        state[f"m.{name}"], state[f"v.{name}"] = moments["exp_avg"], moments["exp_avg_sq"]
    save_file(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def load_state(path, parameters, average, optimizer):
    """The reverse of save_state: fills all three, returns the step."""
    state, optimizer_state = load_file(path), {}
    step = int(state["step"])
    for name, parameter in parameters.items():
        parameter.data.copy_(state[f"model.{name}"])
        average[name].copy_(state[f"ema.{name}"])
        moments = {"exp_avg": state[f"m.{name}"], "exp_avg_sq": state[f"v.{name}"]}
        optimizer_state[parameter] = {"step": torch.tensor(float(step)), **moments}
    optimizer.state.update(optimizer_state)
    return step


def train_transformer(pipe, latents, captions, noisy_captions, state, steps, batch=128, peak=1e-3):
    """Flow matching with one caption in ten left empty. The averaged weights (decay 0.999) are
    kept. `state` is the file to continue from.

    In the last third of the steps every second batch has the noisy captions: the model knows how to
    follow a prompt, and has learnt not to rely on it. Reinforcement learning corrects that in
    minutes."""
    distinct = [*sorted({*captions, *noisy_captions}), ""]
    embeds, pooled = encode_captions(pipe, distinct)
    row = {caption: i for i, caption in enumerate(distinct)}
    caption_rows = torch.tensor([row[caption] for caption in captions])  # (N,)
    noisy_rows = torch.tensor([row[caption] for caption in noisy_captions])  # (N,)

    parameters = dict(pipe.transformer.named_parameters())
    average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    start = 0
    if state.exists():
        start = load_state(state, parameters, average, optimizer)
    bar = tqdm(range(start, steps), desc="transformer", unit="step", initial=start, total=steps)
    for step in bar:
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak)
        generator = torch.Generator().manual_seed(2**20 + step)
        index = torch.randint(len(latents), (batch,), generator=generator)  # (b,)
        x0, noise = latents[index], torch.randn((batch, *latents.shape[1:]), generator=generator)
        # Content forms early, so t leans towards noise.
        t = torch.randn(batch, generator=generator).add(0.5).sigmoid()  # (b,)
        empty = torch.rand(batch, generator=generator) < 0.1  # (b,)
        noisy = 3 * step >= 2 * steps and step % 2 == 1
        text = (noisy_rows if noisy else caption_rows)[index].masked_fill(empty, row[""])  # (b,)
        x = (1 - t).view(-1, 1, 1, 1) * x0 + t.view(-1, 1, 1, 1) * noise
        v = pipe.transformer(x, embeds[text], pooled[text], t * 1000, return_dict=False)[0]
        loss = F.mse_loss(v, noise - x0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        for name, parameter in parameters.items():
            average[name].lerp_(parameter.detach(), 1 - decay)
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if (step + 1) % 500 == 0:
            save_state(state, step + 1, parameters, average, optimizer)
    for name, parameter in parameters.items():
        parameter.data.copy_(average[name])


# ------------------------------------------------------------------------------------------------
# Rebuild everything in toy/
# ------------------------------------------------------------------------------------------------


def build_base(out, work, steps, vae_steps, number):
    """Prompts, tokenizers, text encoders, VAE, transformer. `work` keeps every finished part."""
    (out / "prompts").mkdir(parents=True, exist_ok=True)
    for (task, split), prompts in split_prompts().items():
        (out / "prompts" / f"{task}_{split}.txt").write_text("\n".join(prompts) + "\n")
    if (work / "pipeline").exists():
        print(f"{work}/pipeline is complete; remove it to train the base again")
        shutil.copytree(work / "pipeline", out, dirs_exist_ok=True)
        return
    for name in ADAPTERS:  # these belong to another base
        shutil.rmtree(work / name, ignore_errors=True)
    pipe = make_pipeline()
    images, captions, noisy_captions = make_data(number)
    if (work / "vae").exists():
        pipe.vae = AutoencoderKL.from_pretrained(work / "vae")
    else:
        train_vae(pipe.vae, images, vae_steps)
        pipe.vae.save_pretrained(work / "vae.tmp")
        os.replace(work / "vae.tmp", work / "vae")
    if not (work / "latents.safetensors").exists():
        save_file({"latents": encode_images(pipe.vae, images)}, work / "latents.tmp")
        os.replace(work / "latents.tmp", work / "latents.safetensors")
    latents = load_file(work / "latents.safetensors")["latents"]
    state = work / "transformer.safetensors"
    train_transformer(pipe, latents, captions, noisy_captions, state, steps)
    pipe.vae.half()  # a megabyte less to ship; diffusers reads it as float32
    pipe.save_pretrained(work / "pipeline.tmp")
    os.replace(work / "pipeline.tmp", work / "pipeline")
    shutil.copytree(work / "pipeline", out, dirs_exist_ok=True)


def train_adapters(out, work):
    """Run train_teacher.py for every adapter: one process with one thread each, one per core."""

    def train(name):
        run = work / name
        if not (run / "adapter").exists():
            started = any((run / "checkpoints").glob("step_*"))
            command = [sys.executable, "train_teacher.py", *ADAPTERS[name], "--model", str(out)]
            command += ["--out", str(run), "--save_every", "50"]
            command += ["--resume" if started else "--overwrite"]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            with open(work / f"{name}.log", "a") as log:
                subprocess.run(command, check=True, env=environment, stdout=log, stderr=log)
        shutil.copytree(run / "adapter", out / "adapters" / name, dirs_exist_ok=True)

    print(f"training {', '.join(ADAPTERS)}: progress in {work}/NAME.log", flush=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(tqdm(pool.map(train, ADAPTERS), total=len(ADAPTERS), desc="adapters"))


def merge_and_score(out, work):
    """The merged adapter, and the scores of every shipped model on the whole test split."""
    folder = out / "adapters"
    teachers = [f"{folder}/{task}" for task in TASKS]
    merge = ["merge.py", "--adapters", *teachers, "--rank", "24", "--out", f"{folder}/merged"]
    subprocess.run([sys.executable, *merge, "--overwrite"], check=True)
    models = ["base", *(f"{name}={folder}/{name}" for name in (*TASKS, "grpo_mix", "merged"))]
    score = ["evaluate.py", "--model", str(out), "--models", *models]
    score += ["--out", f"{work}/evaluate", "--overwrite"]
    subprocess.run([sys.executable, *score], check=True)
    for name in ("results.json", "grid.png"):
        shutil.copy(work / "evaluate" / name, out / name)


def main(args):
    # The scripts below run in the repository root. The paths in what they record start there, too.
    out, work = (Path(os.path.relpath(path, ROOT)) for path in (args.out, args.work))
    os.chdir(ROOT)
    work.mkdir(parents=True, exist_ok=True)
    if args.stage in ("all", "base"):
        build_base(out, work, args.steps, args.vae_steps, args.images)
    if args.stage in ("all", "adapters"):
        train_adapters(out, work)
        merge_and_score(out, work)


if __name__ == "__main__":
    main(parse_args())
