"""The graph passes, one module each. Shipped as ``autosparse_fx.passes``; the order in which they run stands here."""

from collections.abc import Callable

from torch.fx import GraphModule

from autosparse_fx.passes.dedupe_masks import dedupe_masks
from autosparse_fx.passes.insert_masks import insert_masks
from autosparse_fx.passes.tag_recompute import tag_recompute

# Each rewrites a graph in place, changes nothing when run again, and returns how many changes it made.
DYNAMO_PASSES: tuple[Callable[[GraphModule], int], ...] = (insert_masks, dedupe_masks)
# These run on the graph of forward and backward together, before it is cut in two.
JOINT_PASSES: tuple[Callable[[GraphModule], int], ...] = (tag_recompute,)

__all__ = ["DYNAMO_PASSES", "JOINT_PASSES", "dedupe_masks", "insert_masks", "tag_recompute"]
