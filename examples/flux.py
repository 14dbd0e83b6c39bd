"""Flow-OPD for another flow transformer: FLUX. What changes against Stable Diffusion 3 is the function `velocity`.

    python examples/flux.py                   # a tiny FluxTransformer2DModel with random weights, half a minute on a CPU

Two teachers and the student are LoRAs of one frozen backbone; the weights are random, so nothing is painted that one
could look at, but shapes, conditioning, time grid, adapters and losses are those of the real model. For FLUX.1-dev:
pipe = FluxPipeline.from_pretrained(...), transformer = pipe.transformer, scheduler = pipe.scheduler, and
embeds, pooled, txt_ids = pipe.encode_prompt(prompts, prompts) in place of the random ones. Not run here with it.

Against train_opd.py, which trains SD3:
 1. Latents (B, C, H, W) are packed: a token per 2 x 2 patch, (B, H W / 4, 4 C). sde.py does not mind: its means and
    log-probs are over all dimensions behind the first, whatever they are called.
 2. The positions of tokens are given: img_ids (H W / 4, 3), txt_ids (L, 3).
 3. The transformer takes t in [0, 1] as it is, and multiplies by 1000 itself; SD3's wants 1000 t.
 4. Guidance is a number that the (distilled) model is told, not a second forward pass. FLUX.1-schnell has none.
 5. The scheduler shifts its grid by the number of image tokens (mu).
"""

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # not needed once sde.py and losses.py are copied beside this

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict
from tqdm import tqdm

from losses import mar, opd_ppo
from sde import kl_weight, rollout, step

C, H, W, L, A = 4, 8, 8, 8, 0.7  # latent channels and sides (FLUX.1 at 512 pixels: 16, 64, 64), text tokens, noise level
MU = 0.5 + (1.15 - 0.5) * (H * W // 4 - 256) / (4096 - 256)  # linear in the number of tokens, as FluxPipeline has it
TINY = {"in_channels": 4 * C, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4}
TINY |= {"joint_attention_dim": 32, "pooled_projection_dim": 32, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6)}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


def pack(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, H W / 4, 4 C), as FluxPipeline._pack_latents."""
    B, C, H, W = x.shape
    return x.view(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, H * W // 4, 4 * C)


def unpack(x: torch.Tensor, H: int, W: int) -> torch.Tensor:
    """The reverse, for the VAE: (B, H W / 4, 4 C) -> (B, C, H, W)."""
    B, C = len(x), x.shape[2] // 4
    return x.view(B, H // 2, W // 2, C, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)


def velocity(
    transformer: torch.nn.Module,
    x: torch.Tensor,
    t: torch.Tensor | float,
    embeds: torch.Tensor,
    pooled: torch.Tensor,
    guidance: float = 3.5,
) -> torch.Tensor:
    """v at packed latents x (B, N, 4 C), t in [0, 1] (one, or one per sample): (B, N, 4 C)."""
    img_ids = torch.zeros(H // 2, W // 2, 3)
    img_ids[..., 1], img_ids[..., 2] = torch.arange(H // 2)[:, None], torch.arange(W // 2)
    return transformer(
        hidden_states=x,
        timestep=torch.as_tensor(t).expand(len(x)),  # not 1000 t
        guidance=torch.full((len(x),), guidance) if transformer.config.guidance_embeds else None,
        encoder_hidden_states=embeds,  # (B, L, E), of T5
        pooled_projections=pooled,  # (B, E'), of CLIP
        img_ids=img_ids.flatten(0, 1),  # (N, 3)
        txt_ids=torch.zeros(L, 3),
        return_dict=False,
    )[0]


def main(args):
    torch.manual_seed(args.seed)
    transformer = FluxTransformer2DModel(**TINY).requires_grad_(False).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / args.steps, args.steps).tolist(), mu=MU)
    grid = scheduler.sigmas.tolist()  # T + 1 values, 1 ... 0

    # Adapters of any rank: the student begins as the base (B = 0); the teachers' B is random, so there is something to learn.
    warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are the point
    for name, rank in {"left": 4, "right": 4, "student": 16}.items():
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, init_lora_weights="gaussian")
        transformer.add_adapter(lora, name)
    for name, weight in transformer.named_parameters():
        if ".lora_B.left" in name or ".lora_B.right" in name:
            torch.nn.init.normal_(weight, std=0.3)
    transformer.set_adapter("student")  # peft: this one is active and carries gradient, the others do not
    student = [weight for name, weight in transformer.named_parameters() if "student" in name]
    optimizer = torch.optim.AdamW(student, lr=args.lr)

    # Two tasks, a prompt embedding each, where a real run has a file of prompts and encode_prompt.
    prompts = {"left": torch.randn(2, 1, L, 32).unbind(), "right": torch.randn(2, 1, L, 32).unbind()}
    B, S, kls = args.samples, args.steps - 1, []  # all but the last of the T steps are trained
    for _ in (bar := tqdm(range(args.iterations), "training")):
        kl = 0.0
        for task, (embeds, pooled) in prompts.items():  # every task in every iteration, each with its own teacher
            text = embeds.expand(B, -1, -1), pooled[:, 0].expand(B, -1)
            transformer.set_adapter("student")
            noise = pack(torch.randn(B, C, H, W))
            path = rollout(lambda x, t: velocity(transformer, x, t, *text), noise, grid, A)  # path.x (T + 1, B, N, 4 C)
            # All S trained steps in one pass: states (S B, N, 4 C), their times (S B,), their prompts.
            states, t = path.x[:S].flatten(0, 1), torch.tensor(grid[:S]).repeat_interleave(B)
            text = [part.repeat(S, *[1] * (part.ndim - 1)) for part in text]
            with torch.no_grad():  # labels: the task's teacher, and the base as MAR's anchor
                transformer.set_adapter(task)
                v_teacher = velocity(transformer, states, t, *text).view_as(path.x[:S])  # (S, B, N, 4 C)
                transformer.disable_adapters()
                v_anchor = velocity(transformer, states, t, *text).view_as(path.x[:S])
                transformer.enable_adapters()
            transformer.set_adapter("student")
            v = velocity(transformer, states, t, *text).view_as(path.x[:S])  # the only tensor with gradient
            total = 0.0
            for i in range(S):
                times = (grid[i], grid[i + 1], A, grid[1])
                mean, std = step(path.x[i], v[i], *times)
                mean_teacher, _ = step(path.x[i], v_teacher[i], *times)
                loss, _ = opd_ppo(mean, path.mean[i], mean_teacher, path.x[i + 1], std)
                near, _ = mar(v[i], v_anchor[i], 0.02 * kl_weight(*times))
                total = total + (loss + near) / S / len(prompts)
                kl += kl_weight(*times) * (v[i] - v_teacher[i]).detach().square().mean().item() / S / len(prompts)
            total.backward()
        torch.nn.utils.clip_grad_norm_(student, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        kls.append(kl)
        bar.set_postfix(kl=f"{kl:.2e}")
    print(f"KL to the teachers: {kls[0]:.2e} -> {kls[-1]:.2e}")
    print(f"latents for the VAE: {tuple(unpack(path.x[-1], H, W).shape)}")
    # Not transformer.save_lora_adapter: pipe.load_lora_weights would load nothing from it, and say nothing.
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in transformer.peft_config["student"].to_dict().items()}
    layers = get_peft_model_state_dict(transformer, adapter_name="student")
    FluxPipeline.save_lora_weights(args.out, layers, transformer_lora_adapter_metadata=config)
    print(f"the student's LoRA: {args.out}/pytorch_lora_weights.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=140)
    parser.add_argument("--samples", type=int, default=8, help="per task and iteration (default 8)")
    parser.add_argument("--steps", type=int, default=6, help="of a rollout (default 6)")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/flux", help="folder of the student's LoRA (runs/flux)")
    main(parser.parse_args())
