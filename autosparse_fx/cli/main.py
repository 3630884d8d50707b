"""autosparse-fx: draw, report and count a model from the command line."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autosparse_fx.cli.commands import flops, graph, report

_MODEL = """\
MODEL is one of
  resnet50                  a model of torchvision.models, by name, with fresh weights
  package.module:callable   a function or class to import and call without arguments (also from the current directory)
  run.pt                    a checkpoint of examples/train_image_classifier.py, of a torchvision model

--weights FILE puts saved weights into it: the state_dict of a dense, sparse or finalized model, or a checkpoint of
the example. Files of torch.save are read with weights_only=True, and .safetensors files, those of save_sparse among
them, hold nothing but tensors: no code in a file is ever run.

--input gives the arguments of one call, as shapes: 1x3x224x224, or 1x128:int64 for token ids (zeros). Torchvision
models need none.
"""
_EPILOGS = {
    "report": """\
examples:
  autosparse-fx report resnet50 --macs                        costs as the sparse-training literature counts them
  autosparse-fx report resnet50 --weights sparse.pt --json    zeros and costs of a trained model, for a program
  autosparse-fx report mymodels:make_gpt --input 1x128:int64  a model of your own
""",
    "flops": """\
examples:
  autosparse-fx flops resnet50 --sparsity 0.8                 what 80 % everywhere would save, forward and in training
  autosparse-fx flops resnet50 --sparsity budgets.json        sparsities by name: {"layer1.0.conv1.weight": 0.7, ...}
  autosparse-fx flops resnet50 --dynamic batch=0 height=2 width=3     as a formula in these dimensions of the input
""",
    "graph": """\
examples:
  autosparse-fx graph resnet50 -o resnet50.html               to look at, search and unfold in a browser
  autosparse-fx graph vit_b_16 --weights sparse.pt -o vit.png
  autosparse-fx graph resnet18 --weights training.pt --kind backward -o backward.html
                                                              with the Gradient Annealing nodes (weights saved before
                                                              finalize)
""",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all three commands."""
    parser = argparse.ArgumentParser(
        prog="autosparse-fx",
        description="Look at a model: its graph, what is sparse in it, and what that saves.",
        epilog=_MODEL + "\nSee also: autosparse-fx COMMAND --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    made = {}
    for name, function, what in (
        ("report", report, "zeros, parameters and costs, weight by weight"),
        ("flops", flops, "what the forward pass and a training step multiply, dense and sparse"),
        ("graph", graph, "draw the captured graph: .html, .svg, .png, .dot or .graphml"),
    ):
        made[name] = command = commands.add_parser(
            name,
            help=what,
            description=f"{what[0].upper()}{what[1:]}.",
            epilog=f"{_MODEL}\n{_EPILOGS[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=function)
        command.add_argument("model", metavar="MODEL", help="see below")
        command.add_argument("--weights", type=Path, metavar="FILE", help="saved weights to put into the model")
        command.add_argument(
            "--input", nargs="+", metavar="SHAPE", help="arguments of one call, such as 1x3x224x224 or 1x128:int64"
        )
        command.add_argument("--train", action="store_true", help="in training mode (default: eval mode)")
    for name in ("report", "flops"):
        made[name].add_argument("--macs", action="store_true", help="multiply-accumulates, with average pooling")
        made[name].add_argument("--json", action="store_true", help="print JSON")
    made["flops"].add_argument(
        "--sparsity", metavar="S", help="a fraction for all weights, or a JSON file of fractions by name"
    )
    made["flops"].add_argument(
        "--dynamic", nargs="+", metavar="NAME=DIM", help="dimensions of the first input that stay symbols"
    )
    made["graph"].add_argument("-o", "--output", required=True, metavar="PATH", help="file to write")
    made["graph"].add_argument(
        "--kind", choices=("forward", "joint", "backward"), default="forward", help="which graph (default: forward)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 1 after an error that the message names; argparse exits with 2 on wrong usage.
    """
    args = build_parser().parse_args(argv)
    run: Any = args.run
    try:
        run(args)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"autosparse-fx {args.command}: error: {error}", file=sys.stderr)
        return 1
    return 0
