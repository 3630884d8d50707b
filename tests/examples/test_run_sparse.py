"""The example that runs a trained network on dense and on sparse kernels."""

import sys

import pytest

import run_sparse
import train_image_classifier


@pytest.mark.slow
def test_both_kernels_classify_alike(tmp_path, monkeypatch, capsys):
    model = tmp_path / "sparse.pt"
    train_image_classifier.main(
        ["--data", "digits", "--max-steps", "60", "--target-sparsity", "0.9", "--save-model", str(model)]
    )
    monkeypatch.setattr(sys, "argv", ["run_sparse.py", "--data", "digits", "--model", str(model)])
    capsys.readouterr()
    run_sparse.main()
    printed = capsys.readouterr().out
    assert "weights run on sparse kernels" in printed and "sparse: estimated" in printed
    assert "\n0 images are classified differently; sparse is " in printed
