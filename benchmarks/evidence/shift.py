"""What the tools for shifts make of a new video: weights, an alarm, and levels that move.

    python benchmarks/evidence/shift.py --data FOLDER
    python benchmarks/evidence/shift.py --quick

FOLDER is as frames.py says; its train part is used. Each part prints a Markdown table and writes
``results/shift_PART.csv``.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from frames import Frames, load
from judge import ALPHAS, Bench
from miniature import miniature
from tables import RESULTS, Row, markdown, write
from torch import Tensor

from cpseg.shift import AdaptiveLevel, ExchangeabilityMartingale, WeightedCalibrator


def features(frames: Frames) -> Tensor:
    """Of each image, without labels: mean probability and share of the top label by class, entropy."""
    log = frames.logits.log_softmax(1)
    share = log.argmax(1).flatten(1)
    top = torch.stack([(share == c).float().mean(1) for c in range(log.shape[1])], 1)
    entropy = -(log.exp() * log).sum(1).mean((1, 2))
    return torch.cat((log.exp().mean((2, 3)), top, entropy[:, None]), 1).double()


def ratios(source: Tensor, target: Tensor, ridge: float) -> Callable[[Tensor], Tensor]:
    """Likelihood ratio of target to source by a logistic regression with a ridge."""
    x = torch.cat((source, target))
    mean, spread = x.mean(0), x.std(0).clamp(min=1e-6)
    x = (x - mean) / spread
    y = torch.cat((torch.zeros(len(source)), torch.ones(len(target)))).double()
    weight = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        odds = x @ weight[:-1] + weight[-1]
        cost = torch.nn.functional.binary_cross_entropy_with_logits(odds, y)
        cost = cost + ridge * weight[:-1].square().sum()
        torch.autograd.backward(cost)
        return cost

    step: Callable[[Callable[[], Tensor]], object] = solver.step  # untyped in torch
    step(loss)
    found = weight.detach()
    prior = len(source) / len(target)
    return lambda x: prior * ((x - mean) / spread @ found[:-1] + found[-1]).exp()


def weighted(bench: Bench, count: int, seed: int) -> list[Row]:
    """Half of source and target, without labels, fit the ratio; the rest calibrates and tests."""
    frames, described = bench.frames, features(bench.frames)
    judge = bench.judge("LAC")
    rows: list[Row] = []
    videos = sorted(set(frames.videos))
    for case in (*videos, "no shift"):
        for ridge in (1e-3, 1e-1):
            found: dict[float, list[tuple[float, ...]]] = {alpha: [] for alpha in ALPHAS}
            generator = torch.Generator().manual_seed(seed)
            for _ in range(count):
                order = torch.randperm(len(frames), generator=generator).tolist()
                if case == "no shift":
                    target, source = order[: len(order) // 3], order[len(order) // 3 :]
                else:
                    target = [i for i in order if frames.videos[i] == case]
                    source = [i for i in order if frames.videos[i] != case]
                fit, drawn = source[: len(source) // 2], source[len(source) // 2 :]
                shown, rest = target[: len(target) // 2], target[len(target) // 2 :]
                ratio = ratios(described[fit], described[shown], ridge)
                calibrator = WeightedCalibrator().update(
                    frames.logits[drawn], frames.labels[drawn], ratio(described[drawn])
                )
                plain = bench.stock("none", "image", "LAC").of(drawn)
                for alpha in ALPHAS:
                    made = calibrator.compute(alpha)
                    own = made.thresholds(ratio(described[rest]))
                    each = [judge.of_one(t, i) for t, i in zip(own.tolist(), rest, strict=True)]
                    covered, sizes = np.array(each).T
                    limits = bench.limits_of(plain, plain.compute(alpha))
                    mean, _, _, size = judge.coverage(limits)[rest].summary()
                    found[alpha].append((
                        mean,
                        float(covered.mean()),
                        size,
                        float(sizes.mean()),
                        made.effective_units,
                        float(own.isinf().double().mean()),
                    ))  # fmt: skip
            for alpha, values in found.items():
                names = ["unweighted", "weighted", "set size", "set size, weighted"]
                names += ["effective images", "full sets"]
                mean = np.array(values).mean(0).tolist()
                spread = float(np.array(values)[:, 1].std(ddof=1))
                rows.append(
                    {"test": case, "ridge": ridge, "alpha": alpha, "n": len(drawn)}
                    | dict(zip(names, mean, strict=True))
                    | {"sd of weighted": spread}
                )
        print("done: weights,", case, file=sys.stderr, flush=True)
    return rows


def alarms(bench: Bench, count: int, seed: int) -> list[Row]:
    """How often the alarm rings in random order, when a new video begins, and in a video's order."""
    frames, delta = bench.frames, 0.01
    log = frames.logits.log_softmax(1)
    entropy = -(log.exp() * log).sum(1).mean((1, 2))
    judge = bench.judge("LAC")
    per_frame = judge.counts.sum(1)
    ends = np.concatenate(([0], per_frame.cumsum()[:-1]))
    score = torch.from_numpy(np.add.reduceat(judge.scores.astype(np.float64), ends) / per_frame)
    videos = sorted(set(frames.videos))
    of_video = {v: torch.tensor([i for i, x in enumerate(frames.videos) if x == v]) for v in videos}
    everything = torch.arange(len(frames))
    none = everything[:0]
    streams = {"all frames, random order": (everything, none)}
    for video, held in of_video.items():
        rest = torch.tensor([i for i in everything.tolist() if frames.videos[i] != video])
        streams[f"other videos, random order, then {video}"] = rest, held
    rows: list[Row] = []
    for statistic, values in (("mean entropy", entropy), ("mean score of the labels", score)):
        for told, (before, after) in streams.items():
            generator = torch.Generator().manual_seed(seed)
            early, waits = 0, []
            for _ in range(count):
                first = before[torch.randperm(len(before), generator=generator)]
                watch = ExchangeabilityMartingale(seed).update(values[first])
                if watch.alarm(delta):
                    early += 1
                    continue
                for place, index in enumerate(after.tolist(), 1):
                    if watch.update(values[index : index + 1]).alarm(delta):
                        waits.append(place)
                        break
            rows.append({
                "statistic": statistic,
                "stream": told,
                "streams": count,
                "alarm before the new video": early / count,
                "alarm on it": len(waits) / (count - early) if len(after) and count > early else np.nan,
                "new frames until then": float(np.median(waits)) if waits else np.nan,
            })  # fmt: skip
        for video, held in of_video.items():
            watch = ExchangeabilityMartingale(seed).update(values[held])
            rows.append({
                "statistic": statistic,
                "stream": f"{video} alone, in its own order",
                "streams": 1,
                "alarm before the new video": float(watch.alarm(delta)),
            })  # fmt: skip
    print("done: alarms", file=sys.stderr, flush=True)
    return rows


def following(bench: Bench) -> list[Row]:
    """Levels that move along each video in its order, calibrated on all others."""
    frames, judge = bench.frames, bench.judge("LAC")
    rows: list[Row] = []
    for video in sorted(set(frames.videos)):
        stream = [i for i, name in enumerate(frames.videos) if name == video]
        others = [i for i, name in enumerate(frames.videos) if name != video]
        calibrator = bench.stock("none", "image", "LAC").of(others)
        for alpha in ALPHAS:
            made = calibrator.compute(alpha)
            fixed = judge.coverage(bench.limits_of(calibrator, made))[stream]
            mean, _, _, size = fixed.summary()
            rows.append({
                "test": video, "alpha": alpha, "gamma": "fixed", "frames": len(stream),
                "mean of images": mean,
                "second half": float(np.nanmean(fixed.of_images[len(stream) // 2 :])),
                "worst frame": float(np.nanmin(fixed.of_images)),
                "set size": size, "full": 0.0,
            })  # fmt: skip
            for gamma in (0.01, 0.05, 0.2):
                moving = AdaptiveLevel(calibrator, alpha, gamma=gamma)
                seen: list[tuple[float, float]] = []
                full = 0
                for index in stream:
                    threshold = float(moving.calibration.thresholds)
                    full += threshold == np.inf
                    seen.append(judge.of_one(threshold, index))
                    moving.update(
                        frames.logits[index : index + 1], frames.labels[index : index + 1]
                    )
                covered, sizes = np.array(seen).T
                rows.append({
                    "test": video, "alpha": alpha, "gamma": gamma, "frames": len(stream),
                    "mean of images": float(np.nanmean(covered)),
                    "second half": float(np.nanmean(covered[len(stream) // 2 :])),
                    "worst frame": float(np.nanmin(covered)),
                    "set size": float(sizes.mean()), "full": full / len(stream),
                })  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Print the tables of all parts, and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument(
        "--quick", action="store_true", help="a few splits of frames made on the fly"
    )
    parser.add_argument("--splits", type=int, help="200, or 8 if quick")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=["weights", "alarms", "levels"])
    parser.add_argument("--output", type=Path, help="a folder")
    chosen = parser.parse_args(arguments)
    if chosen.data is None and not chosen.quick:
        print("nothing to do without --data FOLDER or --quick")
        return
    torch.set_num_threads(1)
    count = chosen.splits or (8 if chosen.quick else 200)
    bench = Bench(miniature() if chosen.quick else load(chosen.data, "train"))
    output = chosen.output or RESULTS
    print(f"{len(bench.frames)} frames, {count} splits, seed {chosen.seed}")
    parts: dict[str, tuple[str, Callable[[], list[Row]]]] = {
        "weights": ("Weights", lambda: weighted(bench, max(count // 10, 2), chosen.seed)),
        "alarms": ("Alarms at delta = 0.01", lambda: alarms(bench, count, chosen.seed)),
        "levels": ("Levels that move", lambda: following(bench)),
    }
    for name in chosen.only:
        title, run = parts[name]
        rows = run()
        if chosen.output or not chosen.quick:
            write(output / f"shift_{name}.csv", rows)
        print(f"\n{title}\n\n{markdown(rows, list(rows[0]))}", flush=True)


if __name__ == "__main__":
    main()
