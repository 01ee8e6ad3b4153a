"""Threads that store one sum together must hold the same bits of it (docs/inside/gpu.md)."""

import json
from pathlib import Path

import pytest
from triton_child import child

from drsn_kernels.backends import gpu

pytestmark = pytest.mark.skipif(gpu.missing() is not None, reason="no Triton, or too old")
SCRIPT = Path(__file__).resolve().parent / "replicated_stores.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory, triton_cache) -> dict:
    done = child(str(SCRIPT), cwd=tmp_path_factory.mktemp("replicated"), cache=triton_cache)
    assert done.returncode == 0, done.stderr[-8000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_reduction_of_ten_lines_shows_the_race_and_its_mending(found):
    """Eight lanes store each sum, none of them chosen; their values differ only where Triton may contract."""
    fused, apart = found["fused"], found["apart"]
    assert fused["lanes"] == apart["lanes"] == 8
    assert fused["stores"] > 0 and apart["stores"] > 0
    assert fused["contracted"] > 0 and apart["contracted"] == 0


@pytest.mark.slow
def test_no_kernel_contracts_across_lanes(found):
    launches = found["launches"]
    assert {launch["kernel"] for launch in launches if launch["shuffles"]} >= {
        "reduce_kernel", "hidden_kernel", "hidden_grad_kernel", "linear_grad_kernel", "forward_kernel",
        "backward_kernel", "grad_kernel",
    }  # fmt: skip
    assert [launch for launch in launches if launch["contracted"] or launch["fusion"]] == []
