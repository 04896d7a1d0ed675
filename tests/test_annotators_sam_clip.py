"""SAM with CLIP: the right answer where it is planted, and end to end on tiny random models."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cpseg.annotators import Preprocessing, SamClipAnnotator
from cpseg.annotators.sam_clip import (
    dense_clip_features,
    ignore_unusable,
    non_maximum_suppression,
    paint_segments,
    sam_segments,
    segment_features,
)
from cpseg.errors import InputError


def nested() -> tuple[Tensor, Tensor]:
    """A large segment of class 0 (surer), a small one of class 1 inside it; 5 x 6 pixels."""
    segments = torch.zeros(2, 5, 6, dtype=torch.bool)
    segments[0, :4] = True
    segments[1, 1:3, 1:3] = True
    return segments, torch.tensor([[0.9, 0.05, 0.05], [0.2, 0.7, 0.1]]).log()


def test_overlap_and_uncovered_pixels_follow_the_policy() -> None:
    segments, shares = nested()
    small = paint_segments(segments, shares, overlap="smallest", uncovered="abstain")
    assert set(small[:, :4].argmax(0)[1:3, 1:3].flatten().tolist()) == {1}
    assert small[:, 0, 0].tolist() == shares[0].tolist()
    assert bool(small[:, 4].isnan().all())
    assert not bool(small[:, :4].isnan().any())
    sure = paint_segments(segments, shares, overlap="surest", uncovered="uniform")
    assert set(sure[:, :4].argmax(0).flatten().tolist()) == {0}
    torch.testing.assert_close(sure[:, 4].exp(), torch.full((3, 6), 1 / 3))
    product = paint_segments(
        segments, shares, overlap="product", uncovered="background", background=2
    )
    odds = [0.9 * 0.2, 0.05 * 0.7, 0.05 * 0.1]
    assert product[:, 1, 1].exp().tolist() == pytest.approx([o / sum(odds) for o in odds])
    torch.testing.assert_close(product[:, 4].softmax(0)[2], torch.ones(6))


def test_of_equal_segments_the_first_stays_on_top() -> None:
    segments = torch.ones(3, 2, 2, dtype=torch.bool)
    shares = torch.eye(3).clamp(min=1e-3).log_softmax(1)
    for overlap in ("smallest", "surest"):
        painted = paint_segments(segments, shares, overlap=overlap, uncovered="abstain")
        assert set(painted.argmax(0).flatten().tolist()) == {0}


def test_no_segment_at_all_leaves_everything_uncovered() -> None:
    none = torch.zeros(0, 2, 3, dtype=torch.bool)
    for overlap in ("smallest", "surest", "product"):
        painted = paint_segments(
            none,
            torch.zeros(0, 4),
            overlap=overlap,
            uncovered="abstain",
        )
        assert painted.shape == (4, 2, 3)
        assert bool(painted.isnan().all())


def test_uncovered_pixels_lose_their_labels_for_calibration() -> None:
    segments, shares = nested()
    logits = paint_segments(segments, shares, overlap="smallest", uncovered="abstain")[None]
    labels = ignore_unusable(logits, torch.ones(1, 5, 6, dtype=torch.int64))
    assert labels[0, :, 0].tolist() == [1, 1, 1, 1, 255]


def test_a_segment_gets_the_mean_of_the_features_inside_it() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn((3, 4, 5), generator=generator, dtype=torch.float64)
    segments = torch.rand((6, 8, 15), generator=generator) < 0.4
    full = features.repeat_interleave(2, 1).repeat_interleave(3, 2)  # the grid's cells as pixels
    for k, mean in enumerate(segment_features(features, segments)):
        torch.testing.assert_close(mean, full[:, segments[k]].mean(1))


@settings(max_examples=50, deadline=None)
@given(count=st.integers(0, 9), seed=st.integers(0, 999), limit=st.floats(0.05, 0.95))
def test_suppression_keeps_what_no_better_kept_box_overlaps(
    count: int, seed: int, limit: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    low = torch.randint(0, 6, (count, 2), generator=generator)
    boxes = torch.cat((low, low + torch.randint(1, 6, (count, 2), generator=generator)), 1).float()
    scores = torch.randint(0, 4, (count,), generator=generator).float()

    def overlap(a: list[float], b: list[float]) -> float:
        sides = [max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
        areas = [(r[2] - r[0]) * (r[3] - r[1]) for r in (a, b)]
        both = sides[0] * sides[1]
        return both / (sum(areas) - both)

    rows: list[list[float]] = boxes.tolist()
    kept: list[int] = []
    for k in sorted(range(count), key=lambda k: (-float(scores[k]), k)):
        if all(overlap(rows[k], rows[j]) <= limit + 1e-9 for j in kept):
            kept.append(k)
    found = non_maximum_suppression(boxes, scores, limit).tolist()
    if all(abs(overlap(a, b) - limit) > 1e-6 for a in rows for b in rows):
        assert found == kept


class PlantedSam(nn.Module):
    """Two segments, left and right of the image's middle, the left one twice."""

    class Config:
        class vision_config:  # noqa: N801  (transformers' name)
            image_size = 64

    config = Config()

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def get_image_embeddings(self, pixels: Tensor) -> Tensor:
        assert pixels.shape == (1, 3, 64, 64)
        return pixels[:, :1]

    def forward(self, image_embeddings: Tensor, input_points: Tensor) -> Any:
        del image_embeddings
        points = input_points[0, :, 0]
        masks = torch.full((len(points), 3, 16, 16), -9.0)
        left = points[:, 0] < 32
        masks[left, 0, :, :8] = 9
        masks[left, 1, :, :7] = 9  # a worse duplicate
        masks[~left, 0, :, 8:] = 9
        masks[:, 2] = 0.5  # everything, and unstable
        quality = torch.tensor([0.99, 0.95, 0.99]).expand(len(points), 3)

        class Output:
            pred_masks = masks[None]
            iou_scores = quality[None]

        return Output()


def test_segments_are_found_once_and_within_the_image() -> None:
    image = torch.zeros(1, 3, 20, 40, dtype=torch.uint8)  # 32 x 64 within the square
    segments = sam_segments(PlantedSam(), image, points_per_side=4)
    assert segments.shape == (2, 20, 40)
    halves = [segments[0, 0].tolist(), segments[1, 0].tolist()]
    for k, half in enumerate(halves):
        assert half[:19] == [k == 0] * 19
        assert half[21:] == [k == 1] * 19
    assert torch.equal(segments, segments[:, :1].expand(2, 20, 40))


class SmoothSam(PlantedSam):
    """Three smooth random masks for each point, a sixteenth of the image in size; keeps its input."""

    def get_image_embeddings(self, pixels: Tensor) -> Tensor:
        self.seen = pixels
        return pixels[:, :1]

    def forward(self, image_embeddings: Tensor, input_points: Tensor) -> Any:
        del image_embeddings
        count = input_points.shape[2 - 1]
        generator = torch.Generator().manual_seed(count)
        coarse = torch.randn((count * 3, 1, 5, 5), generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, size=(16, 16), mode="bicubic")
        self.masks = smooth.reshape(1, count, 3, 16, 16)

        class Output:
            pred_masks = self.masks
            iou_scores = torch.linspace(1, 0.5, count * 3).reshape(1, count, 3)

        return Output()


@pytest.mark.parametrize(("height", "width"), [(37, 61), (64, 64), (61, 37), (90, 33)])
def test_segments_and_pixels_lie_where_transformers_own_processor_puts_them(
    height: int, width: int
) -> None:
    transformers: Any = pytest.importorskip("transformers")
    square = {"height": 64, "width": 64}
    theirs = transformers.SamImageProcessor(size={"longest_edge": 64}, pad_size=square)
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 3, height, width), generator=generator).to(torch.uint8)
    sam = SmoothSam()
    ours = sam_segments(
        sam, image, points_per_side=2, min_iou=-1.0, min_stability=0.0, max_overlap=1.0
    )
    inputs = theirs(images=[image[0].permute(1, 2, 0).numpy()], return_tensors="pt")
    grey = 1 / 255 / 0.224  # one level, normalized
    assert float((sam.seen - inputs["pixel_values"]).abs().max()) <= 2 * grey
    assert torch.equal(sam.seen == 0, inputs["pixel_values"] == 0)  # the same padding
    (masks,) = theirs.post_process_masks(
        [sam.masks[0]], inputs["original_sizes"], inputs["reshaped_input_sizes"]
    )
    wanted = [mask for mask in masks.flatten(0, 1) if bool(mask.any())]
    assert len(ours) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


def test_painting_takes_no_more_memory_for_more_segments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No tensor of floats of all segments; and parts of them give what all at once give."""
    generator = torch.Generator().manual_seed(0)
    segments = torch.rand((40, 32, 48), generator=generator) < 0.3
    shares = torch.randn((40, 3), generator=generator).log_softmax(1)
    whole = torch.einsum("khw,kc->chw", segments.float(), shares).log_softmax(0)
    for overlap in ("product", "smallest", "surest"):
        largest = 0

        class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                nonlocal largest
                del types
                out = func(*args, **(kwargs or {}))
                if isinstance(out, Tensor) and out.untyped_storage() != segments.untyped_storage():
                    largest = max(largest, out.numel() * out.element_size())
                return out

        monkeypatch.setattr("cpseg.annotators.sam_clip._CHUNK", 32 * 48 * 2)
        with Watch():  # type: ignore[no-untyped-call]
            painted = paint_segments(segments, shares, overlap=overlap, uncovered="uniform")
        if overlap == "product":
            torch.testing.assert_close(painted, whole)
        assert largest <= 8 * 32 * 48 * 3  # of one class map, not of 40 segments


def tiny_clip() -> Any:
    transformers: Any = pytest.importorskip("transformers")
    text = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 16,
        "eos_token_id": 63,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.CLIPModel(config).eval()


def tokens(texts: list[str]) -> Tensor:
    """A token for each of the last fourteen letters that are no blank; 63 ends a text."""
    rows = [[2 + ord(c) % 60 for c in t.replace(" ", "").rjust(14)[-14:]] for t in texts]
    return torch.tensor([[1, *row, 63] for row in rows])


SQUARE = Preprocessing(size=(64, 64))


def test_planted_features_name_their_segments() -> None:
    """Texts are what CLIP says of plain images; each half of an image is named by its color."""
    clip = tiny_clip()
    colors = torch.tensor([[250, 10, 20], [20, 30, 240], [90, 240, 30]], dtype=torch.uint8)
    plain = colors[:, :, None, None].expand(-1, -1, 20, 40)
    seen = dense_clip_features(clip, SQUARE(plain, clip.logit_scale), depth=2)
    planted = torch.nn.functional.normalize(seen.mean((2, 3)), dim=-1)
    label = SamClipAnnotator(
        PlantedSam(),
        clip,
        ["red", "blue", "green"],
        tokenizer=tokens,
        scale=50.0,
        depth=2,
        preprocessing=SQUARE,
        points_per_side=4,
    )
    label._texts = planted
    image = plain[:1].clone()
    image[:, :, :, 20:] = plain[2:, :, :, 20:]
    logits = label(image)
    assert logits.shape == (1, 3, 20, 40)
    assert set(logits[0, :, :, :19].argmax(0).flatten().tolist()) == {0}
    assert set(logits[0, :, :, 21:].argmax(0).flatten().tolist()) == {2}


def test_the_second_path_is_the_network_itself_where_attention_is_uniform() -> None:
    """With values alone left and no feed-forward, both paths add each layer's mean value."""
    clip = tiny_clip()
    with torch.no_grad():
        for layer in clip.vision_model.encoder.layers:
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.mlp.fc2):
                part.weight.zero_()
                part.bias.zero_()
            layer.self_attn.v_proj.weight.zero_()  # every token has the same value
    pixels = torch.randn((1, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    dense = dense_clip_features(clip, pixels, depth=2)
    with torch.no_grad():
        last = clip.vision_model(pixels).last_hidden_state[:, 1:]
        expected = clip.visual_projection(clip.vision_model.post_layernorm(last))
    expected = torch.nn.functional.normalize(expected, dim=-1)
    torch.testing.assert_close(dense.flatten(2).transpose(1, 2), expected)


def test_end_to_end_on_tiny_random_models() -> None:
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.SamConfig(
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
            "output_channels": 16,
            "mlp_dim": 16,
            "window_size": 2,
            "global_attn_indexes": [0],
            "num_pos_feats": 8,
        },
        prompt_encoder_config={
            "hidden_size": 16,
            "image_size": 64,
            "patch_size": 16,
            "mask_input_channels": 4,
        },
        mask_decoder_config={
            "hidden_size": 16,
            "mlp_dim": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
            "iou_head_depth": 2,
        },
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        sam = transformers.SamModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 40, 56), generator=generator).to(torch.uint8)
    options: dict[str, Any] = {
        "tokenizer": tokens,
        "preprocessing": SQUARE,
        "points_per_side": 3,
        "min_iou": -9.0,
        "min_stability": 0.0,
    }
    names = {"background": ["sky", "wall"], "cat": ["cat"]}
    label = SamClipAnnotator(sam, tiny_clip(), names, **options)
    logits = label(images)
    assert logits.shape == (2, 2, 40, 56)
    covered = ~logits.isnan().any(1)
    assert bool(covered.any())
    torch.testing.assert_close(
        logits.exp().sum(1)[covered], torch.ones(int(covered.sum())), rtol=0, atol=1e-5
    )
    one_by_one = torch.stack(label.annotate(list(images)))
    assert torch.equal(one_by_one.nan_to_num(7), logits.nan_to_num(7))
    sources = [
        label.source,
        SamClipAnnotator(sam, tiny_clip(), names, overlap="surest", **options).source,
        SamClipAnnotator(sam, tiny_clip(), ["sky", "cat"], **options).source,
    ]
    assert all(a != b for a, b in pairwise(sources))


def test_bad_policies_are_refused() -> None:
    segments, shares = nested()
    bad: list[tuple[dict[str, Any], str]] = [
        ({"overlap": "largest", "uncovered": "abstain"}, "overlap must be one of"),
        ({"overlap": "smallest", "uncovered": "drop"}, "uncovered must be one of"),
        ({"overlap": "smallest", "uncovered": "background"}, "background must be a class"),
    ]
    for options, message in bad:
        with pytest.raises(InputError, match=message):
            paint_segments(segments, shares, **options)
    with pytest.raises(InputError, match="a row for each of 2 segments"):
        paint_segments(segments, shares[:1], overlap="smallest", uncovered="abstain")


def test_networks_of_another_kind_are_refused_by_name() -> None:
    plain = torch.nn.Conv2d(3, 3, 1)
    for sam, message in (
        (None, r"sam must be a torch\.nn\.Module; got NoneType"),
        (plain, "sam must"),
    ):
        with pytest.raises(InputError, match=message):
            SamClipAnnotator(sam, plain, ["cat"], tokenizer=torch.tensor)  # type: ignore[arg-type]
