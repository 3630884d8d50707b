"""Draws the pictures of docs/images: ResNet-50, ViT-B/16 and a small GPT, with cuts that differ from layer to layer.

    pip install -e ".[plot]" && python docs/graphs.py [name ...]

The weights are as they are initialised: what a picture shows is the graph. `--html DIRECTORY` writes the pages as well.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn

import autosparse_fx

IMAGES = Path(__file__).parent / "images"


class Block(nn.Module):
    """A layer of a GPT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """A small GPT whose head is tied to its embedding."""

    def __init__(self, vocabulary: int = 8192, length: int = 256, width: int = 384, depth: int = 8) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads=6) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        return self.head(self.norm(self.blocks(x)))


MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "resnet50": (torchvision.models.resnet50, torch.zeros(1, 3, 224, 224)),
    "vit_b_16": (torchvision.models.vit_b_16, torch.zeros(1, 3, 224, 224)),
    "gpt": (GPT, torch.zeros(1, 128, dtype=torch.long)),
}


@torch.no_grad()
def spread(model: nn.Module) -> None:
    """Give each layer a sparsity of its own, from little in the first to most behind the middle, as trainings do."""
    buffers, parameters = dict(model.named_buffers()), dict(model.named_parameters())
    names = [name for name in buffers if name.endswith("_offset")]
    noise = 0.12 * torch.randn(len(names), generator=torch.Generator().manual_seed(0))
    for i, name in enumerate(names):
        share = 0.25 + 0.7 * math.sin(math.pi * (i + 1) / (len(names) + 8)) + float(noise[i])
        magnitudes = parameters[name.removesuffix("_offset")].abs().flatten()
        cut = magnitudes.kthvalue(max(1, int(min(max(share, 0.05), 0.98) * len(magnitudes)))).values
        buffers[name].fill_(torch.logit(cut.clamp(1e-6, 1 - 1e-6)))


def draw(name: str, pages: Path | None) -> None:
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    model = autosparse_fx.sparsify(build())
    spread(model)
    path = IMAGES / f"{name}.png"
    start = time.process_time(), time.perf_counter()
    autosparse_fx.visualize(model, inputs, path)
    busy, passed = time.process_time() - start[0], time.perf_counter() - start[1]
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE).save(path)
        size = f"{picture.width} x {picture.height}, {path.stat().st_size / 1e3:.0f} kB"
    print(f"{path.name}: {size}, drawn in {passed:.1f} s, {busy:.1f} s of them computing")
    for kind in ("forward", "joint") if pages is not None else ():
        autosparse_fx.visualize(model, inputs, pages / f"{name}_{kind}.html", graph=kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(MODELS)} (default: all)")
    parser.add_argument("--html", type=Path, metavar="DIRECTORY", help="write the pages too")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in MODELS]
    if unknown:
        parser.error(f"no model {', '.join(unknown)}: choose from {', '.join(MODELS)}")
    IMAGES.mkdir(exist_ok=True)
    if arguments.html is not None:
        arguments.html.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or MODELS:
        draw(name, arguments.html)


if __name__ == "__main__":
    main()
