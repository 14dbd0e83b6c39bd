"""rewards/unidet.py and rewards/depth.py: every part, and the whole, against the plain loops of
experiments/published_unidet.py on random weights; files that are not the published ones."""

import functools
import math

import pytest
import torch
from conftest import raises
from test_rewards import drawing, fetched
from torch.testing import assert_close

from experiments import published_unidet as slow
from experiments.published_networks import coarse_pictures
from rewards import depth, unidet

BOXES, ROWS = slow.random_boxes(200), slow.random_boxes(200).tolist()
PICTURES = coarse_pictures((512, 512), (512, 306), (9, 23), (400, 400))
TINY = (slow.TINY, (90, 120))  # of the network, and of the input's edges
FULL = pytest.param(slow.FULL, (479, 480), 0, False, marks=pytest.mark.slow)


def test_anchors_boxes_and_roi_align():
    assert_close(unidet.anchors(1, 3, 5), torch.tensor(slow.slow_anchors(4, 3, 5)))  # of P4
    deltas = torch.randn(200, 4) * torch.tensor([20, 20, 40, 40])  # some grow more than allowed
    moved = torch.tensor([slow.slow_decode(*row, (10, 10, 5, 5)) for row in zip(ROWS, deltas)])
    assert_close(unidet.decode(BOXES, deltas, (10, 10, 5, 5)), moved)
    clipped = torch.tensor([slow.slow_clip(row, 300, 400) for row in moved.tolist()])
    assert_close(unidet.clip(moved, (300, 400)), clipped)
    features = [torch.randn(3, *size) for size in ((32, 50), (16, 25), (8, 13))]  # 256 x 400
    expected = slow.slow_pool([feature.double().numpy() for feature in features], ROWS[:60])
    pooled = unidet.pool(features, BOXES[:60])
    assert_close(pooled, torch.tensor(expected).float(), rtol=0, atol=2e-4)
    assert pooled[:2].count_nonzero() == 0 and set(unidet.box_levels(BOXES).tolist()) == {0, 1, 2}
    ramp, middles = torch.arange(40) + 0.5, (torch.arange(7) + 0.5) / 7
    pooled = unidet.roi_align((ramp + 10 * ramp[:, None])[None], torch.tensor([[3, 5, 38, 12.0]]))
    assert_close(pooled[0, 0], 3 + 35 * middles + 10 * (5 + 7 * middles)[:, None])  # the centres


@pytest.mark.parametrize("threshold, most", [(0.7, 1000), (0.5, 1000), (0.5, 7)])
def test_suppression_and_choice(threshold, most):
    groups, scores = torch.arange(200) % 3, torch.randint(0, 40, (200,)) / 40  # many are tied
    kept = unidet.suppress(BOXES, torch.arange(200), groups, scores, threshold, most)
    expected = slow.slow_nms(ROWS, groups.tolist(), scores.tolist(), threshold, most)
    assert kept == expected and len(kept) < 200
    scores = torch.rand(200, 5) ** 4
    edge = torch.tensor([[0.1], [0.1000001]])
    assert_close(unidet.choose(BOXES[3:5], edge)["scores"], edge[1])
    for many in (scores, scores / 2 + 0.2):  # some; more than 300, two of them without an area
        found, expected = unidet.choose(BOXES, many), slow.slow_choose(ROWS, many.tolist())
        assert slow.largest_difference(found, expected, unidet.LABELS) == 0
    assert len(expected) > 290 and unidet.choose(BOXES, edge[:0])["boxes"].shape == (0, 4)


@pytest.mark.parametrize("sizes, edges, seed, saturated", [(*TINY, 1, 0), (*TINY, 2, 1), FULL])
def test_detector(monkeypatch, tmp_path, sizes, edges, seed, saturated):
    monkeypatch.setattr(unidet, "EDGES", edges)
    monkeypatch.setattr(unidet, "PROPOSALS", 30)
    monkeypatch.setattr(unidet, "Network", functools.partial(unidet.Network, **sizes))
    state = slow.unidet_state(sizes, seed, saturated)
    torch.save({"model": state | slow.old_constants()}, tmp_path / "random.pth")
    scorer = unidet.UniDet(weights=tmp_path / "random.pth", batch=2, sha256=None)
    for picture, found in zip(PICTURES, scorer.detect(PICTURES)):
        expected = slow.slow_detect(state, slow.slow_input(picture, edges), 30)
        for result in (found, scorer.detect([picture])[0]):
            assert slow.largest_difference(result, expected, unidet.LABELS) < 1e-3
    assert scorer.detect([]) == []
    scorer.model.backbone.fpn_lateral5.bias.fill_(math.nan)
    raises("not finite", scorer.detect, PICTURES)


def test_depth(tmp_path):
    scorer = depth.Depth(weights=slow.save_depth(tmp_path, [depth.UNUSED]), batch=2)
    inputs = [(479, 479), (480, 287), (188, 480)]
    for picture, size, result in zip(PICTURES, inputs, scorer.depth(PICTURES[:3])):
        expected = slow.slow_depth(scorer.model, picture, size)
        assert_close(result, expected, rtol=0, atol=1.5 / 255)  # rounding may be a step of 1/255
        assert (result - expected).abs().mean() < 1e-4 and result.max() > 0.5
    assert scorer.depth([]) == []
    raises("constant", depth.finish, torch.ones(480, 480), 9, 9)


def test_files(tmp_path):
    shapes = slow.unidet_shapes(**slow.FULL)
    assert len(shapes) == 311 and sum(map(math.prod, shapes.values())) == 71_954_034
    with torch.device("meta"):
        unidet.load_published(unidet.Network(), {k: torch.empty(v) for k, v in shapes.items()})
        assert len(slow.hf.DPTForDepthEstimation(slow.depth_config()).state_dict()) == 414
    assert len(unidet.LABELS) == 722 and len(set(unidet.LABELS)) == 677  # 44 names recur
    norm, fc = "backbone.bottom_up.stem.conv1.norm.bias", "roi_heads.box_head.0.fc1.weight"
    wrong = {norm: None, fc: torch.ones(16, 9), "other": 7, "pixel_std": torch.zeros(3, 1, 1)}
    for name, value in wrong.items():
        state = (slow.unidet_state() | {name: value}).items()
        state = {key: tensor for key, tensor in state if tensor is not None}
        network, message = unidet.Network(**slow.TINY), f"do not fit: 1 .{name} is .*curl"
        raises(message, unidet.load_published, network, state)
    file = tmp_path / "other.pth"
    raises("no file.*curl", unidet.UniDet(weights=file).load)
    file.write_bytes(b"not a checkpoint")
    raises("not the published file.*curl", unidet.UniDet(weights=file).load)
    raises("cannot be read.*curl", unidet.UniDet(weights=file, sha256=None).load)
    raises("cannot load.*hf download", depth.Depth(weights=tmp_path).load)
    folder = slow.save_depth(tmp_path / "depth", [depth.UNUSED, "head.head.4"])
    raises("lacks 2 weights .head.head.4.bias.*hf download", depth.Depth(weights=folder).load)


@pytest.mark.slow
@pytest.mark.parametrize("kind, call", [(unidet.UniDet, "detect"), (depth.Depth, "depth")])
def test_the_real_weights(kind, call):
    result = getattr(fetched(kind()), call)([drawing("orange")])[0]
    assert "orange" in result["labels"] if call == "detect" else result.std() > 0.01
