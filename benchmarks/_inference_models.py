"""The networks of the inference benchmark: built, made sparse, and handed over as files."""

import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from _inference_masks import prune_

CLASSIFIERS = ("fc", "classifier", "heads")
CALIBRATION_BATCHES, CALIBRATION_BATCH_SIZE = 2, 8


class EncoderLayer(nn.Module):
    """A post-norm transformer layer as in BERT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.heads = heads

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._by_head(layer(x)) for layer in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.output(attended))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


def bert_base() -> nn.Module:
    """The encoder of BERT-base: 12 layers, 768 wide, 12 heads; it takes embeddings."""
    return nn.Sequential(*(EncoderLayer(768, 12) for _ in range(12)))


def vit_b_16() -> nn.Module:
    """Torchvision starts the head at zero, and every output with it, which no check of the outputs would survive."""
    model = torchvision.models.vit_b_16(weights=None)
    nn.init.trunc_normal_(model.heads.head.weight, std=0.02)
    return model


def mobilenet_v1() -> nn.Module:
    sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
    from _models import MobileNetV1

    return MobileNetV1(3, 224, 1000)


BUILDERS = {
    "resnet50": torchvision.models.resnet50,
    "mobilenet_v2": torchvision.models.mobilenet_v2,
    "mobilenet_v1": mobilenet_v1,
    "vit_b_16": vit_b_16,
    "bert_base": bert_base,
    "decoder_step": bert_base,  # of one token, whose cost is that of reading the weights: attention to others left out
}
INPUT_SHAPES = dict.fromkeys(BUILDERS, (3, 224, 224)) | {"bert_base": (128, 768), "decoder_step": (1, 768)}


def example_input(name: str, batch: int) -> Tensor:
    return torch.randn(batch, *INPUT_SHAPES[name])


def maskable(model: nn.Module) -> dict[str, Tensor]:
    """The weights that uniform and ERK masks cover: not the first and depthwise convolutions, nor the classifier."""
    found: dict[str, Tensor] = {}
    first_conv = True
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            if not first_conv and module.groups == 1:
                found[f"{name}.weight"] = module.weight
            first_conv = False
        elif isinstance(module, nn.Linear) and name.partition(".")[0] not in CLASSIFIERS:
            found[f"{name}.weight"] = module.weight
        elif isinstance(module, nn.MultiheadAttention):
            found[f"{name}.in_proj_weight"] = module.in_proj_weight
    return found


@torch.no_grad()
def calibrate_(model: nn.Module, name: str) -> None:
    """Give batch norms the statistics of random inputs, as a trained network has those of its data."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average over all batches
    model.train()
    for _ in range(CALIBRATION_BATCHES):
        model(example_input(name, CALIBRATION_BATCH_SIZE))


def build_sparse(name: str, sparsities: Mapping[str, float]) -> nn.Module:
    """Build a network with random weights, of which these shares are zero.

    The statistics are those before the zeros. Taken after them, they scale channels up of which little is left, layer
    after layer: rounding errors become 20 times larger than in a trained network, and checks of the outputs blunt.
    """
    model = BUILDERS[name]()
    calibrate_(model, name)
    for parameter, sparsity in sparsities.items():
        prune_(model.get_parameter(parameter), sparsity)
    return model.eval()


def load(name: str, path: Path) -> nn.Module:
    with torch.device("meta"):
        model = BUILDERS[name]()
    model.load_state_dict(torch.load(path, weights_only=True), assign=True)
    return model.eval()


def export_onnx(model: nn.Module, x: Tensor, path: Path) -> None:
    """Write the file that the other runtimes read, with the batch size of ``x``."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its fused attention has no ONNX counterpart
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The TorchScript exporter writes plain initializers and needs `onnx` only.
            torch.onnx.export(
                model, (x,), str(path), dynamo=False, opset_version=17, input_names=["x"], output_names=["y"]
            )
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
