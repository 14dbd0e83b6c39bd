"""GRPO with a reward of your own, on the miniature as stock diffusers loads it: pictures become red, in a minute on a CPU.

    python examples/own_reward.py

Your own part is `reward`, a function of images (B, 3, H, W) in [0, 1] and prompts that returns a number per image, and
PROMPTS. Of this project it uses sde.py, losses.py and the pipeline in toy/. A reward alone takes all it can get: look at
what becomes of the shapes. train_teacher.py, which is this with everything that long runs need (files of prompts, test
rewards, guidance, checkpoints, an average of the weights, many processes), has --beta and weighted rewards against that.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # not needed once sde.py and losses.py are copied beside this

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from tqdm import tqdm

from losses import group_advantage, grpo
from sde import log_prob, rollout, step

PROMPTS = ["two circles", "nice mural of squares", "triangle above circle", "pretty view of triangles"]  # they name no colour


def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Redness: how much more red than green and blue a picture is, on average. (B,)"""
    red, green, blue = images.mean(dim=(2, 3)).unbind(1)
    return red - (green + blue) / 2


def decode(vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B, 3, H, W) in [0, 1]."""
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


def main(args):
    torch.manual_seed(args.seed)
    out, A, G = Path(args.out), 0.7, args.group_size
    pipe = StableDiffusion3Pipeline.from_pretrained("toy")
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=8)
    pipe.scheduler.set_timesteps(args.steps)
    grid = pipe.scheduler.sigmas.tolist()  # T + 1 values, 1 ... 0
    transformer, vae = pipe.transformer.requires_grad_(False), pipe.vae
    layers = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]
    transformer.add_adapter(LoraConfig(r=16, lora_alpha=32, target_modules=layers, init_lora_weights="gaussian"))
    weights = [p for p in transformer.parameters() if p.requires_grad]  # the LoRA alone
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    shape = (transformer.config.in_channels, transformer.config.sample_size, transformer.config.sample_size)

    def velocity(x, t, which):
        """v (B, C, h, w) for the prompts `which` (B,)."""
        times = torch.full((len(x),), 1000 * t)
        return transformer(x, embeds[which], pooled[which], times, return_dict=False)[0]

    def paint():
        """Eight pictures without noise, of the same starting points every time, in one row: (3, H, 8 W)."""
        x = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
        latents = rollout(lambda x, t: velocity(x, t, torch.arange(8) % len(PROMPTS)), x, grid, a=0.0).x[-1]
        with torch.no_grad():
            return torch.cat(decode(vae, latents).unbind(), dim=2)

    before, history, spread = paint(), [], None
    which = torch.arange(len(PROMPTS)).repeat_interleave(G)  # (B,): G samples of every prompt
    for _ in (bar := tqdm(range(args.iterations), "training")):
        # Paint with the SDE, score, and compare each picture with the others of its prompt.
        path = rollout(lambda x, t: velocity(x, t, which), torch.randn(len(which), *shape), grid, A)
        with torch.no_grad():
            rewards = reward(decode(vae, path.x[-1]), [PROMPTS[i] for i in which])  # (B,)
        advantage = group_advantage(rewards, which)  # (B,)
        # Make the steps of the better ones more likely: two updates, each on every second sample.
        for half in (slice(0, None, 2), slice(1, None, 2)):
            for i in range(args.steps - 1):
                v = velocity(path.x[i, half], grid[i], which[half])
                mean, std = step(path.x[i, half], v, grid[i], grid[i + 1], A, grid[1])
                now = log_prob(path.x[i + 1, half], mean, std)
                loss, _ = grpo(now, path.log_prob[i, half], advantage[half], clip_range=1e-2)
                (loss / (args.steps - 1)).backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        history.append(rewards.mean().item())
        spread = spread or rewards.std().item()  # of the base's pictures
        bar.set_postfix(reward=f"{history[-1]:.3f}")

    out.mkdir(parents=True, exist_ok=True)
    picture = torch.cat([before, paint()], dim=1)  # (3, 2 H, 8 W): before above, after below
    picture = Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy())
    picture.resize((4 * picture.width, 4 * picture.height), Image.Resampling.NEAREST).save(out / "before_after.png")
    # Not transformer.save_lora_adapter: pipe.load_lora_weights would load nothing from it, and say nothing.
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in transformer.peft_config["default"].to_dict().items()}
    pipe.save_lora_weights(out, get_peft_model_state_dict(transformer), transformer_lora_adapter_metadata=config)
    print(f"reward: {history[0]:.3f} (standard deviation {spread:.3f}) -> {history[-1]:.3f}")
    print(f"pictures: {out}/before_after.png (above: before); LoRA, for pipe.load_lora_weights: {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--group_size", type=int, default=16, help="samples per prompt (16)")
    parser.add_argument("--steps", type=int, default=6, help="of a rollout (6)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/own_reward")
    main(parser.parse_args())
