"""Command-line options of the training example."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _arguments import MAX_SEED, device, real, whole
from _data import DATA_SETS

PRESETS: dict[str, dict[str, Any]] = {
    # The ImageNet recipe of AutoSparse (arXiv:2304.06941) as far as public code shows it: thresholds start at
    # sigmoid(-5), learn at the rate of the weights, do not decay, and end where they end (no target).
    "imagenet": {
        "data": "imagefolder",
        "arch": "resnet50",
        "epochs": 100,
        "batch_size": 256,
        "optimizer": "sgd",
        "lr": 0.256,
        "momentum": 0.875,
        "weight_decay": 2.0**-15,
        "label_smoothing": 0.1,
        "warmup_epochs": 5.0,
        "param_groups": True,
        "threshold_weight_decay": 0.0,
        "target_sparsity": None,
        "alpha": 0.75,
        "decay": "sigmoid_cosine",
        "alpha_end": 0.9,
        "threshold_init": -5.0,
        "threshold_scale": 1.0,
    },
}

# What `AutoSparse` takes; without the option on the command line the library's own default holds.
SPARSE_OPTIONS = (
    "target_sparsity", "alpha", "decay", "alpha_end", "threshold_init", "threshold_scale", "granularity",
)  # fmt: skip
THRESHOLD_OPTIONS = ("threshold_lr", "threshold_weight_decay")

# Where and how a run is made, as against what is trained: free to change when it is resumed.
RUNTIME_OPTIONS = frozenset(
    ("data_dir", "download", "workers", "preset", "device", "threads", "compile", "checkpoint", "checkpoint_every",
     "resume", "json", "save_model")
)  # fmt: skip


def recipe(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that decide what is trained."""
    return {name: value for name, value in sorted(vars(args).items()) if name not in RUNTIME_OPTIONS}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train an image classifier, dense or sparse, and report accuracy and sparsity.",
        epilog="Example: python train_image_classifier.py --data fashion-mnist --epochs 6 --target-sparsity 0.9",
    )
    group = parser.add_argument_group("data and network")
    group.add_argument("--data", choices=DATA_SETS, default="digits", help="data set (default: %(default)s)")
    group.add_argument(
        "--data-dir", type=Path, default=Path(os.environ.get("AUTOSPARSE_DATA", "data")),
        help="folder that holds it (default: environment variable AUTOSPARSE_DATA, or 'data')",
    )  # fmt: skip
    group.add_argument("--download", action="store_true", help="let torchvision download it into --data-dir")
    group.add_argument("--image-size", type=whole(), default=224, help="imagefolder: pixels (default: 224)")
    group.add_argument("--workers", type=whole(0), default=4, help="imagefolder: reader processes (default: 4)")
    group.add_argument(
        "--arch", default="convnet",
        help="convnet, convnet_wide, resnet20, mobilenet_v1 or a torchvision classifier (default: %(default)s)",
    )  # fmt: skip

    group = parser.add_argument_group("recipe")
    group.add_argument("--preset", choices=sorted(PRESETS), help="start from a known recipe; other options override it")
    group.add_argument("--epochs", type=whole(), default=6, help="(default: %(default)s)")
    group.add_argument("--max-steps", type=whole(), help="train for this many steps instead of whole epochs")
    group.add_argument("--batch-size", type=whole(), default=128, help="(default: %(default)s)")
    group.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd", help="(default: %(default)s)")
    group.add_argument(
        "--lr", type=real(0.1, above=0), help="peak learning rate (default: 0.1 for sgd, 2e-3 for adamw)"
    )
    group.add_argument(
        "--momentum", type=real(0.9, least=0, below=1), default=0.9, help="of sgd (default: %(default)s)"
    )
    group.add_argument("--weight-decay", type=real(5e-4, least=0), help="(default: 5e-4 for sgd, 1e-2 for adamw)")
    group.add_argument(
        "--warmup-epochs", type=real(5, least=0), default=0.0, help="linear warm-up, then cosine (default: 0)"
    )
    group.add_argument("--label-smoothing", type=real(0.1, least=0, most=1), default=0.0, help="(default: 0)")
    group.add_argument(
        "--seed", type=whole(0, MAX_SEED), default=0, help="of weights, order and augmentation (default: 0)"
    )

    group = parser.add_argument_group("sparsity (defaults are the library's; see autosparse_fx.AutoSparse)")
    group.add_argument("--dense", action="store_true", help="train the plain dense network, for comparison")
    group.add_argument(
        "--one-line", action="store_true", help="leave the model as it is: torch.compile(..., options=...) does it all"
    )
    group.add_argument(
        "--target-sparsity", type=real(0.9, above=0, below=1, word="none"), default=argparse.SUPPRESS,
        metavar="FRACTION|none", help="fraction of zeros to reach, or 'none' to let the thresholds decide",
    )  # fmt: skip
    group.add_argument(
        "--alpha", type=real(0.75, least=0, most=1), default=argparse.SUPPRESS, help="gradient scale of masked weights"
    )
    group.add_argument("--decay", default=argparse.SUPPRESS, help="shape of alpha over time")
    group.add_argument(
        "--alpha-end",
        type=real(0.9, above=0, most=1),
        default=argparse.SUPPRESS,
        help="fraction of training after which alpha is 0",
    )
    group.add_argument(
        "--threshold-init", type=real(-5, word="auto", stands_for="auto"), default=argparse.SUPPRESS,
        metavar="LOGIT|auto", help="where thresholds start",
    )  # fmt: skip
    group.add_argument(
        "--threshold-scale", type=real(0.1, above=0), default=argparse.SUPPRESS, help="pace of threshold learning"
    )
    group.add_argument("--granularity", choices=("layer", "channel"), default=argparse.SUPPRESS, help="of thresholds")
    group.add_argument(
        "--param-groups", action="store_true", help="give thresholds their own optimizer group, for the next two"
    )
    group.add_argument(
        "--threshold-lr", type=real(0.01, least=0), default=argparse.SUPPRESS, help="learning rate of thresholds"
    )
    group.add_argument(
        "--threshold-weight-decay", type=real(1e-4, least=0), default=argparse.SUPPRESS, help="decay of thresholds"
    )

    group = parser.add_argument_group("run")
    group.add_argument("--device", type=device, default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    group.add_argument("--threads", type=whole(), help="CPU threads of PyTorch (default: PyTorch's)")
    group.add_argument("--amp", choices=("bf16", "fp16"), help="mixed precision; fp16 scales the loss and needs a GPU")
    group.add_argument("--channels-last", action="store_true", help="NHWC memory layout")
    group.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True,
        help="torch.compile: backend 'autosparse', or 'inductor' with --dense (default: on)",
    )  # fmt: skip
    group.add_argument("--checkpoint", type=Path, help="file to keep the state of the run in; written every epoch")
    group.add_argument("--checkpoint-every", type=whole(), metavar="STEPS", help="write it more often")
    group.add_argument("--resume", action="store_true", help="continue from --checkpoint if that file exists")
    group.add_argument("--json", type=Path, help="write the results here")
    group.add_argument("--save-model", type=Path, help="write the finalized model's state_dict here")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; options that are given win over those of `--preset`."""
    parser = build_parser()
    preset = parser.parse_args(argv).preset
    if preset is not None:
        parser.set_defaults(**PRESETS[preset])
    args = parser.parse_args(argv)

    if args.lr is None:
        args.lr = {"sgd": 0.1, "adamw": 2e-3}[args.optimizer]
    if args.weight_decay is None:
        args.weight_decay = {"sgd": 5e-4, "adamw": 1e-2}[args.optimizer]
    if args.dense:
        _drop_preset_sparsity(parser, args, argv)
    if not args.param_groups and any(hasattr(args, name) for name in THRESHOLD_OPTIONS):
        parser.error("--threshold-lr and --threshold-weight-decay need --param-groups")
    if args.one_line and (args.dense or args.param_groups or not args.compile):
        parser.error("--one-line needs the compiler, and leaves no place for --dense and --param-groups")
    if args.amp == "fp16" and not args.device.startswith("cuda"):
        parser.error("--amp fp16 needs --device cuda; on the CPU use --amp bf16")
    if args.resume and args.checkpoint is None:
        parser.error("--resume needs --checkpoint, the file to continue from")
    if args.checkpoint_every and args.checkpoint is None:
        parser.error("--checkpoint-every needs --checkpoint, the file to write")
    return args


def _drop_preset_sparsity(
    parser: argparse.ArgumentParser, args: argparse.Namespace, argv: Sequence[str] | None
) -> None:
    """With --dense, forget what a preset says about sparsity, but refuse what the user says about it."""
    names = (*SPARSE_OPTIONS, *THRESHOLD_OPTIONS, "param_groups")
    given = build_parser().parse_args(argv)
    for name in names:
        if getattr(given, name, False) is not False:
            parser.error(f"--{name.replace('_', '-')} has no meaning with --dense")
        if hasattr(args, name):
            delattr(args, name)
    args.param_groups = False
