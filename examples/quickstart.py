"""Train a small network on handwritten digits twice, dense and with 90 % of its weights zero, and compare.

Run `python examples/quickstart.py`: it takes under two minutes on two CPU cores and writes quickstart.png.
"""

import argparse
import copy

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import autosparse_fx
from autosparse_fx import AutoSparse, GradientAnnealing

EPOCHS, BATCH = 60, 64


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1,797 grey images of 8x8 pixels, that come with scikit-learn; a fifth of them is for testing."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    return images[train], labels[train], images[test], labels[test]


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def train(model: nn.Module, images: Tensor, labels: Tensor, config: AutoSparse | None) -> GradientAnnealing | None:
    """An ordinary training loop. With a config the weights become sparse: three lines do it."""
    total_steps = EPOCHS * (len(labels) // BATCH)
    torch.manual_seed(0)  # the same order of images for every network
    if config is not None:
        autosparse_fx.sparsify(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)
    annealer = None
    if config is not None:
        annealer = GradientAnnealing(model, total_steps, optimizer=optimizer)
    step = torch.compile(model, backend="inductor" if config is None else "autosparse")

    model.train()
    with tqdm(total=total_steps, desc="dense" if config is None else "sparse") as bar:
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(labels))[: len(labels) // BATCH * BATCH].split(BATCH):
                loss = nn.functional.cross_entropy(step(images[batch]), labels[batch])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                bar.update()
    return annealer


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model.eval()(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train digits dense and sparse, and compare.")
    parser.add_argument("--output", default="quickstart.png", help="where the plot goes (default: %(default)s)")
    args = parser.parse_args()

    torch.set_num_threads(1)  # enough for a network this small, and steady on a busy machine
    train_x, train_y, test_x, test_y = load()
    dense = build()
    sparse = copy.deepcopy(dense)
    train(dense, train_x, train_y, None)
    annealer = train(sparse, train_x, train_y, AutoSparse(target_sparsity=0.9))

    print(autosparse_fx.report(sparse, test_x[:1]))
    sparse = autosparse_fx.finalize(sparse)  # plain layers again, with real zeros in their weights
    print(f"accuracy  dense {accuracy(dense, test_x, test_y):.2%}  sparse {accuracy(sparse, test_x, test_y):.2%}")
    annealer.history.plot(args.output)
    print(f"sparsity, alpha and cuts over the training: {args.output}")


if __name__ == "__main__":
    main()
