"""Run a network that `train_image_classifier.py` trained and saved, on dense and on sparse kernels.

    python examples/train_image_classifier.py --data digits --target-sparsity 0.9 --save-model sparse.pt
    python examples/run_sparse.py --data digits --model sparse.pt

Every test image is classified by both. It prints how many come out differently, what each takes, and the kernel of each
layer. The only line that sparse inference needs is `torch.compile(model, backend="autosparse")`.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import autosparse_fx
from _arguments import whole
from _data import DATA_SETS, load_data
from _models import BUILT_IN, build_model

ROUNDS = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="state_dict of a finalized model")
    parser.add_argument("--arch", default="convnet", help="(default: %(default)s)")
    parser.add_argument("--data", choices=DATA_SETS, default="digits", help="(default: %(default)s)")
    parser.add_argument(
        "--data-dir", type=Path, default=Path(os.environ.get("AUTOSPARSE_DATA", "data")),
        help="folder that holds it (default: environment variable AUTOSPARSE_DATA, or 'data')",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=whole(), default=128, help="(default: %(default)s)")
    args = parser.parse_args()
    try:
        compare(args)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


def compare(args: argparse.Namespace) -> None:
    """Classify all test images on both kernels, and print what comes of it."""
    rgb = args.arch not in BUILT_IN
    data = load_data(
        args.data, args.data_dir, device=torch.device("cpu"), download=False, rgb=rgb, image_size=224, workers=2
    )
    model = build_model(args.arch, channels=data.channels, size=data.size, num_classes=data.num_classes)
    model.load_state_dict(torch.load(args.model, map_location="cpu", weights_only=True))
    model.eval()
    with torch.no_grad():
        dense = torch.compile(model, backend="inductor")
        sparse = torch.compile(model, backend="autosparse")
        correct = {"dense": 0, "sparse": 0}
        different = total = 0
        for images, labels in data.test.eval_batches(args.batch_size):
            answers = {"dense": dense(images).argmax(1), "sparse": sparse(images).argmax(1)}
            different += int((answers["dense"] != answers["sparse"]).sum())
            total += len(labels)
            for name, answer in answers.items():
                correct[name] += int((answer == labels).sum())
        images, _ = next(iter(data.test.eval_batches(args.batch_size)))
        ratios, milliseconds = race(dense, sparse, images)
    print(autosparse_fx.report(model, images))
    for name, count in correct.items():
        print(f"{name}: {count} of {total} test images right, {milliseconds[name]:.2f} ms for {len(images)} images")
    print(f"{different} images are classified differently; sparse is {ratios:.2f} times as fast")


def race(
    dense: Callable[[Tensor], Tensor], sparse: Callable[[Tensor], Tensor], images: Tensor
) -> tuple[float, dict[str, float]]:
    """Time both in turn; return the median of dense over sparse, and the median milliseconds of each."""
    times: dict[str, list[float]] = {"dense": [], "sparse": []}
    for _ in range(ROUNDS):
        for name, model in (("dense", dense), ("sparse", sparse)):
            model(images)
            start = time.perf_counter()
            model(images)
            times[name].append(1000 * (time.perf_counter() - start))
    ratio = statistics.median(d / s for d, s in zip(times["dense"], times["sparse"], strict=True))
    return ratio, {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
