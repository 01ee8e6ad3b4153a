"""benchmarks/sweep.py: its alternatives are there and compile; under a made-up clock it derives what was planted.

Also `tuned.using`, by which an alternative is tried.
"""

import datetime
import json
import math
import random
from types import SimpleNamespace

import pytest
import repository  # noqa: F401 - benchmarks/
import torch
from triton_child import child

from benchmarks import derive, sweep
from benchmarks.cases import Case
from benchmarks.rows import ENVIRONMENT, read_json
from benchmarks.sweep_calls import OPS, Subject
from drsn_kernels.backends import gpu
from drsn_kernels.backends.gpu import tuned
from drsn_kernels.demo.timing import Call

needs_triton = pytest.mark.skipif(gpu.missing() is not None, reason="no Triton, or too old")
ABOUT = {name: "" for name in ENVIRONMENT} | {"device": "a GPU", "kernels": "of these sources"}
MAP = Case("map", "C", (64, 32, 128), "forward", "fp32")


# ---- other constants, for a while ------------------------------------------------------------------------------------


def test_using_sets_constants_and_forgets_what_was_planned_by_others(monkeypatch):
    monkeypatch.setattr(tuned, "_caches", [])
    seen = tuned.cached(lambda: tuned.TILE)
    before = tuned.TILE
    assert seen() == before
    with tuned.using(TILE=before // 2, THREAD=16):
        assert (seen(), tuned.THREAD) == (before // 2, 16)
        with tuned.using(TILE=64):
            assert seen() == 64
        assert seen() == before // 2
    assert seen() == tuned.TILE == before
    with pytest.raises(KeyError), tuned.using(TILE=1):
        raise KeyError
    assert seen() == before


def test_using_refuses_what_is_no_constant():
    before = dict(vars(tuned))
    for name in ("TILES", "tiles", "_caches", "Any"):
        with pytest.raises(ValueError, match=rf"tuned has no constant {name}; it has .*TILE") as raised:
            with tuned.using(**{name: 3, "TILE": 1}):
                pass
        assert "\n" not in str(raised.value)
    assert dict(vars(tuned)) == before


@needs_triton
def test_whatever_is_prepared_by_a_plan_is_forgotten():
    """A cache that using() does not know would go on with launches of the constants before."""
    from drsn_kernels.backends.gpu import gate, sequence, stream

    for module in (stream, sequence, gate):
        own = [v for v in vars(module).values() if hasattr(v, "cache_clear") and v.__module__ == module.__name__]
        assert all(any(one is known for known in tuned._caches) for one in own), module.__name__
    assert len(tuned._caches) >= 5


@needs_triton
def test_launches_that_differ_in_code_only_are_not_the_same():
    from drsn_kernels.backends.gpu.launch import Prepared
    from drsn_kernels.backends.step import Cost

    fn = SimpleNamespace(__name__="kernel", values=("N", "B"), pointers=(), aligned=())

    def planned(values, registers=None):
        return Prepared(fn, torch.device("cpu"), 1, values, None, Cost(), warps=4, registers=registers).describe()

    one = planned({"N": 1, "B": 64})
    assert one == planned({"N": 1, "B": 64}) and one != planned({"N": 1, "B": 32})
    assert one != planned({"N": 1, "B": 64}, registers=64)


# ---- the table -------------------------------------------------------------------------------------------------------


def test_every_constant_is_there_and_a_choice_is_about_the_same_ones():
    for choice in sweep.CHOICES:
        assert set(choice.ops) <= set(OPS)
        assert all(tuple(other) == choice.names for other in choice.alternatives)
        assert all(name.isupper() and hasattr(tuned, name) for name in choice.names)
        assert len({tuple(other.values()) for other in choice.alternatives}) == len(choice.alternatives) > 1
        assert any(choice.governs(unit.case) for unit in sweep.units() if unit.case.op in choice.ops)


def test_units_are_forty_shapes_in_both_dtypes_and_the_headlines_come_first():
    found = sweep.units()
    assert len(found) == len(set(found)) and len({unit.case.shape for unit in found}) == 40
    assert {unit.case.dtype for unit in found} == {"fp32", "bf16"} and {unit.case.op for unit in found} == set(OPS)
    assert found[0].case.shape == (512, 64, 256) and not found[0].compiled
    first = next(number for number, unit in enumerate(found) if unit.compiled)
    assert {unit.case.group for unit in found[:first]} == set("GACEDB")


def test_some_constants_alone(monkeypatch):
    monkeypatch.setattr(sweep, "CHOICES", sweep.CHOICES)  # put back afterwards
    monkeypatch.setattr(sweep, "COMPILED", True)
    every = sweep.kernels()
    sweep.restrict(["DEPENDENT", "TILE"])
    assert [choice.names for choice in sweep.CHOICES] == [("THREAD", "TILE"), ("DEPENDENT",)]
    assert sweep.kernels() != every  # rows of one are not continued by the other
    sweep.restrict(["DEPENDENT"])
    assert {unit.case.op for unit in sweep.units()} == set(sweep.STEPS) and not any(u.compiled for u in sweep.units())
    assert list(dict(sweep.alternatives(Case("shrink_eval", "C", (64, 32, 128), "forward", "fp32")))) == [
        sweep.PLANNED, "DEPENDENT=False",
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        sweep.main(["--only", "TILES"])


def test_what_the_tree_has_is_first_and_each_alternative_differs_from_it():
    names = dict(sweep.alternatives(MAP))
    assert next(iter(names.items())) == (sweep.PLANNED, {}) and len(names) > 3
    for constants in list(names.values())[1:]:
        assert any(getattr(tuned, name) != value for name, value in constants.items())
    with tuned.using(**list(names.values())[1]):
        assert list(names.values())[1] not in [c for name, c in sweep.alternatives(MAP) if name != sweep.PLANNED]


# ---- a made-up GPU ---------------------------------------------------------------------------------------------------


class Clock:
    """Times are what `seconds(case)` says under the constants of the call's setting; a copy takes one microsecond."""

    timed = 0

    def __call__(self, call):
        return {"gpu": 0.0, "host": 0.0}

    def replay(self, call):
        return None

    def way(self, call):
        return "graph"

    def graph(self, call):
        Clock.timed += 1
        with call.setting():
            return {"gpu": call.run()}


def made_up(seconds, wrong=lambda: False, launches=lambda: (tuned.THREAD, tuned.TILE)):
    """A subject whose launches are told apart by `launches`."""

    def make(case, device, compiled=False):
        def objection(call):
            with call.setting():
                return "y differs" if wrong() else None

        judge = SimpleNamespace(case=case, objection=objection)
        ours = Call(lambda: seconds(case))
        return Subject(Call(lambda: 1e-6), ours, judge, launches, Call(lambda: 3e-6) if compiled else None)

    return make


def rows_of(cases, make):
    return [one for case in cases for one in sweep.measure(sweep.Unit(case), ABOUT, make, lambda _: Clock())[0]]


CASES = [Case("map", "C", (64, 32, 16 << n), "forward", dtype) for n in range(3) for dtype in ("fp32", "bf16")]


def planted(case):
    """Fastest at 64 bytes and 1,024 elements by the geometric mean, though not for the longest rows."""
    favoured = (128, 1024) if case.shape[2] == 64 else (64, 1024)
    return 1e-5 * (0.8 if (tuned.THREAD, tuned.TILE) == favoured else 1.0)


def test_the_planted_best_is_derived_with_its_reason():
    with tuned.using(THREAD=64, TILE=512):
        rows = rows_of(CASES, made_up(planted))
        unit = sweep.Unit(CASES[0], True)
        rows += [one for one in sweep.measure(unit, ABOUT, made_up(planted), lambda _: Clock())[0]
                 if one["provider"] == "best-compiled"]  # fmt: skip
    assert rows[-1]["constants"] == {} and rows[-1]["median_ms"] < rows[1]["median_ms"]
    found = derive.derived(rows, ("THREAD", "TILE"))
    assert (found.present, found.best) == ((64, 512), (64, 1024)) and len(found.ratios) == len(CASES)
    assert found.slower[found.best] == pytest.approx(0.8 ** (2 / 3)) and found.slower[(64, 512)] == 1
    thread, tile = str(found).splitlines()
    assert thread.startswith("THREAD = 64  # was (64, 512): 1.160 times as fast, geometric mean of 6 rows; most 1.25 ")
    assert tile.startswith("TILE = 1024  # was")
    assert derive.derived(rows, ("RAGGED",)) is None


def test_a_gain_of_less_than_two_runs_differ_by_changes_nothing():
    with tuned.using(THREAD=64, TILE=512):
        rows = rows_of(CASES, made_up(lambda case: 1e-5 * (0.995 if (tuned.THREAD, tuned.TILE) == (64, 1024) else 1.0)))
    found = derive.derived(rows, ("THREAD", "TILE"))
    assert found.best == found.present == (64, 512) and "(64, 1024) takes 0.995" in str(found)


def test_a_value_that_was_wrong_somewhere_is_left_out_and_said():
    wrong = lambda: (tuned.THREAD, tuned.TILE) == (64, 1024)  # noqa: E731
    with tuned.using(THREAD=64, TILE=512):
        rows, refused = sweep.measure(sweep.Unit(CASES[0]), ABOUT, made_up(planted, wrong), lambda _: Clock())
        rows += rows_of(CASES[1:], made_up(planted))
    assert refused == {"THREAD=64 TILE=1024": "y differs"}
    found = derive.derived(rows, ("THREAD", "TILE"))
    assert (64, 1024) not in found.slower and "left out, not timed everywhere: (64, 1024)" in str(found)


def test_a_case_in_which_all_values_are_the_same_launch_is_left_out():
    """It would dilute the gain of the others; but a value that was refused there is still left out."""
    with tuned.using(THREAD=64, TILE=512):
        every = rows_of(CASES[:2], made_up(planted))
        alike = made_up(lambda case: 1e-5, launches=lambda: ("one",))
        assert derive.derived(rows_of(CASES[2:3], alike), ("THREAD", "TILE")) is None
        rows = every + rows_of(CASES[2:3], alike)
    found, without = (derive.derived(some, ("THREAD", "TILE")) for some in (rows, every))
    assert found == without and list(found.ratios) == [case.id for case in CASES[:2]]
    refused = [one for one in rows if (one["case"], one["provider"]) != (CASES[2].id, "THREAD=64 TILE=1024")]
    assert derive.derived(refused, ("THREAD", "TILE")).dropped == ((64, 1024),)


def test_launches_that_are_the_same_are_timed_once():
    with tuned.using(THREAD=64, TILE=512):
        Clock.timed = 0
        rows = rows_of([MAP], made_up(planted, launches=lambda: ("one",)))
        assert Clock.timed == 2 * (sweep.ROUNDS + 1)  # a copy, and what all alternatives are
        assert len(rows) == 1 + len(list(sweep.alternatives(MAP)))
    assert {one["same_as"] for one in rows[2:]} == {sweep.PLANNED} and len({one["median_ms"] for one in rows[1:]}) == 1


def test_the_best_form_compiled_is_a_unit_of_its_own():
    rows, refused = sweep.measure(sweep.Unit(MAP, True), ABOUT, made_up(planted), lambda _: Clock())
    assert [one["provider"] for one in rows] == ["floor", "as planned", "best-compiled"] and not refused
    assert rows[2]["median_ms"] == pytest.approx(3e-3) and rows[2]["ratio_to_floor"] == pytest.approx(3)


# ---- a run -----------------------------------------------------------------------------------------------------------


class Run:
    """time_units with a clock of its own; each unit takes `seconds`."""

    def __init__(self, out, about=ABOUT, seconds=10.0, make=None):
        self.out, self.about, self.seconds, self.now, self.measured = out, about, seconds, 0.0, []
        self.make = make or made_up(planted)
        out.mkdir(exist_ok=True)

    def measure(self, unit, about):
        self.now += self.seconds
        self.measured.append(unit)
        return sweep.measure(unit, about, self.make, lambda _: Clock())

    def __call__(self, todo, until=math.inf):
        return sweep.time_units(todo, self.out, until, self.about, self.measure, lambda: self.now)


UNITS = [sweep.Unit(case) for case in CASES]


def test_a_run_ends_in_time_and_the_next_one_goes_on(tmp_path):
    first = Run(tmp_path)
    assert first(UNITS, until=35) == 0
    assert first.measured == UNITS[:3] and first.now <= 35
    kept = read_json(tmp_path / "rows.json")
    assert {one["case"] for one in kept} == {case.id for case in CASES[:3]}
    second = Run(tmp_path)
    assert second([*UNITS, sweep.Unit(CASES[0], True)]) == 0
    assert second.measured == [*UNITS[3:], sweep.Unit(CASES[0], True)]
    rows = read_json(tmp_path / "rows.json")
    assert rows[: len(kept)] == kept
    found = derive.derived(rows, ("THREAD", "TILE"))
    assert len(found.ratios) == len(CASES) and found.best == (64, 1024)
    assert sum(one["provider"] == "best-compiled" for one in rows) == 1
    text = sweep.summary(rows)
    assert "| case | floor | as planned | THREAD=" in text and "TILE = " in text and CASES[0].id in text


def test_a_run_ends_with_a_line_for_each_constant(tmp_path):
    """From its file, which has lists for pairs such as MIDDLE's. One unit for each set of choices."""
    names = [name for choice in sweep.CHOICES for name in choice.names]

    def values():
        return tuple(getattr(tuned, name) for name in names)

    def seconds(case):
        return 1e-5 * random.Random(repr(values())).uniform(0.5, 1.5)

    units = {repr(sweep.of(unit.case)): unit for unit in sweep.units() if not unit.compiled}
    assert Run(tmp_path, make=made_up(seconds, launches=values))([*units.values()]) == 0
    text = sweep.summary(read_json(tmp_path / "rows.json"))
    found = {}
    exec(text.split("```")[1], found)
    assert set(names) <= found.keys()
    for choice in sweep.CHOICES:
        derived = {name: found[name] for name in choice.names}
        assert derived in choice.alternatives or derived == {name: getattr(tuned, name) for name in choice.names}


def test_rows_of_other_kernels_are_not_kept(tmp_path, capsys):
    Run(tmp_path, ABOUT | {"kernels": "others"})(UNITS[:2])
    again = Run(tmp_path)
    again(UNITS[:1])
    assert again.measured == UNITS[:1] and "of other kernels or another GPU" in capsys.readouterr().out
    assert {one["case"] for one in read_json(tmp_path / "rows.json")} == {CASES[0].id}


def test_what_is_wrong_or_raises_is_said_and_the_run_goes_on(tmp_path):
    def make(case, device, compiled=False):
        if case == CASES[0]:
            raise RuntimeError("no memory")
        return made_up(planted, wrong=lambda: tuned.TILE == 1024)(case, device, compiled)

    assert Run(tmp_path, make=make)(UNITS[:2]) == 1
    refused = json.loads((tmp_path / "refused.json").read_text())
    assert refused[UNITS[0].id] == {"all": "raised RuntimeError: no memory"}
    assert refused[UNITS[1].id]["THREAD=64 TILE=1024"] == "y differs"


def test_the_command(tmp_path, capsys):
    Run(tmp_path)(UNITS)
    capsys.readouterr()
    assert sweep.main(["--derive", str(tmp_path / "rows.json")]) == 0
    assert capsys.readouterr().out.startswith("THREAD = ")
    assert sweep.main(["--derive", str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit):
        sweep.main(["--minutes", "0"])
    assert "--minutes must be more than 0, got 0" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu(capsys):
    assert sweep.main([]) == 2
    assert capsys.readouterr().err == "error: there is no CUDA device, which the sweep needs\n"


# ---- the alternatives compile ----------------------------------------------------------------------------------------


ONE_PASS_SPILLS = {"64x32x128 torch.float64": 24}


def spilled(tmp_path, cache, *arguments: str) -> tuple[int, list[str]]:
    """How many launches were compiled, and those that spill: as planned at all, but for ONE_PASS_SPILLS; alternatives,
    which are timed with it, more than 160 bytes."""
    script = str(repository.ROOT / "tests" / "lowered_sweep.py")
    done = child(script, "--json", "found.json", *arguments, cwd=tmp_path, cache=cache)
    assert done.returncode == 0, done.stderr[-8000:]
    found = json.loads((tmp_path / "found.json").read_text())
    every = [(case, name, *one) for case, names in found.items() for name, made in names.items() for one in made]
    assert len(every) >= len(found) > 3

    def allowed(case: str, name: str) -> int:
        return 160 if name.partition("=")[0].isupper() else ONE_PASS_SPILLS.get(case, 0)

    return len(every), [
        f"{case} {name}: {kernel}, {stack} bytes"
        for case, name, kernel, _, stack in every
        if stack > allowed(case, name)
    ]


@pytest.mark.slow
@needs_triton
def test_a_sample_of_the_alternatives_and_of_one_pass_compiles_and_does_not_spill(tmp_path, triton_cache):
    assert spilled(tmp_path, triton_cache, "--sample")[1] == []


@needs_triton
@pytest.mark.slow
def test_a_part_of_all_alternatives_compiles_and_does_not_spill(request, tmp_path, triton_cache):
    """That of --part, else another one each day: all of them take an hour."""
    part = request.config.getoption("--part")
    part = (datetime.date.today().toordinal() if part is None else part) % 32
    assert spilled(tmp_path, triton_cache, "--part", str(part), "--parts", "32")[1] == []


@needs_triton
@pytest.mark.slow
def test_one_pass_does_not_spill(tmp_path, triton_cache):
    """Registers that a plan asks for are enough, on every shape of the benchmarks in every dtype."""
    assert spilled(tmp_path, triton_cache, "--one-pass")[1] == []
