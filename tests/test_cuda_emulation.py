"""The emulation that runs CUDA kernels on a CPU: what it computes, that a barrier left out is seen, that misuse throws.

The kernels are in emulation/kernels.cu, and no kernel of the package is here: this is the test of the test.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "emulation" / "kernels.cu"
SCHEDULES = range(8)
FLAGS = os.environ.get("DRSN_EMULATION_FLAGS", "-O1")  # set where this file is run under sanitizers

pytestmark = [pytest.mark.cuda_emu, pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")]


class Emulation:
    """emulation/kernels.cu, compiled."""

    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))
        self._library.run.restype = ctypes.c_char_p
        self.schedule(0)
        self.device()

    def schedule(self, order: int) -> None:
        self._library.set_schedule(order)

    def device(self, compute_capability: int = 90, multiprocessors: int = 4) -> None:
        self._library.set_device(compute_capability, multiprocessors)

    def run(self, kernel, x, out, *, grid=1, block=64, shared=1024, cluster=1, cooperative=False, n=None, without=0):
        """Launches kernel(x, out, n, without); an error of the emulation is a RuntimeError."""
        grid, block = (tuple(v) if isinstance(v, tuple) else (v, 1, 1) for v in (grid, block))
        shape = (ctypes.c_uint * 9)(*grid, *block, shared, cluster, cooperative)
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (x, out))
        error = self._library.run(kernel.encode(), shape, *pointers, x.numel() if n is None else n, without)
        if error is not None:
            raise RuntimeError(error.decode())
        return out


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    built = tmp_path_factory.mktemp("emulation") / "kernels.so"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-U_FORTIFY_SOURCE", "-fPIC", "-shared", *FLAGS.split()]
    subprocess.run(["g++", *flags, f"-I{SOURCE.parent}", "-x", "c++", str(SOURCE), "-o", str(built)], check=True)
    return built


@pytest.fixture
def emulation(library) -> Emulation:
    return Emulation(library)


X = torch.linspace(-3, 4, 1000)


def block_sums(emulation, without):
    out = emulation.run("block_sums", X, torch.empty(2, 256), block=256, without=without)
    return out, torch.stack([X.sum(), X.square().sum()])[:, None].expand(2, 256)


def warp_exchange(emulation, without):
    x, lanes = X[:96].contiguous(), torch.arange(96)
    out = emulation.run("warp_exchange", x, torch.empty(96), block=96, without=without)
    return out, x[lanes ^ 1] + x[lanes ^ 31]


def cluster_sums(emulation, without):
    out = emulation.run("cluster_sums", X, torch.empty(2, 8, 64), grid=8, cluster=4, without=without)
    return out, torch.stack([X.sum(), X.square().sum()])[:, None, None].expand(2, 8, 64)


def cluster_halves(emulation, without):
    out = emulation.run("cluster_halves", X, torch.empty(6, 64), grid=6, cluster=3, without=without)
    return out, X[[1, 2, 0, 4, 5, 3]][:, None].expand(6, 64)


def grid_centred(emulation, without):
    out = emulation.run("grid_centred", X, torch.full((1006,), torch.nan), grid=6, block=32, cooperative=True,
                        without=without)  # fmt: skip
    return out[:1000], X - X.mean()


def async_tiles(emulation, without):
    x = X[:960].contiguous()
    out = emulation.run("async_tiles", x, torch.empty(960), block=48, shared=2 * 4 * 4 * 48, without=without)
    return out, x.view(5, 192).flip(1).flatten()


# kernel, and the barriers that can be left out of it
BARRIERS = {block_sums: 2, warp_exchange: 2, cluster_sums: 3, cluster_halves: 2, grid_centred: 1, async_tiles: 3}


def right(emulation, job, without) -> bool:
    try:
        out, expected = job(emulation, without)
    except RuntimeError:
        return False
    return torch.allclose(out, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("order", SCHEDULES)
@pytest.mark.parametrize("job", BARRIERS, ids=lambda job: job.__name__)
def test_a_right_kernel_is_right_under_every_schedule(emulation, job, order):
    emulation.schedule(order)
    out, expected = job(emulation, 0)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "job, without", [pytest.param(j, w, id=f"{j.__name__}-{w}") for j, n in BARRIERS.items() for w in range(1, n + 1)]
)
def test_a_barrier_left_out_is_seen(emulation, job, without):
    """Whatever the schedule; but copies that land early hide one mistake, and those that land late another."""
    missed = []
    for order in SCHEDULES:
        emulation.schedule(order)
        if right(emulation, job, without):
            missed.append(order)
    assert missed == {(async_tiles, 1): [1], (async_tiles, 3): [0]}.get((job, without), [])


def test_a_block_that_ends_too_early_is_reported_under_every_schedule(emulation):
    for order in SCHEDULES:
        emulation.schedule(order)
        with pytest.raises(RuntimeError, match="a block ends while another|has ended"):
            cluster_sums(emulation, 3)


@pytest.mark.parametrize("order", SCHEDULES)
@pytest.mark.parametrize("block", [(64, 1, 1), (8, 4, 2)])
def test_values(emulation, order, block):
    emulation.schedule(order)
    torch.manual_seed(1)
    x, lanes = torch.randn(64), torch.arange(64)
    out = emulation.run("values", x, torch.empty(19, 64), block=block)
    first, lane, positive = lanes // 32 * 32, lanes % 32, (x > 0).view(2, 32)
    expected = [
        x[first + 3],
        x[lanes // 8 * 8 + (lanes + 1) % 8],
        x[lanes ^ 5],
        torch.where((lane ^ 8) > lane, x, x[lanes ^ 8]),
        torch.where(lane + 3 < 32, x[(lanes + 3).clamp(max=63)], x),
        torch.where(lane % 4 + 2 < 4, x[(lanes + 2).clamp(max=63)], x),
        torch.where(lane >= 3, x[(lanes - 3).clamp(min=0)], x),
        torch.where(lane % 4 >= 2, x[(lanes - 2).clamp(min=0)], x),
        positive.sum(1).repeat_interleave(32),
        (positive.int().argmax(1) + 1).repeat_interleave(32),
        positive[:, 7].repeat_interleave(32),
        torch.ones(64),
        positive.sum().expand(64),
        torch.ones(64),
        torch.zeros(64),
        torch.where(lane % 2 == 0, x[lanes ^ 2], -1.0),
        torch.ones(64),
        torch.tensor([32 - int(t).bit_length() for t in lanes]) + 2,
        3 * x + 1,
    ]
    torch.testing.assert_close(out, torch.stack([row.float() for row in expected]))


@pytest.mark.parametrize("order", SCHEDULES)
def test_atomics(emulation, order):
    emulation.schedule(order)
    x = X[:40].contiguous()
    out = torch.zeros(9)
    out[8:].view(torch.int32).fill_(-1)
    emulation.run("atomics", x, out, grid=3, block=8)
    torch.testing.assert_close(out[:7], torch.tensor([x.sum(), 0, x.min(), 39, 1, 1, 2]))
    assert out[7:].view(torch.int32).tolist() == [(1 << 24) - 1, -1 << 24]


def test_shared_memory_that_nobody_wrote_is_nan(emulation):
    assert emulation.run("unwritten", X, torch.zeros(2), shared=400, n=100).isnan().all()


def test_a_lane_that_never_was_gives_nan(emulation):
    out = emulation.run("ragged", X, torch.zeros(40), block=40)
    assert torch.equal(out[:31], X[1:32]) and torch.equal(out[32:39], X[33:40]) and out[31] == X[31] and out[39].isnan()


@pytest.mark.parametrize("order", SCHEDULES)
def test_an_asynchronous_copy_fills_up_with_zeros(emulation, order):
    emulation.schedule(order)
    assert emulation.run("zeros_behind", X, torch.empty(4), block=1).tolist() == [*X[:2].tolist(), 0, 0]


MISUSE = [
    ("divergent_block", {}, r"divergent barrier: threads of a block are at .*kernels.cu:\d+ and at .*kernels.cu:\d+"),
    ("ended_threads", {"n": 40}, r"deadlock: threads wait, 40 at __syncthreads \(.*kernels.cu:\d+\); 24 have ended"),
    ("block_and_cluster", {}, "deadlock: threads wait, 32 at __syncthreads .*, 32 at cluster.sync"),
    ("divergent_warp", {}, "divergent warp: lanes of one mask are at (__shfl_sync and at __syncwarp|__sync.*__shfl)"),
    ("lane_not_in_mask", {}, "__syncwarp: the calling lane is not in the mask"),
    ("missing_lane", {"block": 32}, "deadlock: threads wait, 31 at __syncwarp .*, 1 at __syncwarp"),
    ("grid_sync", {}, r"grid.sync\(\) in a launch that is not cooperative"),
    ("arrives_twice", {}, "barrier_arrive.. twice"),
    ("waits_without", {}, "barrier_wait.. without barrier_arrive"),
    ("past_the_end", {"shared": 400, "n": 100}, "a write past the end of dynamic shared memory"),
    ("large_static", {"n": 12289}, "more than 48 KiB of static shared memory"),
    ("large_static", {"n": 2000, "shared": 226 << 10}, "static and dynamic shared memory together"),
    ("async_bytes", {"n": 12}, "an asynchronous copy moves 4, 8 or 16 bytes"),
    ("async_source", {"n": 1}, "misaligned access of 16 bytes"),
    ("async_target", {}, "an asynchronous copy writes to the block's own shared memory"),
    ("misaligned", {"n": 2}, "misaligned access of 16 bytes"),
    ("maps_rank", {"n": 2, "grid": 2, "cluster": 2}, "map_shared_rank: no block of rank 2"),
    ("maps_global", {"grid": 2, "cluster": 2}, "map_shared_rank: not an address of shared memory"),
    ("maps_ended", {"grid": 2, "cluster": 2}, "a block ends while another of its cluster|block of rank 0 has ended"),
    ("values", {"block": 1025}, "launch: more than 1024 threads in a block"),
    ("values", {"block": (1, 1, 65)}, "launch: .*more than 64 along z"),
    ("values", {"grid": 0}, "launch: an empty grid or block"),
    ("values", {"grid": (1, 65536, 1)}, "launch: the grid is too large"),
    ("values", {"shared": (227 << 10) + 1}, "launch: 232449 bytes of shared memory, a block may have 232448"),
    ("values", {"grid": 6, "cluster": 4}, "launch: the grid is not a multiple of the cluster"),
    ("values", {"grid": 9, "cluster": 9}, "launch: a cluster of 9 blocks, the device takes 1 to 8"),
    ("grid_sync", {"grid": 129, "cooperative": True}, "a cooperative grid of 129 blocks, the device holds 128"),
]  # fmt: skip


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("kernel, shape, message", [pytest.param(*m, id=f"{m[0]}-{i}") for i, m in enumerate(MISUSE)])
def test_misuse_is_reported(emulation, kernel, shape, message, order):
    emulation.schedule(order)
    with pytest.raises(RuntimeError, match=message):
        emulation.run(kernel, X, torch.zeros(4), **shape)
    assert right(emulation, block_sums, 0)  # an error leaves nothing behind


@pytest.mark.parametrize("order", [0, 2])
def test_a_copy_nobody_waits_for_is_reported(emulation, order):
    """Schedule 1 lands every copy at once, where nothing is left to wait for."""
    emulation.schedule(order)
    with pytest.raises(RuntimeError, match="a thread ends without waiting for its asynchronous copies"):
        emulation.run("async_unwaited", X, torch.zeros(4))


def test_the_device_can_be_another(emulation):
    emulation.device(compute_capability=80, multiprocessors=1)
    with pytest.raises(RuntimeError, match="clusters need compute capability 9.0"):
        cluster_sums(emulation, 0)
    emulation.run("grid_sync", X, X, grid=32, cooperative=True)
    with pytest.raises(RuntimeError, match="a cooperative grid of 33 blocks, the device holds 32 at a time"):
        emulation.run("grid_sync", X, X, grid=33, cooperative=True)


def test_launches_of_several_threads_wait_for_each_other(emulation):
    results: list[bool] = []

    def work() -> None:
        results.extend(right(emulation, job, 0) for job in BARRIERS for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 * 5 * len(BARRIERS) and all(results)


def sanitized(*arguments: str) -> subprocess.CompletedProcess:
    """Python with the runtimes of the sanitizers, in which this file compiles the kernels with them."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    env = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1",
        "DRSN_EMULATION_FLAGS": "-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined",
    }
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, cwd="/", timeout=1500)


READS_OUTSIDE = """
import sys, pathlib, torch
sys.path.insert(0, {here!r})
import test_cuda_emulation as t
t.Emulation(pathlib.Path({library!r})).run({kernel!r}, torch.zeros(4), torch.zeros(4), shared=400, n={n})
"""


@pytest.mark.slow
@pytest.mark.skipif("DRSN_EMULATION_FLAGS" in os.environ, reason="runs under the sanitizers already")
def test_sanitizers_find_nothing_here_and_find_what_is_outside(tmp_path):
    root = str(HERE.parent)
    outside = "not past_the_end and not ends_too_early and not cluster_sums-3 and not cluster_halves-2"
    done = sanitized("-m", "pytest", __file__, "-c", f"{root}/pyproject.toml", "--rootdir", root, "-q", "-k", outside,
                     "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'pytest'}")  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    (library,) = tmp_path.rglob("kernels.so")
    for kernel, n in (("reads_outside", 100), ("past_the_end", 100), ("large_static", -1)):
        code = READS_OUTSIDE.format(here=str(HERE), library=str(library), kernel=kernel, n=n)
        done = sanitized("-c", code)
        assert done.returncode != 0 and "AddressSanitizer" in done.stderr, (kernel, done.stderr[-2000:])
