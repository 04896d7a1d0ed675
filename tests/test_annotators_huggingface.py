"""Each family of transformers, tiny and random, without a hub and without torchvision."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cpseg.annotators import Preprocessing, SigmoidAnnotator
from cpseg.annotators.huggingface import (
    MaskClassAnnotator,
    SemanticLogitsAnnotator,
    TextPromptAnnotator,
)
from cpseg.annotators.source import difference
from cpseg.errors import FileError, InputError

transformers: Any = pytest.importorskip("transformers")

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 16,
    "eos_token_id": 63,
}
NORMAL = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}


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


VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 64,
    "patch_size": 16,
    "num_labels": 5,
    "use_auxiliary_head": False,
}


@pytest.mark.parametrize("kind", ["MobileViT", "Beit", "DPT", "UperNet"])
def test_the_kin_of_segformer(kind: str) -> None:
    own: dict[str, dict[str, Any]] = {
        "MobileViT": {
            "hidden_sizes": [8, 8, 8],
            "neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 16],
            "aspp_out_channels": 8,
            "num_labels": 5,
        },
        "Beit": VIT | {"out_indices": [1, 2, 3, 4], "use_absolute_position_embeddings": True},
        "DPT": VIT
        | {
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 8, 8, 8],
            "fusion_hidden_size": 8,
        },
        "UperNet": {
            "backbone_config": swin(),
            "hidden_size": 16,
            "pool_scales": [1, 2],
            "num_labels": 5,
            "use_auxiliary_head": False,
        },
    }
    config = getattr(transformers, f"{kind}Config")(**own[kind])
    model = seeded(getattr(transformers, f"{kind}ForSemanticSegmentation"), config)
    see = Preprocessing(size=(64, 64), bgr=kind == "MobileViT")
    assert_annotates(SemanticLogitsAnnotator(model, see), 5)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"out": x}, lambda x: {"logits": x}])
def test_any_network_of_yours(wrap: Any) -> None:
    class Network(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return wrap(torch.stack((x.mean(1), x.amax(1)), 1))

    assert_annotates(SemanticLogitsAnnotator(Network(), Preprocessing()), 2)


def swin() -> Any:
    return transformers.SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def maskformer() -> Any:
    detr = transformers.DetrConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=6,
    )
    return seeded(
        transformers.MaskFormerForInstanceSegmentation,
        transformers.MaskFormerConfig(
            backbone_config=swin(),
            decoder_config=detr,
            fpn_feature_size=32,
            mask_feature_size=32,
            num_labels=4,
        ),
    )


def mask2former() -> Any:
    return seeded(
        transformers.Mask2FormerForUniversalSegmentation,
        transformers.Mask2FormerConfig(
            backbone_config=swin(),
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
    if not hasattr(transformers, "EomtForUniversalSegmentation"):
        pytest.skip("transformers is older than EoMT")
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
    return seeded(
        transformers.OneFormerForUniversalSegmentation,
        transformers.OneFormerConfig(
            backbone_config=swin(),
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


@pytest.mark.parametrize("build", [maskformer, mask2former, eomt, oneformer])
@pytest.mark.parametrize(("mode", "classes"), [("none", 4), ("complement", 5), ("void", 5)])
def test_mask_class_models(build: Any, mode: Any, classes: int) -> None:
    inputs = {"task_inputs": torch.arange(7)[None]} if build is oneformer else None
    label = MaskClassAnnotator(
        build(), Preprocessing(size=(64, 64)), mode=mode, background=1, inputs=inputs
    )
    batch = assert_annotates(label, classes)
    torch.testing.assert_close(batch.exp().sum(1), torch.ones(2, 40, 56))
    assert f'mode="{mode}"' in label.source


def test_an_unknown_mode_or_background_is_refused() -> None:
    for options in ({"mode": "raw"}, {"mode": "void", "background": 0.0}, {"background": -1}):
        with pytest.raises(InputError, match=r"(mode|background) must be"):
            MaskClassAnnotator(nn.Linear(1, 1), Preprocessing(), **options)


def clipseg() -> Any:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
    }
    config = transformers.CLIPSegConfig(
        text_config=TEXT,
        vision_config=vision,
        projection_dim=16,
        extract_layers=[0, 1, 2],
        reduce_dim=16,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    return seeded(transformers.CLIPSegForImageSegmentation, config)


def groupvit() -> Any:
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
        text_config=TEXT, vision_config=vision, projection_dim=16, projection_intermediate_dim=16
    )
    return seeded(transformers.GroupViTModel, config)


def sam3() -> Any:
    if not hasattr(transformers, "Sam3Model"):
        pytest.skip("transformers is older than SAM 3")
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
    text = TEXT | {"projection_dim": 32}
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


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda t: tokens(t)["input_ids"], "input_ids and attention_mask; got Tensor"),
        (lambda t: {"input_ids": tokens(t)["input_ids"]}, "without attention_mask"),
        (lambda t: tokens(t) | {"input_ids": [[1, 2, 3]]}, "an integer tensor .* got list"),
        (lambda t: tokens(["x" for _ in t]), "tell texts apart; 'sky' and 'cat' have the same ids"),
        (lambda t: {k: v * 2 for k, v in tokens(t).items()}, r"ids in \[0, 64\)"),
        (lambda t: tokens(t) | {"attention_mask": None}, "attention_mask of shape"),
    ],
)
def test_a_tokenizer_that_cannot_be_right_is_refused(answer: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        TextPromptAnnotator(
            clipseg(), ["sky", "cat"], Preprocessing(), background=None, tokenizer=answer
        )
    assert "\n" not in str(refusal.value)


def test_token_ids_are_in_the_source() -> None:
    def shifted(texts: list[str]) -> dict[str, Tensor]:
        given = tokens(texts)
        ids = given["input_ids"]
        return given | {"input_ids": torch.where((ids > 1) & (ids < 62), ids + 1, ids)}

    sources = [
        TextPromptAnnotator(
            clipseg(), ["sky", "cat"], Preprocessing(), background=None, tokenizer=tokenizer
        ).source
        for tokenizer in (tokens, tokens, shifted)
    ]
    assert sources[0] == sources[1]
    assert difference(sources[0], sources[2]).startswith("tokens is ")


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
        ({"size": 48, "max_size": 80}, (40, 56), (48, 67)),
        (
            {"size": {"shortest_edge": 70}, "do_center_crop": True, "crop_size": 32},
            (40, 56),
            (32, 32),
        ),
        ({"size": {"shortest_edge": 64}, "size_divisor": 32, "do_pad": True}, (40, 56), (64, 96)),
        ({"do_resize": False, "size": {"height": 9, "width": 9}}, (40, 56), (40, 56)),
    ],
)
def test_their_preprocessor_files_are_understood(
    tmp_path: Path, config: Any, size: tuple[int, int], seen: tuple[int, int]
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config | NORMAL))
    assert Preprocessing.from_pretrained(tmp_path).seen(size) == seen


def test_the_files_of_transformers_5_are_read_nested_before_the_older_ones(tmp_path: Path) -> None:
    older = tmp_path / "preprocessor_config.json"
    older.write_text(json.dumps({"size": 48} | NORMAL))
    newer = tmp_path / "processor_config.json"
    newer.write_text(
        json.dumps({"processor_class": "X"})
    )  # as written before 5: no image processor
    assert Preprocessing.from_pretrained(tmp_path).size == (48, 48)
    newer.write_text(json.dumps({"image_processor": {"size": 32} | NORMAL}))
    assert Preprocessing.from_pretrained(tmp_path).size == (32, 32)
    older.unlink()
    assert Preprocessing.from_pretrained(tmp_path).size == (32, 32)


@pytest.mark.parametrize(
    "name", ["Segformer", "Mask2Former", "OneFormer", "Beit", "DPT", "CLIP", "ViT", "MobileViT"]
)
def test_pixels_are_those_of_the_models_own_processor(tmp_path: Path, name: str) -> None:
    """At a size where neither resizes nor crops, so that only values count."""
    kind: Any = getattr(transformers, f"{name}ImageProcessor")
    if name == "OneFormer" and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("before transformers 5 it asks the hub for the names of classes")
    size = {"shortest_edge": 64} if name in ("CLIP", "MobileViT") else {"height": 64, "width": 64}
    square = {"height": 64, "width": 64}
    options: dict[str, Any] = {"size": size}
    if name in ("CLIP", "MobileViT", "Beit"):
        options["crop_size"] = square
    if name in ("Mask2Former", "OneFormer"):
        options["size"] = {"shortest_edge": 64, "longest_edge": 128}
    theirs = kind(**options)
    theirs.save_pretrained(tmp_path)
    batch = images(1, 64, 64)
    with torch.no_grad():
        want = theirs(images=[batch[0].permute(1, 2, 0).numpy()], return_tensors="pt")
    ours = Preprocessing.from_pretrained(tmp_path)(batch, torch.zeros(()))
    torch.testing.assert_close(ours, want["pixel_values"].float(), rtol=0, atol=1e-5)


def test_channels_factors_and_labels_are_done_or_said(tmp_path: Path) -> None:
    def read(**config: Any) -> Preprocessing:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 4} | config))
        return Preprocessing.from_pretrained(tmp_path)

    batch = images(1, 4, 4)
    bytes_ = batch.float()
    like = torch.zeros(())
    flipped = read(do_flip_channel_order=True, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    torch.testing.assert_close(flipped(batch, like), bytes_.flip(1) / 255)
    plain = read(do_normalize=False)
    torch.testing.assert_close(plain(batch, like), bytes_ / 255)
    unscaled = read(do_rescale=False, **NORMAL)
    torch.testing.assert_close(unscaled(batch, like), (bytes_ - 0.5) / 0.25)
    halved = read(rescale_factor=1 / 127.5, **NORMAL)
    torch.testing.assert_close(halved(batch, like), (bytes_ / 127.5 - 0.5) / 0.25)
    assert read(do_reduce_labels=True, **NORMAL).reduce_labels
    assert read(reduce_labels=True, **NORMAL).reduce_labels
    assert not read(do_reduce_labels=False, **NORMAL).reduce_labels


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"do_split_image": True}, "do_split_image"),
        ({"do_pad": True}, "do_pad"),
        ({"do_pad": True, "size_divisor": 32, "pad_size": {"height": 64}}, "pad_size"),
        ({"keep_aspect_ratio": True}, "keep_aspect_ratio"),
        ({"resample": 0}, "resample must be 2"),
        ({"size": {"longest_edge": 9}}, "size must have height and width"),
        ({"size": {"height": 0, "width": 9}}, "size must be an integer >= 1"),
        ({"image_mean": [0.5]}, "image_mean must hold three"),
        ({"image_std": [0, 1, 1]}, "std must be greater than 0"),
        ({"image_mean": None}, "image_mean"),
        ({"do_normalize": True, "do_flip_channel_order": True}, "do_flip_channel_order"),
    ],
)
def test_what_would_change_pixels_and_is_not_done_is_refused_by_name(
    tmp_path: Path, config: Any, named: str
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 8} | NORMAL | config))
    with pytest.raises(FileError, match=named) as refusal:
        Preprocessing.from_pretrained(tmp_path)
    assert "\n" not in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)


def test_missing_and_damaged_folders_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(transformers.utils.hub, "is_offline_mode", lambda: True, raising=False)
    (tmp_path / "none").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "preprocessor_config.json").write_text("[")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "preprocessor_config.json").write_text("[1]")
    (tmp_path / "file").write_text("no folder")
    square = Preprocessing(size=(64, 64))
    attempts: list[Any] = [
        lambda: Preprocessing.from_pretrained(tmp_path / "none"),
        lambda: Preprocessing.from_pretrained(tmp_path / "bad"),
        lambda: Preprocessing.from_pretrained(tmp_path / "list"),
        lambda: Preprocessing.from_pretrained(tmp_path / "file"),
        lambda: Preprocessing.from_pretrained(tmp_path / "no" / "such" / "folder"),
        lambda: SemanticLogitsAnnotator.from_pretrained(tmp_path / "none", preprocessing=square),
        lambda: MaskClassAnnotator.from_pretrained(tmp_path / "none", preprocessing=square),
        lambda: TextPromptAnnotator.from_pretrained(tmp_path / "none", ["cat"], background=None),
    ]
    for attempt in attempts:
        with pytest.raises(FileError) as refusal:
            attempt()
        assert "\n" not in str(refusal.value)
        assert str(tmp_path) in str(refusal.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    for device in ("cuda", "cuda:7", "gpu", "mps"):
        with pytest.raises(InputError, match="device must be one that torch can use") as refusal:
            SemanticLogitsAnnotator.from_pretrained(tmp_path, device=device)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "options",
    [
        {"size": (4.5, 4)},
        {"size": 4},
        {"size": (4, 4), "short": 4},
        {"short": 64.5},
        {"short": 0},
        {"longest": 9},
        {"multiple": 0},
        {"mode": "nearest"},
        {"mean": (0.5, 0.5)},
        {"mean": (0.5, 0.5, float("nan"))},
        {"std": (1.0, 1.0, 0.0)},
    ],
)
def test_bad_preprocessing_is_refused_in_one_line(options: Any) -> None:
    with pytest.raises(InputError, match=r"(size|short|multiple|mode|mean|std) must") as refusal:
        Preprocessing(**options)
    assert "\n" not in str(refusal.value)


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


@pytest.mark.parametrize(
    "kind", [SemanticLogitsAnnotator, MaskClassAnnotator, SigmoidAnnotator], ids=str
)
def test_a_model_or_preprocessing_of_the_wrong_kind_is_refused(kind: Any) -> None:
    seen, network = Preprocessing(size=(32, 32)), torch.nn.Conv2d(3, 3, 1)
    for wrong in (None, "nvidia/segformer", torch.sigmoid):
        with pytest.raises(InputError, match=r"model must be a torch\.nn\.Module; got"):
            kind(wrong, seen)
    with pytest.raises(InputError, match="preprocessing must be a Preprocessing; got NoneType"):
        kind(network, None)


def test_a_model_without_queries_is_refused_as_mask_classes() -> None:
    class Plain(torch.nn.Module):
        def forward(self, pixel_values: Tensor) -> Tensor:
            return pixel_values

    plain = MaskClassAnnotator(Plain(), Preprocessing(size=(32, 32)))
    with pytest.raises(InputError, match="must answer with class_queries_logits, as Mask2Former"):
        plain(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    for wrong, message in ((5, "inputs must map names"), ({"a": 5}, r"inputs\['a'\] must be a")):
        with pytest.raises(InputError, match=message):
            MaskClassAnnotator(Plain(), Preprocessing(), inputs=wrong)  # type: ignore[arg-type]
