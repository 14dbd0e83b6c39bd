"""The training loops once more, slowly: one sample and one step at a time, for the miniature.

Nothing comes from the scripts, sde.py, losses.py or support/: stock diffusers loads pipeline and
LoRAs, every equation is written out anew. tests/test_iteration.py holds the scripts against these
loops, number by number. Read them where a line of a script is not clear. `ties` is for merge.py.
"""

import hashlib
import itertools
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


def clipped(log_ratio, reward, clip):
    """PPO's objective, to be maximised, and its two numbers for the log."""
    ratio = log_ratio.exp()
    low = torch.minimum(ratio * reward, ratio.clamp(1 - clip, 1 + clip) * reward).mean()
    gap = (ratio - 1).abs().detach()
    outside = (gap > clip).float().mean().item()
    return low, {"ratio_gap": gap.mean().item(), "clip_fraction": outside}


def visit(models, f, grid, key, prompt, noisy, last, guidance):
    """All that the student's SDE visits: a row per step up to `last`."""
    own, rows = generator(*key), []
    x = torch.randn(models.shape, generator=own)
    for j in range(last + 1):
        t, t_next = grid[j], grid[j + 1]
        how = (f.noise, grid[1], f.noise_kind) if j in noisy else (0.0, grid[1], "flow")
        with torch.no_grad():
            v = models.velocity("student", x, t, prompt, guidance)
        mean, std = policy(x, v, t, t_next, *how)
        x_next = mean
        if std > 0:
            x_next = mean + std * torch.randn(models.shape, generator=own)
        row = {"x": x, "x_next": x_next, "old": mean, "std": std, "how": (t, t_next, *how)}
        rows.append(SimpleNamespace(**row, j=j, t=t, prompt=prompt))
        x = x_next
    return rows


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

    def log(self, line):
        """The line, with what it says of updates that were skipped in its iteration."""
        if self.skipped:
            line |= {"skipped_updates": self.skipped}
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


def spaced(prompts, number):
    """So many prompts, at equal distances from the first on."""
    return [prompts[int(i * len(prompts) / number)] for i in range(number)]


def read(task, split="train"):
    return (TOY / "prompts" / f"{task}_{split}.txt").read_text().split("\n")[:-1]


def begin(flags, teachers, anchor="base"):
    """Flags, models, what descends, and (task, prompt) of all slots."""
    f = SimpleNamespace(
        noise=0.7, noise_kind="flow", guidance=1.0, teacher_guidance={}, task_mix={}, lr=1e-3,
        grad_norm=1.0, ema_decay=0.9, ema_every=1, seed=0, init="merged", skip=(), updates=2,
        tasks=("geneval", "ocr", "deqa", "pickscore"), mix=None,
    )  # fmt: skip
    f.__dict__.update(flags)
    if f.mix:
        f.tasks, f.task_mix = list(f.mix), f.mix
    adapters = {f"t_{task}": TOY / "adapters" / task for task in f.tasks if teachers}
    if anchor != "base":
        adapters["anchor"] = TOY / "adapters" / anchor
    models = Models(adapters, TOY / "adapters" / f.init)
    shares = {task: f.task_mix.get(task, 1) for task in f.tasks}
    prompts = {task: read(task) for task in f.tasks}
    return (
        f,
        models,
        Descent(models, f),
        schedule(prompts, shares, f.seed, f.prompts_per_iteration, f.iterations),
    )


def opd(objective="ppo", mar_weight=0.02, clip_range=0.2, anchor="deqa", student_guidance=None,
        trained=None, random_steps=0, step_weights="kl", **flags):  # fmt: skip
    """train_opd.py: (models, log)."""
    f, models, descent, slots = begin({"lr": 2e-3} | flags, True, anchor)
    guidance = f.guidance if student_guidance is None else student_guidance
    grid, log, eligible = models.grid(f.steps), [], trained or list(range(f.steps - 1))
    for iteration in range(f.iterations):
        trained = eligible
        if random_steps:
            own = generator(f.seed, "steps", iteration)
            order = torch.randperm(len(eligible), generator=own).tolist()
            trained = sorted(eligible[j] for j in order[:random_steps])
        rows = []  # all that was visited and labelled
        for i in range(f.prompts_per_iteration * f.group_size):
            task, prompt = slots[iteration][i // f.group_size]
            key, last = (f.seed, "rollout", iteration, i), max(trained)
            later = 0.0  # the KL of later trained steps
            visited = visit(models, f, grid, key, prompt, range(f.steps), last, guidance)
            for row in [row for row in visited if row.j in trained][::-1]:
                scale = f.teacher_guidance.get(task, f.guidance)
                with torch.no_grad():
                    v = models.velocity(f"t_{task}", row.x, row.t, prompt, scale)
                    lora = None if anchor == "base" else "anchor"
                    row.v_anchor = models.velocity(lora, row.x, row.t, prompt, f.guidance)
                row.task, row.i, row.later = task, i, later
                row.to = policy(row.x, v, *row.how)[0]
                width = row.std or 1.0  # without noise: half the squared distance
                row.kl = ((row.old - row.to) ** 2).mean().item() / (2 * width**2)
                row.w = policy(0.0, 1.0, *row.how)[0] ** 2 / (2 * width**2)
                later += row.kl
                rows.append(row)
        line, means = {"iteration": iteration}, {}
        for task in {row.task for row in rows}:
            of_task = [row.kl for row in rows if row.task == task]
            line[f"kl/{task}"] = sum(of_task) / len(of_task)
        for update in range(f.updates):
            own, per_task = [row for row in rows if row.i % f.updates == update], {}
            for row in own:
                v, values = models.velocity("student", row.x, row.t, row.prompt, guidance), {}
                mean, std = policy(row.x, v, *row.how)[0], row.std or 1.0
                D, loss = mean.numel(), ((mean - row.to) ** 2).mean() / (2 * std**2)
                if objective not in ("kl", "ode"):
                    per = torch.as_tensor if objective == "ppo" else torch.mean  # or per image
                    log_new, log_old, log_to = (
                        per(log_density(row.x_next, m, std)) for m in (mean, row.old, row.to)
                    )
                    reward = log_to - log_old
                    if objective in ("ppo-published", "ppo-public-code"):
                        reward = -loss
                    if objective == "ppo-published":
                        reward = reward.detach()
                    if objective == "trajectory":
                        reward = torch.tensor(-row.later)
                    low, values = clipped(log_new - log_old, reward, clip_range)
                    factor = D if objective in ("ppo-scalar", "trajectory") else 1
                    loss = loss * (objective == "trajectory") - factor * low
                penalty = mar_weight * row.w * ((v - row.v_anchor) ** 2).mean()
                values |= {"mar": penalty.item(), "loss": (loss + penalty).item()}
                add(means, {name: x / len(own) / f.updates for name, x in values.items()})
                weight = 1 / row.w if step_weights == "equal" else 1.0
                gradient = gradient_of(weight * (loss + penalty) / len(own), models)
                add(per_task.setdefault(row.task, {}), gradient)
            total = {}
            for gradient in per_task.values():
                add(total, gradient)
            norm = descent.step(total)
        line |= means | {"grad_norm": norm}
        present = [task for task in f.tasks if task in per_task]  # in the last update
        for task in present:
            line[f"grad_norm/{task}"] = math.sqrt(dot(per_task[task], per_task[task]))
        for one, other in itertools.combinations(present, 2):
            both = line[f"grad_norm/{one}"] * line[f"grad_norm/{other}"]
            line[f"cosine/{one}-{other}"] = dot(per_task[one], per_task[other]) / both
        log.append(descent.log(line))
    return models, log


def report(models, guidance, student_guidance):
    """The end of train_opd.py, on two test prompts a task in two steps: {(model, task): mean score}
    of start and average, and by how much Average rises, with its standard error."""
    scores, gain, variance = {}, 0.0, 0.0
    for task, scale in {"geneval": 1, "ocr": 1, "deqa": 5, "pickscore": 26}.items():
        prompts = spaced(read(task, "test"), 2)
        items = [(prompt, (0, "evaluate", task, j)) for j, prompt in enumerate(prompts)]
        for name, weights, scale_of in (
            ("merged start", models.start, guidance),
            ("student", models.average, student_guidance),
        ):
            images = torch.stack(pictures(models, weights, items, 2, scale_of))
            images = (images * 255).round() / 255  # as files hold them
            scores[name, task] = REWARDS[task](images, prompts).double()
        difference = (scores["student", task] - scores["merged start", task]) / scale / 4
        gain, variance = gain + difference.mean().item(), variance + difference.var().item() / 2
    means = {key: values.mean().item() for key, values in scores.items()}
    return means, [gain, math.sqrt(variance)]


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


def grpo(reward=None, mix_quality=0.2, window=0, window_end=0, clip_range=1e-2, beta=0.0,
         std="global", eval_every=0, eval_prompts=2, eval_steps=2, **flags):  # fmt: skip
    """train_teacher.py: (models, log). models.best: the average with the best test."""
    f, models, descent, slots = begin({"tasks": list(reward or ())} | flags, False)
    f.reward, f.mix_quality, G = reward, mix_quality, f.group_size
    B, grid, log = f.prompts_per_iteration * G, models.grid(f.steps), []
    for iteration in range(f.iterations):
        trained, noisy = range(f.steps - 1), range(f.steps)
        if window:
            own = generator(f.seed, "window", iteration)
            last_first = (window_end or f.steps - 1) - window
            first = torch.randint(last_first + 1, (), generator=own).item()
            trained = noisy = range(first, first + window)
        rows, rewards, images, tasks, words = [], [], [], [], []
        for i in range(B):
            task, prompt = slots[iteration][i // G]
            key = (f.seed, "rollout", iteration, i)
            visited = visit(models, f, grid, key, prompt, noisy, f.steps - 1, f.guidance)
            for row in visited:
                row.i = i
            rows += [row for row in visited if row.j in trained]
            images.append(picture(models, visited[-1].x_next))
            rewards.append(reward_of(images[-1], task, prompt, f))
            tasks.append(task)
            words.append(prompt)
        line, means = {"iteration": iteration, "reward": sum(rewards) / B}, {}
        groups = [torch.tensor(rewards[i : i + G]).double() for i in range(0, B, G)]
        advantage = []
        for i in range(B):
            group = groups[i // G]
            of_task = [own for own, task in zip(rewards, tasks) if task == tasks[i]]
            line[f"reward/{tasks[i]}"] = sum(of_task) / len(of_task)
            spread = torch.tensor(of_task).double() if std == "global" else group
            value = (rewards[i] - group.mean()) / (spread.std(correction=0) + 1e-4)
            advantage.append(value.clamp(-5, 5).float())
        line["flat_groups"] = sum(float(g.max() - g.min() < 1e-6) for g in groups) / len(groups)
        for monitor in (edge_density, colour_entropy, diversity):
            line[f"monitor/{monitor.name}"] = monitor(torch.stack(images), words).mean().item()
        for update in range(f.updates):
            own, total = [row for row in rows if row.i % f.updates == update], {}
            for row in own:
                v = models.velocity("student", row.x, row.t, row.prompt, f.guidance)
                mean = policy(row.x, v, *row.how)[0]
                log_new, log_old = (
                    log_density(row.x_next, m, row.std).mean() for m in (mean, row.old)
                )
                low, values = clipped(log_new - log_old, advantage[row.i], clip_range)
                loss = -low
                if beta:
                    with torch.no_grad():
                        v_base = models.velocity(None, row.x, row.t, row.prompt, f.guidance)
                    square = (mean - policy(row.x, v_base, *row.how)[0]) ** 2
                    kl = square.mean() / (2 * row.std**2)
                    loss, values["kl_base"] = loss + beta * kl, kl.item()
                add(means, {name: x / len(own) / f.updates for name, x in values.items()})
                add(total, gradient_of(loss / len(own), models))
            norm = descent.step(total)
        line |= means | {"grad_norm": norm}
        done = iteration + 1
        if eval_every and (done % eval_every == 0 or done == f.iterations):
            for task in f.tasks:
                words = spaced(read(task, "test"), eval_prompts)
                items = [(prompt, (f.seed, "test", task, i)) for i, prompt in enumerate(words)]
                images = pictures(models, models.average, items, eval_steps, f.guidance)
                own = [reward_of(image, task, word, f) for image, word in zip(images, words)]
                line[f"test/{task}"] = sum(own) / len(own)
            line["test"] = sum(line[f"test/{task}"] for task in f.tasks) / len(f.tasks)
            if line["test"] > max((old.get("test", -1) for old in log), default=-1):
                models.best = dict(models.average)
        log.append(descent.log(line))
    return models, log


def sft(sft_images, batch, eval_steps, **flags):
    """train_sft.py: (models, log). The teachers' samples are made here too, with Euler's method."""
    f, models, descent, slots = begin(flags | {"prompts_per_iteration": sft_images}, True)
    log, images = [], []
    for i, (task, prompt) in enumerate(slots[0]):
        scale = f.teacher_guidance.get(task, f.guidance)
        images.append(euler(models, f"t_{task}", prompt, (f.seed, "sft", i), eval_steps, scale))
    numbers = {"image": list(range(sft_images))}
    order = schedule(numbers, {"image": 1}, f.seed, batch, f.iterations)
    for iteration in range(f.iterations):
        total, mean = {}, 0.0
        for i in range(batch):
            number = order[iteration][i][1]
            own = generator(f.seed, "sft", iteration, i)
            noise, t = torch.randn(models.shape, generator=own), torch.rand(1, generator=own).item()
            x = (1 - t) * images[number] + t * noise
            v = models.velocity("student", x, t, slots[0][number][1], 1)
            loss = ((v - (noise - images[number])) ** 2).mean()
            mean += loss.item() / batch
            add(total, gradient_of(loss / batch, models))
        line = {"iteration": iteration, "loss": mean, "grad_norm": descent.step(total)}
        log.append(descent.log(line))
    return models, log


def ties(parts, weights, density):
    """merge.py --method ties of the teachers' dW, an entry at a time: trim, elect, merge (TIES)."""
    trimmed = []
    for part in parts:
        number = max(int(density * part.numel()), 1)
        limit = sorted(part.abs().flatten().tolist())[-number]
        trimmed.append([x if abs(x) >= limit else 0.0 for x in part.flatten().tolist()])
    merged = []
    for entries in zip(*trimmed):
        total = sum(w * x for w, x in zip(weights, entries))
        agree = [(w, x) for w, x in zip(weights, entries) if x * total > 0]
        weight = sum(w for w, _ in agree)
        merged.append(sum(w * x for w, x in agree) / weight if weight else 0.0)
    return torch.tensor(merged).view(parts[0].shape)
