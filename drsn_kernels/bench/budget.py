"""The budget of a call of ours (drsn_kernels.budgets): the bytes it should move and keep."""

from .. import budgets
from .cases import NETWORKS, Case
from .providers import Provider
from .workloads import TRAINING


def budget(case: Case, provider: Provider) -> dict[str, int]:
    """{"bytes", "saved"} of the case's mode; {} for what is not ours, is compiled or has more than our operators."""
    if provider.form != "ours" or provider.compiled or case.op == "unit" or case.op in NETWORKS:
        return {}
    options = {
        "backend": provider.backend,
        "channels_last": case.channels_last,
        "grad": case.mode != "forward" or case.op in TRAINING,
    }
    if case.op in ("abs_mean", "soft_threshold"):
        operator = getattr(budgets, case.op)
    else:
        operator = budgets.shrink
        options["training"] = case.op == "shrink_train"
        if case.op == "shrink_any_gate":
            options["fused"] = False
    forward, backward = operator(case.shape, case.torch_dtype, **options)
    moved = {"forward": forward.bytes, "backward": backward.bytes, "both": forward.bytes + backward.bytes}
    return {"bytes": moved[case.mode], "saved": forward.saved}
