"""The training example: results, checkpoints that survive being killed, and errors that say what to do."""

import gzip
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "train_image_classifier.py"
# 11 steps an epoch: long enough to be killed in the middle, a second or two to train.
TINY = ("--data", "digits", "--epochs", "4", "--no-compile", "--threads", "1", "--target-sparsity", "0.8")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(*argv):
    from train_image_classifier import parse_args
    from train_image_classifier import train as run

    return run(parse_args([str(arg) for arg in argv]))


def assert_same(a, b, at="checkpoint"):
    """Compare nested states to the last bit."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), at
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for key in a:
            assert_same(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), at
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{at}[{index}]")
    else:
        assert a == b, at


def read_checkpoint(path):
    state = torch.load(path, weights_only=True)
    del state["seconds"]
    return state


def test_sparse_training_reports_accuracy_and_sparsity(tmp_path):
    output, weights = tmp_path / "new" / "result.json", tmp_path / "weights.pt"
    result = train(*TINY, "--json", output, "--save-model", weights)

    assert json.loads(output.read_text()) == result
    assert result["accuracy"] > 0.85
    assert result["sparsity"] == pytest.approx(0.8, abs=0.005)
    assert sum(layer["zeros"] for layer in result["layers"]) == pytest.approx(
        result["sparsity"] * sum(np.prod(layer["shape"]) for layer in result["layers"])
    )
    assert result["history"][-1]["alpha"] == 0
    assert result["steps"] == 44 and len(result["epochs"]) == 4
    saved = torch.load(weights, weights_only=True)
    assert not [name for name in saved if "threshold" in name or "offset" in name]
    zeros = {name: int((tensor == 0).sum()) for name, tensor in saved.items()}
    assert all(zeros[layer["name"]] == layer["zeros"] for layer in result["layers"])


def test_one_line_trains_like_the_prepared_model():
    prepared, one_line = (train(*TINY, "--compile", *options) for options in ((), ("--one-line",)))
    # The two graphs are not the same, and kernels may add in another order: rounding grows over the 44 steps.
    assert prepared["accuracy"] > 0.85 and one_line["accuracy"] == pytest.approx(prepared["accuracy"], abs=0.02)
    for found, expected in zip(one_line["layers"], prepared["layers"], strict=True):
        assert (found["name"], found["shape"]) == (expected["name"], expected["shape"])
        assert found["sparsity"] == pytest.approx(expected["sparsity"], abs=0.005)
    assert one_line["sparsity"] == pytest.approx(0.8, abs=0.005)


def test_results_name_no_path(tmp_path):
    output = tmp_path / "result.json"
    train(*TINY, "--max-steps", "2", "--json", output, "--checkpoint", tmp_path / "checkpoint.pt")
    assert str(tmp_path) not in output.read_text()


@pytest.mark.parametrize(
    "options",
    [
        ("--dense",),
        ("--optimizer", "adamw", "--target-sparsity", "none", "--granularity", "channel"),
        ("--param-groups", "--threshold-lr", "0.01", "--amp", "bf16", "--channels-last"),
        ("--arch", "resnet20", "--label-smoothing", "0.1", "--warmup-epochs", "0.1"),
        ("--arch", "mobilenet_v1"),
        ("--arch", "convnet_wide"),
        ("--arch", "squeezenet1_1", "--data", "imagefolder"),
    ],
    ids=lambda options: options[1].strip("-") if len(options) > 1 else "dense",
)
@pytest.mark.filterwarnings("ignore:.*the target:UserWarning")  # three steps are too few to reach it
def test_options(options, tmp_path):
    if "imagefolder" in options:
        make_image_folder(tmp_path)
    argv = ("--no-compile", "--threads", "1", "--max-steps", "3", "--batch-size", "4", "--workers", "0")
    result = train(*argv, "--data-dir", tmp_path, "--image-size", "64", *options)
    assert result["steps"] == 3
    assert 0 <= result["accuracy"] <= 1
    assert ("sparsity" in result) == ("--dense" not in options)


def make_image_folder(root):
    from PIL import Image

    noise = np.random.default_rng(0)
    for half, count in (("train", 6), ("val", 2)):
        for label in ("cat", "dog"):
            (root / half / label).mkdir(parents=True)
            for index in range(count):
                pixels = noise.integers(256, size=(80, 70, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / half / label / f"{index}.png")


def test_order_and_augmentation_depend_on_seed_epoch_and_step_alone(tmp_path):
    from _data import TensorSplit

    images = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8)
    statistics = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    memory = TensorSplit(images, torch.arange(40), *statistics, augment=True)
    make_image_folder(tmp_path)
    folder = load("imagefolder", tmp_path).train
    for split in (memory, folder):
        whole = list(split.batches(4, seed=3, epoch=1, start=0))
        state = torch.get_rng_state()
        rest = list(split.batches(4, seed=3, epoch=1, start=2))
        assert torch.equal(torch.get_rng_state(), state)
        assert_same(whole[2:], rest)
        other = next(split.batches(4, seed=3, epoch=2, start=0))
        assert not torch.equal(other[0], whole[0][0])


def load(name, folder, **options):
    from _data import load_data

    defaults = {"download": False, "rgb": False, "image_size": 32, "workers": 0}
    return load_data(name, folder, device=torch.device("cpu"), **{**defaults, **options})


@pytest.mark.parametrize("packed", [True, False])
def test_reads_fashion_mnist_files(packed, tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(256, size=(20, 28, 28), dtype=np.uint8)
    for prefix in ("train", "t10k"):
        for kind, header, values in (
            ("images-idx3", 16, images),
            ("labels-idx1", 8, np.arange(20, dtype=np.uint8) % 10),
        ):
            content = bytes(header) + values.tobytes()
            name = raw / f"{prefix}-{kind}-ubyte"
            if packed:
                name.with_name(name.name + ".gz").write_bytes(gzip.compress(content))
            else:
                name.write_bytes(content)
    data = load("fashion-mnist", tmp_path)
    assert (data.channels, data.size, data.num_classes) == (1, 28, 10)
    x, y = next(data.test.eval_batches(20))
    assert torch.equal(y, torch.arange(20) % 10)
    torch.testing.assert_close(x[:, 0], (torch.from_numpy(images).float() / 255 - 0.2860) / 0.3530)
    assert load("fashion-mnist", tmp_path, rgb=True).channels == 3


def test_reads_cifar10_jpeg_streams(tmp_path):
    from PIL import Image

    arrays = {}
    for half, count in (("train", 6), ("test", 3)):
        streams = []
        for index in range(count):
            stream = io.BytesIO()
            Image.new("RGB", (32, 32), (40 * index, 0, 255)).save(stream, "JPEG")
            streams.append(stream.getvalue())
        arrays[f"{half}_jpeg"] = np.frombuffer(b"".join(streams), np.uint8)
        arrays[f"{half}_offsets"] = np.cumsum([0, *map(len, streams)])
        arrays[f"{half}_labels"] = np.arange(count, dtype=np.uint8)
    np.savez(tmp_path / "cifar10_jpeg80.npz", **arrays)
    data = load("cifar10-jpeg", tmp_path)
    assert (len(data.train), len(data.test), data.channels, data.size) == (6, 3, 3, 32)
    x, y = next(data.test.eval_batches(3))
    assert x.shape == (3, 3, 32, 32) and y.tolist() == [0, 1, 2]
    red = (x[:, 0] * 0.2470 + 0.4914) * 255
    torch.testing.assert_close(red.mean((1, 2)), torch.tensor([0.0, 40.0, 80.0]), atol=3, rtol=0)


def test_random_crop_and_flip_moves_and_mirrors():
    from _data import random_crop_and_flip

    images = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).expand(64, 3, 8, 8)
    cropped = random_crop_and_flip(images, padding=2, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images[:1], (2,) * 4)
    windows = [padded[0, :, y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
    windows += [window.flip(2) for window in windows]
    matches = [[i for i, window in enumerate(windows) if torch.equal(image, window)] for image in cropped]
    assert all(len(match) == 1 for match in matches)
    assert len({match[0] for match in matches}) > 20


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    whole, broken = tmp_path / "whole.pt", tmp_path / "broken.pt"
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *TINY, "--checkpoint", broken, "--checkpoint-every", "3"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    train(*TINY, "--checkpoint", whole)

    deadline = time.monotonic() + 60
    while not broken.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    killed_at = read_checkpoint(broken)["step"]
    assert 0 < killed_at < 44

    subprocess.run([sys.executable, SCRIPT, *TINY, "--checkpoint", broken, "--resume"], check=True, capture_output=True)
    assert_same(read_checkpoint(whole), read_checkpoint(broken))


@pytest.mark.parametrize("options", [("--param-groups",), ("--one-line", "--compile")], ids=["prepared", "one line"])
def test_resumed_in_the_middle_of_an_epoch_equals_uninterrupted(options, tmp_path):
    """The same in one process, at a step that is certainly inside an epoch, with AdamW."""
    from train_image_classifier import Trainer, parse_args

    argv = [*TINY, "--optimizer", "adamw", *options, "--checkpoint", str(tmp_path / "checkpoint.pt")]
    whole = Trainer(parse_args(argv))
    whole.run()

    class StopError(Exception):
        pass

    interrupted = Trainer(parse_args(argv))
    update = interrupted._update

    def update_until(loss):
        update(loss)
        if interrupted.step == 17:
            raise StopError

    interrupted._update = update_until
    with pytest.raises(StopError):
        interrupted.run()
    resumed = Trainer(parse_args(argv))
    resumed.load_state_dict(interrupted.state_dict())
    resumed.run()
    a, b = whole.state_dict(), resumed.state_dict()
    del a["seconds"], b["seconds"]
    assert_same(a, b)


def test_killed_while_saving_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    script = f"""
import os, pathlib, signal, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import torch, _checkpoint
path = pathlib.Path({str(path)!r})
_checkpoint.save_checkpoint({{"recipe": "old", "w": torch.zeros(1000)}}, path)
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
_checkpoint.save_checkpoint({{"recipe": "new", "w": torch.ones(1000)}}, path)
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == -signal.SIGKILL

    from _checkpoint import load_checkpoint, save_checkpoint

    assert path.with_name("checkpoint.pt.tmp").exists()
    assert load_checkpoint(path)["recipe"] == "old"
    save_checkpoint({"recipe": "newer"}, path)
    assert load_checkpoint(path)["recipe"] == "newer"
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--data", "fashion-mnist"), "fashion-mnist.*--data-dir.*AUTOSPARSE_DATA.*--download"),
        (("--data", "cifar10"), "cifar10.*--data-dir"),
        (("--data", "cifar10-jpeg"), "cifar10_jpeg80.npz.*--data-dir"),
        (("--data", "imagefolder"), "no folder.*train.*one subfolder"),
        (("--arch", "resnet-fifty"), "unknown --arch 'resnet-fifty'.*resnet20"),
        (("--arch", "googlenet"), "auxiliary"),
        (("--batch-size", "5000"), "--batch-size 5000 is more than the 1437"),
        (("--target-sparsity", "0.995"), "target_sparsity.*0.995"),
        (("--decay", "exponential"), "decay.*exponential"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet:FutureWarning")  # torchvision's own
def test_bad_input_is_a_clear_error(argv, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train("--no-compile", "--data-dir", tmp_path, *argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--amp", "fp16"), "needs --device cuda"),
        (("--resume",), "needs --checkpoint"),
        (("--checkpoint-every", "5"), "needs --checkpoint"),
        (("--threshold-lr", "0.1"), "need --param-groups"),
        (("--one-line", "--no-compile"), "--one-line needs the compiler"),
        (("--dense", "--target-sparsity", "0.9"), "no meaning with --dense"),
        (("--data", "mnist"), "invalid choice"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_options_are_a_usage_error(argv, message, capsys):
    from train_image_classifier import parse_args

    with pytest.raises(SystemExit):
        parse_args(argv)
    assert message in capsys.readouterr().err


def test_resume_refuses_another_recipe_and_a_damaged_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    argv = ("--data", "digits", "--no-compile", "--dense", "--max-steps", "2", "--checkpoint", path, "--resume")
    train(*argv)
    with pytest.raises(ValueError, match=r"another recipe \(lr: 0.1 then, 0.3 now\)"):
        train(*argv, "--lr", "0.3")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot read the checkpoint"):
        train(*argv)
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a checkpoint of this script"):
        train(*argv)


def test_preset_gives_way_to_options():
    from train_image_classifier import parse_args

    args = parse_args(["--preset", "imagenet"])
    assert (args.arch, args.lr, args.momentum, args.weight_decay) == ("resnet50", 0.256, 0.875, 2**-15)
    assert args.target_sparsity is None and args.threshold_init == -5 and args.param_groups
    assert parse_args(["--preset", "imagenet", "--lr", "0.1", "--target-sparsity", "0.8"]).target_sparsity == 0.8
    dense = parse_args(["--preset", "imagenet", "--dense"])
    assert dense.epochs == 100 and not dense.param_groups and not hasattr(dense, "alpha")
