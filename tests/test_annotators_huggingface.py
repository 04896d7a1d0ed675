"""Each family of transformers, tiny and random, without a hub and without torchvision."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cpseg.annotators.huggingface import (
    MaskClassAnnotator,
    Preprocessing,
    SemanticLogitsAnnotator,
    TextPromptAnnotator,
)
from cpseg.errors import InputError

transformers: Any = pytest.importorskip("transformers")


def images(count: int = 2, height: int = 40, width: int = 56) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator).to(torch.uint8)


def assert_annotates(label: Any, classes: int) -> Tensor:
    batch: Tensor = label(images())
    assert batch.shape == (2, classes, 40, 56)
    assert batch.dtype == torch.float32
    assert bool(batch.isfinite().all())
    assert torch.equal(batch, label(images()))
    torch.testing.assert_close(
        label(images()[1:]).softmax(1), batch[1:].softmax(1), rtol=0, atol=1e-5
    )
    assert label.source == label.source
    other = images(1, 33, 47)[0]
    mixed = label.annotate([other, images()[0]])
    assert [tuple(m.shape) for m in mixed] == [(classes, 33, 47), (classes, 40, 56)]
    assert "torchvision" not in sys.modules
    return batch


def seeded(build: Any, config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(config).eval()


def test_segformer_and_its_kind() -> None:
    model = seeded(
        transformers.SegformerForSemanticSegmentation,
        transformers.SegformerConfig(
            hidden_sizes=[8, 8, 16, 16],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 1, 2, 2],
            decoder_hidden_size=16,
            num_labels=5,
        ),
    )
    label = SemanticLogitsAnnotator(model, Preprocessing(size=(64, 64)))
    batch = assert_annotates(label, 5)
    pixels = Preprocessing(size=(64, 64))(images(), torch.zeros(()))
    with torch.no_grad():
        raw = model(pixels).logits
    expected = nn.functional.interpolate(raw, size=(40, 56), mode="bilinear")
    torch.testing.assert_close(batch, expected)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"out": x}, lambda x: {"logits": x}])
def test_any_network_of_yours(wrap: Any) -> None:
    class Network(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return wrap(torch.stack((x.mean(1), x.amax(1)), 1))

    assert_annotates(SemanticLogitsAnnotator(Network(), Preprocessing()), 2)


def mask2former() -> Any:
    swin = transformers.SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return seeded(
        transformers.Mask2FormerForUniversalSegmentation,
        transformers.Mask2FormerConfig(
            backbone_config=swin,
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=32,
            encoder_layers=1,
            decoder_layers=2,
            dim_feedforward=32,
            num_attention_heads=2,
            num_queries=6,
            num_labels=4,
        ),
    )


def eomt() -> Any:
    return seeded(
        transformers.EomtForUniversalSegmentation,
        transformers.EomtConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=64,
            patch_size=16,
            num_blocks=1,
            num_queries=6,
            num_labels=4,
            num_upscale_blocks=1,
        ),
    )


def oneformer() -> Any:
    swin = transformers.SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return seeded(
        transformers.OneFormerForUniversalSegmentation,
        transformers.OneFormerConfig(
            backbone_config=swin,
            num_queries=6,
            num_labels=4,
            hidden_dim=32,
            conv_dim=32,
            mask_dim=32,
            encoder_feedforward_dim=32,
            dim_feedforward=32,
            encoder_layers=1,
            decoder_layers=3,
            num_attention_heads=2,
            text_encoder_width=32,
            text_encoder_num_layers=1,
            text_encoder_context_length=7,
            task_seq_len=7,
            text_encoder_vocab_size=64,
            text_encoder_n_ctx=2,
            text_encoder_proj_layers=2,
            query_dec_layers=1,
            is_training=False,
        ),
    )


@pytest.mark.parametrize("build", [mask2former, eomt, oneformer])
@pytest.mark.parametrize(("mode", "classes"), [("none", 4), ("complement", 5), ("void", 5)])
def test_mask_class_models(build: Any, mode: Any, classes: int) -> None:
    inputs = {"task_inputs": torch.arange(7)[None]} if build is oneformer else None
    label = MaskClassAnnotator(
        build(), Preprocessing(size=(64, 64)), mode=mode, background=1, inputs=inputs
    )
    batch = assert_annotates(label, classes)
    torch.testing.assert_close(batch.exp().sum(1), torch.ones(2, 40, 56))


def clipseg() -> Any:
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
    config = transformers.CLIPSegConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=16,
        extract_layers=[0, 1, 2],
        reduce_dim=16,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    return seeded(transformers.CLIPSegForImageSegmentation, config)


def groupvit() -> Any:
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
        "depths": [1, 1, 1],
        "num_group_tokens": [4, 3, 0],
        "num_output_groups": [4, 3, 0],
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
    }
    config = transformers.GroupViTConfig(
        text_config=text, vision_config=vision, projection_dim=16, projection_intermediate_dim=16
    )
    return seeded(transformers.GroupViTModel, config)


def sam3() -> Any:
    vision = {
        "backbone_config": {
            "model_type": "sam3_vit_model",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            "window_size": 2,
            "global_attn_indexes": [1],
            "pretrain_image_size": 56,
        },
        "fpn_hidden_size": 32,
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    }
    text = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 16,
        "projection_dim": 32,
        "eos_token_id": 63,
    }
    small = {"hidden_size": 32, "intermediate_size": 32, "num_layers": 1, "num_attention_heads": 2}
    config = transformers.Sam3Config(
        vision_config=vision,
        text_config=text,
        geometry_encoder_config=small,
        detr_encoder_config=small,
        detr_decoder_config=small | {"num_queries": 5},
        mask_decoder_config={
            "hidden_size": 32,
            "num_upsampling_stages": 3,
            "num_attention_heads": 2,
        },
    )
    return seeded(transformers.Sam3Model, config)


def tokens(texts: list[str]) -> dict[str, Tensor]:
    ids = torch.tensor([[1, *(2 + ord(c) % 60 for c in (t + "  ")[:4]), 63] for t in texts])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize(("build", "size"), [(clipseg, 64), (sam3, 56), (groupvit, 64)])
@pytest.mark.parametrize("background", [None, 1])
def test_text_prompted_models(build: Any, size: int, background: int | None) -> None:
    names = {"sky": ["sky"], "other": ["nothing"], "cat": ["cat", "kitten"]}
    label = TextPromptAnnotator(
        build(), names, Preprocessing(size=(size, size)), background=background, tokenizer=tokens
    )
    batch = assert_annotates(label, 3)
    torch.testing.assert_close(batch.exp().sum(1), torch.ones(2, 40, 56))


def test_clipseg_encodes_an_image_once_and_says_what_the_whole_model_says() -> None:
    model = clipseg()
    label = TextPromptAnnotator(
        model, ["sky", "cat"], Preprocessing(size=(64, 64)), background=None, tokenizer=tokens
    )
    pixels = Preprocessing(size=(64, 64))(images(1), torch.zeros(()))
    with torch.no_grad():
        whole = model(pixel_values=pixels.expand(2, -1, -1, -1), **tokens(["sky", "cat"])).logits
        torch.testing.assert_close(label._clipseg(pixels), whole.sigmoid())


def test_shares_that_leave_room_give_it_to_the_background() -> None:
    from cpseg.annotators.huggingface import _simplex  # noqa: PLC0415

    shares = torch.tensor([[0.25, 0.9, 0.0], [0.5, 0.9, 0.0]])[None]  # (1, K = 2, 3 pixels)
    torch.testing.assert_close(
        _simplex(shares, 1)[0], torch.tensor([[0.25, 0.5, 0.0], [0.25, 0, 1], [0.5, 0.5, 0]])
    )
    torch.testing.assert_close(
        _simplex(shares, None)[0], torch.tensor([[1 / 3, 0.5, 0.5], [2 / 3, 0.5, 0.5]])
    )


def test_models_come_back_from_a_folder(tmp_path: Path) -> None:
    model = mask2former()
    model.save_pretrained(tmp_path)
    config = {
        "size": {"height": 64, "width": 64},
        "resample": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.25] * 3,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    label = MaskClassAnnotator.from_pretrained(tmp_path)
    mine = MaskClassAnnotator(
        model,
        Preprocessing(size=(64, 64), multiple=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
    )
    assert torch.equal(label(images()), mine(images()))


@pytest.mark.parametrize(
    ("config", "size", "seen"),
    [
        ({"size": {"shortest_edge": 64, "longest_edge": 80}}, (40, 56), (57, 80)),
        ({"size": 48}, (40, 56), (48, 48)),
        ({"size": {"longest_edge": 96}}, (40, 56), (96, 96)),
        ({"do_resize": False, "size": {"height": 9, "width": 9}}, (40, 56), (40, 56)),
    ],
)
def test_their_preprocessor_files_are_understood(
    tmp_path: Path, config: Any, size: tuple[int, int], seen: tuple[int, int]
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    assert Preprocessing.from_pretrained(tmp_path).seen(size) == seen


def test_pixels_are_normalised_as_said() -> None:
    white = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    pixels = Preprocessing(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))(white, torch.zeros(()))
    assert pixels[0, :, 0, 0].tolist() == [1.0, 3.0, 0.5]


def test_what_is_no_known_model_is_refused() -> None:
    with pytest.raises(InputError, match="model must be a CLIPSeg, SAM 3 or GroupViT model"):
        TextPromptAnnotator(
            nn.Linear(1, 1), ["cat"], Preprocessing(), background=None, tokenizer=tokens
        )
    with pytest.raises(InputError, match="model must answer with"):
        SemanticLogitsAnnotator(nn.Flatten(), Preprocessing())(images())
