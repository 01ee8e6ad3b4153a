"""benchmarks/model.py and instructions.py: what is counted, what was recorded is predicted, and the page holds it."""

import json
from collections import Counter

import pytest
import repository  # noqa: F401 - benchmarks/
from triton_child import child

from benchmarks import instructions, model
from benchmarks.cases import Case
from drsn_kernels.backends import gpu

needs_triton = pytest.mark.skipif(gpu.missing() is not None, reason="no Triton, or too old")

# Adds up `rows` elements of a row of 4, from the program's number on; the last branch depends on what was loaded.
PTX = """
.visible .entry sums(
\t.param .u64 .ptr .global .align 1 sums_param_0,
\t.param .u32 sums_param_1
)
{
\tmov.u32 \t%r1, %ctaid.x;
\tld.param.b32 \t%r2, [sums_param_1];
\tld.param.b64 \t%rd1, [sums_param_0];
\tadd.s32 \t%r3, %r2, -1;
\tshr.s32 \t%r4, %r3, 2;
\tsetp.lt.s32 \t%p1, %r2, 1;
\t@%p1 bra \t$L__BB0_3;
$L__BB0_2:
\tld.global.b32 \t{ %r5 }, [ %rd1 + 0 ];
\tadd.s64 \t%rd1, %rd1, 16;
\tadd.s32 \t%r1, %r1, 1;
\tsetp.le.s32 \t%p2, %r1, %r4;
\t@%p2 bra \t$L__BB0_2;
$L__BB0_3:
\tsetp.eq.b32 \t%p3, %r5, 0;
\t@%p3 bra \t$L__BB0_2;
\tret;
}
"""


@pytest.mark.parametrize("rows, turns", [(0, 0), (1, 1), (4, 1), (5, 2), (40, 10)])
def test_a_thread_is_followed_through_its_loop(rows, turns):
    found = instructions.follow(PTX, [0, rows])
    assert found == (7 + 5 * turns + 3, turns > 1, 1)


def test_a_thread_that_does_not_end_is_an_error(monkeypatch):
    monkeypatch.setattr(instructions, "LIMIT", 1000)
    with pytest.raises(ValueError, match="sums has executed 1000 instructions and not come to its end"):
        instructions.follow(PTX, [0, 2**30])


INTEGERS = [
    ("mul.lo.s32 %r9, %a, %b", -7, 3, -21),
    ("mul.wide.s32 %r9, %a, %b", -(2**30), 8, -(2**33)),
    ("mul.wide.u32 %r9, %a, %b", -1, 2, 2 * (2**32 - 1)),
    ("div.s32 %r9, %a, %b", -7, 2, -3),
    ("rem.s32 %r9, %a, %b", -7, 2, -1),
    ("shr.s32 %r9, %a, %b", -8, 1, -4),
    ("shr.u32 %r9, %a, %b", -8, 1, 2**31 - 4),
    ("min.s32 %r9, %a, %b", -8, 1, -8),
    ("bfe.u32 %r9, %a, 4, 8", 0xABCD, 0, 0xBC),
    ("mad.lo.s32 %r9, %a, %b, 5", 7, 3, 26),
    ("selp.b32 %r9, %a, %b, %true", 7, 3, 7),
    ("and.b32 %r9, %a, 255", 0x1FF, 0, 255),
    ("add.s32 %r9, %a, %b", 2**31 - 1, 1, -(2**31)),
]


@pytest.mark.parametrize("text, a, b, result", INTEGERS, ids=[one[0].split()[0] for one in INTEGERS])
def test_integers_are_computed_as_ptx_has_them(text, a, b, result):
    thread = instructions._Thread({})
    thread.registers |= {"%a": a, "%b": b, "%true": True}
    opcode, operands = text.split(" ", 1)
    instructions._step(opcode, operands.split(", "))(thread)
    bits = 64 if "wide" in text else 32
    assert thread.registers["%r9"] % 2**bits == result % 2**bits


def test_the_busiest_pipe_counts():
    assert instructions.clocks(Counter(FADD=10, LDG=2)) == 12
    assert instructions.clocks(Counter(LOP3=10, FADD=2)) == 20
    assert instructions.clocks(Counter(SHFL=10, FADD=2)) == 40


def of(programs=132 * 16, warps=4, fit=16, sass=100, followed=50, loops=False, **more):
    return instructions.Work(programs, warps, fit, sass, more.pop("clocks", sass), followed, loops)


def test_a_launch_takes_what_binds_it():
    assert model.predict("k", 39_000_000, of()).us == pytest.approx(model.START + 10)
    assert model.predict("k", 39_000_000, of()).bound == "memory"
    busy = model.predict("k", 1000, of(sass=14_000))
    assert (busy.bound, busy.us) == ("issue", pytest.approx(model.START + 16 * 4 * 14_000 / (4 * model.ISSUE)))
    alone = model.predict("k", 1000, of(programs=8, sass=4550))
    assert (alone.bound, alone.us) == ("latency", pytest.approx(model.START + 10))
    looped = model.predict("k", 1000, of(programs=8, sass=999, clocks=999, followed=4550, loops=True))
    assert looped.us == pytest.approx(model.START + 10 * model.UNROLLED)


def test_recorded_kernels_are_predicted():
    """The errors that docs/inside/gpu.md tells of."""
    found = model.records()
    errors = sorted(max(us / predicted, predicted / us) for *_, us, predicted in found)
    assert len(found) > 200 and {kernel for _, kernel, *_ in found} >= {"reduce_kernel", "forward_kernel"}
    assert errors[len(errors) // 2] < 1.15 and errors[int(0.9 * len(errors))] < 1.45 and errors[-1] < 2.6
    assert model.main(["--check"]) == 0


def test_the_page_holds_the_tables():
    page = model.PAGE.read_text("utf-8")
    for name in model.MARKERS:
        changed = model.written(page, name, ["a line"])
        assert changed.count("a line") == 1 and model.written(changed, name, ["a line"]) == changed
    assert "\n".join(model.check_table(model.records())) in page
    with pytest.raises(ValueError, match="the page has no <!-- steps"):
        model.written("nothing", "steps", [])


ONE_STEP = """
import json, sys, repository
from benchmarks import model
from benchmarks.cases import Case
steps = [
    model.step(Case("shrink_train", "C", (128, 16, 128), "both", sys.argv[1])),
    model.step(Case("shrink_eval", "C", (128, 16, 128), "forward", "fp32")),
]
each = [[one.case.id, one.us, [(k.kernel, k.bytes, k.us) for k in one.launches], one.products] for one in steps]
print(json.dumps(each))
print("\\n".join(model.steps_table(steps, model.measured())))
print("\\n".join(model.launches_table(steps)))
"""


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_step_is_the_sum_of_its_launches(tmp_path, triton_cache, dtype):
    path = str(repository.ROOT / "tests")
    done = child("-c", ONE_STEP, dtype, cwd=tmp_path, cache=triton_cache, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    first, *tables = done.stdout.splitlines()
    train, evaluated = json.loads(first)
    name, us, launches, products = train
    assert name == Case("shrink_train", "C", (128, 16, 128), "both", dtype).id and products == 0
    # two passes, and between launches of one there is no gap
    assert us == pytest.approx(model.GRAPH + model.GAP + sum(one[2] for one in launches))
    full = {"fp32": 4, "bf16": 2}[dtype] * 128 * 16 * 128
    assert [kernel for kernel, *_ in launches].count("grad_kernel") == 2
    assert 2 * full < dict((kernel, moved) for kernel, moved, _ in launches)["map_kernel"] < 2.3 * full
    assert [kernel for kernel, *_ in evaluated[2]] == ["forward_kernel"]
    assert sum(line.startswith(f"| {name} |") for line in tables) == 1 + len(launches)
    timed = {"floor", "best-compiled"} <= set(model.measured().get(name, {}))
    assert any(line.startswith(f"| shrink_train {dtype} | 1 |") for line in tables) == timed
