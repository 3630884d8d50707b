"""Private parts of Inductor: its lowerings, options and caches, and compiling with it."""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule


def register_lowerings_if_inductor_is_loaded() -> None:
    """Register the Inductor lowerings, once and only where Inductor has been imported already. 2.11-2.15."""
    if "torch._inductor.lowering" in sys.modules:
        import autosparse_fx.lowering  # noqa: F401  (registers on import)


def inductor_lowerings() -> dict[Any, Callable[..., Any]]:
    """Inductor's table of lowerings, from which ours are composed. 2.11-2.15."""
    from torch._inductor.lowering import lowerings

    return lowerings


def register_inductor_lowering(op: Any, lowering: Callable[..., Any]) -> None:
    """Enter ``op`` in Inductor's table of lowerings. No type promotion: the ops fix their own dtypes. 2.11-2.15."""
    from torch._inductor.lowering import register_lowering

    register_lowering(op, type_promotion_kind=None)(lowering)


def tag_compile_caches(tag: str) -> None:
    """Make ``tag`` a part of the keys of AOTAutograd's and Inductor's caches, where no lowering is one: code of an
    earlier version of ours would be taken from them. 2.11-2.15; a public setting, made for this.
    """
    if tag not in torch.compiler.config.cache_key_tag:
        torch.compiler.config.cache_key_tag += tag


def inductor_mode_options(mode: str) -> dict[str, Any]:
    """The config patches that stand for a mode of ``torch.compile``. 2.11-2.15."""
    import torch._inductor

    return dict(torch._inductor.list_mode_options(mode))


def inductor_option_names() -> set[str]:
    """The names that Inductor takes as options. 2.11-2.15."""
    import torch._inductor

    return set(torch._inductor.list_options())


def inductor_cache_dir() -> Path:
    """Where Inductor keeps what it compiled, and what it measured. 2.11-2.15."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def compile_with_inductor(
    gm: GraphModule, example_inputs: Sequence[Any], patches: dict[str, Any], *, recompute_masks: bool = True
) -> Callable[..., Any]:
    """Hand a Dynamo graph to Inductor, with our joint passes after the user's own. 2.11-2.15."""
    from torch._inductor.compile_fx import compile_fx

    from autosparse_fx.joint import JointPasses

    key = "joint_custom_post_pass"
    user_pass = patches.get(key, getattr(torch._inductor.config, key))
    patches = {**patches, key: JointPasses(user_pass, recompute_masks=recompute_masks)}
    with warnings.catch_warnings():
        # What Inductor's own freezing does to a graph with a dynamic batch size. 2.15.
        warnings.filterwarnings("ignore", "Raw SymInt value", UserWarning)
        compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches)
    return compiled  # type: ignore[no-any-return]


@contextmanager
def forgetting_what_is_compiled() -> Iterator[None]:
    """Within it Inductor keeps nothing that it compiles: the modules of its code, to which frozen weights are tied, are
    gone with what was returned. 2.11-2.15; otherwise they stay as long as the process.
    """
    from torch._inductor.codecache import PyCodeCache

    before = set(map(id, PyCodeCache.modules))
    try:
        yield
    finally:
        for module in [module for module in PyCodeCache.modules if id(module) not in before]:
            with suppress(ValueError):  # another thread, which compiles as well, has removed it
                PyCodeCache.modules.remove(module)
            sys.modules.pop(module.__name__, None)


def compile_cpp(source: str) -> Any:
    """Compile C++ for this machine's vector instructions, and load it; Inductor's cache keeps it. 2.11-2.15."""
    from torch._inductor.codecache import CppCodeCache

    return CppCodeCache.load(source)
