"""The plan of miniature.py: every run behind RESULTS.md, the most telling first.

Runs of the first round name the flags whose defaults may change (FIRST), so that their records keep
their meaning.
"""

from typing import NamedTuple

from support.flags import TASKS
from toy.build import ADAPTERS

TEACHERS = [f"toy/adapters/{task}" for task in TASKS]
MERGED = ["--init", "toy/adapters/merged"]
# As GRPO-Mix in toy/build.py, for as many images as the student sees.
MIX = "--window 3 --window_end 3 --prompts_per_iteration 12 --lr 7e-4 --eval_every 0".split()
WEIGHTED = ["--mix", "geneval=3", "ocr=1", "pickscore=1", *MIX]
UNIFORM = ["--mix", *(f"{task}=1" for task in TASKS), *MIX]
# A quarter of the main job's images, as many optimizer steps: 32 images an iteration.
SMALL = "--prompts_per_iteration 8 --group_size 4".split()
EIGHTS = "--prompts_per_iteration 4 --group_size 8".split()  # the same, divisible into 8 updates
EPOCHS = ["--task_mix", *(f"{task}=8" for task in TASKS)]  # iterations of one task in turn
QUARTERS = (20, 40, 60, 80)  # iterations
SFT = 600  # iterations of 64 images
# The main job of the first round, which all its students vary: 128 images an iteration.
FIRST = "--objective ppo --prompts_per_iteration 8 --group_size 16 --updates 2 --lr 1e-3".split()
PARTS = "main objectives gradients MAR interference ablations staleness speed hacking repeat"
PARTS += " map default bf16 faster pays beyond strict tasks later guidance"
MAP_IMAGES = 2560
BEST = "--objective ppo --prompts_per_iteration 8 --group_size 2 --updates 2 --lr 2e-3".split()
GUIDED = ["--guidance", "2", "--student_guidance", "1"]
LONG = (20, 40, 80, 160, 320)  # iterations of 16 images: 320 to 5,120
ALONG = (5, 10, 20, 40, 80, 160, 320, 520)  # iterations of 192 images: 960 to 99,840
VARIANT = "experiments/variants.py"


class Job(NamedTuple):
    part: str
    name: str
    seed: int
    script: str | None  # None: no training; flags are the adapter, then guidance scales
    flags: list[str]
    stages: tuple[int, ...]  # the iterations after which it is scored


# ---- The plan: every run, the most telling first


class Plan:
    def __init__(self, out):
        self.out, self.jobs = out, []
        self.from_sft = ["--init", f"{out}/sft_seed0/adapter"]

    def add(self, part, name, script, *flags, seed=0, at=()):
        self.jobs.append(Job(part, name, seed, script, list(flags), tuple(at)))

    def opd(self, part, name, *flags, seed=0, at=(80,)):
        self.add(part, name, "train_opd.py", *FIRST, *flags, seed=seed, at=at)

    def small(self, part, name, *flags, seed=0, at=(80,)):
        self.opd(part, name, *SMALL, *flags, seed=seed, at=at)

    def objective(self, objective, lr, seed=0, at=(80,)):
        flags = ["--objective", objective]
        if lr != "1e-3":  # the default
            flags += ["--lr", lr]
        self.small("objectives", f"{objective}_lr{lr}", *flags, seed=seed, at=at)

    def grpo(self, name, *flags, part="main", seed=0, at=(54,)):
        self.add(part, name, "train_teacher.py", *flags, seed=seed, at=at)

    def staleness(self, name, *flags, seed=0):
        self.opd("staleness", name, *EIGHTS, *flags, seed=seed)


def plan(out):
    """Every job, in order."""
    jobs = Plan(out)
    plan_main_table(jobs)
    plan_one_seed_of_each_question(jobs)
    plan_more_seeds(jobs)
    plan_other_teachers(jobs)
    plan_reuse_and_ranks(jobs)
    plan_map(jobs)
    plan_default(jobs)
    plan_bf16(jobs)
    plan_faster(jobs)
    plan_pays(jobs)
    plan_beyond(jobs)
    plan_strict(jobs)
    plan_tasks(jobs)
    plan_later_papers(jobs)
    plan_guidance(jobs)
    plan_last_seeds(jobs)
    return jobs.jobs


def plan_main_table(jobs):
    """The main table, and what else was recorded first."""
    for seed in (0, 1):
        jobs.opd("main", "opd_merge", seed=seed)
    jobs.opd("main", "opd_merge", seed=2, at=(5, 10, 20, 40, 60, 80))
    jobs.add("main", "base", None, "base")
    for name in (*TASKS, "grpo_mix", "merged"):  # as shipped in toy/
        jobs.add("main", name, None, f"toy/adapters/{name}")
    jobs.grpo("merge_mix", *WEIGHTED, *MERGED, at=(10, 30, 54))
    jobs.small("main", "opd_small")
    jobs.small("main", "opd_small", seed=1, at=QUARTERS)
    jobs.small("main", "opd_nomar", "--mar_weight", "0")
    others = ("kl", "ode", "trajectory", "ppo-public-code", "ppo-scalar", "ppo-published")
    for objective in others:  # ppo is opd_small
        jobs.objective(objective, "1e-3")
    for objective in ("ode", "ppo"):
        jobs.objective(objective, "3e-3")
    along = [f"{jobs.out}/opd_merge_seed2.stages", f"{jobs.out}/merge_mix_seed0.stages"]
    jobs.add("gradients", "gradients", "experiments/gradients.py", *along)
    # The paper's schedule: whole epochs of one task in turn, nine of ten steps, the public code's
    # objective.
    published = ["--objective", "ppo-public-code", "--steps", "10", *EPOCHS]
    jobs.small("speed", "published_schedule", *published, at=(40, 60, 80, 100, 120))


def plan_one_seed_of_each_question(jobs):
    plan_no_routing(jobs, seed=0)
    jobs.add("main", "sft", "train_sft.py", at=(SFT,))
    jobs.small("main", "opd_sft", *jobs.from_sft)
    jobs.small("main", "opd_base", "--init", "base")
    for updates in ("8", "1"):
        plan_updates(jobs, updates)
    jobs.small("MAR", "anchor_base", "--anchor", "base")
    jobs.small("MAR", "mar0.1", "--mar_weight", "0.1")
    for objective in ("ppo-scalar", "ppo-published", "trajectory"):
        jobs.objective(objective, "3e-4")
    for method in ("ties", "dare", "factor-mean"):
        flags = ["--adapters", *TEACHERS, "--method", method]
        if method != "factor-mean":
            flags += ["--rank", "24"]
        jobs.add("ablations", f"merge_{method}", "merge.py", *flags)
        start = f"{jobs.out}/merge_{method}_seed0/adapter"
        jobs.small("ablations", f"opd_{method}", "--init", start)
    jobs.small("ablations", "alternate", *EPOCHS)
    taste = ["--reward", "pickscore", *MIX, "--lr", "1e-3"]  # most other scores pay for this one
    jobs.grpo("teacher_pickscore", *taste, part="hacking", at=(10, 20, 40, 60))


def plan_no_routing(jobs, seed):
    every_prompt = [f"{task}={jobs.out}/prompts/all.txt" for task in TASKS]
    jobs.small("ablations", "routing_all", "--prompts", *every_prompt, seed=seed)


def plan_updates(jobs, updates, seed=0):
    for objective in ("ppo", "kl"):
        flags = ["--objective", objective, "--updates", updates]
        jobs.staleness(f"{objective}_updates{updates}", *flags, seed=seed)


def plan_more_seeds(jobs):
    """More seeds and more rows in turn, then the rest of three seeds for the first parts."""
    jobs.small("main", "opd_small", seed=2, at=QUARTERS)
    jobs.objective("ode", "3e-3", seed=1, at=QUARTERS)
    jobs.objective("ode", "3e-3", seed=2)
    jobs.objective("kl", "3e-3")
    jobs.grpo("mix_short", *WEIGHTED)
    for seed in (1, 2):
        jobs.small("main", "opd_sft", *jobs.from_sft, seed=seed)
    jobs.small("ablations", "late", "--train_steps", "3,4")
    jobs.small("ablations", "noise0.3", "--noise", "0.3")
    jobs.small("ablations", "steps10", "--steps", "10")
    jobs.grpo("sft_mix", *WEIGHTED, *jobs.from_sft)
    for seed in (1, 2):
        jobs.small("main", "opd_nomar", "--mar_weight", "0", seed=seed)
        jobs.grpo("merge_mix", *WEIGHTED, *MERGED, seed=seed)
    jobs.small("ablations", "noise1.2", "--noise", "1.2")
    jobs.small("ablations", "early", "--train_steps", "0,1,2")
    jobs.small("ablations", "random2", "--train_steps", "random:2")
    groups = ["--prompts_per_iteration", "16", "--group_size", "2"]
    jobs.small("ablations", "groups2", *groups)
    jobs.objective("kl", "1e-3", seed=1, at=QUARTERS)
    jobs.objective("kl", "1e-3", seed=2)
    jobs.grpo("mix_uniform", *UNIFORM)
    for seed in (1, 2):
        jobs.small("main", "opd_base", "--init", "base", seed=seed)
    for seed in (1, 2):
        jobs.grpo("sft_mix", *WEIGHTED, *jobs.from_sft, seed=seed)
        jobs.grpo("mix_short", *WEIGHTED, seed=seed)
        jobs.grpo("mix_uniform", *UNIFORM, seed=seed)
        jobs.add("main", "sft", "train_sft.py", seed=seed, at=(SFT,))
    jobs.objective("ppo-public-code", "3e-3")
    for objective in ("ppo", "kl", "ode", "ppo-public-code"):
        jobs.objective(objective, "3e-4")
    best = {"kl": "3e-3", "ppo-public-code": "3e-3", "ppo-published": "3e-4"}
    best |= {"ppo-scalar": "3e-4", "trajectory": "3e-4", "ppo": "3e-3"}
    for seed in (1, 2):
        for objective, lr in best.items():
            jobs.objective(objective, lr, seed=seed)
        jobs.small("MAR", "mar0.1", "--mar_weight", "0.1", seed=seed)
        jobs.small("MAR", "anchor_base", "--anchor", "base", seed=seed)


def plan_other_teachers(jobs):
    """The main rows once more with other teachers, trained from the same base with seed 1."""
    # Stages: before the end, and the end. RESULTS.md section 7 shows them all.
    stages = {"geneval": (40, 120, 260), "ocr": (20, 45, 90), "deqa": (25, 60, 110)}
    stages["pickscore"] = (10, 20, 40, 60)
    other = {task: f"{jobs.out}/other_{task}_seed1/adapter" for task in TASKS}
    teachers = []
    for task in TASKS:
        *flags, _, iterations = ADAPTERS[task]  # ..., "--iterations", N
        assert int(iterations) == stages[task][-1]
        flags += ["--eval_every", "0"]
        jobs.grpo(f"other_{task}", *flags, part="repeat", seed=1, at=stages[task])
        teachers += ["--teacher", f"{task}={other[task]}"]
    merge = ["--adapters", *other.values(), "--rank", "24"]
    jobs.add("repeat", "other_merged", "merge.py", *merge, seed=1)
    merged = ["--init", f"{jobs.out}/other_merged_seed1/adapter"]
    sft = ["--init", f"{jobs.out}/other_sft_seed1/adapter"]
    anchor = ["--anchor", other["deqa"]]
    default = [*teachers, *anchor, *merged]
    for seed in (1, 0, 2):
        jobs.opd("repeat", "other_opd", *default, seed=seed)
        jobs.grpo("other_merge_mix", *WEIGHTED, *merged, part="repeat", seed=seed)
        jobs.add("repeat", "other_sft", "train_sft.py", *teachers, seed=seed, at=(SFT,))
        jobs.small("repeat", "other_opd_sft", *teachers, *anchor, *sft, seed=seed)
        jobs.add("repeat", "other_default", "train_opd.py", *default, seed=seed, at=(160,))


def plan_reuse_and_ranks(jobs):
    """What the ratio and the clip do; and rows that came last."""
    jobs.staleness("ppo_updates8_clip0.02", "--updates", "8", "--clip_range", "0.02")
    plan_reuse_at_a_high_rate(jobs, seed=0)
    for updates in ("2", "4"):
        plan_updates(jobs, updates)
    best = ["--eval_every", "20", "--final", "best"]
    jobs.grpo("mix_uniform_long", *UNIFORM, *best, part="speed", at=(460,))
    for rank, alpha in (("2", "4"), ("16", "32")):
        flags = ["--init", "base", "--rank", rank, "--alpha", alpha]
        jobs.small("ablations", f"base_rank{rank}", *flags)
    for seed in (1, 2):
        jobs.objective("ode", "1e-3", seed=seed)
        jobs.objective("ppo-public-code", "1e-3", seed=seed)


def plan_reuse_at_a_high_rate(jobs, seed):
    for objective in ("ppo", "kl"):
        flags = ["--updates", "8", "--objective", objective, "--lr", "3e-3"]
        jobs.staleness(f"{objective}_updates8_lr3e-3", *flags, seed=seed)
    for clip in ("0.02", "100"):
        flags = ["--updates", "8", "--lr", "3e-3", "--clip_range", clip]
        jobs.staleness(f"ppo_updates8_lr3e-3_clip{clip}", *flags, seed=seed)


# ---- The second round


def plan_last_seeds(jobs):
    """Three seeds for the rows of the first round that RESULTS.md leans on."""
    for seed in (1, 2):
        plan_no_routing(jobs, seed)
        plan_updates(jobs, "8", seed)
        plan_reuse_at_a_high_rate(jobs, seed)


def plan_map(jobs):
    """2,560 images in iterations of 8 to 128, by rate, updates and objective.

    Scored on training prompts that are held back from these runs alone: a default is chosen here,
    and measured on the test prompts afterwards."""
    for size in (32, 16, 8, 64, 128):
        for updates in ("2", "1"):
            for lr in ("2e-3", "4e-3", "1e-3"):
                steps = MAP_IMAGES // size * int(updates)  # of the optimizer
                if size >= 64 and (lr == "1e-3" or steps < 40):
                    continue  # too few steps to arrive at this rate
                for objective in ("ppo", "kl"):
                    add_to_map(jobs, objective, size, updates, lr)
    # What may help the best of them.
    for lr in ("2e-3", "4e-3"):
        add_to_map(jobs, "ppo", 16, "2", lr, "decay", "decay")
        add_to_map(jobs, "ppo", 16, "2", lr, "warmup", "warmup")
        add_to_map(jobs, "ppo", 16, "2", lr, "ema0.97", "--ema_decay", "0.97")
    for objective, lr, decay in (
        ("ppo", "2e-3", "0.95"),
        ("ppo", "2e-3", "0.98"),
        ("kl", "1e-3", "0.97"),
        ("kl", "2e-3", "0.97"),
    ):
        add_to_map(jobs, objective, 16, "2", lr, f"ema{decay}", "--ema_decay", decay)


def add_to_map(jobs, objective, size, updates, lr, *more):
    """A run of plan_map, also scored after half of its iterations. more: its name, words."""
    name = "_".join([f"map_{objective}_b{size}_u{updates}_lr{lr}", *more[:1]])
    held_back = [f"{task}={jobs.out}/prompts/{task}_map.txt" for task in TASKS]
    words = [*more[1:], *candidate(objective, size, updates, lr), "--prompts", *held_back]
    last = MAP_IMAGES // size
    add_variant(jobs, "map", name, words, at=(last // 2, last))


def candidate(objective, size, updates, lr):
    """The flags that part map varies."""
    prompts = min(8, size // 2)  # two samples of a prompt or more
    flags = ["--objective", objective, "--updates", updates, "--lr", lr]
    return [*flags, "--prompts_per_iteration", str(prompts), "--group_size", str(size // prompts)]


def add_variant(jobs, part, name, words, seed=0, at=(80,)):
    """A run of train_opd.py, or of variants.py if the first word is a variant's name."""
    script = "train_opd.py" if words[0].startswith("--") else VARIANT
    jobs.add(part, name, script, *words, seed=seed, at=at)


def plan_default(jobs):
    """The best of the map with three seeds, scored on the test prompts."""
    for seed in range(3):
        for objective, lr, decay in (
            ("ppo", "2e-3", "0.9"),
            ("kl", "1e-3", "0.9"),
            ("ppo", "2e-3", "0.97"),
            ("kl", "2e-3", "0.97"),
        ):
            name, flags = f"default_{objective}_b16_u2_lr{lr}", candidate(objective, 16, "2", lr)
            if decay != "0.9":
                name, flags = f"{name}_ema{decay}", [*flags, "--ema_decay", decay]
            jobs.add("default", name, "train_opd.py", *flags, seed=seed, at=(80, 160))


def plan_bf16(jobs):
    """The default with the backbone in bf16 and the student's LoRA in float32."""
    for seed in range(3):
        flags = [*BEST, "--dtype", "bf16"]
        jobs.add("bf16", "default_bf16", "train_opd.py", *flags, seed=seed, at=(160,))


def plan_faster(jobs):
    """The default beside the published schedule with its rewards, in turn."""
    published = ["--objective", "ppo-public-code", "--steps", "10", *EPOCHS]
    for seed in range(3):
        words = ["rewards", *FIRST, *SMALL, *published]
        add_variant(jobs, "faster", "faster_published", words, seed, at=(80, 120, 160, 200))
        add_variant(jobs, "faster", "faster_default", BEST, seed, at=(40, 60, 80, 100, 160))
        flags = [*BEST, *GUIDED]
        add_variant(jobs, "faster", "faster_guided", flags, seed, at=(20, 40, 60, 80, 160))


def plan_pays(jobs):
    """GRPO-Mix from three starts, far beyond the student's images: one seed far, two less so."""
    starts = {"base": [], "merge": MERGED, "sft": jobs.from_sft}
    far = {"base": ALONG, "merge": ALONG, "sft": ALONG[:6]}
    near = {"base": ALONG[:5], "merge": ALONG[:4], "sft": ALONG[:4]}
    for seed in range(3):
        for start, flags in starts.items():
            at = near[start] if seed else far[start]
            jobs.grpo(f"mix_from_{start}", *WEIGHTED, *flags, part="pays", seed=seed, at=at)
            words = [*BEST, *(flags or ["--init", "base"])]
            at = (*LONG, 640) if start == "merge" and not seed else LONG
            jobs.add("pays", f"opd_from_{start}", "train_opd.py", *words, seed=seed, at=at)


def plan_beyond(jobs):
    """Longer chains of stages: is any student better than its teachers?"""
    for seed in range(3):
        from_merge = ["--init", "toy/adapters/merged"]
        sft = f"{jobs.out}/beyond_merge_sft_seed{seed}/adapter"
        jobs.add("beyond", "beyond_merge_sft", "train_sft.py", *from_merge, seed=seed, at=(SFT,))
        flags = [*BEST, "--init", sft]
        jobs.add("beyond", "beyond_merge_sft_opd", "train_opd.py", *flags, seed=seed, at=(320,))
        opd = ["--init", f"{jobs.out}/default_ppo_b16_u2_lr2e-3_seed{seed}.stages/160"]
        jobs.grpo("beyond_opd_mix", *WEIGHTED, *opd, part="beyond", seed=seed, at=(20, 54))
        flags = [*BEST, *GUIDED]
        jobs.add("beyond", "beyond_guided", "train_opd.py", *flags, seed=seed, at=(160,))
        flags += ["--step_weights", "equal", "--lr", "1e-3"]
        jobs.add("beyond", "beyond_guided_equal", "train_opd.py", *flags, seed=seed, at=(160,))
        jobs.add("beyond", "beyond_guided_equal_long", "train_opd.py", *flags, seed=seed, at=(320,))


def plan_strict(jobs):
    """The same with rewards of all or nothing: teachers, merge, students and GRPO-Mix."""
    strict = ["--rewards", "experiments.strict_rewards"]
    made = {task: f"toy/adapters/{task}" for task in ("deqa", "pickscore")}
    for task, stages in (("geneval", (65, 130, 260)), ("ocr", (22, 45, 90))):
        *flags, _, iterations = ADAPTERS[task]
        assert int(iterations) == stages[-1]
        flags += ["--eval_every", "0", *strict]
        jobs.grpo(f"strict_{task}", *flags, part="strict", at=stages)
        made[task] = f"{jobs.out}/strict_{task}_seed0/adapter"
    teachers = []
    for task in TASKS:
        teachers += ["--teacher", f"{task}={made[task]}"]
    merge = ["--adapters", *(made[task] for task in TASKS), "--rank", "24"]
    jobs.add("strict", "strict_merged", "merge.py", *merge)
    jobs.add("strict", "strict_sft", "train_sft.py", *teachers, at=(SFT,))
    starts = {"base": ["--init", "base"]}
    for start in ("merged", "sft"):
        starts[start] = ["--init", f"{jobs.out}/strict_{start}_seed0/adapter"]
    for seed in range(3):
        for start, flags in starts.items():
            far = ALONG[:6] if start == "base" else ALONG[:5]
            mix = [*WEIGHTED, *flags, *strict]
            at = ALONG[:4] if seed else far
            jobs.grpo(f"strict_mix_from_{start}", *mix, part="strict", seed=seed, at=at)
            opd = [*BEST, *teachers, *flags]
            at = LONG[:4] if seed else LONG
            name = f"strict_opd_from_{start}"
            jobs.add("strict", name, "train_opd.py", *opd, seed=seed, at=at)


def plan_tasks(jobs):
    """One to four tasks from the base, the same number of images for each task."""
    order = ("geneval", "ocr", "pickscore", "deqa")
    for seed in range(3):
        for number in (1, 2, 3, 4):
            tasks = order[:number]
            own = ["--teacher", *(f"{task}=toy/adapters/{task}" for task in tasks)]
            size = ["--prompts_per_iteration", str(2 * number)]
            flags = [*BEST, *size, *own, "--init", "base", "--mar_weight", "0"]
            jobs.add("tasks", f"tasks{number}_opd", "train_opd.py", *flags, seed=seed, at=(160,))
            mix = ["--mix", *(f"{task}=1" for task in tasks), *MIX]
            mix += ["--prompts_per_iteration", str(3 * number)]
            jobs.grpo(f"tasks{number}_mix", *mix, part="tasks", seed=seed)


def plan_later_papers(jobs):
    """What later papers change in the loss, from the merge, without MAR, at two rates."""
    kl = ["--mar_weight", "0"]
    ode = ["--objective", "ode", "--noise", "0", "--mar_weight", "0"]
    one = ["--train_steps", "random:1"]
    variants = {
        "kl": kl,
        "velocity": kl,
        "noisy": kl,
        "clean": kl,
        "extrapolate": kl,
        "uniform": [*ode, *one],
        "beta": [*ode, *one],
        "ode": ode,
        "ode_velocity": ode,
    }
    rows = [(name, lr, 0) for name in variants for lr in ("1e-3", "2e-3")]
    best = {"kl": "2e-3", "velocity": "1e-3", "noisy": "1e-3", "clean": "2e-3"}
    best |= {"ode_velocity": "2e-3", "beta": "2e-3"}
    rows += [(name, lr, seed) for seed in (1, 2) for name, lr in best.items()]
    for name, lr, seed in rows:
        words = [*candidate("kl", 16, "2", lr), *variants[name]]
        if name not in ("kl", "ode", "uniform"):
            words = [name.removeprefix("ode_"), *words]
        add_variant(jobs, "later", f"later_{name}_lr{lr}", words, seed=seed, at=(160,))
    # The same weights with ppo, and with MAR, whose errors they weigh too.
    rows = [("5e-4", 0), ("1e-3", 0), ("2e-3", 0), ("1e-3", 1), ("1e-3", 2)]
    for lr, seed in rows:
        flags = [*candidate("ppo", 16, "2", lr), "--step_weights", "equal"]
        jobs.add("later", f"later_ppo_lr{lr}", "train_opd.py", *flags, seed=seed, at=(160,))


def plan_guidance(jobs):
    """Teachers with guidance 2: three ways to follow them, scored at four scales."""
    ways = {"sum": [], "branches": ["branches"], "prompt_alone": ["--student_guidance", "1"]}
    for rate, suffix, seeds in (("1e-3", "", 3), ("2e-3", "_lr2e-3", 1)):
        how = [*candidate("kl", 16, "2", rate), "--mar_weight", "0", "--guidance", "2"]
        for seed in range(seeds):
            for way, words in ways.items():
                name = f"guidance_{way}{suffix}"
                add_variant(jobs, "guidance", name, [*words, *how], seed=seed, at=(160,))
    # A student that was trained without guidance, and the teachers.
    off = f"{jobs.out}/later_kl_lr1e-3_seed0/adapter"
    jobs.add("guidance", "guidance_off", None, off, "1.5", "2", "3")
    for task in TASKS:
        jobs.add("guidance", f"guidance_{task}", None, f"toy/adapters/{task}", "2")
