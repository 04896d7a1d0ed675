"""Does the promise hold on real frames? Random splits, splits by video, and peers.

    python benchmarks/evidence/promise.py --data FOLDER
    python benchmarks/evidence/promise.py --quick

FOLDER is as frames.py says; the frames of its train part are all there is, and each is labeled.
``--only`` runs some of the parts: random, peers, videos. Each prints a Markdown table and writes
``results/promise_PART.csv``. Peers are taken along where they can be imported: torchcp 1.2.1, and
mapie 1.6 with scikit-learn.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from frames import Frames, load
from judge import ALPHAS, NOWHERE, SCORES, Bench, Coverage, Judge, Limits, Way
from miniature import miniature
from scipy.stats import t
from tables import RESULTS, Row, markdown, told, write
from torch import Tensor

UNLIKELY = 1e-4  # what chance may explain, for each number that is judged


# Group, unit, fallback.
MAIN_WAYS = (
    ("none", "image", "none"),
    ("none", "pixel", "none"),
    ("class", "image", "none"),
    ("class", "image", "pooled"),
    ("class", "pixel", "none"),
)
LAC_WAYS = (
    *MAIN_WAYS,
    ("class", "image", "interpolated"),
    ("class", "image", "clusters"),
    ("location", "image", "none"),
    ("4 rings", "image", "none"),
    ("4 rings", "pixel", "none"),
    ("4 fitted clusters", "image", "none"),
    ("3 bands", "image", "none"),
    ("3 bands x class", "image", "none"),
    ("3 bands x class", "image", "pooled"),
)
APS_WAYS = (*MAIN_WAYS, ("location", "image", "none"))
VIDEO_WAYS = (
    ("none", "image", "none"),
    ("none", "pixel", "none"),
    ("class", "image", "none"),
    ("class", "image", "pooled"),
    ("3 bands", "image", "none"),
    ("location", "image", "none"),
)


def ways(listed: tuple[tuple[str, str, str], ...], score: str) -> list[Way]:
    return [Way(*names, score) for names in listed]


def over_splits(values: np.ndarray, aim: float) -> tuple[np.ndarray, int]:
    """Of values ``(splits, G)`` the means ``(G,)``, and how many lie below by more than chance."""
    count = (~np.isnan(values)).sum(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what one split shows, or none: NaN
        means, spread = np.nanmean(values, 0), np.nanstd(values, 0, ddof=1)
        error = t.isf(UNLIKELY, count - 1) * spread / count**0.5
    return means, int((means + error < aim).sum())


class Tally:
    """What many splits gave for one way, budget and level."""

    def __init__(self) -> None:
        self.means: list[float] = []
        self.classes: list[np.ndarray] = []
        self.groups: list[np.ndarray] = []
        self.sizes: list[float] = []
        self.finite: list[float] = []

    def add(self, coverage: Coverage, thresholds: np.ndarray) -> None:
        mean, by_class, by_group, size = coverage.summary()
        self.means.append(mean)
        self.classes.append(by_class)
        self.groups.append(by_group)
        self.sizes.append(size)
        self.finite.append(float(np.isfinite(thresholds).mean()))

    def row(self, alpha: float, names: list[str]) -> dict[str, object]:
        """Means over splits; short: below the level by more than chance explains."""
        means, aim = np.array(self.means), 1 - alpha
        _, short = over_splits(means[:, None], aim)
        by_class, classes_short = over_splits(np.array(self.classes), aim)
        by_group, groups_short = over_splits(np.array(self.groups), aim)
        worst, groups = int(np.nanargmin(by_class)), int((~np.isnan(by_group)).sum())
        return {
            "alpha": alpha,
            "splits": len(means),
            "mean of images": float(means.mean()),
            "sd": float(means.std(ddof=min(len(means) - 1, 1))),
            "splits below": float((means < aim).mean()),
            "short": "yes" if short else "",
            "worst class": float(by_class[worst]),
            "which": names[worst],
            "classes short": classes_short,
            "groups": groups or "",
            "worst group": float(np.nanmin(by_group)) if groups else "",
            "groups short": groups_short if groups else "",
            "set size": float(np.mean(self.sizes)),
            "finite": float(np.mean(self.finite)),
            **{f"mean of images, {name}": float(by_class[i]) for i, name in enumerate(names)},
        }


WHAT = ["mean of images", "sd", "splits below", "short", "worst class", "which", "classes short"]
WHAT += ["groups", "worst group", "groups short", "set size", "finite"]


def splits(frames: Frames, count: int, budgets: tuple[int, ...], seed: int) -> Iterator[Any]:
    """Budget, the frames drawn and the rest; frames come in random order."""
    for n in budgets:
        generator = torch.Generator().manual_seed(seed + n)
        for _ in range(count):
            order = torch.randperm(len(frames), generator=generator).tolist()
            yield n, order[:n], order[n:]


Held = list[tuple[Limits, list[int]]]  # thresholds, and the frames on which they are tested


def at_random(
    bench: Bench, listed: list[Way], count: int, budgets: tuple[int, ...], seed: int
) -> Iterator[Row]:
    """Splits by image, where all that is promised must hold."""
    for way in listed:
        found: dict[tuple[int, float], Held] = {}
        for n, drawn, rest in splits(bench.frames, count, budgets, seed):
            for alpha, limits in bench.limits(way, drawn):
                found.setdefault((n, alpha), []).append((limits, rest))
        for (n, alpha), of_splits in found.items():
            tally = tallied(bench.judge(way.score), of_splits)
            yield {**way.told, "n": n, **tally.row(alpha, bench.frames.classes)}
        print("done:", *way.told.values(), file=sys.stderr, flush=True)


def tallied(judge: Judge, held: Held) -> Tally:
    """Thresholds of one way, each tested on the frames beside them."""
    tally = Tally()
    covered = judge.coverages([limits for limits, _ in held])
    for coverage, (limits, tested) in zip(covered, held, strict=True):
        tally.add(coverage[tested], limits.thresholds)
    return tally


def by_video(bench: Bench, count: int, budgets: tuple[int, ...], seed: int) -> list[Row]:
    """Each video left out: drawn from the others, from each other one, or from itself."""
    frames = bench.frames
    videos = sorted(set(frames.videos))
    held = {v: [i for i, name in enumerate(frames.videos) if name == v] for v in videos}
    rows: list[Row] = []
    for video in videos:
        others = [i for v in videos if v != video for i in held[v]]
        for way in ways(VIDEO_WAYS, "LAC"):
            for n in (*budgets, len(others)):
                if way.group != "location" or n == budgets[-1]:
                    told = {"test": video, "from": "all others", **way.told, "n": n}
                    drawn = subsets(others, n, count if n < len(others) else 1, seed)
                    rows += judged(bench, way, drawn, held[video], told)
            if way.group in ("none", "class") and way.unit == "image":
                for source in videos:
                    name = "itself" if source == video else source
                    told = {"test": video, "from": name, **way.told, "n": budgets[-2]}
                    drawn = subsets(held[source], budgets[-2], count, seed)
                    rows += judged(bench, way, drawn, held[video], told)
        print("done:", video, file=sys.stderr, flush=True)
    return rows


def subsets(pool: list[int], n: int, count: int, seed: int) -> list[list[int]]:
    """So many times n of these, without replacement."""
    generator = torch.Generator().manual_seed(seed + n)
    orders = [torch.randperm(len(pool), generator=generator)[:n] for _ in range(count)]
    return [[pool[i] for i in order.tolist()] for order in orders]


def judged(
    bench: Bench, way: Way, drawn: list[list[int]], target: list[int], told: dict[str, object]
) -> list[Row]:
    """Calibrated on each of the drawn sets; tested on what of the target was not drawn."""
    found: dict[float, Held] = {}
    for chosen in drawn:
        rest = sorted(set(target) - set(chosen))
        for alpha, limits in bench.limits(way, chosen):
            found.setdefault(alpha, []).append((limits, rest))
    return [
        {**told, **tallied(bench.judge(way.score), of_draws).row(alpha, bench.frames.classes)}
        for alpha, of_draws in found.items()
    ]


@dataclass(frozen=True)
class Peer:
    """Another library's thresholds for a level and frames."""

    told: dict[str, str]
    thresholds: Callable[[float, list[int]], np.ndarray]


def peers(bench: Bench, count: int, budgets: tuple[int, ...], seed: int) -> list[Row]:
    """TorchCP and MAPIE on the same splits; each gets what it can take."""
    frames = bench.frames
    rows: list[Row] = []
    for peer in (*of_torchcp(frames), *of_mapie(frames)):
        axes = ("class",) if peer.told["group"] == "class" else ()
        found: dict[tuple[int, float], Held] = {}
        for n, drawn, rest in splits(frames, count, budgets, seed):
            for alpha in ALPHAS:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    thresholds = peer.thresholds(alpha, drawn)
                found.setdefault((n, alpha), []).append((Limits(thresholds, axes, NOWHERE), rest))
        for (n, alpha), of_splits in found.items():
            tally = tallied(bench.judge(peer.told["score"]), of_splits)
            rows.append({**peer.told, "n": n, **tally.row(alpha, frames.classes)})
        print("done:", *peer.told.values(), file=sys.stderr, flush=True)
    return rows


def pixels(frames: Frames, drawn: list[int]) -> tuple[Tensor, Tensor]:
    """Logits ``(N, C)`` and labels of labeled pixels, which is what these libraries take."""
    labels = frames.labels[drawn]
    known = labels < len(frames.classes)
    return frames.logits[drawn].movedim(1, -1)[known], labels[known]


def of_torchcp(frames: Frames) -> Iterator[Peer]:
    """With the stand-ins that the benchmark of speed has for what it imports and does not use."""
    if find_spec("torchcp") is None:
        return
    sys.path.append(str(Path(__file__).parents[1]))
    import_module("speed").stand_in()
    package = import_module("torchcp.classification")
    for name in SCORES:
        score = getattr(package.score, name)(**({"randomized": False} if name == "APS" else {}))
        for kind, group in (("SplitPredictor", "none"), ("ClassConditionalPredictor", "class")):
            predictor = getattr(package.predictor, kind)(score, temperature=1)

            def thresholds(
                alpha: float, drawn: list[int], predictor: Any = predictor
            ) -> np.ndarray:
                predictor.calculate_threshold(*pixels(frames, drawn), alpha)
                return np.asarray(predictor.q_hat, dtype=np.float32).reshape(-1)

            told = {"by": "TorchCP", "group": group, "unit": "pixel", "score": name}
            yield Peer(told, thresholds)


def of_mapie(frames: Frames) -> Iterator[Peer]:
    """Its controller of a segmentation's recall, and its split conformal classifier."""
    if find_spec("mapie") is None or find_spec("sklearn") is None:
        return
    controller = import_module("mapie.risk_control").SemanticSegmentationController
    classifier = import_module("mapie.classification").SplitConformalClassifier
    risks = mapie_risks(controller, frames)

    def recall(alpha: float, drawn: list[int]) -> np.ndarray:
        control = controller(identity, risk="recall", method="crc", target_level=1 - alpha)
        control._risks = risks[drawn]
        control.compute_best_predict_param()
        # In the set: p > parameter, which is score < 1 - parameter.
        strict = 1 - np.asarray(control.best_predict_param, dtype=np.float32)
        return np.nextafter(strict, np.float32(-np.inf))

    def lac(alpha: float, drawn: list[int]) -> np.ndarray:
        rows, truth = pixels(frames, drawn)
        model = classifier(
            Rows(len(frames.classes)),
            confidence_level=1 - alpha,
            conformity_score="lac",
            prefit=True,
        )
        model.conformalize(rows.softmax(1).numpy(), truth.numpy())
        model.predict_set(rows[:1].softmax(1).numpy())  # it finds its quantile when it predicts
        return np.asarray(model._mapie_classifier.conformity_score_function_.quantiles_)

    told = {"by": "MAPIE", "group": "none"}
    yield Peer({**told, "unit": "image (CRC of recall)", "score": "LAC"}, recall)
    yield Peer({**told, "unit": "pixel", "score": "LAC"}, lac)


def identity(values: np.ndarray) -> np.ndarray:
    return values


class Rows:
    """What MAPIE takes for a fitted classifier: rows of probabilities are their own prediction."""

    _estimator_type = "classifier"

    def __init__(self, classes: int) -> None:
        self.classes_ = np.arange(classes)
        self.n_features_in_ = classes

    def fit(self, X: np.ndarray, y: np.ndarray) -> "Rows":  # noqa: N803 - their names
        del X, y
        return self

    def predict(self, X: np.ndarray) -> np.ndarray:  # noqa: N803 - their name
        return np.asarray(X.argmax(1))

    def predict_proba(self, X: np.ndarray) -> np.ndarray:  # noqa: N803 - their name
        return X

    def __sklearn_is_fitted__(self) -> bool:
        return True


def mapie_risks(controller: Any, frames: Frames) -> np.ndarray:
    """MAPIE's own risk of each frame on its grid. Void pixels are of no class: recall skips them."""
    control = controller(identity, risk="recall", method="crc", target_level=0.9)
    for index in range(len(frames)):
        part = slice(index, index + 1)
        truth = torch.arange(len(frames.classes))[None, :, None, None] == frames.labels[part, None]
        control.compute_risks(
            frames.logits[part].softmax(1).numpy(), truth.flatten(1).long().numpy()
        )
    return np.asarray(control._risks)


def main(arguments: list[str] | None = None) -> None:
    """Print the tables of all parts, and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument(
        "--quick", action="store_true", help="a few splits of frames made on the fly"
    )
    parser.add_argument("--splits", type=int, help="200, or 8 if quick")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=["random", "peers", "videos"])
    parser.add_argument("--scores", nargs="*", default=list(SCORES), help="of the random part")
    parser.add_argument("--groups", nargs="*", help="of the random part; all of them if left out")
    parser.add_argument("--output", type=Path, help="a folder")
    chosen = parser.parse_args(arguments)
    if chosen.data is None and not chosen.quick:
        print("nothing to do without --data FOLDER or --quick")
        return
    torch.set_num_threads(1)
    count, seed = chosen.splits or (8 if chosen.quick else 200), chosen.seed
    budgets = (12, 20, 24) if chosen.quick else (23, 46, 92)
    bench = Bench(miniature() if chosen.quick else load(chosen.data, "train"))
    output = chosen.output or RESULTS
    print(f"{len(bench.frames)} frames, {count} splits, seed {seed}")

    def part(name: str, title: str, rows: list[Row], columns: list[str]) -> None:
        if chosen.output or not chosen.quick:
            write(output / f"promise_{name}.csv", rows)
        print(f"\n{title}\n\n{markdown(rows, columns)}", flush=True)

    key = ["group", "unit", "fallback", "score", "n", "alpha"]
    if "random" in chosen.only:
        both = {"LAC": LAC_WAYS, "APS": APS_WAYS}
        listed = [way for name in chosen.scores for way in ways(both[name], name)]
        listed = [way for way in listed if chosen.groups is None or way.group in chosen.groups]
        rows = []
        for row in at_random(bench, listed, count, budgets, seed):
            rows.append(row)
            print(*(told(row[name]) for name in (*key, *WHAT)), file=sys.stderr, flush=True)
        part("random", "Frames drawn at random", rows, [*key, *WHAT])
    if "peers" in chosen.only:
        rows = peers(bench, count, budgets, seed)
        part("peers", "Peers, same splits", rows, ["by", *key[:2], *key[3:], "splits", *WHAT])
    if "videos" in chosen.only:
        rows = by_video(bench, max(count // 5, 2), budgets, seed)
        part("videos", "A video left out", rows, ["test", "from", *key[:3], *key[4:], *WHAT])


if __name__ == "__main__":
    main()
