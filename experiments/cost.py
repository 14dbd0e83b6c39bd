"""What an iteration of a recipe costs, counted and not measured: needs neither weights nor a GPU.

    python experiments/cost.py                                  # the recipes for 8 GPUs and for one
    python experiments/cost.py sd35m_opd --student_guidance 1   # flags of train_opd.py may follow

The transformer of Stable Diffusion 3.5 Medium stands on torch's "meta" device, where tensors have
shapes and no contents. A batch of the recipe goes forward, and for the update backward, and the
FLOP of matrix products, convolutions and attention are added up by torch's own formulas. Beside
them the bytes that an operation reads and writes are counted, if nothing is fused but attention
(eager mode). An iteration is its rows times that; a row is a state with a prompt.

Two estimates of the seconds: all FLOP at the rate that such code reaches, and every operation at
the slower of the peak rate and the memory's (a lower limit). The VAE, the text encoders, Adam, what
processes exchange and the work of Python are not counted.
"""

import sys
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.sd35m import TRANSFORMER, recipe_args
from support import lora

# {recipe: (GPUs, FLOP/s that it reaches on each, peak FLOP/s in bf16, bytes/s)}: an H100 and an RTX
# 4090. With --compile the H100 reached 371 TFLOP/s in the update and 450 without gradient, eagerly
# 203 and 236 (recipes/README.md). That a 4090 reaches the same share of its peak is our assumption.
GPUS = {
    "sd35m_opd": (8, 400e12, 989e12, 3.35e12),
    "sd35m_opd_24gb": (1, 66e12, 165e12, 1.0e12),
}


class Attention(torch.autograd.Function):
    """Fused attention: it reads q, k and v and writes its output, and never the whole matrix."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        Work.add(4 * q.numel() * k.shape[2], q, k, v, q)  # q k^T and its product with v
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx, gradient):
        q, k, v = ctx.saved_tensors
        Work.add(10 * q.numel() * k.shape[2], q, k, v, q, gradient, q, k, v)  # forward's twice, + 2
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class Work(TorchDispatchMode):
    """Adds up (FLOP, bytes) of the operations inside."""

    done = []  # of the innermost: Attention adds to it too

    @classmethod
    def add(cls, flop, *tensors):
        cls.done.append((flop, sum(tensor.numel() * tensor.element_size() for tensor in tensors)))

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.is_view or op.overloadpacket in (torch.ops.aten.empty_like, torch.ops.aten.detach):
            return out
        formula = flop_registry.get(op.overloadpacket)
        flop = formula(*args, **(kwargs or {}), out_val=out) if formula else 0
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if torch.is_tensor(leaf)]
        self.add(flop, *tensors)
        return out


def count(transformer, rows, side, tokens, backward=False):
    """[(FLOP, bytes), ...] of the operations of a batch, for each of its rows."""
    Work.done, config = [], transformer.config
    zeros = lambda *shape: torch.zeros(rows, *shape, device="meta", dtype=torch.bfloat16)
    x, embeds = zeros(config.in_channels, side, side), zeros(tokens, config.joint_attention_dim)
    pooled = zeros(config.pooled_projection_dim)
    attention = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = lambda q, k, v, **_: Attention.apply(q, k, v)
    try:
        with torch.set_grad_enabled(backward), Work():
            t = torch.zeros(rows, device="meta")
            (v,) = transformer(x, embeds, pooled, timestep=t, return_dict=False)
            if backward:
                v.sum().backward()
    finally:
        torch.nn.functional.scaled_dot_product_attention = attention
    return [(flop / rows, size / rows) for flop, size in Work.done]


def rows_of(args):
    """{phase: rows an iteration sends through the transformer}, with guidance two a state."""
    B, S = args.prompts_per_iteration * args.group_size, args.trained_steps
    own, theirs = 1 + (args.student_guidance != 1), 1 + (args.guidance != 1)
    anchor = 0.0  # labels that no teacher has given already
    if args.mar_weight:
        shares = {task: n for task, n in args.task_mix.items() if args.teacher[task] != args.anchor}
        anchor = sum(shares.values()) / sum(args.task_mix.values())
    steps, shown = args.eligible_steps[-1] + 1, 2 * len(args.teacher) * args.eval_steps
    return {
        "rollout": B * steps * own,
        "labels": B * S * (1 + anchor) * theirs,
        "update": B * S * own,
        "pictures": shown * own / args.sample_every if args.sample_every else 0,
    }


def seconds(work, flops, traffic):
    """Each operation takes the longer of its arithmetic and its memory traffic."""
    return sum(max(flop / flops, size / traffic) for flop, size in work)


def count_recipe(recipe, flags):
    with recipe_args(recipe, *flags) as args:
        pass
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**TRANSFORMER).to(torch.bfloat16).eval()
    transformer.requires_grad_(False)
    lora.add_adapter(transformer, "student", rank=args.rank, alpha=args.alpha)
    for parameter in lora.adapter_parameters(transformer, "student").values():
        parameter.requires_grad_(True)  # float32 in training; each is read as bfloat16
    side, tokens = args.size // 8, 77 + args.text_length
    transformer.register_to_config(sample_size=side)
    with lora.use(transformer, "student"):
        forward = count(transformer, 2 * args.label_batch, side, tokens)
        both = count(transformer, 2 * args.micro_batch, side, tokens, backward=True)
    work = dict.fromkeys(("rollout", "labels", "pictures"), forward)
    work["update"] = both + forward * args.checkpointing
    rows = rows_of(args)
    images = args.prompts_per_iteration * args.group_size
    gpus, reached, peak, traffic = GPUS.get(recipe, GPUS["sd35m_opd"])
    print(f"\n{recipe} {' '.join(flags)}: {images} images an iteration, {gpus} GPU(s)")
    print(f"a row: {total(forward):.2f} TFLOP forward, {total(both):.2f} forward and backward\n")
    print("| phase | rows | PFLOP | s at the rate | s by traffic |\n|---|---|---|---|---|")
    sums = [0.0, 0.0, 0.0]
    for phase, number in rows.items():
        flop = number * total(work[phase]) / 1e3
        cells = [flop, 1e15 * flop / reached / gpus]
        cells.append(number * seconds(work[phase], peak, traffic) / gpus)
        sums = [a + b for a, b in zip(sums, cells)]
        print(f"| {phase} | {number:.0f} | {' | '.join(f'{cell:.1f}' for cell in cells)} |")
    print(f"| together | | {' | '.join(f'{cell:.1f}' for cell in sums)} |")
    hours = [args.iterations * second / 3600 for second in sums[1:]]
    how = f"{hours[0]:.1f} hours at the rate, {hours[1]:.1f} by traffic"
    print(f"\n{args.iterations} iterations: {how}")
    # The public code: all steps sampled; teacher, anchor and student at every trained state.
    states = 2 * images * args.trained_steps
    public = 2 * images * args.steps * total(forward) + states * (2 * total(forward) + total(both))
    again = public + states * total(forward)
    print(f"the public way: {public / 1e3:.1f} PFLOP, {again / 1e3:.1f} with checkpointing")


def total(work):
    """TFLOP."""
    return sum(flop for flop, _ in work) / 1e12


def main():
    recipes = [word for word in sys.argv[1:2] if not word.startswith("--")] or list(GPUS)
    flags = [word for word in sys.argv[1:] if word not in recipes]
    for recipe in recipes:
        count_recipe(recipe, flags)


if __name__ == "__main__":
    main()
