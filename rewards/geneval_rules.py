"""GenEval's rules: what an image must show, and how that becomes a score. Pure Python.

    official(objects, metadata)   right or wrong, by djghosh13/geneval evaluation/evaluate_images.py
    softened(objects, metadata)   the reward that trains, by yifan123/reward-server gen_eval.py
    summary(results)              the four numbers that papers call "GenEval"

metadata is a line of GenEval's evaluation_metadata.jsonl: tag, include, exclude. objects is what
the detector found, the best first: {class: [{"box": (x1, y1, x2, y2), "colour": name, …}, …]}.
"""

import difflib
import math
from collections.abc import Sequence

# object_names.txt: COCO's order with three names changed (computer mouse, tv remote, computer
# keyboard). So the detector's labels are looked up by index, never by COCO's names.
CLASSES = tuple(
    """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,
stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,
umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,
skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,
sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,
toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,
refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush
""".replace("\n", "").split(",")
)
COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"
)  # fmt: skip
RELATIONS = ("left of", "right of", "above", "below")
TAGS = ("position", "counting", "color_attr", "colors", "two_object", "single_object")  # six tasks
DEAD_ZONE = 0.1  # POSITION_THRESHOLD: the share of both sizes by which centres must differ


def relative_position(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Where box a lies, seen from box b: a subset of RELATIONS, at most two of them."""
    offset, beyond = [], []  # x and y: between the centres, and what of it exceeds the dead zone
    for low, high in ((0, 2), (1, 3)):
        distance = (a[low] + a[high] - b[low] - b[high]) / 2
        dead_zone = DEAD_ZONE * (a[high] - a[low] + b[high] - b[low])
        offset.append(distance)
        beyond.append(max(abs(distance) - dead_zone, 0))
    if max(beyond) < 1e-3:
        return set()
    length = math.hypot(*offset)  # upstream divides by the offset before the dead zone is taken off
    dx = math.copysign(beyond[0], offset[0]) / length
    dy = math.copysign(beyond[1], offset[1]) / length
    holds = (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)  # y grows downwards
    return {name for name, true in zip(RELATIONS, holds) if true}


def in_place(found: list[dict], target: list[dict] | None, relation: str) -> bool:
    """Does every object found stand in the relation to every target? None: there is no target."""
    if target is None:
        return False
    return all(relation in relative_position(a["box"], b["box"]) for a in found for b in target)


def official(objects: dict[str, list[dict]], metadata: dict) -> bool:
    """The official verdict on one image (evaluate in evaluate_images.py).

    Of each class only the best `count` objects are looked at. So one cat too many is no error,
    unless `exclude` makes it one."""
    groups = []
    for request in metadata["include"]:
        found = objects.get(request["class"], [])[: request["count"]]
        matched = len(found) == request["count"]
        if matched and "color" in request:
            matched = all(o["colour"] == request["color"] for o in found)
        if matched and "position" in request:
            relation, target = request["position"]
            matched = in_place(found, groups[target], relation)
        groups.append(found if matched else None)
    for request in metadata.get("exclude") or ():
        if len(objects.get(request["class"], [])) >= request["count"]:
            return False
    return None not in groups


def softened(
    objects: dict[str, list[dict]], metadata: dict, position_slip: bool = True
) -> tuple[float, bool]:
    """The reward that trains, and the strict verdict (evaluate_reward in reward-server).

    The reward is the mean of one term for each count, colour and position asked for. A count's term
    is 1 - |wanted - found| / wanted: with 1 wanted and 4 found it is -2.
    Strict: every count exact, every colour and position right; `exclude` is not read.
    position_slip: after the 0 of a violated position upstream appends a 1 as well, so the mean is
    (1 + 1 + 0 + 1) / 4; False leaves that 1 out."""
    terms, groups = [], []
    for request in metadata["include"]:
        wanted, found = request["count"], objects.get(request["class"], [])
        matched = len(found) == wanted
        terms.append(1 - abs(wanted - len(found)) / wanted)
        if not matched and ("color" in request or "position" in request):
            terms.append(0.0)
        if matched and "color" in request:
            right = sum(o["colour"] == request["color"] for o in found)
            matched = right == wanted
            terms.append(1 - abs(wanted - right) / wanted)
        if matched and "position" in request:
            relation, target = request["position"]
            matched = in_place(found, groups[target], relation)
            terms.append(float(matched))
            if not matched and groups[target] is not None and position_slip:
                terms.append(1.0)
        groups.append(found if matched else None)
    return sum(terms) / len(terms), None not in groups


def summary(results: list[dict]) -> dict:
    """The four numbers that papers call GenEval, from the results of GenEval.judge on all images.

    official         mean of the task accuracies (summary_scores.py); every task weighs the same
    official_images  share of the images that are officially correct
    strict           share of the images that are strictly correct; what Flow-GRPO logs
    softened         mean softened reward
    tasks            {tag: official accuracy}

    They are means over the images given: all six tags are needed for the benchmark's numbers."""
    if not results:
        raise ValueError("geneval: there are no results to sum up")

    def mean(key, rows):
        return sum(float(row[key]) for row in rows) / len(rows)

    by_tag = {}
    for row in results:
        by_tag.setdefault(row["tag"], []).append(row)
    tasks = {tag: mean("correct", rows) for tag, rows in by_tag.items()}
    return {
        "official": sum(tasks.values()) / len(tasks),
        "official_images": mean("correct", results),
        "strict": mean("strict", results),
        "softened": mean("soft", results),
        "tasks": tasks,
    }


def check_metadata(metadata: object, i: int) -> None:
    """ValueError, one line, unless this is a line of metadata that the rules can judge."""
    where = f"geneval: metadata {i}"
    if not isinstance(metadata, dict) or metadata.get("tag") not in TAGS:
        advice = "give lines as in GenEval's evaluation_metadata.jsonl"
        raise ValueError(f'{where} has no "tag" of {", ".join(TAGS)}; {advice}')
    include, exclude = metadata.get("include"), metadata.get("exclude") or []
    if not isinstance(include, list) or not include or not isinstance(exclude, list):
        entry = '{"class", "count"}, with "color" or "position" where asked'
        raise ValueError(f'{where} has no "include": a list of {entry}')
    for k, request in enumerate([*include, *exclude]):
        check_request(request, where, earlier=k)


def check_request(request: object, where: str, earlier: int) -> None:
    """ValueError unless this entry of "include" or "exclude" is valid; `earlier` are before it."""
    if not isinstance(request, dict) or "class" not in request:
        raise ValueError(f'{where}: {request} names no "class"; give one of the 80')
    if request["class"] not in CLASSES:
        name = str(request["class"])
        known = f"is not among GenEval's 80 (object_names.txt); {nearest_class(name)!r} is one"
        raise ValueError(f"{where}: class {name!r} {known}")
    count = request.get("count")
    if type(count) is not int or count < 1:
        raise ValueError(f'{where}: {request} needs a "count", a whole number of at least 1')
    colour = request.get("color", "red")
    if colour not in COLOURS:
        raise ValueError(f"{where}: color {colour!r} is none of {', '.join(COLOURS)}")
    if "position" in request and not is_position(request["position"], earlier):
        valid = f"[{' | '.join(RELATIONS)}, index of an earlier entry]"
        raise ValueError(f"{where}: position {request['position']} is not {valid}")


def is_position(place: object, earlier: int) -> bool:
    """Is it [relation, index of one of the `earlier` entries before it]?"""
    if not isinstance(place, (list, tuple)) or len(place) != 2:
        return False
    relation, target = place
    return relation in RELATIONS and type(target) is int and target in range(earlier)


def nearest_class(name: str) -> str:
    """The class that someone who wrote `name` may have meant; for an error's text."""
    containing = [known for known in CLASSES if name in known.split()]
    return [*containing, *difflib.get_close_matches(name, CLASSES, 1), "person"][0]
