"""The Triton kernels as they are compiled for each GPU, without one: launches, bytes, widths, spills, compilations.

lowered_cases.py holds the cases and their budgets; lowered_plans.py compiles them in processes of its own, where Triton
compiles instead of interpreting.
"""

import json
from pathlib import Path

import lowered_cases
import lowered_plans
import ptx
import pytest
from filelock import FileLock
from triton_child import child

from drsn_kernels.backends import gpu
from drsn_kernels.backends.gpu import lowering

pytestmark = pytest.mark.skipif(gpu.missing() is not None, reason="no Triton, or too old")
HERE = Path(__file__).resolve().parent


def compiled(session_folder: Path, cache: Path, name: str, *arguments: str) -> dict:
    """What lowered_plans.py finds, and the folder of its files. One of xdist's workers compiles, the others wait."""
    folder = session_folder / name
    with FileLock(f"{folder}.lock"):
        if not (out := folder / "results.json").exists():
            folder.mkdir(exist_ok=True)
            done = child(str(HERE / "lowered_plans.py"), "--json", str(out), *arguments, cwd=folder, cache=cache)
            assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return json.loads(out.read_text()) | {"folder": folder}


@pytest.fixture(scope="session")
def on_hopper(session_folder, triton_cache) -> dict:
    return compiled(session_folder, triton_cache, "on_hopper", "--sample")


@pytest.fixture(scope="session")
def everywhere(session_folder, triton_cache) -> dict:
    found = compiled(session_folder, triton_cache, "everywhere", "--table", "table.md")
    return found | {"table": (found["folder"] / "table.md").read_text()}


@pytest.fixture
def lowered(request) -> dict:
    """A sample of the cases for cuda:90; all cases for all targets, for the slow tests."""
    slow = request.node.get_closest_marker("slow") is not None
    return request.getfixturevalue("everywhere" if slow else "on_hopper")


CASES = [
    pytest.param(
        case, id=case.name.replace(" ", "-"), marks=[] if case.name in lowered_cases.SAMPLE else [pytest.mark.slow]
    )
    for case in lowered_cases.CASES
]
each_case = pytest.mark.parametrize("case", CASES)
each_target = pytest.mark.parametrize(
    "target", [pytest.param(t, marks=[] if t == "cuda:90" else [pytest.mark.slow]) for t in lowered_plans.CUDA]
)


def pairs(lowered: dict, target: str, case: lowered_cases.Case):
    """(launch, what was expected of it), forward and backward."""
    run = lowered["cases"][target][case.name]
    yield from zip(run["forward"], case.forward, strict=True)
    yield from zip(run["backward"], case.backward, strict=True)


@each_target
@each_case
def test_launches_are_as_budgeted_and_nothing_else_is_of_full_size(lowered, case, target):
    run = lowered["cases"][target][case.name]
    assert [launch["kernel"] for launch in run["forward"]] == [expected.kernel for expected in case.forward]
    assert [launch["kernel"] for launch in run["backward"]] == [expected.kernel for expected in case.backward]
    assert run["launches"] == run["budgeted"]  # by the backend, in that process
    assert run["full_size_ops"] == []


@each_case
def test_the_budget_reads_and_writes_the_feature_map_as_often(lowered, case):
    """Of the budget's bytes, what is no whole feature map are planes and tensors of the gate's size."""
    budgeted = lowered["cases"]["cuda:90"][case.name]["bytes"]
    for (read, written), launches in zip(budgeted, (case.forward, case.backward), strict=True):
        twice = any(launch.loop_loads.get("x", 0) == 2 or launch.loop_loads.get("g", 0) == 2 for launch in launches)
        loads = sum(sum(launch.loads.values()) + sum(launch.loop_loads.values()) for launch in launches)
        stores = sum(sum(launch.stores.values()) + sum(launch.loop_stores.values()) for launch in launches)
        if twice:  # walked twice, from memory and then from L2: the first tile is loaded once more, and counts once
            loads = 1
        small = case.small_bytes
        assert 0 <= read - loads * case.bytes <= small, (read, loads)
        assert 0 <= written - stores * case.bytes <= small, (written, stores)


@each_target
@each_case
def test_the_feature_map_is_moved_as_often_as_budgeted(lowered, case, target):
    for launch, expected in pairs(lowered, target, case):
        assert launch["unattributed"] == 0, launch
        for argument, kind in [(a, "ld") for a in ("x", "times", "residual", "g")] + [(a, "st") for a in ("y", "dx")]:
            found = launch["by_argument"].get(f"{kind} {argument}", {"bytes": [0, 0]})["bytes"]
            wanted = [expected.tiles(kind, loop).get(argument, 0) * launch["tile_bytes"] for loop in (False, True)]
            assert found == wanted, (launch["kernel"], kind, argument, launch)
        if not launch["tile_bytes"]:
            continue  # a kernel of the gate
        # all programs together: the feature map, and what rounding up to whole tiles adds
        covered = launch["steps"] * launch["tile_bytes"]
        assert case.bytes <= covered <= case.padding * case.bytes, (launch["kernel"], covered, case.bytes)
        if not (expected.loop_loads or expected.loop_stores):
            assert launch["grid"][0] == launch["steps"]


@each_target
@each_case
def test_accesses_are_as_wide_as_the_rows_allow(lowered, case, target):
    if case.width is None:
        pytest.skip("the case has no width")
    for launch, expected in pairs(lowered, target, case):
        for kind in ("ld", "st"):
            for argument in {**expected.tiles(kind, False), **expected.tiles(kind, True)}:
                found = launch["by_argument"][f"{kind} {argument}"]["widths"]
                assert found == [case.width], (launch["kernel"], kind, argument, found)


@each_target
@each_case
def test_nothing_spills_and_a_program_fits(lowered, case, target):
    known = lowered_cases.SPILLS.get((case.name, target), {})
    for launch, _ in pairs(lowered, target, case):
        assert launch["stack"] <= known.get(launch["kernel"], 0), launch
        assert launch["shared"] <= launch["shared_limit"], launch
        assert launch["occupancy"] >= 1, launch


@pytest.mark.parametrize("case", [case for case in CASES if case.values[0].name in lowered_cases.INSTRUCTIONS])
def test_few_instructions_an_element(lowered, case):
    run = lowered["cases"]["cuda:90"][case.name]
    found = [launch["instructions"] for launch in run["forward"] + run["backward"]]
    budget = lowered_cases.INSTRUCTIONS[case.name]
    assert [one is None for one in found] == [most is None for most in budget]  # a number: straight-line code
    assert all(most is None or one <= most for one, most in zip(found, budget, strict=True)), found


@pytest.mark.parametrize("what", list(lowered_cases.SIZES))
def test_other_sizes_do_not_compile_again(lowered, what):
    first, *others = lowered["compilations"][what]
    assert first > 0
    assert others == [0] * len(others), dict(zip(lowered_cases.SIZES[what][1], [first, *others], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("what", list(lowered_cases.FIRST_STEPS))
def test_a_first_step_compiles_no_more_kernels_than_it_did(lowered, what):
    assert lowered["compilations"][what] == list(lowered_cases.FIRST_STEPS[what][1].values())


@pytest.mark.slow
def test_the_table_holds_every_launch(everywhere):
    rows = everywhere["table"].count("\n| ") - 1
    assert rows == sum(len(case.forward) + len(case.backward) for case in lowered_cases.CASES)
    assert "not what a GPU does" in everywhere["table"] and everywhere["triton"] in everywhere["table"]


# ---- the context manager itself --------------------------------------------------------------------------------------

NESTED = """
import torch, drsn_kernels as dk
from drsn_kernels.backends import gpu
from drsn_kernels.backends.gpu.lowering import lowering
x = torch.randn(8, 16, 1024)
with lowering("cuda:90") as outer, dk.use_backend("triton", strict=True):
    dk.abs_mean(x)
    with lowering("cuda:80") as inner:
        dk.abs_mean(x)
    dk.abs_mean(x)
    with lowering("cuda:90") as again:  # the compiled kernel is Triton's to keep, the record is the block's
        dk.abs_mean(x)
assert [len(launches) for launches in (outer, inner, again)] == [2, 1, 1]
assert outer[0].compiled is outer[1].compiled is again[0].compiled is not inner[0].compiled
assert outer[0].compiled.metadata.target.arch == 90 and inner[0].compiled.metadata.target.arch == 80
launch = outer[0]
assert launch.kernel == "reduce_kernel" and launch.programs == launch.grid[0] and launch.arguments["L"] == 1024
assert launch == outer[1] and launch != inner[0]
try:
    launch.grid = (1, 1, 1)
    raise SystemExit("a launch can be changed")
except AttributeError:
    pass
assert "CPU tensors under" in gpu.unsupported(x)  # afterwards everything is as before
gate = lambda pooled: pooled / 2
with dk.use_backend("triton"):
    wanted = dk.shrink(x, gate)
    with lowering("cuda:90") as inner:
        dk.shrink(x, gate)  # of a call that is known, too
    assert len(inner) == 2 and torch.equal(dk.shrink(x, gate), wanted)
try:
    with lowering("cuda:90"):
        raise KeyError("a caller's error")
except KeyError:
    pass
assert "CPU tensors under" in gpu.unsupported(x)
"""

EXPLAINED = """
with lowering("cuda:90") as launches, dk.use_backend("triton", strict=True), torch.no_grad():
    (call,) = dk.explain(dk.Shrinkage(16).eval(), x, strict=True)
assert [launch.kernel for launch in launches] == list(call.forward.kernels) == ["forward_kernel"]
assert [launch.programs for launch in launches] == [planned.programs for planned in call.plan.launches]
assert [launch.num_warps for launch in launches] == [planned.warps for planned in call.plan.launches]
"""


@pytest.mark.slow
def test_lowering_nests_restores_and_is_explained(tmp_path, triton_cache):
    done = child("-c", NESTED + EXPLAINED, cwd=tmp_path, cache=triton_cache)
    assert done.returncode == 0, done.stderr


def test_lowering_refuses_in_one_sentence(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    refused = {
        "cuda:75": "target must be one of cuda:80, cuda:90, cuda:100, hip:gfx942, got 'cuda:75'",
        "cuda:90": "TRITON_INTERPRET=1 makes Triton interpret kernels instead of compiling them; unset it",
    }
    for target, message in refused.items():
        with pytest.raises((ValueError, RuntimeError)) as error, lowering.lowering(target):
            pass
        assert str(error.value) == message


# ---- reading what the compiler wrote ---------------------------------------------------------------------------------

PTX = """
.visible .entry k(
\t.param .u64 .ptr .global .align 1 k_param_0,
\t.param .u32 k_param_1,
\t.param .u64 .ptr .global .align 1 k_param_2,
\t.param .u64 .ptr .global .align 1 k_param_3
)
\tld.param.b64 \t%rd1, [k_param_0];
\tld.param.b64 \t%rd2, [k_param_2];
\tld.param.b32 \t%r9, [k_param_1];
\tmad.wide.s32 \t%rd3, %r9, 4, %rd1;
\t@%p1 ld.global.L1::evict_first.L2::cache_hint.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd3 + 16 ], %rd7;
\tmov.b64 \t%rd4, %rd2;
$L__BB0_1:
\tld.global.v8.b32 {%r1}, [ %rd4 + 0 ];
\tadd.s64 \t%rd4, %rd4, 64;
\tst.global.v2.b16 [ %rd3 + 0 ], { %rs1, %rs2 };
\tld.shared.v4.b32 {%r1}, [ %r5 ];
\tcp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, 0x10;
\t@%p2 bra \t$L__BB0_1;
\tred.global.add.f32 [%rd4], %f1;
\tbra.uni \t$L__BB0_2;
$L__BB0_2:
\tret;
"""


def test_ptx_is_read():
    arguments = ptx.flat_arguments({"x": "*fp32", "R": "constexpr", "xs": ("i32", "constexpr"), "y": "*bf16"})
    assert arguments == ["x", "xs", "y"]
    x, y = frozenset({"x"}), frozenset({"y"})
    found = ptx.ptx_accesses(PTX, arguments)
    assert found == [
        ("ld", 16, False, x), ("ld", 32, True, y), ("st", 4, True, x), ("ld", 16, True, x), ("atom", 4, False, y),
    ]  # fmt: skip
    assert ptx.widths(found) == {"atom": {4: 1}, "ld": {32: 1, 16: 2}, "st": {4: 1}}
    straight = ptx.ptx_accesses(PTX.replace("@%p2 bra", "//"), arguments)
    assert len(straight) == 5 and not any(access.loop for access in straight)


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                             /* 0x00000a00ff017b82 */
.L_x_1:
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;                   /* 0x0000000402048981 */
        /*0020*/               @P1 EXIT ;                                             /* 0x000000000000194d */
        /*0030*/              @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;                       /* 0x0000000104048890 */
        /*0040*/                   EXIT ;                                             /* 0x000000000000794d */
.L_x_0:
        /*0050*/                   BRA `(.L_x_0);                                     /* 0xfffffffc00fc7947 */
        /*0060*/                   NOP;                                               /* 0x0000000000007918 */
.L_x_2:
"""


def test_sass_is_read():
    assert ptx.sass_instructions(SASS) == 5
    assert ptx.sass_instructions(SASS.replace("EXIT ;", "BRA `(.L_x_2) ;")) == 5  # ahead
    assert ptx.sass_instructions(SASS.replace("@P1 EXIT", "@P1 BRA `(.L_x_1)")) is None


AMD = """
s_cbranch_execz .LBB0_2
global_load_dwordx4 v[0:3], v4, s[0:1]
buffer_load_ushort v1, v2, s[0:3], 0 offen
.LBB0_2:
buffer_store_short_d16_hi v1, v2, s[0:3], 0 offen
global_atomic_add_f32 v1, v2, s[0:1]
    .private_segment_fixed_size: 12
    .vgpr_count:     26
"""


def test_amdgcn_is_read():
    found = ptx.amdgcn_accesses(AMD)
    assert ptx.widths(found) == {"atom": {4: 1}, "ld": {16: 1, 2: 1}, "st": {2: 1}}
    assert [access.loop for access in found] == [False, False, False, False]
    assert [access.loop for access in ptx.amdgcn_accesses(AMD + "s_branch .LBB0_2\n")] == [False, False, True, True]
    assert ptx.amdgcn_resources(AMD) == (26, 12)
