"""Train a small vision transformer with Hugging Face's Trainer twice, dense and 80 % sparse, and compare.

Run `python examples/train_transformers.py` after `pip install "autosparse-fx[examples,transformers]"`: it takes less
than a minute on two CPU cores and downloads nothing. With `--output` it saves the sparse model for `from_pretrained`.
"""

import argparse
import tempfile

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import (
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

import autosparse_fx
from _arguments import whole
from autosparse_fx.integrations.transformers import AutoSparseCallback

Examples = list[dict[str, object]]


def load() -> tuple[Examples, Examples]:
    """1,797 grey images of 8x8 pixels, that come with scikit-learn; a fifth of them is for testing."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.3
    examples = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, digits.target, strict=True)]
    train, test = train_test_split(examples, test_size=0.2, random_state=0, stratify=digits.target)
    return train, test


def build() -> ViTForImageClassification:
    """16 patches of 2x2 pixels, two layers."""
    set_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, num_labels=10,
    )  # fmt: skip
    return ViTForImageClassification(config)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def train(model: ViTForImageClassification, epochs: int, callbacks: list[TrainerCallback], folder: str) -> float:
    """An ordinary training with Trainer: the accuracy on the test images."""
    train_set, test_set = load()
    args = TrainingArguments(
        folder, num_train_epochs=epochs, per_device_train_batch_size=64, per_device_eval_batch_size=360,
        learning_rate=3e-3, lr_scheduler_type="cosine", warmup_steps=20, weight_decay=0.01, logging_steps=50,
        save_strategy="no", report_to=[], use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(
        model, args, train_dataset=train_set, eval_dataset=test_set, compute_metrics=accuracy, callbacks=callbacks
    )
    trainer.train()
    return float(trainer.evaluate()["eval_accuracy"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a vision transformer, dense and sparse, and compare.")
    parser.add_argument("--epochs", type=whole(), default=20, help="of each training (default: %(default)s)")
    parser.add_argument("--output", help="folder to save the sparse model in")
    args = parser.parse_args()

    model = build()
    with tempfile.TemporaryDirectory() as folder:
        dense = train(build(), args.epochs, [], folder)
        sparse = train(model, args.epochs, [AutoSparseCallback(target_sparsity=0.8, finalize=True)], folder)
    print(autosparse_fx.report(model))
    print(f"accuracy  dense {dense:.2%}  sparse {sparse:.2%}  sparsity {autosparse_fx.sparsity(model):.4f}")
    if args.output:
        model.save_pretrained(args.output)


if __name__ == "__main__":
    main()
