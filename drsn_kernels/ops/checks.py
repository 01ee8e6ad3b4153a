"""Arguments checked before anything runs: one sentence with what was given and what is accepted."""

import numbers
from collections.abc import Callable

import torch

from ..reference import SOFT, Rule

AVERAGES = ("channel", "sample", None)


def positive(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise TypeError(f"{name} must be a positive integer, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value}")


def flag(**values: bool) -> None:
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def floating(x: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a floating-point tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")


def features(x: torch.Tensor, rank: int) -> None:
    """x is a floating-point tensor (N, C, *spatial) of at least `rank` dimensions."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        floating(x)
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"x must be a dense tensor, got {'a nested tensor' if x.is_nested else x.layout}")
    if x.dim() < rank:
        shape = "(N, C, *spatial) with at least one spatial dimension" if rank == 3 else "(N, C, *spatial)"
        raise ValueError(f"x must have shape {shape}, got {tuple(x.shape)}")


def average(value: str | None) -> None:
    if value not in AVERAGES:
        raise ValueError(f"average must be 'channel', 'sample' or None, got {value!r}")


def gate(g: Callable) -> None:
    if not callable(g):
        raise TypeError(f"gate must be a callable (N, C) -> (N, C) or (N, 1), got {type(g).__name__}")


def residual(r: torch.Tensor, x: torch.Tensor) -> None:
    if not isinstance(r, torch.Tensor):
        raise TypeError(f"residual must be a tensor of x's shape or None, got {type(r).__name__}")
    if r.is_complex():
        raise TypeError(f"residual must be a real tensor, got {r.dtype}")
    if r.shape != x.shape:
        raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(r.shape)}")
    if r.device != x.device:
        raise ValueError(f"residual must be on x's device {x.device}, got {r.device}")


def inplace(x: torch.Tensor, r: torch.Tensor | None) -> None:
    """x may be overwritten: not a leaf that wants a gradient, not expanded, and its dtype holds the sum."""
    if x.requires_grad and x.is_leaf and torch.is_grad_enabled():
        raise ValueError("inplace=True cannot overwrite x, a leaf tensor that requires grad; pass inplace=False")
    if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(
            f"inplace=True cannot overwrite x, an expanded tensor with strides {x.stride()} whose elements share memory"
        )
    if r is not None and r is not x and r.dtype != x.dtype and torch.promote_types(r.dtype, x.dtype) != x.dtype:
        raise ValueError(f"inplace=True keeps x's dtype {x.dtype}, but adding a residual of {r.dtype} promotes it")


def rule(threshold: str, slope: float) -> Rule:
    """The rule of the arguments that soft_threshold, shrink and Shrinkage share."""
    if threshold == "soft" and type(slope) is float and slope == 0:
        return SOFT
    if threshold not in ("soft", "hard"):
        raise ValueError(f"threshold must be 'soft' or 'hard', got {threshold!r}")
    if not isinstance(slope, numbers.Real) or isinstance(slope, bool):
        raise TypeError(f"slope must be a number from 0 to less than 1, got {slope!r}")
    if not 0 <= slope < 1:
        raise ValueError(f"slope must be a number from 0 to less than 1, got {slope}")
    if threshold == "hard":
        return Rule(float(slope), 0.0)
    return Rule(float(slope), 1.0 - slope) if slope else SOFT


def gate_output(alpha: torch.Tensor, x: torch.Tensor) -> None:
    n, c = x.shape[0], x.shape[1]
    if not isinstance(alpha, torch.Tensor):
        raise TypeError(f"gate must return a tensor of shape ({n}, {c}) or ({n}, 1), got {type(alpha).__name__}")
    if not alpha.is_floating_point():
        raise TypeError(f"gate must return a floating-point tensor, got {alpha.dtype}")
    if alpha.dim() != 2 or alpha.shape[0] != n or (alpha.shape[1] != 1 and alpha.shape[1] != c):
        raise ValueError(f"gate must return a tensor of shape ({n}, {c}) or ({n}, 1), got {tuple(alpha.shape)}")
    if alpha.device != x.device:
        raise ValueError(f"gate must return a tensor on x's device {x.device}, got {alpha.device}")


def tau_tensor(tau: torch.Tensor, x: torch.Tensor) -> None:
    """0-dim; (N, 1) or (N, C), aligned left; or x's rank and broadcastable."""
    if not tau.is_floating_point():
        raise TypeError(f"tau must be a number or a floating-point tensor, got {tau.dtype}")
    given, shape = tau.shape, x.shape
    if len(given) == 0:
        return
    if tau.device != x.device:
        raise ValueError(f"tau must be on x's device {x.device}, got {tau.device}")
    if len(given) == 2 and len(shape) > 2:
        if given[0] == shape[0] and (given[1] == shape[1] or given[1] == 1):
            return
        n, c = shape[:2]
        raise ValueError(
            f"tau of two dimensions must be ({n}, 1) or ({n}, {c}) for x {tuple(shape)}, got {tuple(given)}"
        )
    if len(given) != len(shape) or any(t != 1 and t != s for t, s in zip(given, shape, strict=True)):
        raise ValueError(
            f"tau must be a number, (N, 1), (N, C), or of x's rank and broadcastable to x {tuple(shape)}, "
            f"got {tuple(given)}"
        )
