"""Sizes of checkpoints at 0, 80, 90 and 95 % zeros, whole and by save_sparse, as the table of docs/files.md.

    pip install -e ".[files]" && python benchmarks/file_sizes.py

Nothing is trained: the weights are as they are initialised, the smallest of each layer set to zero (which layer has how
many does not change the size). MB are 10^6 bytes.
"""

import tempfile
from pathlib import Path

import torch
import torchvision
from torch import nn

import autosparse_fx

MODELS = ("resnet50", "vit_b_16", "mobilenet_v2")
DTYPES = (torch.float32, torch.bfloat16)


def masked(model: nn.Module, zeros: float) -> nn.Module:
    """Set the smallest values of every weight that layers multiply by to zero."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if zeros and weight.dim() > 1 and name.endswith("weight"):
                cut = weight.abs().flatten().kthvalue(round(zeros * weight.numel())).values
                weight.masked_fill_(weight.abs() <= cut, 0.0)
    return model


def sizes(name: str, dtype: torch.dtype, zeros: float, folder: Path) -> tuple[int, int]:
    torch.manual_seed(0)
    model = masked(torchvision.models.get_model(name), zeros).to(dtype)
    torch.save(model.state_dict(), folder / "whole.pt")
    autosparse_fx.save_sparse(model, folder / "sparse.safetensors")
    loaded = autosparse_fx.load_sparse(folder / "sparse.safetensors")
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())
    return (folder / "whole.pt").stat().st_size, (folder / "sparse.safetensors").stat().st_size


def main() -> None:
    print("| network | dtype | zeros | `torch.save`, MB | `save_sparse`, MB | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            for dtype in DTYPES:
                for zeros in (0.0, 0.8, 0.9, 0.95):
                    whole, sparse = sizes(name, dtype, zeros, Path(folder))
                    shown = str(dtype).removeprefix("torch.")
                    print(f"| {name} | {shown} | {zeros:.0%} | {whole / 1e6:.1f} | {sparse / 1e6:.1f} |", end="")
                    print(f" {sparse / whole:.3f} |", flush=True)


if __name__ == "__main__":
    main()
