"""An annotator that learns from labels: what it starts from, what it learns, what it refuses."""

from math import exp, log

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import nll_loss

from cpseg.annotators import SyntheticAnnotator
from cpseg.data import SyntheticShapes
from cpseg.errors import InputError
from cpseg.training import Normalize, Refined, UNet, class_weights_from, refine

C = 6
Example = tuple[Tensor, Tensor, Tensor]


def examples(length: int, seed: int) -> list[Example]:
    """Shapes whose annotator takes discs (1) for squares (2), and says so three times of four."""
    made: list[Example] = []
    for image, label in SyntheticShapes(length=length, size=(24, 32), seed=seed):
        said = torch.where(label == 1, 2, label)
        logits = SyntheticAnnotator(num_classes=C, error_rate=0.1, seed=1)(said[None], seeds=[0])
        made.append((image, logits[0] / 4, label.long()))
    return made


def blank() -> UNet:
    torch.manual_seed(0)
    network = UNet(C, channels=3 + C, width=8, depth=2, norm="batch")
    nn.init.zeros_(network.head.weight)
    assert network.head.bias is not None
    nn.init.zeros_(network.head.bias)
    return network


def weights_of(known: list[Example]) -> tuple[float, ...]:
    return class_weights_from((label for _, _, label in known), C)


def cost(refined: Refined, new: list[Example]) -> float:
    total = 0.0
    for image, logits, label in new:
        told = refined(image[None], logits[None]).log_softmax(1)
        total += float(nll_loss(told, label[None], ignore_index=255).detach())
    return total / len(new)


def test_an_untrained_one_is_the_annotator_by_hand() -> None:
    image = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
    weights = (1.0, 2.0, 0.5)
    network = nn.Conv2d(6, 3, 1)
    nn.init.zeros_(network.weight)
    nn.init.constant_(network.bias, 0.25)  # type: ignore[arg-type]
    logits = torch.tensor([2.0, 0.0, -40.0])
    found = Refined(network, weights)(image, logits.view(1, 3, 1, 1)).flatten().tolist()
    total = log(exp(2) + 1)
    known = [2 - total, -total, -12.0]
    assert found == pytest.approx(
        [k + 0.25 - log(w) for k, w in zip(known, weights, strict=True)], abs=1e-6
    )


def test_the_network_sees_the_image_and_the_log_probabilities() -> None:
    seen: list[Tensor] = []

    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x[:, 3:]

    image = torch.tensor([255, 0, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    logits = torch.tensor([0.0, 0.0, -90.0]).view(1, 3, 1, 1)
    plain = Normalize(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    Refined(Looks(), (1.0, 1.0, 1.0), plain)(image, logits)
    assert seen[0].flatten().tolist() == pytest.approx(
        [1, 0, 0.2, -log(2) / 6, -log(2) / 6, -2], abs=1e-6
    )


def test_it_learns_what_the_annotator_gets_wrong_and_keeps_what_it_gets_right() -> None:
    known, new = examples(16, 2), examples(8, 3)
    weights = weights_of(known)
    state = torch.get_rng_state()
    before = Refined(blank(), (1.0,) * C).eval()
    torch.set_rng_state(state)
    network = blank()
    state = torch.get_rng_state()
    after = refine(network, known, class_weights=weights, steps=150, lr=0.01)
    assert torch.equal(state, torch.get_rng_state())
    assert not after.training
    assert cost(after, new) < 0.6 * cost(before, new)
    right = dict.fromkeys(("before", "after"), 0)
    for image, logits, label in new:
        for name, each in (("before", before), ("after", after)):
            found = each(image[None], logits[None])[0].argmax(0)
            right[name] += int((found == label)[label == 1].sum())
    discs = sum(int((label == 1).sum()) for _, _, label in new)
    assert right["before"] < 0.1 * discs
    assert right["after"] > 0.5 * discs


def test_the_same_seed_gives_the_same_and_another_does_not() -> None:
    known = examples(4, 2)
    weights = weights_of(known)
    image, logits, _ = known[0]

    def told(seed: int) -> Tensor:
        made = refine(blank(), known, class_weights=weights, steps=3, lr=0.1, seed=seed)
        refined: Tensor = made(image[None], logits[None])
        return refined

    assert torch.equal(told(0), told(0))
    assert not torch.equal(told(0), told(1))


def test_class_weights_are_divided_out_of_the_answer() -> None:
    """Half of the pixels are 1, whatever they look like: what is said is a half, weights or not."""
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    label = (torch.arange(64).view(8, 8) % 2).long()
    example = (image, torch.zeros(2, 8, 8), label)
    for weights in ((1.0, 1.0), (0.25, 4.0)):
        network = nn.Conv2d(5, 2, 1)
        made = refine(network, [example], class_weights=weights, steps=300, lr=0.05)
        share = made(image[None], example[1][None]).softmax(1)[:, 1]
        assert float(share.mean()) == pytest.approx(0.5, abs=0.05)


def test_void_pixels_teach_nothing() -> None:
    image, logits, label = examples(1, 2)[0]
    void = torch.arange(label.numel()).view(label.shape) % 3 == 0
    image, label = image.clone(), torch.where(void | (label == 255), 7, label)
    found: list[list[Tensor]] = []
    for _ in range(2):
        torch.manual_seed(0)
        network = nn.Conv2d(3 + C, C, 1)
        refine(
            network,
            [(image, logits, label)],
            class_weights=(1.0,) * C,
            steps=3,
            lr=0.1,
            ignore_index=7,
        )
        found.append([part.detach().clone() for part in network.parameters()])
        image[:, void] = 255 - image[:, void]
        logits = torch.where(void, logits.flip(0), logits)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("where", ["image", "logits"])
def test_what_is_mirrored_is_mirrored_whole(where: str) -> None:
    """The label is written, pixel by pixel, in a part; were that left as it was, it would be lost."""
    label = torch.randint(2, (8, 16), generator=torch.Generator().manual_seed(0))
    image = torch.zeros(3, 8, 16, dtype=torch.uint8)
    logits = torch.zeros(2, 8, 16)
    if where == "image":
        image = image + 255 * label.to(torch.uint8)
    else:
        logits = logits + 4 * torch.stack((1 - label, label))
    made = refine(
        nn.Conv2d(5, 2, 1), [(image, logits, label)], class_weights=(1.0, 1.0), steps=100, lr=0.1
    )
    told = made(image[None], logits[None]).log_softmax(1).detach()
    assert float(nll_loss(told, label[None])) < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"examples": []}, "examples must hold a labeled image; got none"),
        ({"steps": 0}, "steps must be"),
        ({"batch": 0}, "batch must be"),
        ({"class_weights": (1.0, 0.0)}, r"class_weights\[1\] must be positive"),
        ({"class_weights": (1.0, -1.0)}, r"class_weights\[1\] must be finite"),
        ({"class_weights": (1.0,)}, "logits must have C = 1 classes"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    example = (
        torch.zeros(3, 4, 4, dtype=torch.uint8),
        torch.zeros(2, 4, 4),
        torch.zeros(4, 4, dtype=torch.int64),
    )
    given = {"examples": [example], "class_weights": (1.0, 1.0), "steps": 1} | change
    with pytest.raises(InputError, match=message):
        refine(nn.Conv2d(5, 2, 1), given.pop("examples"), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        (0, torch.zeros(3, 4, 4), r"examples must be bytes \(3, H, W\)"),
        (0, torch.zeros(3, 4, 5, dtype=torch.uint8), "examples must be bytes"),
        (2, torch.zeros(1, 4, 4, dtype=torch.int64), "examples must be bytes"),
        (2, torch.full((4, 4), 2), "labels must be classes below 2 .*; got 16 other pixels"),
    ],
)
def test_examples_that_do_not_fit_are_refused(part: int, value: Tensor, message: str) -> None:
    example = [
        torch.zeros(3, 4, 4, dtype=torch.uint8),
        torch.zeros(2, 4, 4),
        torch.zeros(4, 4, dtype=torch.int64),
    ]
    example[part] = value
    with pytest.raises(InputError, match=message):
        refine(nn.Conv2d(5, 2, 1), [(example[0], example[1], example[2])], class_weights=(1.0, 1.0))


def test_examples_of_two_sizes_are_refused_in_one_step() -> None:
    made = [
        (
            torch.zeros(3, size, 4, dtype=torch.uint8),
            torch.zeros(2, size, 4),
            torch.zeros(size, 4, dtype=torch.int64),
        )
        for size in (4, 5)
    ]
    with pytest.raises(InputError, match="examples of one step must be of one size"):
        refine(nn.Conv2d(5, 2, 1), made, class_weights=(1.0, 1.0), batch=16, steps=1)


@pytest.mark.parametrize(
    "images",
    [
        torch.rand(2, 3, 4, 5),  # divided by 255 once more they would be black
        torch.zeros(1, 3, 4, 5, dtype=torch.uint8),
        torch.zeros(2, 3, 5, 4, dtype=torch.uint8),
        torch.zeros(2, 1, 4, 5, dtype=torch.uint8),
    ],
)
def test_images_that_do_not_go_with_the_logits_are_refused(images: Tensor) -> None:
    refined = Refined(nn.Conv2d(5, 2, 1), (1.0, 1.0))
    with pytest.raises(InputError, match=r"images must be bytes \(2, 3, 4, 5\) beside logits"):
        refined(images, torch.zeros(2, 2, 4, 5))
