"""Do the tests notice a slip? One slip at a time is put into a copy of the project, and they run.

    python experiments/slips.py                              # all of them: an hour or more
    python experiments/slips.py --only train_opd.py sde.py   # those of two files
    python experiments/slips.py --only train_opd.py --first_only   # their own tests alone

A slip is a replacement of text of the kind that a tired hand makes: a wrong index, sign or factor,
the student for its average, x for x_next, a default that is not the documented one. None of them
stops the program by itself, and none is equivalent to the right text. The tests most likely to
notice it run first (FIRST), then the rest of the default suite. Exit code 1 if a slip went
unnoticed, 2 if a text to replace is not there exactly once.
"""

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import diffusers  # noqa: F401  imported once, here: every fork would take seconds for it
import peft  # noqa: F401
import pytest
import torch  # noqa: F401
import transformers  # noqa: F401
from diffusers import StableDiffusion3Pipeline  # noqa: F401
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
GUARD = "tests/test_flags.py::test_every_slip_can_still_be_made"  # any slip would fail this test
FIRST = {  # file: the tests that run first
    "train_opd.py": "test_iteration.py::test_opd test_flags.py TWO",
    "train_teacher.py": "test_iteration.py::test_grpo test_flags.py TWO",
    "train_sft.py": "test_iteration.py::test_sft test_flags.py TWO",
    "evaluate.py": "test_evaluate.py test_flags.py",
    "merge.py": "test_merge.py test_flags.py",
    "sde.py": "test_sde.py",
    "losses.py": "test_losses.py test_iteration.py",
    "rewards/scoring.py": "test_evaluate.py test_iteration.py::test_grpo test_flags.py OPD",
    "rewards/tables.py": "test_evaluate.py",
    "rewards/pictures.py": "test_evaluate.py test_toy.py",
    "toy/scorers.py": "test_toy.py",
    "support/run.py": "test_iteration.py test_model.py",
    "support/lora.py": "test_adapters.py test_flags.py test_iteration.py",
    "support/model.py": "test_model.py test_flags.py test_iteration.py",
    "support/checkpoint.py": "test_resume.py test_flags.py test_iteration.py",
    "support/metrics.py": "test_model.py test_iteration.py test_resume.py",
    "support/arguments.py": "test_flags.py test_errors.py test_iteration.py",
}
SLIPS = {  # file: what kind of slip, the text, what the tired hand writes instead
    "train_opd.py": [
        ("default", "default=0.02", "default=0.2"),
        ("default", '"--updates", type=positive, default=2',
         '"--updates", type=positive, default=1'),
        ("swapped", '{"student": args.student_guidance', '{"student": args.guidance'),
        ("guidance", '"anchor": args.guidance', '"anchor": args.student_guidance'),
        ("guidance", "None: args.guidance}", "None: args.student_guidance}"),
        ("guidance", "get(task, args.guidance)", "get(task, args.student_guidance)"),
        ("forgotten", 'f"--teacher {task}", alpha)', 'f"--teacher {task}")'),
        ("not", "task not in args.teacher_guidance", "task in args.teacher_guidance"),
        ("forgotten", "path == args.anchor and task not in args.teacher_guidance",
         "path == args.anchor"),
        ("off by one", "sorted(prompts)[:2]", "sorted(prompts)[1:3]"),
        ("forgotten", "run.read_tasks(args.test_prompts, args.eval_prompts)",
         "run.read_tasks(args.test_prompts)"),
        ("key", '(args.seed, "steps", iteration)', '(args.seed, "steps")'),
        ("index", "torch.tensor(args.eligible_steps)[order].sort().values", "order.sort().values"),
        ("not", 'f"teacher_{task}" == anchor', 'f"teacher_{task}" != anchor'),
        ("factor", "weight_decay=1e-4", "weight_decay=1e-2"),
        ("order", "trained.repeat_interleave(b)", "trained.repeat(b)"),
        ("index", "schedule[iteration][i // G]",
         "schedule[iteration][i % args.prompts_per_iteration]"),
        ("local index", "torch.tensor(samples)[sample_of] % args.updates",
         "sample_of % args.updates"),
        ("key", '"rollout", iteration, i)', '"rollout", i)'),
        ("local index", "iteration, i) for i in samples]", "iteration, i) for i in range(b)]"),
        ("average", 'backbone.predict("student", x, t, prompt)',
         'backbone.predict("average", x, t, prompt) * 1'),
        ("forgotten", "visited, args.noise, args.noise_kind, generators)",
         'visited, args.noise, "flow", generators)'),
        ("off by one", "path.mean[trained].flatten", "path.mean[trained - 1].flatten"),
        ("x_next", 'backbone.predict(f"teacher_{task}", x[rows]',
         'backbone.predict(f"teacher_{task}", x_next[rows]'),
        ("loop variable", "v_teacher[rows] = backbone.predict(f\"teacher_{task}\"",
         'v_teacher[rows] = backbone.predict(f"teacher_{tasks[0]}"'),
        ("forgotten", "torch.where(std > 0, std, 1)", "torch.ones_like(std)"),
        ("forgotten", ".cumsum(0).flip(0) - kl)", ".cumsum(0).flip(0))"),
        ("order", "kl.flip(0).cumsum(0).flip(0)", "kl.cumsum(0)"),
        ("not", "rows = (~is_anchor[task_of])", "rows = (is_anchor[task_of])"),
        ("t_next", "backbone.predict(anchor, x[rows], t[rows]",
         "backbone.predict(anchor, x[rows], t_next[rows]"),
        ("factor", "(t - t_next) ** 2 / 2", "(t - t_next) ** 2"),
        ("forgotten", "args.mar_weight * w[batch]", "w[batch]"),
        ("not", "step_weight = 1 / w", "step_weight = w"),
        ("shape", "torch.mul, step_weight[batch]", "torch.mul, step_weight[:1]"),
        ("sign", "loss = loss + penalty", "loss = loss - penalty"),
        ("local", "args.updates / (B * S)", "args.updates / (b * S)"),
        ("stale", "fraction = len(batch) * args.updates", "fraction = len(rows) * args.updates"),
        ("factor", "values, fraction / args.updates)", "values, fraction)"),
        ("forgotten", "gradients = run.all_reduce(torch.stack(gradients))",
         "gradients = torch.stack(gradients)"),
        ("mean", "gradients.sum(0))", "gradients.mean(0))"),
        ("forgotten", "clip_grad_norm_(parameters, args.grad_norm or inf)",
         "clip_grad_norm_(parameters, 1.0)"),
        ("wrong test", "            if norm.isfinite():", "            if not norm.isnan():"),
        ("swapped", "bad_updates = 0 if norm.isfinite()", "bad_updates = 0 if norm.isnan()"),
        ("forgotten", "            optimizer.zero_grad()\n", ""),
        ("off by one", "iteration * args.updates + update + 1",
         "iteration * args.updates + update"),
        ("local", "*_ in schedule[iteration])  # over", "*_ in slots)  # over"),
        ("factor", "1 / (number * G * S)", "1 / (number * G)"),
        ("off by one", "metrics.is_due(iteration, args.sample_every",
         "metrics.is_due(iteration + 1, args.sample_every"),
        ("key", '(args.seed, "sample", words)', '(args.seed, "sample", iteration, words)'),
        ("guidance", "args.eval_steps, args.student_guidance", "args.eval_steps, args.guidance"),
        ("student", 'lora.use(pipe.transformer, "average")',
         'lora.use(pipe.transformer, "student")'),
        ("off by one", "saver.iteration_done(iteration + 1", "saver.iteration_done(iteration"),
    ],
    "train_teacher.py": [
        ("default", "args.window_end = args.window_end or last", "args.window_end = last"),
        ("default", "default=1e-2", "default=1e-4"),
        ("default", '("global", "group"), default="global"',
         '("global", "group"), default="group"'),
        ("key", '(args.seed, "window", iteration), 0', '(args.seed, "window"), 0'),
        ("off by one", "args.window_end - args.window + 1", "args.window_end - args.window"),
        ("forgotten", "torch.arange(args.trained_steps) + first",
         "torch.arange(args.trained_steps)"),
        ("factor", "weight_decay=1e-4", "weight_decay=1e-2"),
        ("index", "torch.arange(B) // G", "torch.arange(B) % G"),
        ("forgotten", "args.mix or dict.fromkeys(train, 1)", "dict.fromkeys(train, 1)"),
        ("key", '"rollout", iteration, i)', '"rollout", iteration, i // G)'),
        ("local index", "torch.tensor(samples)[sample_of] % args.updates",
         "sample_of % args.updates"),
        ("forgotten", "trained.tolist() if args.window else None", "None"),
        ("off by one", "path.log_prob[trained]", "path.log_prob[trained - 1]"),
        ("forgotten", "torch.cat(run.gather(reward_of(images, slots)))",
         "reward_of(images, slots)"),
        ("wrong test", 'args.std == "global"', 'args.std != "global"'),
        ("forgotten", "rows = torch.tensor([of_slot[group] == task for group in group_of])",
         "rows = torch.tensor([True for group in group_of])"),
        ("local index", "advantage[samples].to", "advantage[:b].to"),
        ("swapped", "torch.tensor(path.std, device=device)[step_of]",
         "torch.tensor(path.std, device=device).flip(0)[step_of]"),
        ("t_next", 'backbone.velocity("student", x[batch], t[batch]',
         'backbone.velocity("student", x[batch], t_next[batch]'),
        ("sign", "loss + args.beta * kl_base", "loss - args.beta * kl_base"),
        ("average", "backbone.predict(None,", 'backbone.predict("average",'),
        ("forgotten", "(w * (v - v_base).square()).mean()", "(v - v_base).square().mean()"),
        ("local", "args.updates / (B * S)", "args.updates / (b * S)"),
        ("wrong", "{\"skipped_updates\": 1}, rank == 0)", "{\"skipped_updates\": 1}, 1)"),
        ("off by one", "iteration * args.updates + update + 1",
         "iteration * args.updates + update"),
        ("local", "torch.cat(run.gather(measure(images)))", "measure(images)"),
        ("swapped", "reward_log(rewards, G, of_slot)",
         "reward_log(rewards, args.prompts_per_iteration, of_slot)"),
        ("off by one", "metrics.is_due(iteration, args.eval_every",
         "metrics.is_due(iteration + 1, args.eval_every"),
        ("forgotten", '            saver.keep_best(log["test"])  # for --final best\n', ""),
        ("student", 'lora.use(pipe.transformer, "average")',
         'lora.use(pipe.transformer, "student")'),
        ("key", '(args.seed, "test", task, i)', '(args.seed, "test", i)'),
        ("swapped", "how = (args.eval_steps, args.guidance", "how = (args.steps, args.guidance"),
        ("forgotten", "sum(log.values()) / len(log)", "sum(log.values())"),
        ("index", "prompts[i], metadata[i]) for i in own", "prompts[0], metadata[i]) for i in own"),
    ],
    "train_sft.py": [
        ("default", "default=64, help=\"images", "default=32, help=\"images"),
        ("forgotten", "args.task_mix, args.sft_images", "dict.fromkeys(train, 1), args.sft_images"),
        ("key", '(args.seed, "sft", iteration, i)', '(args.seed, "sft", i)'),
        ("key", '(args.seed, "sft", i) for i in numbers',
         '(args.seed, "sft", task) for i in numbers'),
        ("swapped", "(1 - t) * x0 + t * noise", "t * x0 + (1 - t) * noise"),
        ("distribution", "torch.rand(1, 1, 1", "torch.randn(1, 1, 1"),
        ("index", "rows[index[batch]]", "rows[batch]"),
        ("swapped", "flow_matching(v, x0[batch], noise[batch])",
         "flow_matching(v, noise[batch], x0[batch])"),
        ("local", "len(batch) / args.batch", "len(batch) / len(samples)"),
        ("guidance", '{"student": 1.0}', '{"student": args.guidance}'),
        ("guidance", "args.teacher_guidance.get(task, args.guidance)", "args.guidance"),
        ("wrong LoRA", 'lora.use(pipe.transformer, f"teacher_{task}")',
         'lora.use(pipe.transformer, "student")'),
        ("off by one", "update_average(average, student, iteration + 1",
         "update_average(average, student, iteration"),
        ("index", "for i in range(len(slots))]", "for i in latents]"),
        ("forgotten", "        optimizer.zero_grad()\n        run", "        run"),
        ("factor", "weight_decay=1e-4", "weight_decay=1e-2"),
        ("not", "if not run.gather(file.exists())[0]", "if True"),
    ],
    "evaluate.py": [
        ("default", "default=16", "default=10"),
        ("forgotten", "args.model_guidance.get(name, args.guidance)", "args.guidance"),
        ("key", '(args.seed, "prompt", i) for i', '(args.seed, "prompt") for i'),
        ("stale", "lora.use(pipe.transformer, loras[name])", "lora.use(pipe.transformer, None)"),
        ("stale", '"guidance": guidance[name]}', '"guidance": args.guidance}'),
        ("forgotten", "sha256(fetch(path, \"--models\", ADAPTER))", "str(path)"),
        ("forgotten", '"text_length": args.text_length, "steps": args.steps',
         '"text_length": args.text_length, "steps": 0'),
        ("key", "how = (args.seed, args.steps, args.batch", "how = (0, args.steps, args.batch"),
        ("forgotten", "args.num_prompts or None", "args.num_prompts"),
        ("off by one", "range(len(prompts))[:2]", "range(len(prompts))[1:3]"),
        ("swapped", "tests, most_different(scores, tests)", "tests, first"),
        ("forgotten", "check_prompts(scorer, *tests[task]",
         "check_prompts(scorer, [], []"),
        ("forgotten", "(results.exists() and not args.overwrite)", "False"),
        ("forgotten", '"steps": args.steps, "size": args.size}', '"steps": args.steps}'),
    ],
    "rewards/scoring.py": [
        ("forgotten", 'name == task or name.startswith(task + "_")', "name == task"),
        ("swapped", '{task: 1 - args.mix_quality, "deqa": args.mix_quality}',
         '{task: args.mix_quality, "deqa": 1 - args.mix_quality}'),
        ("forgotten", "(scores.float() - low) / (high - low)", "scores.float() / (high - low)"),
        ("factor", "(scores.float() - low) / (high - low)", "(scores.float() - low) / high"),
        ("normalisation", "total / sum(weights.values())", "total / len(weights)"),
        ("index", "[slots[n][1] for n in own], [slots[n][2]",
         "[slots[n][1] for n in own], [slots[0][2]"),
        ("wrong test", "(groups.std(1) < 1e-6)", "(groups.std(1) > 1e-6)"),
        ("axis", "groups = rewards.view(-1, G)", "groups = rewards.view(G, -1).T"),
        ("index", "[metadata[j] for j in part]", "metadata[: len(part)]"),
        ("forgotten", "failed[metric] = reasons[0]", "failed[task] = reasons[0]"),
        ("key", '(seed, "evaluate", task, j)', '(seed, "evaluate", name, task, j)'),
        ("key", '(seed, "evaluate", task, j)', '(seed, "evaluate", j)'),
        ("stale", "scale = guidance[name]", "scale = guidance[next(iter(guidance))]"),
        ("swapped", '{start: args.guidance, "student": student_guidance}',
         '{start: student_guidance, "student": args.guidance}'),
        ("student", '{start: None, "student": "average"}', '{start: None, "student": "student"}'),
        ("swapped", 'compare(scores["student"], scores[start], tests)',
         'compare(scores[start], scores["student"], tests)'),
        ("sum", 'math.hypot(se, mix["se"])', 'se + mix["se"]'),
        ("swapped", "mean / oracle:.1%", "oracle / mean:.1%"),
        ("sign", "mean - mix['mean']", "mix['mean'] - mean"),
        ("not", "if flags.get(name) != value]", "if flags.get(name) == value]"),
        ("default", '"dtype": None, "text_length": 128', '"dtype": None, "text_length": 256'),
        ("swapped", "how = (0, args.eval_steps, args.label_batch",
         "how = (0, 16, args.label_batch"),
    ],
    "rewards/tables.py": [
        ("default", '{"geneval": 1, "ocr": 1, "deqa": 5, "pickscore": 26}',
         '{"geneval": 1, "ocr": 1, "deqa": 5, "pickscore": 25}'),
        ("correction", "P / (P - 1)) ** 0.5 / len(scores)", "1) ** 0.5 / len(scores)"),
        ("wrong n", "** 0.5 / len(scores)", "** 0.5 / P"),
        ("forgotten", "standard_error(scores[t], tests[t][0]) / scales[t]",
         "standard_error(scores[t], tests[t][0])"),
        ("sum", "math.hypot(*errors) / len(scales)", "sum(errors) / len(scales)"),
        ("sign", "scores[task] - other[task]", "scores[task] + other[task]"),
        ("index", '{task: scores[task][task] for task in TASKS}',
         '{task: scores["geneval"][task] for task in TASKS}'),
        ("wrong test", '(metrics["geneval"] == 1).double()', '(metrics["geneval"] > 0).double()'),
        ("factor", "for task in tasks.values())) / len(tasks)\n    return",
         "for task in tasks.values()))\n    return"),
        ("order", "spread.argsort(descending=True", "spread.argsort(descending=False"),
        ("extreme", "torch.stack(values).amax(0) - torch.stack(values).amin(0)",
         "torch.stack(values).amax(0)"),
        ("wrong test", "if spread[j] > 0]", "if spread[j] >= 0]"),
        ("default", '{"deqa": 2, "pickscore": 2', '{"deqa": 3, "pickscore": 3'),
        ("order", "table(above | summary)", "table(summary | above)"),
        ("forgotten", "if task_of(metric, tests) == task:", "if True:"),
        ("wrong test", "found = scores[scores > 0]", "found = scores[scores >= 0]"),
    ],
    "rewards/pictures.py": [
        ("forgotten", "(torch.cat(images) / 2 + 0.5)", "(torch.cat(images) / 2 + 0.6)"),
        ("rounding", "(image * 255).round().byte()", "(image * 255).byte()"),
        ("factor", ".permute(2, 0, 1) / 255", ".permute(2, 0, 1) / 256"),
        ("index", "as_picture(images[row])", "as_picture(images[0])"),
    ],
    "toy/scorers.py": [
        ("statistic", "images.flatten(2).median(-1).values", "images.flatten(2).mean(-1)"),
        ("threshold", "hidden = (colours - background[:, None]).norm(dim=-1) < 0.3",
         "hidden = (colours - background[:, None]).norm(dim=-1) < 0.03"),
        ("off by one", "mask.sum(-1) >= 12", "mask.sum(-1) > 12"),
        ("threshold", "(iou >= 0.75) & one_colour", "(iou >= 0.65) & one_colour"),
        ("threshold", "(iou >= 0.7).tolist()", "(iou >= 0.8).tolist()"),
        ("threshold", ">= 0.7 * mask.sum(-1)", ">= 0.4 * mask.sum(-1)"),
        ("sign", '"left": a.column < b.column', '"left": a.column > b.column'),
        ("not strict", '"above": a.row < b.row', '"above": a.row <= b.row'),
        ("factor", "abs(number - wanted) / wanted", "abs(number - wanted) / max(number, wanted)"),
        ("factor", "(2 * score + placed) / 3", "(score + placed) / 2"),
        ("forgotten", "number / max(len(found), 1)", "1"),
        ("threshold", "(dirt - 0.12) / 0.25", "(dirt - 0.15) / 0.25"),
        ("threshold", ".mean(1) / 0.04)", ".mean(1) / 0.08)"),
        ("factor", "(1 - dirty / 0.2)", "(1 - dirty / 0.3)"),
        ("factor", "(2 * 0.35**2)", "(0.35**2)"),
        ("index", '_, colour, shape = wanted["objects"][0]',
         '_, colour, shape = wanted["objects"][-1]'),
        ("factor", "len(matching(found, colour, shape)) / 4",
         "len(matching(found, colour, shape)) / 2"),
        ("forgotten", 'filled.append(len(matching(found, colour, shape))',
         'filled.append(len(matching(found, None, shape))'),
        ("threshold", "> 0.999).float()", "> 0.7).float()"),
    ],
    "sde.py": [
        ("forgotten", "1 - t + (t == 1) * (1 - t_max)", "1 - t + (t == 1) * t_max"),
        ("factor", "sigma**2 / (2 * t)", "sigma**2 / t"),
        ("sign", "x0, noise = x - t * v, x + (1 - t) * v", "x0, noise = x - t * v, x + t * v"),
        ("forgotten", "std = sigma * dt**0.5", "std = sigma"),
        ("sum", ".flatten(1).mean(1)  # (B,)", ".flatten(1).sum(1)  # (B,)"),
        ("factor", "return d_mean_d_v**2 / (2 * std**2)", "return d_mean_d_v**2 / std**2"),
        ("not", "if window is None or i in window", "if window is None or i not in window"),
        ("t_next", "v = velocity(x, t)", "v = velocity(x, t_next)"),
        ("wrong test", "grid[-1] < 0:", "grid[-1] <= 0:"),
    ],
    "losses.py": [
        ("swapped", "log_ratio_of(x_next, mean, mean_old, std)  # (B, C, H, W)",
         "log_ratio_of(x_next, mean_old, mean, std)  # (B, C, H, W)"),
        ("wrong mean", "log_ratio_of(x_next, mean_teacher, mean_old, std).detach()",
         "log_ratio_of(x_next, mean_teacher, mean, std).detach()"),
        ("extreme", "-torch.minimum(ratio * reward", "-torch.maximum(ratio * reward"),
        ("factor", "1 - clip_range, 1 + clip_range", "1 - clip_range, 1 + 2 * clip_range"),
        ("correction", "rewards.std(correction=0)", "rewards.std(correction=1)"),
        ("factor", "(mean - mean_teacher.detach()).square() / (2 * std**2)",
         "(mean - mean_teacher.detach()).square() / std**2"),
        ("factor", "+ D * future", "+ future"),
        ("sign", "ppo(log_ratio, -kl_to_go.detach()", "ppo(log_ratio, kl_to_go.detach()"),
        ("sign", "(v - (noise - x0)).square()", "(v - (x0 - noise)).square()"),
        ("forgotten", "centred = rewards - mean[index]", "centred = rewards - rewards.mean()"),
        ("default", "clip: float = 5.0", "clip: float = 3.0"),
    ],
    "merge.py": [
        ("normalisation", "[weight / sum(weights) for weight in weights]",
         "[weight / len(weights) for weight in weights]"),
        ("forgotten", "B = [w * scaling * B for", "B = [w * B for"),
        ("factor", "B = parts[0][2] * sum(", "B = sum("),
        ("off by one", "S[:rank].sqrt()", "S[1 : rank + 1].sqrt()"),
        ("swapped", "A / root, B * root", "A * root, B * root"),
        ("swapped", "args.weights, args.rank, args.density", "args.weights, args.rank, 0.5"),
    ],
    "support/run.py": [
        ("off by one", "(rank + 1) * number // world", "(rank + 1) * (number // world)"),
        ("off by one", "drawn[task] % number == 0", "drawn[task] % number == 1 or not drawn[task]"),
        ("key", '(seed, task, "pass", drawn[task] // number)',
         '(seed, "pass", drawn[task] // number)'),
        ("forgotten", "prompts[n], metadata[n]))", "prompts[n], metadata[0]))"),
        ("factor", "(1 + updates) / (10 + updates)", "(1 + updates) / (100 + updates)"),
        ("swapped", "lerp_(parameter, 1 - d)", "lerp_(parameter, d)"),
        ("extreme", "d = min((1 + updates)", "d = max((1 + updates)"),
        ("index", "cosine[j, k].item()", "cosine[j, j].item()"),
        ("key", '"/".join', '"".join'),
        ("index", "used = {slots[place][1]", "used = {slots[0][1]"),
    ],
    "support/lora.py": [
        ("not", '0.5 if config.get("use_rslora") else 1', '1 if config.get("use_rslora") else 0.5'),
        ("forgotten", "pattern.get(get_pattern_key(pattern, layer), config.get(\"lora_alpha\"))",
         'config.get("lora_alpha")'),
        ("forgotten", "layer._active_adapter, layer._disable_adapters = active, disabled", "pass"),
        ("factor", "scaling * len(A) for layer", "scaling * len(A) * 2 for layer"),
        ("default", "init_lora_weights=\"gaussian\"", "init_lora_weights=True"),
        ("forgotten", "average[name].data = parameter.data.clone()", "pass"),
        ("alias", "average[name].data = parameter.data.clone()",
         "average[name].data = parameter.data"),
    ],
    "support/model.py": [
        ("constant", "register_to_config(num_train_timesteps=counts)",
         "register_to_config(num_train_timesteps=1000)"),
        ("forgotten", "register_to_config(sample_size=size // pixels)",
         "register_to_config(sample_size=size)"),
        ("not", 'if pipe.time_grid == "single"', 'if pipe.time_grid != "single"'),
        ("swapped", "torch.cat([0 * rows, rows])", "torch.cat([rows, 0 * rows])"),
        ("sign", "v_empty + guidance * (v_prompt - v_empty)",
         "v_prompt + guidance * (v_prompt - v_empty)"),
        ("index", "self.velocity(name, x[rows], t[rows], prompt[rows])",
         "self.velocity(name, x[rows], t[:1], prompt[rows])"),
        ("forgotten", "/{args.no_t5}/{args.text_length}", "/{args.no_t5}"),
    ],
    "support/checkpoint.py": [
        ("order", "key=lambda checkpoint: int(checkpoint.name[5:])",
         "key=lambda checkpoint: checkpoint.name[5:]"),
        ("off by one", "[: -self.args.keep]", "[: -self.args.keep - 1]"),
        ("student", 'tensors[f"average.{name}"] for name', 'tensors[f"student.{name}"] for name'),
        ("student", "save_adapter(beside, self.average, self.scale)",
         "save_adapter(beside, self.student, self.scale)"),
        ("wrong test", "if score > max(scores, default=-math.inf)",
         "if score < max(scores, default=math.inf)"),
        ("index", "source = checkpoints(self.run)[-1]", "source = checkpoints(self.run)[0]"),
        ("off by one", "bad_updates >= self.args.max_bad_steps",
         "bad_updates > self.args.max_bad_steps"),
        ("not", '== "last" or not source.is_dir()', '!= "last" or not source.is_dir()'),
        ("off by one", "iterations % self.args.save_every == 0",
         "(iterations + 1) % self.args.save_every == 0"),
    ],
    "support/metrics.py": [
        ("off by one", "(iteration + 1) % every == 0 or", "iteration % every == 0 or"),
        ("forgotten", " or iteration + 1 == iterations)", ")"),
        ("forgotten", "+ weight * value", "+ value"),
        ("off by one", 'line["iteration"] < iteration]', 'line["iteration"] <= iteration]'),
        ("index", "for part in gather(log):", "for part in [log]:"),
        ("forgotten", " - self.began - before", " - self.began"),
    ],
    "support/arguments.py": [
        ("default", 'args.clip_range = 0.2 if args.objective == "ppo" else 1e-4',
         "args.clip_range = 0.2"),
        ("default", "args.student_guidance = args.guidance", "args.student_guidance = 1.0"),
        ("off by one", '"first": steps[:-1]', '"first": steps[1:]'),
        ("off by one", '"random": steps[:-1]', '"random": steps'),
    ],
}  # fmt: skip


def stop(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def check(root: Path) -> None:
    """Every text to replace is there, once."""
    for file, slips in SLIPS.items():
        content = (root / file).read_text()
        for kind, old, new in slips:
            if content.count(old) != 1:
                stop(f"{file}: {content.count(old)} times instead of once: {old!r} ({kind})")
            if new == old:
                stop(f"{file}: nothing is replaced: {old!r} ({kind})")


def copy_project(folder: str) -> Path:
    """The files that git tracks, as they are now."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        stop(f"{ROOT}: not a git repository; its list of files is needed")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    return Path(folder)


def noticed_by(root: Path, tests: list[str], others_than: list[str] = ()) -> str:
    """The first of these tests that fails, or "". They run in a fork of this process, which has
    imported the libraries, but nothing of the project."""
    words = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *tests]
    for name in (GUARD, *others_than):
        words += ["--deselect", name]
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if not child:
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
            os.chdir(root)
            sys.path[:] = [str(root), *(path for path in sys.path if str(ROOT) not in path)]
            os._exit(pytest.main(words))
        _, status = os.waitpid(child, 0)
        output.seek(0)
        lines = output.read().splitlines()
    if not status:
        return ""
    failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    last = [*lines[-1:], *failed[:1]][-1]
    return last.removeprefix("FAILED ").removeprefix("ERROR ").split(" - ")[0]


def first_tests(file: str) -> list[str]:
    names = FIRST[file].replace("TWO", "test_iteration.py::test_two_processes")
    names = names.replace("OPD", "test_iteration.py::test_opd")
    return [f"tests/{name}" for name in names.split()]


def try_slip(root: Path, file: str, old: str, new: str, first_only: bool) -> str:
    """The test that notices it, or ""."""
    right = (root / file).read_text()
    try:
        (root / file).write_text(right.replace(old, new))
        first = first_tests(file)
        failed = noticed_by(root, first)
        if not failed and not first_only:
            failed = noticed_by(root, ["tests"], others_than=first)
        return failed
    finally:
        (root / file).write_text(right)


def parse_args() -> argparse.Namespace:
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # a slip can have the size and second of another
    sys.dont_write_bytecode = True
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SLIPS, default=list(SLIPS), metavar="FILE")
    parser.add_argument("--jobs", type=int, default=1, help="slips at a time, each in a copy")
    parser.add_argument("--first_only", action="store_true", help="not the rest of the suite")
    parser.add_argument("--containing", default="", help="only slips with this text in them")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    check(ROOT)
    wanted = [(file, *slip) for file in args.only for slip in SLIPS[file]]
    wanted = [slip for slip in wanted if args.containing in slip[2]]
    tried, noticed, roots = Counter(), Counter(), queue.Queue()
    with tempfile.TemporaryDirectory() as folder:
        for job in range(args.jobs):
            roots.put(copy_project(f"{folder}/{job}"))

        def run(slip: tuple) -> None:
            file, kind, old, new = slip
            root, began = roots.get(), time.perf_counter()
            failed = try_slip(root, file, old, new, args.first_only)
            roots.put(root)
            tried[file] += 1
            noticed[file] += bool(failed)
            result = f"noticed by {failed}" if failed else "NOT NOTICED"
            seconds = time.perf_counter() - began
            tqdm.write(f"{file}: {kind}: {old!r} -> {new!r}: {seconds:.0f} s, {result}")
            sys.stdout.flush()
            bar.update()

        # Without a slip all must pass, or every slip would seem to be noticed.
        first = sorted({name for file in args.only for name in first_tests(file)})
        failed = noticed_by(Path(folder, "0"), first if args.first_only else ["tests"])
        if failed:
            stop(f"without any slip {failed} fails")
        bar = tqdm(total=len(wanted), desc="slips", unit="slip")
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(run, wanted))
        bar.close()
    print("\n| file | noticed | tried |\n|---|---|---|")
    for file, number in tried.items():
        print(f"| {file} | {noticed[file]} | {number} |")
    print(f"| all | {noticed.total()} | {tried.total()} |")
    raise SystemExit(noticed.total() < tried.total())


if __name__ == "__main__":
    main(parse_args())
