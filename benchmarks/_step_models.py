"""The networks of the training-step benchmark, and the other systems that it compares with."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT2Small(nn.Module):
    """The shape of GPT-2 small: 12 blocks, 768 wide, 12 heads, 50,257 tokens, embedding and head tied."""

    def __init__(self, vocabulary: int = 50257, width: int = 768, blocks: int = 12, length: int = 1024) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 12) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(x))).flatten(0, 1)


BATCHES = {"resnet50": 8, "mobilenet_v3_large": 16, "vit_b_16": 4, "gpt2_small": 1}


def build(name: str, batch: int, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network, a batch of inputs and a batch of labels."""
    if name == "gpt2_small":
        tokens = torch.randint(50257, (batch, 256), device=device)
        return GPT2Small().to(device), tokens, tokens.roll(-1, 1).flatten()
    model = torchvision.models.get_model(name, weights=None)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    images = torch.randn(batch, 3, 224, 224, device=device)
    return model.to(device), images, torch.randint(1000, (batch,), device=device)


class STR(nn.Module):
    """The soft threshold of STR (arXiv:2002.03231) as one would write it with torch.nn.utils.parametrize."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.full((1,), -5.0))

    def forward(self, weight: Tensor) -> Tensor:
        return torch.sign(weight) * torch.relu(weight.abs() - torch.sigmoid(self.s))


def parametrized(model: nn.Module) -> nn.Module:
    """Put STR on every convolution and linear layer."""
    for module in list(model.modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not isinstance(
            module, nn.modules.linear.NonDynamicallyQuantizableLinear
        ):
            parametrize.register_parametrization(module, "weight", STR().to(module.weight.device))
        elif isinstance(module, nn.MultiheadAttention):
            parametrize.register_parametrization(module, "in_proj_weight", STR().to(module.in_proj_weight.device))
            parametrize.register_parametrization(module.out_proj, "weight", STR().to(module.out_proj.weight.device))
    return model


def pquant() -> Callable[[nn.Module], nn.Module] | None:
    """PQuantML's AutoSparse (pip install pquant-ml), where it is installed."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    try:
        import pquant
    except ImportError:
        return None

    def prepare(model: nn.Module) -> nn.Module:
        device = next(model.parameters()).device
        config: Any = pquant.autosparse_config()
        config.quantization_parameters.enable_quantization = False
        config.pruning_parameters.threshold_type = "layerwise"
        made: nn.Module = pquant.add_compression_layers(model, config)
        for module in made.modules():
            if hasattr(module, "_is_pretraining"):
                module._is_pretraining = module.is_pretraining = False
        return made.to(device)

    return prepare
