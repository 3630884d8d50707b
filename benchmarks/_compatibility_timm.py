"""Small models of timm, from their names; most with fewer blocks than they have under these."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.conv import _ConvNd

from _compatibility_case import Case, Family

CLASSES, BATCH = 10, 4
_VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
_SWIN = {"depths": (2, 2), "embed_dim": 32, "num_heads": (2, 4), "window_size": 4}


def _model(
    name: str, kind: str = "convolutions", side: int = 64, first_of: str | None = None, **arguments: Any
) -> Callable[[], Case]:
    """How to build the model ``name``, and images of this many pixels for it.

    It keeps only the first of the blocks in every ``nn.Sequential`` whose name ``first_of`` matches.

    In float64: over small batches, batch norm makes losses in float32 differ by more than what is looked for.
    """

    def make() -> nn.Module:
        made: nn.Module = timm.create_model(name, num_classes=CLASSES, **arguments).double()
        for path, module in list(made.named_modules()):
            if first_of is not None and re.fullmatch(first_of, path):
                del module[1:]
        return made

    def reload(model: nn.Module, folder: Path) -> nn.Module:
        torch.save(model.state_dict(), folder / "model.pt")
        other = make()
        other.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
        return other

    def build() -> Case:
        torch.manual_seed(0)
        model = make().train()
        settle(model)
        labels, images = torch.randint(CLASSES, (BATCH,)), torch.randn(BATCH, 3, side, side, dtype=torch.float64)
        return Case(kind, model, {"x": images}, lambda out: F.cross_entropy(out, labels), reload)

    return build


def _transformer(name: str, side: int = 64, kind: str = "transformer", **arguments: Any) -> Callable[[], Case]:
    return _model(name, kind, side, img_size=side, **arguments)


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Take out dropout and stochastic depth, and let every layer matter from the start: many begin at zero, or so small
    that what they compute is lost."""
    for module in model.modules():
        for chance in ("p", "drop_prob", "drop_rate"):
            if isinstance(getattr(module, chance, None), float):
                setattr(module, chance, 0.0)
        if isinstance(module, (_ConvNd, nn.Linear)):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))
    for name, parameter in model.named_parameters():
        if not name.endswith("bias") and float(parameter.abs().max()) < 1e-3:
            parameter.fill_(0.5)


MODELS: dict[str, Callable[[], Case]] = {
    "resnet18": _model("resnet18", layers=[1, 1, 1, 1]),
    "resnetv2_18": _model("resnetv2_18", layers=[1, 1, 1, 1]),
    "resnext26ts": _model("resnext26ts"),
    "resnest14d": _model("resnest14d"),
    "res2net50_14w_8s": _model("res2net50_14w_8s", layers=[1, 1, 1, 1]),
    "efficientnet_b0": _model("efficientnet_b0"),
    "mobilenetv3_small_050": _model("mobilenetv3_small_050", first_of=r"blocks\.\d"),
    "mobilenetv4_conv_small": _model("mobilenetv4_conv_small"),
    "regnety_002": _model("regnety_002"),
    "convnext_atto": _model("convnext_atto", depths=(1, 1, 1, 1)),
    "convnextv2_atto": _model("convnextv2_atto", depths=(1, 1, 1, 1)),
    "densenet121": _model("densenet121", block_config=(1, 2, 2, 1)),
    "dla46_c": _model("dla46_c"),
    "hrnet_w18_small": _model("hrnet_w18_small"),
    "inception_v3": _model("inception_v3", side=139),
    "nfnet_l0": _model("nfnet_l0", first_of=r"stages\.\d"),
    "rexnet_100": _model("rexnet_100"),
    "ghostnet_050": _model("ghostnet_050"),
    "repvgg_a0": _model("repvgg_a0", first_of=r"stages\.\d"),
    "tresnet_m": _model("tresnet_m", layers=[1, 1, 1, 1]),
    "starnet_s1": _model("starnet_s1", depths=(1, 1, 1, 1)),
    "mambaout_femto": _model("mambaout_femto", depths=(1, 1, 1, 1)),
    "vit_tiny": _transformer("vit_tiny_patch16_224", **_VIT),
    "deit_tiny_distilled": _transformer("deit_tiny_distilled_patch16_224", **_VIT),
    "beit_base": _transformer("beit_base_patch16_224", **_VIT),
    "eva02_tiny": _transformer("eva02_tiny_patch14_224", **_VIT),
    "swin_tiny": _transformer("swin_tiny_patch4_window7_224", **_SWIN),
    "swinv2_tiny": _transformer("swinv2_tiny_window8_256", **_SWIN),
    "maxvit_pico": _transformer("maxvit_rmlp_pico_rw_256", 64, first_of=r"stages\.\d\.blocks"),
    "coatnet_nano": _transformer("coatnet_nano_rw_224", 64, first_of=r"stages\.\d\.blocks"),
    "xcit_nano": _transformer("xcit_nano_12_p16_224", depth=2, embed_dim=32, num_heads=2),
    "cait_xxs24": _transformer("cait_xxs24_224", depth=2, embed_dim=32, num_heads=2),
    "crossvit_9": _transformer("crossvit_9_240", 240, depth=[[1, 1, 0]], embed_dim=(32, 64)),
    "volo_d1": _transformer("volo_d1_224"),
    "davit_tiny": _model("davit_tiny", "transformer", 224, depths=(1, 1), embed_dims=(32, 64), num_heads=(2, 4)),
    "hiera_tiny": _transformer("hiera_tiny_224", stages=(1, 1, 1, 1), embed_dim=32),
    "levit_128s": _transformer("levit_128s", 64, first_of=r"stages\.\d\.blocks"),
    "pvt_v2_b0": _model("pvt_v2_b0", "transformer", depths=(1, 1, 1, 1)),
    "twins_svt_small": _transformer("twins_svt_small", depths=(2, 1, 1, 1)),
    "mixer_s32": _transformer("mixer_s32_224", kind="perceptrons", first_of="blocks"),
    "resmlp_12": _transformer("resmlp_12_224", kind="perceptrons", first_of="blocks"),
    "gmlp_ti16": _transformer("gmlp_ti16_224", kind="perceptrons", first_of="blocks"),
    "sequencer2d_s": _transformer("sequencer2d_s", kind="LSTM", layers=(1, 1, 1, 1)),
    "poolformer_s12": _model("poolformer_s12", "mixed"),
    "edgenext_xx_small": _model("edgenext_xx_small", "mixed", depths=(2, 2, 2, 2)),
    "mobilevit_xxs": _model("mobilevit_xxs", "mixed"),
    "efficientformerv2_s0": _transformer("efficientformerv2_s0", 64, "mixed", depths=(1, 1, 2, 2)),
    "fastvit_t8": _model("fastvit_t8", "mixed", layers=(1, 1, 1, 1)),
    "lambda_resnet26t": _model("lambda_resnet26t", "mixed", 64),
}  # fmt: skip

REASONS = {
    "sequencer2d_s": "PyTorch's. The dense model fails likewise: behind the LSTM, which stays in eager mode, its "
    "graphs have dynamic sizes, on which Inductor cannot decide (like pytorch/pytorch#172204).",
}
FAMILY = Family("timm", "https://github.com/huggingface/pytorch-image-models", MODELS, REASONS)
