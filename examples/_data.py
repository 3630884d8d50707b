"""Image data sets for the training example. Order and augmentation are pure functions of (seed, epoch, step).

Nothing here draws from the global random state, so that a resumed run sees exactly the batches that the
interrupted one would have seen.
"""

import gzip
import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

DATA_SETS = ("digits", "fashion-mnist", "cifar10", "cifar10-jpeg", "imagefolder")

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Split(Protocol):
    """One half of a data set, as normalised float batches on the right device."""

    def __len__(self) -> int: ...

    def batches(self, batch_size: int, *, seed: int, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled, augmented, full batches of one epoch, from batch number `start`."""

    def eval_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images once, in order."""


class ImageData(NamedTuple):
    train: Split
    test: Split
    channels: int
    size: int
    num_classes: int


def derive_seed(*parts: int) -> int:
    """Mix a few integers into one well-spread seed."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*parts: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(*parts))


@dataclass
class TensorSplit:
    """A small data set held in memory as uint8, NCHW, on the training device."""

    images: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor
    augment: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch_size: int, *, seed: int, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self), generator=generator(seed, epoch)).to(self.images.device)
        for step in range(start, len(self) // batch_size):
            index = order[step * batch_size : (step + 1) * batch_size]
            images = self.images[index]
            if self.augment:
                images = random_crop_and_flip(images, padding=4, generator=generator(seed, epoch, step))
            yield self._normalise(images), self.labels[index]

    def eval_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True):
            yield self._normalise(images), labels

    def _normalise(self, images: Tensor) -> Tensor:
        return images.float().div_(255).sub_(self.mean).div_(self.std)


def random_crop_and_flip(images: Tensor, *, padding: int, generator: torch.Generator) -> Tensor:
    """Pad with zeros, then cut a window of the old size at a random place and mirror half of the images."""
    count, _, height, width = images.shape
    shift = torch.randint(2 * padding + 1, (2, count, 1), generator=generator).to(images.device)
    flip = torch.randint(2, (count, 1), generator=generator, dtype=torch.bool).to(images.device)
    rows = torch.arange(height, device=images.device) + shift[0]
    columns = torch.arange(width, device=images.device).expand(count, width)
    columns = torch.where(flip, width - 1 - columns, columns) + shift[1]
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    sample = torch.arange(count, device=images.device)[:, None, None]
    cropped = padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2).contiguous()


class _SeededImages(Dataset[tuple[Tensor, int]]):
    """Reads an image with the random transforms seeded by the key, not by which worker happens to read it."""

    def __init__(self, images: torchvision.datasets.ImageFolder) -> None:
        self.images = images

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = key
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            image, label = self.images[index]
        return image, label


@dataclass
class FolderSplit:
    """Images read from disk by worker processes."""

    images: torchvision.datasets.ImageFolder
    device: torch.device
    workers: int

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int, *, seed: int, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self), generator=generator(seed, epoch)).tolist()
        keys = [(index, derive_seed(seed, epoch, index)) for index in order]
        yield from self._load(keys[start * batch_size : len(self) // batch_size * batch_size], batch_size)

    def eval_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self._load([(index, 0) for index in range(len(self))], batch_size)

    def _load(self, keys: list[tuple[int, int]], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            _SeededImages(self.images),
            batch_size=batch_size,
            sampler=keys,  # type: ignore[arg-type]  # any iterable of keys will do
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # the loader draws its workers' base seed from here, not from the global state
        )
        for images, labels in loader:
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


def load_data(
    name: str, folder: Path, *, device: torch.device, download: bool, rgb: bool, image_size: int, workers: int
) -> ImageData:
    """Load a data set; `rgb` repeats the channel of grey images for networks that want three."""
    if name == "imagefolder":
        return _image_folder(folder, device=device, size=image_size, workers=workers)
    (train_x, train_y), (test_x, test_y) = _READERS[name](folder, download)
    mean, std = _STATISTICS[name]

    def split(images: np.ndarray, labels: np.ndarray, *, augment: bool) -> TensorSplit:
        x = torch.from_numpy(np.array(images))  # a copy: what comes from a file buffer is read-only
        x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)
        if rgb and x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        return TensorSplit(
            x.contiguous().to(device),
            torch.from_numpy(labels.astype(np.int64)).to(device),
            mean=torch.tensor(mean, device=device).view(-1, 1, 1),
            std=torch.tensor(std, device=device).view(-1, 1, 1),
            augment=augment,
        )

    train = split(train_x, train_y, augment=name.startswith("cifar10"))
    test = split(test_x, test_y, augment=False)
    _, channels, size, _ = train.images.shape
    return ImageData(train, test, channels, size, num_classes=10)


_Arrays = tuple[np.ndarray, np.ndarray]


def _digits(folder: Path, download: bool) -> tuple[_Arrays, _Arrays]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images * (255 / 16)).astype(np.uint8)
    train_x, test_x, train_y, test_y = train_test_split(
        images, digits.target, test_size=0.2, random_state=0, stratify=digits.target
    )
    return (train_x, train_y), (test_x, test_y)


def _fashion_mnist(folder: Path, download: bool) -> tuple[_Arrays, _Arrays]:
    if download:
        torchvision.datasets.FashionMNIST(str(folder), download=True)
    raw = _find(folder, ("FashionMNIST/raw", "fashion-mnist/FashionMNIST/raw"), "fashion-mnist")

    def read(name: str, header: int) -> np.ndarray:
        packed = raw / f"{name}.gz"
        content = gzip.decompress(packed.read_bytes()) if packed.exists() else (raw / name).read_bytes()
        return np.frombuffer(content, np.uint8, offset=header)

    def split(prefix: str) -> _Arrays:
        return read(f"{prefix}-images-idx3-ubyte", 16).reshape(-1, 28, 28), read(f"{prefix}-labels-idx1-ubyte", 8)

    return split("train"), split("t10k")


def _cifar10(folder: Path, download: bool) -> tuple[_Arrays, _Arrays]:
    if not download:
        folder = _find(folder, ("cifar-10-batches-py", "cifar10/cifar-10-batches-py"), "cifar10").parent
    halves = (torchvision.datasets.CIFAR10(str(folder), train=train, download=download) for train in (True, False))
    train, test = ((half.data, np.array(half.targets)) for half in halves)
    return train, test


def _cifar10_jpeg(folder: Path, download: bool) -> tuple[_Arrays, _Arrays]:
    """One npz file; per split: JPEG streams end to end, their offsets, and the labels."""
    from PIL import Image

    archive = np.load(_find(folder, ("cifar10_jpeg80.npz", "cifar10/cifar10_jpeg80.npz"), "cifar10-jpeg"))

    def split(name: str) -> _Arrays:
        streams, offsets = archive[f"{name}_jpeg"], archive[f"{name}_offsets"]
        images = [np.asarray(Image.open(io.BytesIO(streams[begin:end]))) for begin, end in pairwise(offsets)]
        return np.stack(images), archive[f"{name}_labels"]

    return split("train"), split("test")


def _image_folder(root: Path, *, device: torch.device, size: int, workers: int) -> ImageData:
    from torchvision import transforms

    for half in ("train", "val"):
        if not (root / half).is_dir():
            raise FileNotFoundError(
                f"--data imagefolder: there is no folder {str(root / half)!r}; --data-dir must hold train/ and val/, "
                f"each with one subfolder of images per class"
            )
    normalise = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    augmented = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *normalise]
    central = [transforms.Resize(size * 8 // 7), transforms.CenterCrop(size), *normalise]
    train = torchvision.datasets.ImageFolder(str(root / "train"), transforms.Compose(augmented))
    test = torchvision.datasets.ImageFolder(str(root / "val"), transforms.Compose(central))
    if train.classes != test.classes:
        raise ValueError(f"--data imagefolder: train/ and val/ in {root} have different class folders")
    return ImageData(
        FolderSplit(train, device, workers), FolderSplit(test, device, workers), 3, size, len(train.classes)
    )


def _find(folder: Path, candidates: tuple[str, ...], name: str) -> Path:
    for candidate in candidates:
        if (folder / candidate).exists():
            return folder / candidate
    cure = "" if name == "cifar10-jpeg" else ", or let train_image_classifier.py fetch it there with --download"
    raise FileNotFoundError(
        f"--data {name}: found neither {' nor '.join(candidates)} in {str(folder)!r}; point --data-dir (or the "
        f"environment variable AUTOSPARSE_DATA) at the folder that holds it{cure}"
    )


_READERS = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "cifar10-jpeg": _cifar10_jpeg,
}
_STATISTICS = {
    "digits": ((0.305,), (0.376,)),
    "fashion-mnist": ((0.2860,), (0.3530,)),
    "cifar10": (CIFAR_MEAN, CIFAR_STD),
    "cifar10-jpeg": (CIFAR_MEAN, CIFAR_STD),
}
