"""How the state of masks follows a module to another device or dtype: in float32, and shared where it was shared."""

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from autosparse_fx._compat import eager


def is_meta(t: Tensor | None) -> bool:
    return t is not None and t.is_meta


# Where thresholds' state was moved to: tensors that were shared before `.to()`, which handles each module's buffers by
# themselves, are shared after it too.
_new_home = WeakTensorKeyDictionary()


def moved(t: Tensor, out: Tensor) -> Tensor:
    if t.dim() == 0 and not t.is_meta:  # alpha: not in the state_dict, so to_empty must not lose it
        out = t.to(device=out.device)
    elif out.dtype.itemsize < 4:
        out = t.to(device=out.device, dtype=torch.float32)
    if out is t or isinstance(t, nn.Parameter):
        return out
    home = _new_home.get(t)
    there: Tensor | None = home() if home is not None else None
    if there is not None and there.device == out.device and there.dtype == out.dtype:
        return there
    _new_home[t] = eager.weak_tensor_ref(out)
    return out
