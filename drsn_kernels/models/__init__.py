"""Deep residual shrinkage networks and the networks they are compared with, 1-D and 2-D from one definition.

Source: Zhao et al., "Deep Residual Shrinkage Networks for Fault Diagnosis", IEEE TII 2020, 16(7):4681-4690,
DOI 10.1109/TII.2019.2943898, and the authors' code. :func:`network` builds each of them by name;
docs/networks_and_training.md has the layouts, the parameter counts and the state_dict.
"""

from .networks import (
    DRSN,
    NAMES,
    cifar_network,
    convnet,
    network,
    network18,
    paper_network,
    parameter_groups,
    resnet,
    senet,
)
from .unit import ATTENTION, ORDERS, SHORTCUTS, ResidualShrinkageUnit

__all__ = [
    "ATTENTION",
    "DRSN",
    "NAMES",
    "ORDERS",
    "SHORTCUTS",
    "ResidualShrinkageUnit",
    "cifar_network",
    "convnet",
    "network",
    "network18",
    "paper_network",
    "parameter_groups",
    "resnet",
    "senet",
]
