"""Sparse training for PyTorch: learned thresholds and Gradient Annealing, as passes of torch.compile."""

from autosparse_fx.advise import advise
from autosparse_fx.annealing import GradientAnnealing
from autosparse_fx.config import AutoSparse
from autosparse_fx.dense import dense_weights
from autosparse_fx.hidden.state import load_state_dict, state_dict
from autosparse_fx.inference import repack
from autosparse_fx.optimizers import param_groups
from autosparse_fx.report import SparsityReport, report, sparsity, thresholds
from autosparse_fx.sparse_files import SparseFileError, load_sparse, save_sparse
from autosparse_fx.sparsify import finalize, sparsify
from autosparse_fx.view.visualize import visualize

__all__ = [
    "AutoSparse",
    "GradientAnnealing",
    "SparseFileError",
    "SparsityReport",
    "advise",
    "dense_weights",
    "finalize",
    "load_sparse",
    "load_state_dict",
    "param_groups",
    "repack",
    "report",
    "save_sparse",
    "sparsify",
    "sparsity",
    "state_dict",
    "thresholds",
    "visualize",
]
__version__ = "0.1.0"
