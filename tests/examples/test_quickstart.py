"""The quickstart: what it prints and draws, with fewer epochs."""

import re
import sys

import pytest
import torch


@pytest.mark.slow
def test_quickstart(tmp_path, monkeypatch, capsys):
    import quickstart

    threads = torch.get_num_threads()
    plot = tmp_path / "plot.png"
    monkeypatch.setattr(quickstart, "EPOCHS", 6)
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--output", str(plot)])
    try:
        quickstart.main()
    finally:
        torch.set_num_threads(threads)
    output = capsys.readouterr().out

    dense, sparse = re.search(r"accuracy +dense ([\d.]+)% +sparse ([\d.]+)%", output).groups()
    assert float(dense) > 90
    assert float(sparse) > 75
    assert re.search(r"all masked weights .* 0\.90\d\d", output)
    assert plot.read_bytes().startswith(b"\x89PNG")
