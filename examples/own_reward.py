"""GRPO with your own reward, on the miniature as stock diffusers loads it. Images become red.

    python examples/own_reward.py       # a minute on a CPU

Replace `reward`, a function of images (B, 3, H, W) in [0, 1] and prompts that returns a number per
image, and PROMPTS. Of this project the script uses sde.py, losses.py and the pipeline in toy/.

A reward alone is maximised at any price: look at what happens to the shapes. train_teacher.py
limits that by --beta and weighted rewards. It is this script with what long runs need: prompt
files, test rewards, guidance, checkpoints, averaged weights, many processes.
"""

import argparse
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from torch import Tensor
from tqdm import tqdm

# Needed only as long as sde.py and losses.py lie in the folder above this one.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from losses import group_advantage, grpo
from sde import log_prob, rollout, step

TOY = Path(__file__).resolve().parents[1] / "toy"
NOISE = 0.7  # the noise level a of the SDE
PROMPTS = [  # they name no colour
    "two circles",
    "nice mural of squares",
    "triangle above circle",
    "pretty view of triangles",
]
LAYERS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
LAYERS += ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]


def reward(images: Tensor, prompts: list[str]) -> Tensor:
    """Redness: how much more red than green and blue an image is on average. (B,)"""
    red, green, blue = images.mean(dim=(2, 3)).unbind(1)
    return red - (green + blue) / 2


@torch.no_grad()
def decode(vae: torch.nn.Module, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1]."""
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


def main(args):
    torch.manual_seed(args.seed)
    pipe = StableDiffusion3Pipeline.from_pretrained(TOY)
    with torch.no_grad():
        flags = {"do_classifier_free_guidance": False, "max_sequence_length": 8}
        embeds, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, **flags)
    pipe.scheduler.set_timesteps(args.steps)
    grid = pipe.scheduler.sigmas.tolist()  # T + 1 values, 1 ... 0
    transformer = pipe.transformer.requires_grad_(False)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=LAYERS, init_lora_weights="gaussian")
    transformer.add_adapter(lora)
    parameters = [p for p in transformer.parameters() if p.requires_grad]  # the LoRA's
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    side = transformer.config.sample_size
    shape = (transformer.config.in_channels, side, side)

    def velocity(x, t, prompt):
        """v like x (B, C, h, w); t is a float or (B, 1, 1, 1), prompt (B,) the rows of PROMPTS."""
        t = torch.as_tensor(1000 * t).flatten().expand(len(x))
        return transformer(x, embeds[prompt], pooled[prompt], t, return_dict=False)[0]

    def sample_row():
        """Eight images without noise, from the same eight starting points: (3, H, 8 W)."""
        noise = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
        prompt = torch.arange(8) % len(PROMPTS)
        path = rollout(lambda x, t: velocity(x, t, prompt), noise, grid, a=0.0)
        return torch.cat(decode(pipe.vae, path.x[-1]).unbind(), dim=2)

    # G samples of every prompt. A trained step is a row: step i // B of sample i % B.
    prompt = torch.arange(len(PROMPTS)).repeat_interleave(args.group_size)  # (B,)
    B, S = len(prompt), args.steps - 1  # the last step is not trained
    times = torch.tensor(grid).repeat_interleave(B).view(-1, 1, 1, 1)
    t, t_next = times[: S * B], times[B : (S + 1) * B]  # (N, 1, 1, 1), N = S B
    sample_of = torch.arange(B).repeat(S)  # (N,)

    before, history, spread = sample_row(), [], None
    for _ in (bar := tqdm(range(args.iterations), "training")):
        # Sample with the SDE, score, and compare every image with the others of its prompt.
        noise = torch.randn(B, *shape)
        path = rollout(lambda x, t: velocity(x, t, prompt), noise, grid, NOISE)
        x, x_next = path.x[:S].flatten(0, 1), path.x[1 : S + 1].flatten(0, 1)  # (N, C, h, w)
        log_prob_old = path.log_prob[:S].flatten()  # (N,)
        rewards = reward(decode(pipe.vae, path.x[-1]), [PROMPTS[i] for i in prompt])  # (B,)
        advantage = group_advantage(rewards, prompt)  # (B,)
        # Make the steps of the better images more likely: two updates, each with half the samples.
        for update in range(2):
            rows = torch.nonzero(sample_of % 2 == update).flatten()
            sample = sample_of[rows]
            v = velocity(x[rows], t[rows], prompt[sample])
            mean, std = step(x[rows], v, t[rows], t_next[rows], NOISE, grid[1])
            log_prob_new = log_prob(x_next[rows], mean, std)
            loss, _ = grpo(log_prob_new, log_prob_old[rows], advantage[sample], clip_range=1e-2)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        history.append(rewards.mean().item())
        spread = spread or rewards.std().item()  # of the base's images
        bar.set_postfix(reward=f"{history[-1]:.3f}")

    args.out.mkdir(parents=True, exist_ok=True)
    pixels = torch.cat([before, sample_row()], dim=1)  # (3, 2 H, 8 W): before above after
    picture = Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy())
    picture = picture.resize((4 * picture.width, 4 * picture.height), Image.Resampling.NEAREST)
    picture.save(args.out / "before_after.png")
    # pipe.load_lora_weights silently loads nothing from what transformer.save_lora_adapter writes.
    config = transformer.peft_config["default"].to_dict()
    config = {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()}
    tensors = get_peft_model_state_dict(transformer)
    pipe.save_lora_weights(args.out, tensors, transformer_lora_adapter_metadata=config)
    print(f"reward: {history[0]:.3f} (standard deviation {spread:.3f}) -> {history[-1]:.3f}")
    print(f"images: {args.out}/before_after.png (first row: before)")
    print(f"LoRA for pipe.load_lora_weights: {args.out}")


def parse_args() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    flag = parser.add_argument
    flag("--iterations", type=int, default=30)
    flag("--group_size", type=int, default=16, help="samples per prompt (16)")
    flag("--steps", type=int, default=6, help="of a rollout (6)")
    flag("--seed", type=int, default=0)
    flag("--out", type=Path, default="runs/own_reward", help="folder (runs/own_reward)")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
