"""Training prompts for GenEval, by the rules of its test prompts (its prompts/create_prompts.py).

    python -m rewards.geneval_prompts 50000 --test evaluation_metadata.jsonl --out train.jsonl

Flow-GRPO's file of 50,000 prompts is not public. These follow the same rules with other random
numbers.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path

from rewards.geneval_rules import CLASSES, COLOURS, RELATIONS

# The shares of Flow-GRPO's training prompts (its merge_genevaltask.py)
SHARES = {
    "position": 0.7,
    "counting": 0.5,
    "color_attr": 0.3,
    "colors": 0.1,
    "two_object": 0.1,
    "single_object": 0.0,
}
NUMBERS = {2: "two", 3: "three", 4: "four"}


def make_prompt(tag: str, rng: random.Random) -> dict:
    """One line of metadata. Persons get no colour; two objects never share class or colour."""
    if tag in ("colors", "color_attr"):
        classes = CLASSES[1:]
    else:
        classes = CLASSES
    a, b = rng.sample(classes, 2)
    red, blue = rng.sample(COLOURS, 2)
    first, second = {"class": a, "count": 1}, {"class": b, "count": 1}
    exclude = {}
    if tag == "single_object":
        include, text = [first], with_article(a)
    elif tag == "two_object":
        include, text = [first, second], f"{with_article(a)} and {with_article(b)}"
    elif tag == "counting":
        count = rng.randint(2, 4)
        include = [first | {"count": count}]
        exclude = {"exclude": [first | {"count": count + 1}]}
        plural = "es" if a.endswith("s") else "s"
        text = f"{NUMBERS[count]} {a}{plural}"
    elif tag == "colors":
        include, text = [first | {"color": red}], f"{with_article(red)} {a}"
    elif tag == "color_attr":
        include = [first | {"color": red}, second | {"color": blue}]
        text = f"{with_article(red)} {a} and {with_article(blue)} {b}"
    else:  # position: the object that is placed comes second and refers to the first
        relation = rng.choice(RELATIONS)
        include = [first, second | {"position": [relation, 0]}]
        text = f"{with_article(b)} {relation} {with_article(a)}"
    return {"tag": tag, "include": include, **exclude, "prompt": f"a photo of {text}"}


def with_article(words: str) -> str:
    article = "an" if words[0] in "aeiou" else "a"
    return f"{article} {words}"


def training_prompts(n: int, test_prompts: Iterable[str], seed: int = 0) -> list[dict]:
    """n lines of metadata in the shares above, none with a prompt of test_prompts.

    Repeated prompts stay in, as upstream."""
    if n < 1:
        raise ValueError(f"geneval: {n} prompts wanted; give at least 1")
    rng, held_out, lines = random.Random(seed), set(test_prompts), []
    while len(lines) < n:
        (tag,) = rng.choices(list(SHARES), SHARES.values())
        line = make_prompt(tag, rng)
        if line["prompt"] not in held_out:
            lines.append(line)
    return lines


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file of metadata."""
    lines = Path(path).read_text("utf-8").split("\n")
    try:
        return [json.loads(line)["prompt"] for line in lines if line.strip()]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f'geneval: {path} is not JSON lines with a "prompt" in each') from error


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")  # one line, no usage
    parser.add_argument("count", type=int, help="how many lines of metadata to write")
    parser.add_argument(
        "--test",
        required=True,
        metavar="FILE.jsonl",
        help="GenEval's evaluation_metadata.jsonl, whose prompts are left out",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, metavar="FILE.jsonl", help="file to write")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    try:
        lines = training_prompts(args.count, read_prompts(args.test), args.seed)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        Path(args.out).write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main(parse_args())
