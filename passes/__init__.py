"""The graph passes, one module each. Shipped as ``autosparse_fx.passes``; the order in which they run stands here."""

from collections.abc import Callable

from torch.fx import GraphModule

from autosparse_fx.passes.dedupe_masks import dedupe_masks
from autosparse_fx.passes.flatten_batches import flatten_batches
from autosparse_fx.passes.fold_batch_norm import fold_batch_norm
from autosparse_fx.passes.fold_constants import fold_constants
from autosparse_fx.passes.fuse_sparse_programs import fuse_sparse_programs
from autosparse_fx.passes.insert_masks import insert_masks
from autosparse_fx.passes.keep_formats import keep_formats
from autosparse_fx.passes.lower_sparse_conv import lower_sparse_conv
from autosparse_fx.passes.lower_sparse_linear import lower_sparse_linear
from autosparse_fx.passes.open_encoder_layers import open_encoder_layers
from autosparse_fx.passes.remove_dead_channels import remove_dead_channels
from autosparse_fx.passes.reshape_views import reshape_views
from autosparse_fx.passes.tag_recompute import tag_recompute

# Each rewrites a graph in place, changes nothing when run again, and returns how many changes it made.
DYNAMO_PASSES: tuple[Callable[[GraphModule], int], ...] = (insert_masks, dedupe_masks)
# These run on the graph of forward and backward together, before it is cut in two.
JOINT_PASSES: tuple[Callable[[GraphModule], int], ...] = (tag_recompute,)
# These run on a graph of ATen operators whose weights are constants: inference, under no_grad.
INFERENCE_PASSES: tuple[Callable[[GraphModule], int], ...] = (
    keep_formats,
    open_encoder_layers,
    flatten_batches,
    fold_constants,
    fold_batch_norm,
    remove_dead_channels,
    lower_sparse_conv,
    lower_sparse_linear,
    fuse_sparse_programs,
    reshape_views,
)

__all__ = [
    "DYNAMO_PASSES",
    "INFERENCE_PASSES",
    "JOINT_PASSES",
    "dedupe_masks",
    "flatten_batches",
    "fold_batch_norm",
    "fold_constants",
    "fuse_sparse_programs",
    "insert_masks",
    "keep_formats",
    "lower_sparse_conv",
    "lower_sparse_linear",
    "open_encoder_layers",
    "remove_dead_channels",
    "reshape_views",
    "tag_recompute",
]
