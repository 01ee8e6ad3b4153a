"""Globals, defaults and what belongs to classes: kept before a forward runs on a copy, and put back after it."""

import collections
import copy
from typing import Any, NamedTuple

import torch

from .conditions import ABSENT, NAMED, PLAIN, frozen, same
from .reasons import Unexplained


class Kept(NamedTuple):
    """A value that is not the copy's own, before the run."""

    owner: Any
    name: str
    value: Any
    exact: Any
    contents: list[tuple[Any, Any]]  # the containers in it at any depth, and copies of them

    def changed(self, outside: dict[int, Any]) -> bool:
        now = getattr(self.owner, self.name, ABSENT)
        return not same(exactly(now, outside), self.exact) or (type(now) not in PLAIN and now is not self.value)

    def restore(self) -> None:
        if self.value is ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.value)
        for container, before in self.contents:
            if isinstance(container, (list, collections.deque)):
                container.clear()
                container.extend(before)
            elif isinstance(container, (dict, set)):
                container.clear()
                container.update(before)
            elif isinstance(container, torch.Tensor):
                with torch.no_grad():
                    container.copy_(before)
            else:  # an array
                container[...] = before


def contents(reached: dict[int, Any]) -> list[tuple[Any, Any]]:
    found = [*reached.values()]
    found += [vars(v) for v in reached.values() if hasattr(v, "__dict__") and not isinstance(v, (*NAMED, torch.Tensor))]
    copies = [(v, v.detach().clone()) for v in found if isinstance(v, torch.Tensor)]
    mutable = (list, dict, set, collections.deque)
    return copies + [(v, copy.copy(v)) for v in found if isinstance(v, mutable) or hasattr(v, "__array_interface__")]


def exactly(value: Any, outside: dict[int, Any]) -> Any:
    try:
        return frozen(value, outside)
    except Unexplained:
        return value
