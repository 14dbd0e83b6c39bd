"""Evaluate models side by side: the paper's table, picture grids, or images of your own prompt.

    python evaluate.py --models base merged=toy/adapters/merged student=runs/opd/adapter
    python evaluate.py --models base toy/adapters/ocr --prompt "sign reads K T in red"
    torchrun --nproc_per_node=2 evaluate.py --models base            # the same table, two processes
    python evaluate.py --scores_only mine=DIR --tasks ocr --prompts ocr=data/ocr_test.txt
    torchrun --nproc_per_node=8 evaluate.py @recipes/sd35m_quality.args   # or sd35m_compbench.args

A model is `base` or an adapter, written PATH or NAME=PATH. All models get the same prompts and
noise, so differences between them are paired. If the four teachers are among the models under their
tasks' names, a row `oracle` scores each task by its own teacher: perfect routing.

The columns are the paper's: each metric on the test prompts of its own task, and
Average = (GenEval + OCR + DeQA / 5 + PickScore / 26) / 4. ± is one standard error over prompts.
--table quality prints several metrics on one set of prompts, --table compbench T2I-CompBench.

All images are generated first, into OUT/images/MODEL/TASK/00000.png and so on. Then one scorer at
a time scores them. A file records what made it (weights, prompt, noise, settings), and a later call
generates only what is missing: after a crash, or for one more model.

--scores_only takes images made by anything: folders DIR/TASK, or DIR for a single task, that hold
    00000.png, 00001.jpg, …        image n belongs to line n, counted from 0, of the prompt file
    00000/samples/0000.png, …      several images a line, in the layout of GenEval's scripts
    metadata.jsonl and its images  {"file_name": …, "prompt": …, what the scorer needs} a line
"""

import argparse
import os
from pathlib import Path

import torch

from rewards.pictures import picture_grid, sample_images, save_grid
from rewards.scoring import check_prompts, find_missing, find_tests, list_made, try_scorers
from rewards.scoring import load_scorers, sample_missing, score_files
from rewards.tables import TABLES, most_different, paper_table, summarise
from support import lora, model, run
from support.files import ADAPTER, check_adapter, check_model, check_prompt, fetch
from support.files import prompt_files, save_json, sha256
from support.flags import TASKS, Pairs, at_least, check_folder, fail, make_parser
from support.flags import model_flags, positive, reward_flags, scale


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    model_flags(parser)  # --model, --dtype, --size, ...: as in the training scripts
    flag = parser.add_argument_group("evaluation").add_argument
    flag("--models", nargs="+", metavar="[NAME=]PATH", help="base or adapters; default base")
    flag("--prompt", action="append", help="images of this prompt, no scores; may be repeated")
    flag("--scores_only", nargs="+", metavar="[NAME=]DIR", help="score the images of a folder")
    flag("--table", choices=TABLES, default="main", help="which of the paper's tables")
    flag("--tasks", nargs="+", help="whose test prompts to use; default those of --table")
    flag("--prompts", "--test_prompts", action=Pairs, metavar="TASK=FILE", help="the test prompts")
    flag("--num_prompts", type=at_least(0), default=0, help="test prompts per task; 0 = all")
    flag("--published", action="store_true", help="add the paper's rows (SD3.5-M, 512 pixels)")
    flag("--steps", type=positive, default=16, help="ODE steps (40 in the paper)")
    flag("--guidance", type=scale, default=1.0, help="guidance scale; 1 = off (SD3.5: 4.5)")
    flag("--model_guidance", action=Pairs, kind=scale, metavar="NAME=SCALE", help="of one model")
    flag("--seed", type=at_least(0), default=0, help="of the initial noise")
    flag("--batch", type=positive, default=128, help="images per forward pass")
    flag("--out", default="runs/evaluate", help="folder of the results, the images and the grids")
    flag("--overwrite", action="store_true", help="replace the results; images that fit are kept")
    reward_flags(flag)
    return check_evaluation(parser.parse_args())


def check_evaluation(args: argparse.Namespace) -> argparse.Namespace:
    """Afterwards models, prompts and model_guidance are {name: value}, and all files exist."""
    # Three modes: score models, show images of --prompt, or score images made elsewhere.
    if args.scores_only and (args.prompt or args.models):
        fail("--scores_only generates no images: give it without --prompt and --models")
    if args.published and args.rewards == "toy":
        fail("--published: the toy scorers are not the paper's; give --rewards rewards")
    # A model's name becomes a row of the table and a folder of images.
    source, given = "--models", args.models or ["base"]
    if args.scores_only:
        source, given = "--scores_only", args.scores_only
    args.models = {}
    for item in given:
        name, equals, path = item.partition("=")
        if not equals or os.path.exists(item):  # a path may hold a =
            name, path = Path(item.rstrip("/")).name, item
        if name in args.models:
            fail(f"{source}: two models are called {name!r}; write NAME=PATH")
        if Path(name).name != name or name == "..":
            fail(f"{source} {item}: the name becomes a folder: no slash in it; NAME={path}")
        if args.scores_only and not Path(path).is_dir():
            fail(f"--scores_only {path}: not a folder of images")
        if not args.scores_only and path != "base":
            check_adapter(path, "--models")
        args.models[name] = path
    if not args.scores_only:
        check_model(args.model)
    # --model_guidance: a student that was distilled to need no guidance is sampled without.
    for name in args.model_guidance:
        if name not in args.models:
            fail(f"--model_guidance: no model {name!r}; there are {', '.join(args.models)}")
    # A task outside the main table's four needs prompts, and a scorer of its name in --rewards.
    args.tasks = args.tasks or list(TABLES[args.table])
    for task in args.tasks:
        known = task in TASKS or task in args.prompts or args.scores_only
        if Path(task).name != task or not known:
            fail(f"unknown task {task!r}: {', '.join(TASKS)}, or any with --prompts {task}=FILE")
    for task in args.prompts:
        if task not in args.tasks:
            fail(f"--prompts: unknown task {task!r}: this run has {', '.join(args.tasks)}")
    for prompt in args.prompt or ():
        check_prompt(prompt, "--prompt")
    if not (args.prompt or args.scores_only):
        args.prompts = prompt_files(args.prompts, args.tasks, "test", args.model)
    # A training run is never overwritten, an evaluation only with --overwrite.
    check_folder(args.out)
    results = Path(args.out, "prompts.png" if args.prompt else "results.json")
    if results.with_name("args.json").exists() or (results.exists() and not args.overwrite):
        fail(f"--out {args.out} holds results: choose another folder, or --overwrite an evaluation")
    return args


# ---- Models and their images


def load_models(args: argparse.Namespace, device: torch.device) -> tuple:
    """The pipeline with all adapters, {model: its LoRA or None}, {model: guidance scale}."""
    pipe = model.load_pipeline(args, device)
    loras, guidance = {}, {}  # one backbone: a further model costs a LoRA's memory
    for number, (name, path) in enumerate(args.models.items()):
        loras[name] = None
        if path != "base":
            loras[name] = f"model_{number}"
            lora.load_adapter(pipe.transformer, loras[name], path, "--models")
        guidance[name] = args.model_guidance.get(name, args.guidance)
    return pipe, loras, guidance


def sample_prompts(args: argparse.Namespace, device: torch.device) -> None:
    """Write prompts.png: a row per --prompt, a column per model, the same noise for all."""
    pipe, loras, guidance = load_models(args, device)
    text = model.embed_prompts(pipe, args.prompt, args)
    # The noise depends on seed and number alone: it is the same for all models.
    keys, columns = [(args.seed, "prompt", i) for i in range(len(args.prompt))], {}
    for name in loras:
        how = (args.steps, guidance[name], args.batch)
        with lora.use(pipe.transformer, loras[name]):
            columns[name] = sample_images(pipe, text, args.prompt, keys, *how)
    picture_grid(Path(args.out) / "prompts.png", columns, args.prompt)
    print(f"{len(args.prompt)} prompts x {len(columns)} models -> {args.out}/prompts.png")


def marks_of(args: argparse.Namespace, pipe, guidance: dict) -> dict[str, dict]:
    """{model: all that its images depend on, besides their prompt and number}."""
    rank, _ = run.rank_and_world()
    base = None
    if rank == 0:  # 15 GB of SD3.5: read once
        parts = ("transformer", "vae", "scheduler", *model.TEXT)
        folders = [Path(pipe.name_or_path, part) for part in parts]
        base = [sha256(folder) for folder in folders if folder.is_dir()]
    dtype = str(model.backbone_dtype(pipe.transformer))
    how = {"base": run.gather(base)[0], "dtype": dtype, "no_t5": args.no_t5, "seed": args.seed}
    how |= {"text_length": args.text_length, "steps": args.steps, "size": args.size}
    how |= {"time_grid": args.time_grid}
    marks = {}
    # An adapter counts by its contents, not its path: one that was trained again gets new images.
    for name, path in args.models.items():
        marks[name] = how | {"adapter": path, "guidance": guidance[name]}
        if path != "base":
            marks[name]["adapter"] = sha256(fetch(path, "--models", ADAPTER))
    return marks


def generate(args: argparse.Namespace, tests: dict, device: torch.device) -> dict:
    """Generate what OUT/images lacks: {model: {task: [file, ...]}}. Every process has its share."""
    pipe, loras, guidance = load_models(args, device)
    marks = marks_of(args, pipe, guidance)
    files, missing = find_missing(Path(args.out) / "images", tests, marks)
    text = {}
    if missing:
        text = model.embed_prompts(pipe, [tests[task][0][j] for _, task, j, _ in missing], args)
    how = (args.seed, args.steps, args.batch)
    sample_missing(pipe, text, loras, guidance, tests, files, missing, *how)
    return files


# ---- The evaluation


@run.guarded
def main(args: argparse.Namespace) -> None:
    rank, _, device = run.start_processes()
    out = Path(args.out)
    if args.prompt:  # images to look at, nothing to score
        if rank == 0:
            sample_prompts(args, device)
        return run.stop_processes()

    # 1. Scorers and prompts: what cannot be scored is found before any image is generated.
    scorers = load_scorers(args.rewards, args.tasks, args.reward_device or device, args.table)
    tests = run.read_tasks(args.prompts)
    n = args.num_prompts or None  # the first n; None: all
    tests = {task: (prompts[:n], metadata[:n]) for task, (prompts, metadata) in tests.items()}
    if args.scores_only:
        tests, files = find_tests(args)
    for task, metrics in scorers.items():
        for scorer in metrics.values():
            check_prompts(scorer, *tests[task], args.prompts.get(task, f"prompts of {task}"))
    # 2. Images, with the same prompts and noise for every model. The model is freed afterwards.
    if not args.scores_only:
        try_scorers(scorers)
        files = generate(args, tests, device)

    # 3. Scores, from the files: 8-bit pictures, like any others.
    scores, failed = score_files(files, tests, scorers, args.batch)

    # 4. Tables and grids.
    if rank == 0:
        # {model: {metric: mean, standard error, number}}; published rows have no error.
        summary = summarise(scores, tests)
        reasons = [f"not scored: {metric}: {why}" for metric, why in failed.items()]
        # An error is never a score. Without any score there is no table, and the exit code is 2.
        if not any(scores.values()):
            print("\n".join(reasons), flush=True)
            fail(f"--rewards {args.rewards}: nothing was scored, see above; the images are kept")
        table = paper_table(args.table, summary, tests, args.published)
        table = "\n\n".join([table, *reasons])
        results = {"flags": vars(args), "results": summary, "not_scored": failed}
        save_json(out / "results.json", results)
        (out / "table.md").write_text(table + "\n")
        # Two prompts per task, and the prompts on which the models differ most.
        first = {task: range(len(prompts))[:2] for task, (prompts, _) in tests.items()}
        save_grid(out / "grid.png", scores, files, tests, first)
        save_grid(out / "differences.png", scores, files, tests, most_different(scores, tests))
        print(f"\n{table}\n\n-> {out}/: {list_made(out)}")
    run.stop_processes()


if __name__ == "__main__":
    main(parse_args())
