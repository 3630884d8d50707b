"""Train a Lightning module on handwritten digits twice, dense and with 90 % of its weights zero, and compare.

Run `python examples/train_lightning.py` after `pip install "autosparse-fx[examples,lightning]"`: it takes less than a
minute on two CPU cores, and writes nothing.
"""

import argparse
import logging
import warnings

import lightning as L
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import autosparse_fx
from _arguments import whole
from autosparse_fx.integrations.lightning import AutoSparseCallback


class DigitClassifier(L.LightningModule):
    """Nothing in it knows of sparsity."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10),
        )  # fmt: skip

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loaders() -> tuple[DataLoader, DataLoader]:
    """1,797 grey images of 8x8 pixels, that come with scikit-learn; a fifth of them is for testing."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    train_set = TensorDataset(images[train], labels[train])
    return (
        DataLoader(train_set, batch_size=64, shuffle=True, drop_last=True),
        DataLoader(TensorDataset(images[test], labels[test]), batch_size=len(test)),
    )


def train(epochs: int, callbacks: list[L.Callback]) -> tuple[DigitClassifier, float]:
    """An ordinary Lightning training: the module, and its accuracy on the test images."""
    torch.manual_seed(0)
    model = DigitClassifier()
    train_loader, test_loader = loaders()
    trainer = L.Trainer(
        max_epochs=epochs, callbacks=callbacks, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, train_loader)
    (metrics,) = trainer.test(model, test_loader, verbose=False)
    return model, metrics["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train digits with Lightning, dense and sparse, and compare.")
    parser.add_argument("--epochs", type=whole(), default=20, help="of each training (default: %(default)s)")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the images are in memory

    _, dense = train(args.epochs, [])
    model, sparse = train(args.epochs, [AutoSparseCallback(target_sparsity=0.9, finalize=True)])
    print(autosparse_fx.report(model))
    print(f"accuracy  dense {dense:.2%}  sparse {sparse:.2%}  sparsity {autosparse_fx.sparsity(model):.4f}")


if __name__ == "__main__":
    main()
