"""The example that runs a trained network on dense and on sparse kernels."""

import sys
from pathlib import Path

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


@pytest.mark.parametrize("variable", [None, "elsewhere"])
def test_what_is_not_there_is_an_error_that_names_only_options_of_the_script(
    variable: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AUTOSPARSE_DATA", raising=False)
    if variable is not None:
        monkeypatch.setenv("AUTOSPARSE_DATA", variable)
    monkeypatch.setattr(sys, "argv", ["run_sparse.py", "--data", "fashion-mnist", "--model", "sparse.pt"])
    with pytest.raises(
        SystemExit, match=rf"^error: .* in '{variable or 'data'}'; point --data-dir .*AUTOSPARSE"
    ) as caught:
        run_sparse.main()
    assert "or let train_image_classifier.py fetch it there with --download" in str(caught.value)
    monkeypatch.setattr(sys, "argv", ["run_sparse.py", "--model", "sparse.pt"])
    with pytest.raises(SystemExit, match=r"^error: .*sparse\.pt"):
        run_sparse.main()
