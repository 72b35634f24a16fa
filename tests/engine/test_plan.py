"""The plan: every distinct history once, no stream read after it was freed, every row where it was asked for."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpatch.engine.plan import HeadStep, Plan, PlannedTask, PoolStep, Rows, RunStep, Take, make_plan, reads
from modelpatch.heads.reading import Read

LENGTH = 5


@dataclass(frozen=True)
class FakeLink:
    span: tuple[int, int]
    key: str
    own: bool = False
    macs: int = 10
    nbytes: int = 100
    output_bytes: int = 8

    @property
    def name(self) -> str:
        return self.key


BASE = tuple(FakeLink((at, at + 1), f"base {at}", macs=at + 1) for at in range(LENGTH))


def pooled(*segments: int) -> tuple[Read, ...]:
    return tuple(Read(segment, "pooled") for segment in segments)


def path(*own: tuple[int, int, str]) -> tuple[FakeLink, ...]:
    """The base's links but for `own`: (start, end, key)."""
    links, at = [], 0
    spans = {start: (end, key) for start, end, key in own}
    while at < LENGTH:
        end, key = spans.get(at, (at + 1, ""))
        links.append(FakeLink((at, end), key, own=True, macs=7) if key else BASE[at])
        at = end
    return tuple(links)


def simulate(plan: Plan) -> dict[str, list[tuple[int, tuple[Hashable, ...]]]]:
    """RunStep the plan on histories: what every member's head reads is (row, history) a row."""
    streams: dict[int, list[tuple[int, tuple[Hashable, ...]]]] = {
        stream: [(row, (root,)) for row in rows] for root, stream, rows in plan.roots
    }
    answers: dict[str, list[tuple[int, tuple[Hashable, ...]]]] = {}

    def take(one: Take) -> list[tuple[int, tuple[Hashable, ...]]]:
        whole = streams[one.stream]
        return whole if one.places is None else [whole[place] for place in one.places]

    for step in plan.steps:
        if isinstance(step, RunStep):
            for one, output, size in zip(step.inputs, step.outputs, step.sizes, strict=True):
                keys = tuple((link.span, link.key) for link in step.links)
                streams[output] = [(row, (*history, *keys)) for row, history in take(one)]
                assert len(streams[output]) == size
        elif isinstance(step, PoolStep):
            streams[step.output] = [(row, (*history, "pooled", step.tap)) for row, history in streams[step.stream]]
        else:
            for member, takes in zip(step.members, step.takes, strict=True):
                read = [take(one) for one in takes]
                assert all([row for row, _ in other] == [row for row, _ in read[0]] for other in read)
                answers[member] = [
                    (rows[0][0], tuple(itertools.chain.from_iterable(history for _, history in rows)))
                    for rows in zip(*read, strict=True)
                ]
        for stream in step.frees:
            del streams[stream]
    assert not streams
    return answers


def expected(member: PlannedTask, rows: Rows) -> list[tuple[int, tuple[Hashable, ...]]]:
    seen: list[Hashable] = []
    for path in (member.path, *([member.beside] if member.beside else [])):
        history: tuple[Hashable, ...] = (member.root,)
        for link in path:
            history = (*history, (link.span, link.key))
            if Read(link.span[1] - 1, "pooled") in member.reads:
                seen += [*history, "pooled", link.span[1] - 1]
        seen += [] if any(read.form == "pooled" for read in member.reads) else history
    return [(row, tuple(seen)) for row in rows]


@st.composite
def members(draw: st.DrawFn) -> tuple[list[PlannedTask], list[Rows]]:
    """Members with random spans, numbers, roots, taps, and rows of a batch of four."""
    made, rows = [], []
    for number in range(draw(st.integers(1, 6))):
        own, at = [], 0
        while at < LENGTH:
            end = draw(st.integers(at + 1, LENGTH))
            if draw(st.booleans()):
                own.append((at, end, f"own {draw(st.integers(0, 2))} {at}-{end}"))
            at = end if own and own[-1][0] == at else at + 1
        root = draw(st.sampled_from(["small", "large"]))
        links = path(*own)
        ends = [link.span[1] - 1 for link in links]
        taps = tuple(sorted(draw(st.sets(st.sampled_from(ends), max_size=2))))
        beside = BASE if not taps and draw(st.booleans()) else ()
        last = Read(LENGTH - 1)
        inputs = pooled(*taps) or ((last, replace(last, of="base")) if beside else ())
        made.append(
            PlannedTask(f"task {number}", links, root, root, reads=inputs, linear=draw(st.booleans()), beside=beside)
        )
        rows.append(tuple(sorted(draw(st.sets(st.integers(0, 3), min_size=1)))))
    return made, rows


@given(members(), st.sampled_from(["always", "never", "few"]))
def test_a_plan_computes_what_each_member_would_compute_alone_and_nothing_twice(
    drawn: tuple[list[PlannedTask], list[Rows]], merging: str
) -> None:
    pays = {"always": lambda *_: True, "never": lambda *_: False, "few": lambda _, sizes: sum(sizes) < 5}[merging]
    plan = make_plan(*drawn, pays)
    answers = simulate(plan)
    for member, rows in zip(*drawn, strict=True):
        assert answers[member.name] == expected(member, rows)
    assert plan.flops == plan.floor <= plan.separate_flops
    assert plan.activation_bytes <= plan.bytes
    if merging == "never":
        assert all(len(run.inputs) == 1 for run in plan.runs)


def whole(*members: PlannedTask, rows: int = 2, pays: bool = True) -> Plan:
    return make_plan(members, [tuple(range(rows))] * len(members), lambda *_: pays)


def test_patches_that_share_everything_but_the_head_are_one_run_and_one_product() -> None:
    plan = whole(PlannedTask("a", BASE), PlannedTask("b", BASE), PlannedTask("c", BASE))
    run, answer = plan.steps
    assert isinstance(run, RunStep)
    assert isinstance(answer, HeadStep)
    assert [link.key for link in run.links] == [link.key for link in BASE]
    assert answer.members == ("a", "b", "c")
    assert plan.shared == pytest.approx(2 / 3)


def test_heads_that_are_not_linear_answer_one_by_one() -> None:
    plan = whole(PlannedTask("a", BASE, linear=False), PlannedTask("b", BASE), PlannedTask("c", BASE))
    assert sorted(step.members for step in plan.steps if isinstance(step, HeadStep)) == [("a",), ("b", "c")]


def test_streams_fork_at_the_first_variant_and_meet_again_after_the_last() -> None:
    plan = whole(PlannedTask("base", BASE), PlannedTask("patch", path((2, 3, "own"))))
    runs = list(plan.runs)
    assert [[link.key for link in run.links] for run in runs[:1]] == [["base 0", "base 1"]]
    assert {run.links[0].key for run in runs[1:3]} == {"base 2", "own"}
    assert len(runs) == 4
    assert len(runs[3].inputs) == 2
    assert [link.key for link in runs[3].links] == ["base 3", "base 4"]
    assert plan.flops == 2 * 2 * (sum(link.macs for link in BASE) + 7 + 4 + 5)


def test_streams_of_different_roots_share_nothing_and_are_not_concatenated_at_another_resolution() -> None:
    plan = whole(PlannedTask("a", BASE, root=1, shape=64), PlannedTask("b", BASE, root=2, shape=96))
    assert plan.shared == 0
    assert all(len(run.inputs) == 1 for run in plan.runs)
    same_size = whole(PlannedTask("a", BASE, root=1, shape=64), PlannedTask("b", BASE, root=2, shape=64))
    assert same_size.shared == 0
    assert [len(run.inputs) for run in same_size.runs] == [2]


def test_identical_variants_are_one() -> None:
    plan = whole(*(PlannedTask(name, path((1, 3, "same"))) for name in "abc"))
    assert [len(run.inputs) for run in plan.runs] == [1]


def test_streams_are_followed_to_their_end_before_the_next_so_that_few_are_alive() -> None:
    fork = [PlannedTask(str(number), path((0, 1, f"own {number}"))) for number in range(8)]
    apart = whole(*fork, pays=False)
    assert apart.activation_bytes == 2 * BASE[0].output_bytes
    assert whole(*fork).activation_bytes == 2 * (8 * 2 * BASE[0].output_bytes)  # what a run reads and what it makes


def test_rows_are_taken_where_streams_fork() -> None:
    plan = make_plan([PlannedTask("a", BASE), PlannedTask("b", path((4, 5, "own")))], [(0, 2), (1, 2)])
    runs = {run.links[-1].key: run for run in plan.runs}
    assert plan.roots[0][2] == (0, 1, 2)
    assert runs["base 4"].inputs[0].places == (0, 2)
    assert runs["own"].inputs[0].places == (1, 2)


def test_a_plan_frees_each_stream_with_its_last_reader() -> None:
    plan = whole(PlannedTask("a", BASE, reads=pooled(1, 3)), PlannedTask("b", path((2, 3, "own"))))
    for index, step in enumerate(plan.steps):
        assert set(step.frees) <= set(reads(step))
        assert all(not set(step.frees) & set(reads(later)) for later in plan.steps[index + 1 :])


def test_a_plan_prints_its_tree_and_draws_it(tmp_path: object) -> None:
    plan = whole(PlannedTask("base", BASE), PlannedTask("flowers", path((2, 3, "own"))))
    text = str(plan)
    assert "2 tasks, up to 2 images each" in text
    assert "its own" in text
    assert "concatenated with s" in text
    assert "head base" in text
    assert "head flowers" in text
    file = f"{tmp_path}/plan.png"
    plan.draw(file)
    with open(file, "rb") as picture:
        assert picture.read(4) == b"\x89PNG"


def sequence(plan: Plan) -> Sequence[str]:
    return [type(step).__name__ for step in plan.steps]


def test_pooled_outputs_are_computed_once_for_all_heads_that_read_them() -> None:
    plan = whole(PlannedTask("a", BASE, reads=pooled(1, 4)), PlannedTask("b", BASE, reads=pooled(1)))
    assert sequence(plan).count("PoolStep") == 2
    assert sequence(plan).count("HeadStep") == 2
