"""Whether somebody listens to a module: then it is called, and never computed together with others."""

from torch import nn
from torch.nn.modules import module as nn_module

KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
OF_ALL_MODULES = [  # private, dictionaries that torch fills in place
    getattr(nn_module, f"_global_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre")
]


def is_listened_to(module: nn.Module) -> bool:
    """By hooks of its own, or a forward set on it. Hooks of all modules are asked for once for many: OF_ALL_MODULES."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
        or "forward" in own
    )  # fmt: skip
