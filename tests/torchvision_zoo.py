"""Every model that torchvision registers, in training mode, with small inputs and nothing random left in it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torchvision.models import VisionTransformer, get_model, get_model_builder
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.video import MViT

CLASSES = 5
CUT = 0.3  # fraction of each weight that is masked: the cut is this quantile of its magnitudes

# What cannot be built, and why. Those of torchvision.models.quantization come, unless asked for int8, as the float
# models that quantization begins with, and are trained like any other.
EXCLUDED: dict[str, str] = {}

# Built as thin as this, with the depth, the heads and the kernels that they have: of 0.6 billion weights, weights,
# masked weights and two sets of gradients would take 10 GB.
THIN: dict[str, Callable[[], nn.Module]] = {
    "regnet_y_128gf": lambda: RegNet(
        BlockParams.from_init_params(depth=27, w_0=152, w_a=53.61, w_m=2.52, group_width=88, se_ratio=0.25),
        num_classes=CLASSES,
    ),
    "vit_h_14": lambda: VisionTransformer(
        image_size=28, patch_size=14, num_layers=32, num_heads=16, hidden_dim=320, mlp_dim=1280, num_classes=CLASSES
    ),
}

# Called from a frame that Dynamo gives up, these are nn.Sequential through and through, of which it never compiles the
# forward by itself: no compiled graph holds their weights.
UNSEEN = {
    "keypointrcnn_resnet50_fpn": ("roi_heads.keypoint_head.",),
    "maskrcnn_resnet50_fpn": ("roi_heads.mask_",),
    "maskrcnn_resnet50_fpn_v2": ("roi_heads.mask_",),
}

# Suffixes of parameters that the model's own code multiplies by, which sparsify masks if it is given example inputs.
MULTIPLIED = {"mvit_v2_s": (".rel_pos_h", ".rel_pos_w", ".rel_pos_t")}

# Prefixes of weights that the output does not depend on: only the class token of the last block is read, whose query is
# not pooled and has no position.
UNREAD = {"mvit_v2_s": ("blocks.15.attn.pool_q.", "blocks.15.attn.rel_pos_")}

# By the module of torchvision that a model is built in.
_RCNN = {
    "min_size": 64,
    "max_size": 64,
    "rpn_pre_nms_top_n_train": 40,
    "rpn_post_nms_top_n_train": 4,
    "rpn_batch_size_per_image": 100_000,  # all anchors and all proposals: the sampler has nothing to draw
    "box_batch_size_per_image": 100_000,
    "box_positive_fraction": 0.5,
}
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "deeplabv3": {"aux_loss": True},
    "faster_rcnn": _RCNN,
    "fcn": {"aux_loss": True},
    "fcos": {"min_size": 64, "max_size": 64},
    "googlenet": {"init_weights": False},  # which warns of being slow
    "inception": {"init_weights": False},
    "keypoint_rcnn": {**_RCNN, "num_keypoints": 3},
    "mask_rcnn": _RCNN,
    "retinanet": {"min_size": 64, "max_size": 64},
}
_SHAPES: dict[str, tuple[int, ...]] = {
    "inception": (2, 3, 299, 299),  # the auxiliary classifier pools by 5 and convolves by 5
    "maxvit": (1, 3, 224, 224),  # windows of 7 at a stride of 32
    "mvit": (2, 3, 4, 64, 64),
    "raft": (1, 3, 128, 128),
    "s3d": (2, 3, 16, 64, 64),
    "video.resnet": (2, 3, 4, 32, 32),
    "video.swin_transformer": (1, 3, 4, 64, 64),
}


class Case(NamedTuple):
    model: nn.Module
    args: tuple[Any, ...]
    cuts: dict[str, float]  # for each weight that is to be masked, the magnitude up to which it is
    unread: tuple[str, ...] = ()  # prefixes of weights whose gradient is 0


def build(name: str) -> Case:
    """The model ``name`` and arguments for it, the same at every call."""
    torch.manual_seed(0)
    *_, group, kind = get_model_builder(name).__module__.split(".")
    shape = _SHAPES.get(f"{group}.{kind}", _SHAPES.get(kind, (4, 3, 64, 64)))
    arguments: dict[str, Any] = {"weights": None, **_ARGUMENTS.get(kind, {})}
    if group in ("segmentation", "detection"):
        arguments["weights_backbone"] = None
    if group != "optical_flow":
        arguments["num_classes"] = CLASSES
    if kind == "vision_transformer":
        side = 2 * int(name.rpartition("_")[2])
        arguments["image_size"] = side
        shape = (2, 3, side, side)
    with mock.patch("torchvision.models.video.mvit.MViT", _small_mvit):
        model = (THIN[name]() if name in THIN else get_model(name, **arguments)).train()
    if kind == "s3d":
        model.avgpool.kernel_size = 2  # instead of 7, for images of 224
    # RAFT makes its coordinates in float32; the others that stay there would be too large.
    small = sum(p.numel() for p in model.parameters()) < 150e6
    dtype = torch.float64 if small and group != "optical_flow" else torch.float32
    x = torch.randn(shape, dtype=dtype)
    args: tuple[Any, ...] = (x,)
    if group == "optical_flow":
        args = (x, x.roll(2, -1) + 0.1 * torch.randn_like(x), 2)
    elif group == "detection":
        args = (list(x[:2].sigmoid()), [_target(i, dtype) for i in range(2)])
    return deterministic(model.to(dtype), args, MULTIPLIED.get(name, ()))._replace(unread=UNREAD.get(name, ()))


def small_vision_transformer() -> Case:
    torch.manual_seed(0)
    model = VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=CLASSES
    )
    return deterministic(model.double(), (torch.randn(2, 3, 16, 16, dtype=torch.float64),))


def deterministic(model: nn.Module, args: tuple[Any, ...], multiplied: tuple[str, ...] = ()) -> Case:
    """Without dropout and stochastic depth, and with weights of which masking leaves the better part."""
    for module in model.modules():
        for chance in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, chance, None), float):
                setattr(module, chance, 0.0)
    held = dict(model.named_parameters())
    cuts = {}
    for name in [*layer_weights(model), *(name for name in held if name.endswith(multiplied))]:
        weight = nn.init.normal_(held[name], std=math.sqrt(2 / held[name][0].numel())).detach()
        cuts[name] = float(weight.abs().flatten()[:100_000].quantile(CUT))
    for name, parameter in held.items():
        if name.endswith("layer_scale"):  # of ConvNeXt: 1e-6, with which the blocks compute next to nothing
            nn.init.constant_(parameter, 0.5)
    return Case(model, args, cuts)


def layer_weights(model: nn.Module) -> list[str]:
    """The weights of convolutions, linear layers and attention, each once."""
    layers = [m for m in model.modules() if isinstance(m, (_ConvNd, nn.Linear, nn.MultiheadAttention))]
    weights = {id(m.in_proj_weight if isinstance(m, nn.MultiheadAttention) else m.weight) for m in layers}
    return [name for name, parameter in model.named_parameters() if id(parameter) in weights]


def _small_mvit(**arguments: Any) -> MViT:
    """For small clips: its builders insist on 16 images of 224."""
    return MViT(**{**arguments, "spatial_size": (64, 64), "temporal_size": 4})


def _target(i: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Boxes of all sizes, so that every level of every pyramid has one to find."""
    sides = torch.tensor([5, 9, 13, 23, 32, 42, 51, 61])
    inside = torch.arange(64) < sides[:, None]
    points = torch.tensor([0.2, 0.5, 0.8]) * sides[:, None]
    return {
        "boxes": torch.stack([torch.zeros(8), torch.zeros(8), sides, sides], 1).to(dtype) + i,
        "labels": 1 + torch.arange(8) % (CLASSES - 1),
        "masks": (inside[:, :, None] & inside[:, None]).to(torch.uint8),
        "keypoints": torch.stack([points, points, torch.ones(8, 3)], 2) + i,
    }
