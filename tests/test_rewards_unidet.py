"""rewards/unidet.py and rewards/depth.py: every part, and the whole, against the plain loops of
experiments/published_unidet.py on random weights; files that are not the published ones."""

import functools
import math
from collections import Counter

import pytest
import torch
from conftest import raises
from test_rewards import as_image, drawing, fetched, noise
from torch.testing import assert_close

from experiments import published_unidet as slow
from rewards import depth, unidet

BOXES, SIZES = slow.random_boxes(200), [(512, 512), (300, 512), (20, 9), (512, 512)]
LEVELS = [slow.slow_level(box) if slow.has_area(box) else 3 for box in BOXES.tolist()]


@pytest.mark.parametrize("level, height, width", [(3, 5, 7), (4, 1, 3), (5, 2, 2), (7, 3, 1)])
def test_anchors(level, height, width):
    expected = torch.tensor(slow.slow_anchors(level, height, width))
    assert_close(unidet.anchors(level - 3, height, width), expected)


def test_boxes_are_decoded_clipped_and_given_to_levels():
    deltas = torch.randn(200, 4) * torch.tensor([20, 20, 40, 40])  # some grow more than allowed
    moved = [slow.slow_decode(*pair, (10, 10, 5, 5)) for pair in zip(BOXES.tolist(), deltas)]
    assert_close(unidet.decode(BOXES, deltas, (10, 10, 5, 5)), torch.tensor(moved))
    clipped = torch.tensor([slow.slow_clip(box, 300, 400) for box in moved])
    assert_close(unidet.clip(torch.tensor(moved), (300, 400)), clipped)
    assert set(LEVELS) == {3, 4, 5} and unidet.box_levels(BOXES).add(3).tolist() == LEVELS


def test_roi_align():
    features = [torch.randn(3, *size) for size in ((32, 50), (16, 25), (8, 13))]  # 256 x 400
    expected = []
    for box, level in zip(BOXES[:60].tolist(), LEVELS):
        feature = features[level - 3].double().numpy()
        expected.append(torch.tensor(slow.slow_roi_align(feature, box, 1 / 2**level)).float())
    pooled = unidet.pool(features, BOXES[:60])
    assert_close(pooled, torch.stack(expected), rtol=0, atol=2e-4)
    assert pooled[:2].count_nonzero() == 0 and len(unidet.pool(features, BOXES[:0])) == 0
    # A pixel's value is the place of its centre, so a bin's is that of the bin's.
    ramp, middles = torch.arange(40.0) + 0.5, (torch.arange(7) + 0.5) / 7
    ramps = torch.stack((ramp.expand(40, 40), ramp[:, None].expand(40, 40)))
    across, down = (3.3 + middles * 34.6).expand(7, 7), (5.1 + middles * 11.3).expand(7, 7)
    bins = unidet.roi_align(ramps, torch.tensor([[3.3, 5.1, 37.9, 16.4]]))[0]
    assert_close(bins, torch.stack((across, down.T)))


@pytest.mark.parametrize("threshold, most", [(0.7, 1000), (0.5, 1000), (0.5, 7)])
def test_suppression_and_choice(threshold, most):
    groups, scores = torch.arange(200) % 3, torch.randint(0, 40, (200,)) / 40  # many are tied
    kept = unidet.suppress(BOXES, torch.arange(200), groups, scores, threshold, most)
    expected = slow.slow_nms(BOXES.tolist(), groups.tolist(), scores.tolist(), threshold)
    assert kept == expected[:most] and len(expected) < 200
    scores = torch.rand(200, 5) ** 4
    scores[5], scores[6] = 0.1, torch.nextafter(torch.tensor(0.1), torch.tensor(1.0))
    for many in (scores, scores / 2 + 0.2):  # some; more than 300, two of them without an area
        expected = slow.slow_choose(BOXES.tolist(), many.tolist())
        found = unidet.choose(BOXES, many)
        assert slow.largest_difference(found, expected, unidet.LABELS) == 0
    assert len(expected) > 290 and unidet.choose(BOXES, scores * 0.1)["boxes"].shape == (0, 4)


@pytest.mark.parametrize("seed, saturated", [(0, False), (1, False), (1, True), (2, True)])
def test_detector(monkeypatch, tmp_path, seed, saturated):
    """From the file to objects, for pictures of unequal sizes in batches, and for each alone."""
    monkeypatch.setattr(unidet, "EDGES", (150, 203))
    monkeypatch.setattr(unidet, "PROPOSALS", 60)
    monkeypatch.setattr(unidet, "Network", functools.partial(unidet.Network, **slow.TINY))
    state = slow.unidet_state(slow.TINY, seed, saturated)
    torch.save({"model": state | slow.old_constants()}, tmp_path / "tiny.pth")
    scorer = unidet.UniDet(weights=tmp_path / "tiny.pth", batch=2, sha256=None)
    pictures = [as_image(noise(*size, i)) for i, size in enumerate(SIZES)]
    for picture, found in zip(pictures, scorer.detect(pictures)):
        expected = slow.slow_detect(state, slow.slow_input(picture, (150, 203)), 60)
        for result in (found, scorer.detect([picture])[0]):
            assert slow.largest_difference(result, expected, unidet.LABELS) < 1e-3
    assert scorer.detect([]) == []
    scorer.model.backbone.fpn_lateral5.bias.fill_(math.nan)
    raises("not finite", scorer.detect, pictures)


def test_depth(tmp_path):
    scorer = depth.Depth(weights=slow.save_depth(tmp_path, [depth.UNUSED]), batch=2)
    pictures = [as_image(noise(*size, i)) for i, size in enumerate(SIZES)]
    results, inputs = scorer.depth(pictures), [(479, 479), (480, 281), (216, 480), (479, 479)]
    for picture, result, size in zip(pictures, results, inputs):
        expected = slow.slow_depth(scorer.model, picture, size)  # at a step of 1/255, a step off
        assert_close(result, expected, rtol=0, atol=1.5 / 255)
        assert (result - expected).abs().mean() < 1e-4 and result.max() > 0.5
    assert scorer.depth([]) == []
    raises("constant", depth.finish, torch.ones(480, 480), 9, 9)


def test_the_published_names_and_shapes():
    shapes = slow.unidet_shapes(**slow.FULL)
    assert len(shapes) == 311 and sum(map(math.prod, shapes.values())) == 71_954_034
    with torch.device("meta"):
        full, state = unidet.Network(), {name: torch.empty(s) for name, s in shapes.items()}
        assert len(slow.hf.DPTForDepthEstimation(slow.depth_config()).state_dict()) == 414
    unidet.load_published(full, state)
    recurring = [name for name, count in Counter(unidet.LABELS).items() if count > 1]
    assert len(unidet.LABELS) == 722 and len(recurring) == 44


NORM, FC = "backbone.bottom_up.res2.0.conv1.norm.bias", "roi_heads.box_head.0.fc1.weight"
WRONG = {NORM: None, FC: torch.ones(16, 9), "iteration": 7, "pixel_std": torch.ones(3, 1, 1) * 57}


@pytest.mark.parametrize("name", WRONG)
def test_one_bad_tensor_is_refused(name):
    state = {k: v for k, v in (slow.unidet_state() | WRONG).items() if k == name or k not in WRONG}
    state = {k: v for k, v in (slow.unidet_state() | {name: WRONG[name]}).items() if v is not None}
    message = f"do not fit: 1 .{name} is .*curl"
    raises(message, unidet.load_published, unidet.Network(**slow.TINY), state)


def test_other_files_are_refused(tmp_path):
    file = tmp_path / "other.pth"
    raises("no file.*curl", unidet.UniDet(weights=file).load)
    file.write_bytes(b"not a checkpoint")
    raises("not the published file.*curl", unidet.UniDet(weights=file).load)
    raises("cannot be read.*curl", unidet.UniDet(weights=file, sha256=None).load)
    raises("cannot load.*hf download", depth.Depth(weights=tmp_path).load)
    folder = slow.save_depth(tmp_path / "depth", [depth.UNUSED, "head.head.4"])
    raises("lacks 2 weights .head.head.4.bias.*hf download", depth.Depth(weights=folder).load)


@pytest.mark.slow
def test_full_size_and_the_real_weights(monkeypatch):
    filled, state = unidet.Network(), slow.unidet_state(slow.FULL)
    unidet.load_published(filled, state)
    monkeypatch.setattr(unidet, "PROPOSALS", 100)
    x = unidet.prepare(drawing("red"))
    expected = slow.slow_detect(state, x, 100)
    found = unidet.find_objects(filled, x[None])[0]
    assert slow.largest_difference(found, expected, unidet.LABELS) < 5e-3
