"""csrc/cuda/one_pass.cu emulated: against float64 under several schedules, and that what is done wrong is noticed.

How the emulation works is said in emulation/.
"""

import pytest
import torch

from drsn_kernels.backends import gpu

if gpu.missing() is not None:
    pytest.skip(gpu.missing(), allow_module_level=True)

import emulated
import oracle
from one_pass_cases import BF16, F32, Case, Problem

from drsn_kernels.backends.eager import eager
from drsn_kernels.backends.gpu import one_pass_cu

SCHEDULES = range(4)


# ---- results ---------------------------------------------------------------------------------------------------------

CASES = [
    Case(),
    Case(dtype=BF16),
    Case(shape=(1, 8, 64)),
    Case(shape=(2, 8, 64), clusters=1),  # as many samples as are loaded at first
    Case(shape=(7, 8, 64), clusters=3),  # a ragged last turn
    Case(shape=(9, 4, 128), stages=2),
    Case(shape=(9, 4, 128), stages=2, dtype=BF16, average="sample"),
    # rows of a part of a word, of one lane's words, of more than a warp's
    Case(shape=(3, 4, 20)),
    Case(shape=(3, 12, 36), hidden=4),
    Case(shape=(3, 4, 100), hidden=12, kind="plain"),
    Case(shape=(3, 4, 40), dtype=BF16, hidden=36),
    Case(shape=(3, 8, 264), dtype=BF16),
    Case(shape=(3, 4, 1056), residual=False),
    Case(shape=(3, 4, 2080), dtype=BF16, clusters=1, residual=False),
    Case(shape=(3, 132, 32), hidden=20, tau=False),  # more rows than threads
    Case(shape=(2, 16, 1024), hidden=16, clusters=1, residual=False),  # 512 threads
    # every form of the threshold, with and without clusters
    Case(average="sample"),
    Case(average=None, kind="plain"),
    Case(one=True),
    Case(one=True, average="sample", dtype=BF16),
    Case(one=True, average=None, tau=False),
    Case(shape=(5, 8, 64), cluster=2),
    Case(shape=(5, 16, 64), cluster=4, average="sample"),
    Case(shape=(5, 16, 64), cluster=4, one=True, dtype=BF16),
    Case(shape=(4, 32, 36), cluster=8, average=None, clusters=1, residual=False),
    Case(shape=(5, 16, 64), cluster=2, one=True, average="sample", stages=2),
    Case(shape=(5, 16, 64), cluster=4, one=True, average=None, kind="plain"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_is_that_of_float64(emulation, case):
    check(emulation, case, SCHEDULES)


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [1, 2, 4])
@pytest.mark.parametrize("kind", ["plain", "norm"])
@pytest.mark.parametrize("average", oracle.AVERAGES)
@pytest.mark.parametrize("one", [False, True], ids=["an alpha a channel", "one alpha"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_every_step_under_many_schedules(emulation, dtype, one, average, kind, cluster):
    for length in (24, 200):
        for residual, tau, stages in ((True, True, 3), (False, False, 2)):
            shape = (7, 16, length)
            check(emulation, Case(shape, 12, kind, one, average, residual, tau, dtype, cluster, stages), range(8))


def check(emulation, case: Case, schedules) -> None:
    problem, runs = Problem(case), []
    for emulation.schedule in schedules:
        kept = problem.run_forward(emulation)
        problem.check_forward(kept)
        back = problem.run_backward(emulation, kept)
        problem.check_backward(back)
        runs.append(kept | back)
    for run in runs[1:]:  # the same bits, whatever came first
        assert all(torch.equal(run[name], runs[0][name]) for name in run)
    problem.check_forward(problem.run_forward(emulation, keep=False))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_values_that_are_no_numbers_or_no_magnitudes(emulation, dtype):
    """As the eager form has them: y, and the planes bit for bit."""
    problem = Problem(Case(shape=(4, 8, 64), dtype=dtype, residual=False, average=None))
    special = torch.tensor([0.0, -0.0, torch.nan, -torch.nan, torch.inf, -torch.inf, 1e-40, -1e-40, 3e38, -3e38])
    problem.x[0, :, : len(special)] = special.to(dtype)  # tau is NaN there, or 0 to 1
    problem.x[1, 3, : len(special)] = special.to(dtype)
    problem.x[2, 5] = 0.0
    problem.x[3, 1, 5:7] = torch.tensor([3e38, -0.0]).to(dtype)
    found = problem.run_forward(emulation)
    y, planes = eager.map(problem.x, problem.layout, found["tau"], keep=3)
    assert found["tau"].isnan().any() and not found["tau"][3].isnan().any()
    assert torch.equal(found["planes"], planes.bits)
    torch.testing.assert_close(found["y"], y, rtol=0, atol=0, equal_nan=True)


# ---- what is done wrong is noticed -----------------------------------------------------------------------------------

# With one alpha or an average of all channels there is more to synchronise, with clusters something else.
MUTATED = [
    Case(shape=(9, 8, 64), average="sample"),
    Case(shape=(9, 16, 64), cluster=4, average="sample"),
    Case(shape=(7, 8, 256), one=True, dtype=BF16, clusters=1),
]


def notices(run, emulation, mutation: str = "", schedules=range(8)) -> bool:
    """Whether the kernel fails under one of the schedules: by the emulation, or by its results."""
    emulation.mutation = mutation
    for emulation.schedule in schedules:
        try:
            run()
        except (emulated.Wrong, AssertionError):
            return True
    return False


def runs_of(problem: Problem, emulation) -> list:
    """Forward, and backward from what a right forward pass keeps."""
    kept = problem.run_forward(emulated.emulation())
    return [
        lambda: problem.check_forward(problem.run_forward(emulation)),
        lambda: problem.check_backward(problem.run_backward(emulation, kept)),
    ]


@pytest.mark.parametrize("direction", [0, 1], ids=["forward", "backward"])
def test_each_synchronisation_is_needed(emulation, direction):
    """Left out, done by one thread only, of the wrong parity or bytes: somewhere among the cases it is noticed."""
    missed: dict[str, int] = {}
    for case in MUTATED:
        run = runs_of(Problem(case), emulation)[direction]
        run()
        for mutation in emulation.mutations():
            missed[mutation] = missed.get(mutation, 1) & (not notices(run, emulation, mutation))
        emulation.mutation, emulation.schedule = "", 0
    kinds = {mutation.split(" @")[0] for mutation in missed}
    assert kinds == {
        "one more arrival at barrier_init", "without fence_barrier_init", "without barrier_expect",
        "16 bytes fewer at barrier_expect", "16 bytes more at barrier_expect", "without load_bulk",
        "16 bytes fewer at load_bulk", "without barrier_wait", "barrier_wait by thread 0 only",
        "the other parity at barrier_wait", "without wait_stores_read", "without commit_stores", "without fence_async",
        "fence_async by thread 0 only", "without the first __syncthreads", "without a later __syncthreads",
        "without the first cluster.sync", "without a later cluster.sync",
    }  # fmt: skip
    assert [mutation for mutation, everywhere in missed.items() if everywhere] == []


@pytest.mark.parametrize("mutation, says", [
    ("without barrier_wait", "reads what a bulk load fills, without having seen its barrier complete"),
    ("the other parity at barrier_wait", "without having seen its barrier complete|deadlock"),
    ("16 bytes fewer at barrier_expect", "completes its phase before its copies have landed|deadlock"),
    ("16 bytes more at barrier_expect", "deadlock: threads wait, .* at barrier_wait"),
    ("without wait_stores_read", "a bulk load into what a bulk store may still read"),
    ("without fence_async", "a bulk store of what a thread has written without fence.proxy.async"),
    ("fence_async by thread 0 only", "a bulk store of what a thread has written without fence.proxy.async"),
    ("without commit_stores", "a bulk load into what a bulk store may still read"),
    ("without fence_barrier_init", "whose initialisation was not fenced"),
])  # fmt: skip
def test_what_is_said_of_it_under_every_schedule(emulation, mutation, says):
    run, _ = runs_of(Problem(MUTATED[0]), emulation)
    run()
    (emulation.mutation, *_) = [name for name in emulation.mutations() if name.startswith(mutation + " @")]
    for emulation.schedule in range(8):
        with pytest.raises(emulated.Wrong, match=says):
            run()


CHANGES = {
    "one buffer of averages": {"a = a == averages ? averages + s.c : averages": "a = averages"},
    "one buffer of dtau": {"d = d == sums ? sums + s.c : sums": "d = sums"},
    "a parity that stays": {"current = 0, parity ^= 1": "current = 0"},
    "the stage in use is filled": {"current ? current - 1 : count - 1": "current"},
    "stored before all have written": {"    fence_async();\n    __syncthreads();": "    fence_async();"},
    "fenced after the barrier": {"fence_async();\n    __syncthreads();": "__syncthreads();\n    fence_async();"},
}


@pytest.mark.slow  # each is compiled
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_kernel_is_noticed(change):
    if emulated.missing() is not None:
        pytest.skip(emulated.missing())
    changed = emulated.Emulation(CHANGES[change])
    found = [notices(run, changed) for case in MUTATED for run in runs_of(Problem(case), changed)]
    assert any(found), found


@pytest.mark.parametrize("case", MUTATED, ids=str)
def test_shared_memory_is_what_the_plan_says(emulation, case):
    """16 bytes less, and the kernels write past the end; with what is planned they do not, in any test here."""
    problem = Problem(case)
    kept = problem.run_forward(emulation)
    less = problem.prepare(one_pass_cu.prepare_forward, problem.x.stride()).plan.shared - 16
    if case.average == "sample":  # else the last words, the average of all channels, are not written
        with pytest.raises(emulated.Wrong, match="past the end"):
            problem.run_forward(emulation, shared=less)
    less = problem.prepare(one_pass_cu.prepare_backward, problem.x.stride()).plan.shared - 16
    with pytest.raises(emulated.Wrong, match="past the end"):
        problem.run_backward(emulation, kept, shared=less)
