"""What the examples say of numbers and devices that cannot be: the option, the value and the cure, in one line."""

import sys

import pytest
import torch


def parse_classifier(argv):
    from train_image_classifier import parse_args

    return parse_args(argv)


def parse_distributed(argv):
    from train_distributed import parse_args

    return parse_args(argv)


def usage_error(capsys, parse, *argv):
    """The last line that a refused command line prints."""
    with pytest.raises(SystemExit) as stopped:
        parse(list(argv))
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    *usage, message = printed.splitlines()
    assert usage[0].startswith("usage: ")
    return message


BAD = {
    "--lr": ("nan", "inf", "0", "-0.1", "fast", "above 0"),
    "--momentum": ("nan", "-0.1", "1", "at least 0 and below 1"),
    "--weight-decay": ("nan", "inf", "-1e-4", "at least 0"),
    "--epochs": ("0", "-1", "2.5", "many", "at least 1"),
    "--batch-size": ("0", "-8", "1e3", "at least 1"),
    "--seed": ("-1", "1.5", str(2**63), "at least 0"),
    "--threads": ("0", "two", "at least 1"),
    "--checkpoint-every": ("0", "at least 1"),
    "--target-sparsity": ("nan", "0", "1", "90", "much", "above 0 and below 1"),
}
ONLY_CLASSIFIER = {
    "--max-steps": ("0", "at least 1"),
    "--image-size": ("0", "at least 1"),
    "--workers": ("-1", "at least 0"),
    "--warmup-epochs": ("nan", "-1", "at least 0"),
    "--label-smoothing": ("nan", "-0.1", "1.1", "at least 0 and at most 1"),
    "--alpha": ("nan", "-0.1", "2", "at least 0 and at most 1"),
    "--alpha-end": ("0", "1.5", "above 0 and at most 1"),
    "--threshold-init": ("nan", "inf", "low", "'auto'"),
    "--threshold-scale": ("nan", "0", "above 0"),
    "--threshold-lr": ("nan", "-1", "at least 0"),
    "--threshold-weight-decay": ("nan", "-1", "at least 0"),
}


@pytest.mark.parametrize(
    ("parse", "option"),
    [(parse_distributed, option) for option in BAD]
    + [(parse_classifier, option) for option in (*BAD, *ONLY_CLASSIFIER)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_number_that_cannot_be_names_option_value_and_cure(parse, option, capsys):
    *values, cure = {**BAD, **ONLY_CLASSIFIER}[option]
    for value in values:
        message = usage_error(capsys, parse, f"{option}={value}")
        assert f"argument {option}: " in message and value in message and cure in message, message


@pytest.mark.parametrize("parse", [parse_classifier, parse_distributed])
def test_numbers_at_the_bounds_are_taken(parse):
    args = parse(["--lr", "1e-9", "--momentum", "0", "--weight-decay", "0", "--seed", str(2**63 - 1), "--epochs", "1"])
    assert (args.lr, args.momentum, args.weight_decay, args.seed, args.epochs) == (1e-9, 0, 0, 2**63 - 1, 1)


def test_words_stand_for_what_is_no_number():
    args = parse_classifier(["--target-sparsity", "None", "--threshold-init", "auto", "--workers", "0"])
    assert (args.target_sparsity, args.threshold_init, args.workers) == (None, "auto", 0)


@pytest.mark.parametrize("name", ["gpu", "cpu:x", "", "cuda:99", "meta"])
def test_device_that_is_not_there_names_those_that_are(name, capsys):
    message = usage_error(capsys, parse_classifier, f"--device={name}")
    assert "argument --device: " in message and repr(name) in message and "choose one of cpu" in message


def test_cuda_without_a_gpu_is_a_usage_error(capsys, monkeypatch):
    if torch.cuda.is_available():
        assert parse_classifier(["--device", "cuda"]).device == "cuda"
        return
    assert "'cuda' cannot be used: choose one of cpu" in usage_error(capsys, parse_classifier, "--device", "cuda")


def test_device_that_is_there_is_taken():
    assert parse_classifier(["--device", "cpu"]).device == parse_classifier([]).device == "cpu"


def run_with(name):
    def parse(argv):
        module = __import__(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{name}.py", *argv])
            module.main()

    return parse


@pytest.mark.parametrize("name", ["train_lightning", "train_transformers"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_no_epochs_at_all_are_a_usage_error_of_the_integrations_examples(name, capsys):
    pytest.importorskip(name.removeprefix("train_"))
    assert "argument --epochs: 0 is not" in usage_error(capsys, run_with(name), "--epochs", "0")


def test_no_batches_at_all_are_a_usage_error_of_the_inference_example(capsys):
    message = usage_error(capsys, run_with("run_sparse"), "--model", "sparse.pt", "--batch-size", "0")
    assert "argument --batch-size: 0 is not a whole number, at least 1" in message
