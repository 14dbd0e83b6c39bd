"""Flow-OPD for another flow transformer: FLUX. Only the function `velocity` differs from SD3.

    python examples/flux.py         # a tiny FLUX with random weights: half a minute on a CPU

Two teachers and the student are LoRAs of one frozen backbone. The weights are random, so there are
no images to look at. Shapes, conditioning, time grid, adapters and losses are the real model's. For
FLUX.1-dev use pipe = FluxPipeline.from_pretrained(...), pipe.transformer, pipe.scheduler, and
embeds, pooled, txt_ids = pipe.encode_prompt(prompts, prompts). That was not run here.

Differences from train_opd.py, which trains SD3:
 1. Latents (B, C, H, W) are packed: one token per 2 x 2 patch, (B, H W / 4, 4 C). sde.py takes any
    shape: its means and log-probs are over all dimensions after the first.
 2. The transformer needs the positions of tokens: img_ids (H W / 4, 3), txt_ids (L, 3).
 3. The transformer takes t in [0, 1] and multiplies by 1000 itself. SD3's takes 1000 t.
 4. Guidance is an input of the (distilled) model, not a second pass. FLUX.1-schnell has none.
 5. The scheduler shifts its grid by the number of image tokens (mu).
"""

import argparse
import sys
import warnings
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor
from tqdm import tqdm

# Needed only as long as sde.py and losses.py lie in the folder above this one.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from losses import mar, opd_ppo
from sde import kl_weight, rollout, step

C, H, W = 4, 8, 8  # latent channels and sides; FLUX.1 at 512 pixels: 16, 64, 64
L = 8  # text tokens
NOISE = 0.7  # the noise level a of the SDE
MU = 0.5 + (1.15 - 0.5) * (H * W // 4 - 256) / (4096 - 256)  # linear in the tokens: FluxPipeline
TINY = {
    "in_channels": 4 * C,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
LAYERS += ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


def pack(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W / 4, 4 C), like FluxPipeline._pack_latents."""
    B, C, H, W = x.shape
    x = x.view(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(B, H * W // 4, 4 * C)


def unpack(x: Tensor, H: int, W: int) -> Tensor:
    """The reverse, for the VAE: (B, H W / 4, 4 C) -> (B, C, H, W)."""
    B, C = len(x), x.shape[2] // 4
    x = x.view(B, H // 2, W // 2, C, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(B, C, H, W)


def velocity(
    transformer: FluxTransformer2DModel,
    x: Tensor,
    t: Tensor | float,
    embeds: Tensor,
    pooled: Tensor,
    guidance: float = 3.5,
) -> Tensor:
    """v like x (B, H W / 4, 4 C); t in [0, 1], a float or B of them."""
    img_ids = torch.zeros(H // 2, W // 2, 3)
    img_ids[..., 1], img_ids[..., 2] = torch.arange(H // 2)[:, None], torch.arange(W // 2)
    strength = None
    if transformer.config.guidance_embeds:
        strength = torch.full((len(x),), guidance)
    return transformer(
        hidden_states=x,
        timestep=torch.as_tensor(t).flatten().expand(len(x)),  # not 1000 t
        guidance=strength,
        encoder_hidden_states=embeds,  # (B, L, E), of T5
        pooled_projections=pooled,  # (B, E'), of CLIP
        img_ids=img_ids.flatten(0, 1),  # (H W / 4, 3)
        txt_ids=torch.zeros(L, 3),
        return_dict=False,
    )[0]


def add_adapters(transformer: FluxTransformer2DModel) -> list[torch.nn.Parameter]:
    """The student starts as the base (B = 0). The teachers' B is random: something to learn."""
    warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # we want several
    for name, rank in {"left": 4, "right": 4, "student": 16}.items():  # any ranks
        flags = {"target_modules": LAYERS, "init_lora_weights": "gaussian"}
        transformer.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, **flags), name)
    for name, parameter in transformer.named_parameters():
        if ".lora_B.left" in name or ".lora_B.right" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    transformer.set_adapter("student")  # peft: the active adapter alone carries gradient
    return [parameter for name, parameter in transformer.named_parameters() if "student" in name]


def main(args):
    torch.manual_seed(args.seed)
    transformer = FluxTransformer2DModel(**TINY).requires_grad_(False).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    sigmas = torch.linspace(1, 1 / args.steps, args.steps).tolist()
    scheduler.set_timesteps(sigmas=sigmas, mu=MU)
    grid = scheduler.sigmas.tolist()  # T + 1 values, 1 ... 0
    student = add_adapters(transformer)
    optimizer = torch.optim.AdamW(student, lr=args.lr)

    # Two tasks with one prompt embedding each. A real run has prompt files and encode_prompt.
    embeds = {"left": torch.randn(2, 1, L, 32).unbind(), "right": torch.randn(2, 1, L, 32).unbind()}

    # A trained step of a sample is a row: step i // B of sample i % B. N = S B rows.
    B, S = args.samples, args.steps - 1  # the last step is not trained
    times = torch.tensor(grid).repeat_interleave(B).view(-1, 1, 1)
    t, t_next = times[: S * B], times[B : (S + 1) * B]  # (N, 1, 1)
    weight = kl_weight(t, t_next, NOISE, grid[1])  # (N, 1, 1)

    curve = []
    for _ in (bar := tqdm(range(args.iterations), "training")):
        kl = 0.0
        for task, (embed, pooled) in embeds.items():  # every task in every iteration
            text = embed.expand(B, -1, -1), pooled[:, 0].expand(B, -1)  # (B, L, E), (B, E')
            text_of = text[0].repeat(S, 1, 1), text[1].repeat(S, 1)  # (N, L, E), (N, E')
            # Rollout: the student samples with its own SDE.
            transformer.set_adapter("student")
            noise = pack(torch.randn(B, C, H, W))
            path = rollout(lambda x, t: velocity(transformer, x, t, *text), noise, grid, NOISE)
            x, x_next = path.x[:S].flatten(0, 1), path.x[1 : S + 1].flatten(0, 1)
            mean_old = path.mean[:S].flatten(0, 1)  # (N, H W / 4, 4 C), like x and x_next
            # Labels: the task's teacher, and the base as MAR's anchor.
            with torch.no_grad():
                transformer.set_adapter(task)
                v_teacher = velocity(transformer, x, t, *text_of)
                transformer.disable_adapters()
                v_anchor = velocity(transformer, x, t, *text_of)
                transformer.enable_adapters()
            mean_teacher, std = step(x, v_teacher, t, t_next, NOISE, grid[1])
            # Gradient, summed over tasks.
            transformer.set_adapter("student")
            v = velocity(transformer, x, t, *text_of)  # the only tensor with gradient
            mean, _ = step(x, v, t, t_next, NOISE, grid[1])
            loss, _ = opd_ppo(mean, mean_old, mean_teacher, x_next, std)
            anchor_loss, _ = mar(v, v_anchor, 0.02 * weight)
            ((loss + anchor_loss) / len(embeds)).backward()
            kl += (weight * (v.detach() - v_teacher).square()).mean().item() / len(embeds)
        torch.nn.utils.clip_grad_norm_(student, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(kl)
        bar.set_postfix(kl=f"{kl:.2e}")
    print(f"KL to the teachers: {curve[0]:.2e} -> {curve[-1]:.2e}")
    print(f"latents for the VAE: {tuple(unpack(path.x[-1], H, W).shape)}")

    # pipe.load_lora_weights silently loads nothing from what transformer.save_lora_adapter writes.
    config = transformer.peft_config["student"].to_dict()
    config = {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()}
    tensors = get_peft_model_state_dict(transformer, adapter_name="student")
    FluxPipeline.save_lora_weights(args.out, tensors, transformer_lora_adapter_metadata=config)
    print(f"the student's LoRA: {args.out}/pytorch_lora_weights.safetensors")


def parse_args() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    flag = parser.add_argument
    flag("--iterations", type=int, default=140)
    flag("--samples", type=int, default=8, help="per task and iteration (8)")
    flag("--steps", type=int, default=6, help="of a rollout (6)")
    flag("--lr", type=float, default=1e-2)
    flag("--seed", type=int, default=0)
    flag("--out", default="runs/flux", help="folder of the student's LoRA (runs/flux)")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
