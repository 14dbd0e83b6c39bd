"""The training loops once more, slowly: one sample and one step at a time.

Nothing comes from the scripts, sde.py, losses.py or support/: stock diffusers loads pipeline and
LoRAs, every equation is written out anew. test_iteration.py compares the scripts with these loops.
"""

import hashlib
import math
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import StableDiffusion3Pipeline

from rewards.monitors import colour_entropy, diversity, edge_density
from toy import REWARDS

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "toy"


def generator(*key):
    """The documented rule: the key's words joined by /, blake2b, seven bytes, little-endian."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def schedule(prompts, shares, seed, slots, iterations):
    """(task, prompt) of every slot: tasks in a cycle by share, prompts in shuffled passes."""
    cycle = [task for task in prompts for _ in range(shares[task])]
    passes = {task: [] for task in prompts}
    number = dict.fromkeys(prompts, 0)
    chosen = []
    for slot in range(slots * iterations):
        task = cycle[slot % len(cycle)]
        if not passes[task]:
            own = generator(seed, task, "pass", number[task])
            passes[task] = torch.randperm(len(prompts[task]), generator=own).tolist()
            number[task] += 1
        chosen.append((task, prompts[task][passes[task].pop(0)]))
    return [chosen[i * slots : (i + 1) * slots] for i in range(iterations)]


class Models:
    """A stock pipeline with LoRAs that stock diffusers loads; one velocity at a time."""

    def __init__(self, adapters, student):
        self.pipe = StableDiffusion3Pipeline.from_pretrained(TOY, variant=None)
        self.pipe.transformer.requires_grad_(False).eval()
        for name, path in {**adapters, "student": student}.items():
            self.pipe.load_lora_weights(path, adapter_name=name)
        self.named = {}
        for name, parameter in self.pipe.transformer.named_parameters():
            parameter.requires_grad_(".student." in name)
            if ".student." in name:
                self.named[name.replace(".student.", ".")] = parameter
        self.start = {name: p.detach().clone() for name, p in self.named.items()}
        self.average, self.best = dict(self.start), None
        config = self.pipe.transformer.config
        self.shape = (config.in_channels, config.sample_size, config.sample_size)
        self.text, self.active = {}, "none yet"
        self.pipe.scheduler.set_timesteps(1)

    def grid(self, steps):
        self.pipe.scheduler.set_timesteps(steps)
        return self.pipe.scheduler.sigmas.tolist()

    def embed(self, prompt):
        if prompt not in self.text:
            with torch.no_grad():
                out = self.pipe.encode_prompt(
                    prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=8
                )
            self.text[prompt] = out[0], out[2]
        return self.text[prompt]

    def velocity(self, lora, x, t, prompt, guidance):
        transformer = self.pipe.transformer
        if lora != self.active:  # switching takes longer than a velocity
            if lora:
                transformer.enable_lora()
                transformer.set_adapters(lora)
            else:
                transformer.disable_lora()
            for name, p in transformer.named_parameters():  # the calls above change it
                p.requires_grad_(".student." in name)
            self.active = lora

        def at(words):
            embeds, pooled = self.embed(words)
            time = torch.tensor([1000 * t])
            return transformer(x[None], embeds, pooled, timestep=time, return_dict=False)[0][0]

        if guidance == 1:
            return at(prompt)
        empty = at("")
        return empty + guidance * (at(prompt) - empty)


def euler(models, lora, prompt, key, steps, guidance):
    """The latent that an ODE of so many steps leads to from the noise of this key."""
    x, grid = torch.randn(models.shape, generator=generator(*key)), models.grid(steps)
    for t, t_next in zip(grid[:-1], grid[1:]):
        with torch.no_grad():
            x = x - (t - t_next) * models.velocity(lora, x, t, prompt, guidance)
    return x


def picture(models, latent):
    """The decoded image: (3, H, W) in 0..1."""
    vae = models.pipe.vae.float()
    with torch.no_grad():
        z = latent / vae.config.scaling_factor + vae.config.shift_factor
        return (vae.decode(z[None]).sample[0] / 2 + 0.5).clamp(0, 1)


def pictures(models, weights, items, steps, guidance):
    """Of ODE samples of the student with other weights; items: (prompt, key of its noise)."""
    now = {name: p.detach().clone() for name, p in models.named.items()}
    put = lambda new: [p.data.copy_(new[name]) for name, p in models.named.items()]
    put(weights)
    latents = [euler(models, "student", *item, steps, guidance) for item in items]
    put(now)
    return [picture(models, latent) for latent in latents]


def policy(x, v, t, t_next, a, t_1, kind):
    """(mean, std) of one step of one sample: method of Flow-GRPO, DanceGRPO or CPS."""
    dt = t - t_next
    if kind == "cps":
        std = t_next * math.sin(a * math.pi / 2)
        data, noise = x - t * v, x + (1 - t) * v
        return (1 - t_next) * data + math.sqrt(t_next**2 - std**2) * noise, std
    if kind == "dance":
        sigma = a
    else:
        sigma = a * math.sqrt(t / (1 - (t_1 if t == 1 else t)))
    score_pull = sigma**2 / (2 * t) * (x + (1 - t) * v)
    return x - dt * (v + score_pull), sigma * math.sqrt(dt)


def log_density(x, mean, std):
    """log Normal(x; mean, std^2) of every coordinate."""
    return -((x - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)


def clipped(ratio, reward, clip):
    """PPO's objective, to be maximised, and its two numbers for the log."""
    low = torch.minimum(ratio * reward, ratio.clamp(1 - clip, 1 + clip) * reward)
    gap = (ratio - 1).abs().detach()
    return low, gap.mean().item(), (gap > clip).float().mean().item()


class Descent:
    """AdamW, the clipping of the gradient and the average, by hand. Updates whose number, from 1,
    is in f.skip are counted as if their gradient were infinite: the average is updated alone."""

    def __init__(self, models, f):
        self.models, self.f, self.updates, self.steps, self.skipped = models, f, 0, 0, 0
        self.m = {name: torch.zeros_like(p) for name, p in models.named.items()}
        self.s = {name: torch.zeros_like(p) for name, p in models.named.items()}

    def step(self, gradients):
        """gradients {name: tensor}. Returns their norm before clipping."""
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
        self.updates += 1
        if self.updates in self.f.skip:
            norm, self.skipped = None, self.skipped + 1
        else:
            self.descend(gradients, min(1.0, self.f.grad_norm / (norm + 1e-6)))
        if self.updates % self.f.ema_every == 0:
            keep = min((1 + self.updates) / (10 + self.updates), self.f.ema_decay)
            for name, p in self.models.named.items():
                old = self.models.average[name]
                self.models.average[name] = keep * old + (1 - keep) * p.detach()
        return norm

    def descend(self, gradients, shrink):
        self.steps += 1
        for name, p in self.models.named.items():
            g = gradients[name] * shrink
            self.m[name] = 0.9 * self.m[name] + 0.1 * g
            self.s[name] = 0.999 * self.s[name] + 0.001 * g * g
            m, s = self.m[name] / (1 - 0.9**self.steps), self.s[name] / (1 - 0.999**self.steps)
            with torch.no_grad():
                p.mul_(1 - self.f.lr * 1e-4)
                p.sub_(self.f.lr * m / (s.sqrt() + 1e-8))

    def log(self, line, slots):
        """The line, with what it says of updates that were skipped in its iteration."""
        if self.skipped:
            prompts = [prompt for _, prompt in slots]
            line |= {"skipped_updates": self.skipped, "skipped_prompts": prompts}
        self.skipped = 0
        return line


def gradient_of(loss, models):
    """{name: gradient} of one scalar."""
    names = list(models.named)
    found = torch.autograd.grad(loss, [models.named[n] for n in names], allow_unused=True)
    return {n: torch.zeros_like(models.named[n]) if g is None else g for n, g in zip(names, found)}


def add(total, more):
    for name, tensor in more.items():
        total[name] = total[name] + tensor if name in total else tensor
    return total


def dot(one, other):
    return sum((one[name].double() * other[name].double()).sum().item() for name in one)


def read(task, split="train"):
    return (TOY / "prompts" / f"{task}_{split}.txt").read_text().split("\n")[:-1]


def opd(**flags):
    """train_opd.py: (student, average, log)."""
    f = SimpleNamespace(
        objective="ppo", mar_weight=0.02, clip_range=0.2, prompts_per_iteration=4, group_size=2,
        steps=4, trained=None, random_steps=0, noise=0.7, noise_kind="flow", guidance=1.0,
        student_guidance=None, teacher_guidance={}, task_mix={}, iterations=2, updates=2, lr=1e-3,
        grad_norm=1.0, ema_decay=0.9, ema_every=1, seed=0, anchor="deqa", init="merged", skip=(),
        tasks=("geneval", "ocr", "deqa", "pickscore"),
    )  # fmt: skip
    f.__dict__.update(flags)
    student_guidance = f.guidance if f.student_guidance is None else f.student_guidance
    adapters = {f"t_{task}": TOY / "adapters" / task for task in f.tasks}
    if f.anchor != "base":
        adapters["anchor"] = TOY / "adapters" / f.anchor
    models = Models(adapters, TOY / "adapters" / f.init)
    descent, grid, log = Descent(models, f), models.grid(f.steps), []
    shares = {task: f.task_mix.get(task, 1) for task in f.tasks}
    prompts = {task: read(task) for task in f.tasks}
    slots = schedule(prompts, shares, f.seed, f.prompts_per_iteration, f.iterations)
    B = f.prompts_per_iteration * f.group_size
    for iteration in range(f.iterations):
        eligible = list(range(f.steps - 1)) if f.trained is None else f.trained
        trained = eligible
        if f.random_steps:
            own = generator(f.seed, "steps", iteration)
            order = torch.randperm(len(eligible), generator=own).tolist()
            trained = sorted(eligible[j] for j in order[: f.random_steps])
        rows = {}  # (sample, step): all that was visited and labelled
        for i in range(B):
            task, prompt = slots[iteration][i // f.group_size]
            own = generator(f.seed, "rollout", iteration, i)
            x = torch.randn(models.shape, generator=own)
            for j in range(max(trained) + 1):
                t, t_next = grid[j], grid[j + 1]
                with torch.no_grad():
                    v = models.velocity("student", x, t, prompt, student_guidance)
                    mean, std = policy(x, v, t, t_next, f.noise, grid[1], f.noise_kind)
                    x_next = mean
                    if std > 0:
                        x_next = mean + std * torch.randn(models.shape, generator=own)
                    if j in trained:
                        scale = f.teacher_guidance.get(task, f.guidance)
                        label = models.velocity(f"t_{task}", x, t, prompt, scale)
                        to, _ = policy(x, label, t, t_next, f.noise, grid[1], f.noise_kind)
                        anchor = None if f.anchor == "base" else "anchor"
                        v_anchor = models.velocity(anchor, x, t, prompt, f.guidance)
                        one, _ = policy(0.0, 1.0, t, t_next, f.noise, grid[1], f.noise_kind)
                        width = std or 1.0  # without noise: half the squared distance
                        rows[i, j] = SimpleNamespace(
                            task=task, prompt=prompt, t=t, t_next=t_next, x=x, x_next=x_next,
                            old=mean, to=to, std=std, v_anchor=v_anchor, w=one**2 / (2 * width**2),
                            kl=((mean - to) ** 2).mean().item() / (2 * width**2),
                        )  # fmt: skip
                x = x_next
        line = {"iteration": iteration}
        for task in f.tasks:
            of_task = [row.kl for row in rows.values() if row.task == task]
            if of_task:
                line[f"kl/{task}"] = sum(of_task) / len(of_task)
        means = {}
        for update in range(f.updates):
            own = [key for key in rows if key[0] % f.updates == update]
            per_task = {}
            for i, j in own:
                row = rows[i, j]
                v = models.velocity("student", row.x, row.t, row.prompt, student_guidance)
                mean, std = policy(row.x, v, row.t, row.t_next, f.noise, grid[1], f.noise_kind)
                values = {}
                if f.objective == "ppo":
                    log_old = log_density(row.x_next, row.old, std)
                    ratio = (log_density(row.x_next, mean, std) - log_old).exp()
                    reward = log_density(row.x_next, row.to, std) - log_old
                    low, values["ratio_gap"], values["clip_fraction"] = clipped(
                        ratio, reward, f.clip_range
                    )
                    loss = -low.mean()
                elif f.objective.startswith("ppo-"):  # one ratio and one reward per image
                    log_old = log_density(row.x_next, row.old, std).mean()
                    ratio = (log_density(row.x_next, mean, std).mean() - log_old).exp()
                    reward, factor = log_density(row.x_next, row.to, std).mean() - log_old, 1
                    if f.objective == "ppo-scalar":
                        factor = mean.numel()
                    else:
                        reward = -((mean - row.to) ** 2).mean() / (2 * std**2)
                    if f.objective == "ppo-published":
                        reward = reward.detach()
                    low, values["ratio_gap"], values["clip_fraction"] = clipped(
                        ratio, reward, f.clip_range
                    )
                    loss = -factor * low
                elif f.objective == "kl":
                    loss = ((mean - row.to) ** 2).mean() / (2 * std**2)
                elif f.objective == "ode":
                    loss = ((mean - row.to) ** 2).mean() / 2
                elif f.objective == "trajectory":
                    log_old = log_density(row.x_next, row.old, std).mean()
                    ratio = (log_density(row.x_next, mean, std).mean() - log_old).exp()
                    later = sum(rows[i, k].kl for k in trained if k > j)
                    low, values["ratio_gap"], values["clip_fraction"] = clipped(
                        ratio, torch.tensor(-later), f.clip_range
                    )
                    loss = ((mean - row.to) ** 2).mean() / (2 * std**2) - mean.numel() * low
                penalty = f.mar_weight * row.w * ((v - row.v_anchor) ** 2).mean()
                values |= {"mar": penalty.item(), "loss": (loss + penalty).item()}
                for name, value in values.items():
                    means[name] = means.get(name, 0.0) + value / len(own) / f.updates
                gradient = gradient_of((loss + penalty) / len(own), models)
                add(per_task.setdefault(row.task, {}), gradient)
            total = {}
            for task in f.tasks:
                add(total, per_task.get(task, {}))
            norm = descent.step(total)
        line |= means | {"grad_norm": norm}
        present = [task for task in f.tasks if task in per_task]  # of the last update
        for n, task in enumerate(present):
            line[f"grad_norm/{task}"] = math.sqrt(dot(per_task[task], per_task[task]))
            for other in present[n + 1 :]:
                both = math.sqrt(dot(per_task[task], per_task[task]))
                both *= math.sqrt(dot(per_task[other], per_task[other]))
                line[f"cosine/{task}-{other}"] = dot(per_task[task], per_task[other]) / both
        log.append(descent.log(line, slots[iteration]))
    return models, log


def reward_of(image, task, prompt, f):
    """Of one image (3, H, W): the miniature's scorers, each put on 0..1 by its range, weighted."""
    weights = f.reward
    if f.mix:
        weights = {task: 1 - f.mix_quality, "deqa": f.mix_quality}
        if task == "deqa":
            weights = {"deqa": 1.0}
    total = 0.0
    for name, weight in weights.items():
        low, high = REWARDS[name].range
        own = REWARDS[name](image[None], [prompt], [{}]).double().item()
        total += weight * (own - low) / (high - low)
    return total / sum(weights.values())


def grpo(**flags):
    """train_teacher.py: (models, log). models.best: the average with the best test."""
    f = SimpleNamespace(
        reward={"ocr": 1.0}, mix=None, mix_quality=0.2, tasks=("ocr",), prompts_per_iteration=4,
        group_size=3, steps=4, noise=0.7, noise_kind="flow", window=0, window_end=0, guidance=1.0,
        iterations=2, updates=1, lr=1e-3, clip_range=1e-2, beta=0.0, std="global", grad_norm=1.0,
        ema_decay=0.9, ema_every=1, seed=0, init="merged", skip=(), eval_every=0, eval_prompts=2,
        eval_steps=2,
    )  # fmt: skip
    f.__dict__.update(flags)
    models = Models({}, TOY / "adapters" / f.init)
    descent, grid, log = Descent(models, f), models.grid(f.steps), []
    tasks = list(f.mix) if f.mix else list(f.tasks)
    shares = f.mix or dict.fromkeys(tasks, 1)
    prompts = {task: read(task) for task in tasks}
    slots = schedule(prompts, shares, f.seed, f.prompts_per_iteration, f.iterations)
    B = f.prompts_per_iteration * f.group_size
    for iteration in range(f.iterations):
        trained = list(range(f.steps - 1))
        if f.window:
            end = f.window_end or f.steps - 1
            own = generator(f.seed, "window", iteration)
            first = torch.randint(end - f.window + 1, (), generator=own).item()
            trained = list(range(first, first + f.window))
        rows, rewards, images = {}, [], []
        for i in range(B):
            task, prompt = slots[iteration][i // f.group_size]
            own = generator(f.seed, "rollout", iteration, i)
            x = torch.randn(models.shape, generator=own)
            for j in range(f.steps):
                t, t_next = grid[j], grid[j + 1]
                a = f.noise if not f.window or j in trained else 0.0
                kind = f.noise_kind if a else "flow"
                with torch.no_grad():
                    v = models.velocity("student", x, t, prompt, f.guidance)
                    mean, std = policy(x, v, t, t_next, a, grid[1], kind)
                    x_next = mean
                    if std > 0:
                        x_next = mean + std * torch.randn(models.shape, generator=own)
                if j in trained:
                    old = log_density(x_next, mean, std).mean()
                    rows[i, j] = (x, x_next, t, t_next, old, std)
                x = x_next
            images.append(picture(models, x))
            rewards.append(reward_of(images[-1], task, prompt, f))
        advantage = [0.0] * B
        for task in tasks:
            mine = [i for i in range(B) if slots[iteration][i // f.group_size][0] == task]
            over_all = torch.tensor([rewards[i] for i in mine]).double()
            for i in mine:
                g = i // f.group_size * f.group_size
                group = torch.tensor(rewards[g : g + f.group_size]).double()
                spread = over_all if f.std == "global" else group
                spread = ((spread - spread.mean()) ** 2).mean().sqrt().item()
                value = (rewards[i] - group.mean().item()) / (spread + 1e-4)
                advantage[i] = max(-5.0, min(5.0, value))
        line, means = {"iteration": iteration, "reward": sum(rewards) / B}, {}
        for task in tasks:
            own = [rewards[i] for i in range(B) if slots[iteration][i // f.group_size][0] == task]
            if own:
                line[f"reward/{task}"] = sum(own) / len(own)
        groups = [rewards[i : i + f.group_size] for i in range(0, B, f.group_size)]
        flat = [max(group) - min(group) < 1e-6 for group in groups]
        line["flat_groups"] = sum(flat) / len(flat)
        words = [slots[iteration][i // f.group_size][1] for i in range(B)]
        for monitor in (edge_density, colour_entropy, diversity):
            line[f"monitor/{monitor.name}"] = monitor(torch.stack(images), words).mean().item()
        for update in range(f.updates):
            own, total = [key for key in rows if key[0] % f.updates == update], {}
            for i, j in own:
                x, x_next, t, t_next, old, std = rows[i, j]
                prompt = slots[iteration][i // f.group_size][1]
                v = models.velocity("student", x, t, prompt, f.guidance)
                mean, _ = policy(x, v, t, t_next, f.noise, grid[1], f.noise_kind)
                ratio = (log_density(x_next, mean, std).mean() - old).exp()
                low, gap, outside = clipped(ratio, torch.tensor(advantage[i]), f.clip_range)
                loss, values = -low, {"ratio_gap": gap, "clip_fraction": outside}
                if f.beta:
                    with torch.no_grad():
                        v_base = models.velocity(None, x, t, prompt, f.guidance)
                    base, _ = policy(x, v_base, t, t_next, f.noise, grid[1], f.noise_kind)
                    kl = ((mean - base) ** 2).mean() / (2 * std**2)
                    loss, values["kl_base"] = loss + f.beta * kl, kl.item()
                for name, value in values.items():
                    means[name] = means.get(name, 0.0) + value / len(own) / f.updates
                add(total, gradient_of(loss / len(own), models))
            norm = descent.step(total)
        line |= means | {"grad_norm": norm}
        done = iteration + 1
        if f.eval_every and (done % f.eval_every == 0 or done == f.iterations):
            for task in tasks:
                words = read(task, "test")[: f.eval_prompts]
                items = [(words[i], (f.seed, "test", task, i)) for i in range(len(words))]
                images = pictures(models, models.average, items, f.eval_steps, f.guidance)
                own = [reward_of(image, task, item[0], f) for image, item in zip(images, items)]
                line[f"test/{task}"] = sum(own) / len(own)
            line["test"] = sum(line[f"test/{task}"] for task in tasks) / len(tasks)
            if line["test"] > max((old.get("test", -1) for old in log), default=-1):
                models.best = dict(models.average)
        log.append(descent.log(line, slots[iteration]))
    return models, log


def sft(**flags):
    """train_sft.py: (models, log). The teachers' samples are made here too, with Euler's method."""
    f = SimpleNamespace(
        tasks=("ocr", "deqa"), task_mix={}, sft_images=5, batch=3, eval_steps=2, iterations=3,
        guidance=1.0, teacher_guidance={}, lr=1e-3, grad_norm=1.0, ema_decay=0.9, ema_every=1,
        seed=0, init="merged", skip=(),
    )  # fmt: skip
    f.__dict__.update(flags)
    adapters = {f"t_{task}": TOY / "adapters" / task for task in f.tasks}
    models = Models(adapters, TOY / "adapters" / f.init)
    shares = {task: f.task_mix.get(task, 1) for task in f.tasks}
    prompts = {task: read(task) for task in f.tasks}
    slots = schedule(prompts, shares, f.seed, f.sft_images, 1)[0]
    images = []
    for i, (task, prompt) in enumerate(slots):
        scale = f.teacher_guidance.get(task, f.guidance)
        images.append(euler(models, f"t_{task}", prompt, (f.seed, "sft", i), f.eval_steps, scale))
    numbers = {"image": list(range(f.sft_images))}
    order = schedule(numbers, {"image": 1}, f.seed, f.batch, f.iterations)
    descent, log = Descent(models, f), []
    for iteration in range(f.iterations):
        total, mean = {}, 0.0
        for i in range(f.batch):
            number = order[iteration][i][1]
            own = generator(f.seed, "sft", iteration, i)
            noise, t = torch.randn(models.shape, generator=own), torch.rand(1, generator=own).item()
            x = (1 - t) * images[number] + t * noise
            v = models.velocity("student", x, t, slots[number][1], 1)
            loss = ((v - (noise - images[number])) ** 2).mean()
            mean += loss.item() / f.batch
            add(total, gradient_of(loss / f.batch, models))
        line = {"iteration": iteration, "loss": mean, "grad_norm": descent.step(total)}
        log.append(descent.log(line, order[iteration]))  # an image's number stands for its prompt
    return models, log
