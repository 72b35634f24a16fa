"""Fair shares: turns in proportion to weights, places that are left for others, budgets that refill."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpatch.serve.fair import Budgets, FairPool, FairQueue, Places
from modelpatch.serve.tenants import Caller, Tenant

GREEDY, MODEST = Caller.alone("greedy"), Caller.alone("modest")


def strangers(count: int, weight: float = 1.0) -> list[Caller]:
    return [Caller(f"10.0.0.{number}", Tenant(name="strangers", weight=weight)) for number in range(count)]


def shares(callers: list[Caller], price: dict[str, float], items: int, rounds: int) -> Counter[str]:
    """The work of each caller's items that a queue gives first, while all of them wait."""
    queue: FairQueue[str] = FairQueue()
    for caller in callers:
        for _ in range(items):
            queue.put(caller, caller.name, price[caller.name])
    given: Counter[str] = Counter()
    for _ in range(rounds):
        for name in queue.take():
            given[name] += price[name]  # type: ignore[assignment]
    return given


@given(
    st.lists(st.tuples(st.floats(0.25, 4.0), st.integers(1, 50)), min_size=2, max_size=5),
)
def test_work_is_shared_by_weight_whatever_an_item_costs(rows: list[tuple[float, int]]) -> None:
    callers = [Caller(str(n), Tenant(name=str(n), weight=weight)) for n, (weight, _) in enumerate(rows)]
    given = shares(callers, {str(n): cost for n, (_, cost) in enumerate(rows)}, 400, 399)  # nobody runs out of items
    turns = [given[caller.name] / caller.tenant.weight for caller in callers]
    turn = max(cost for _, cost in rows)
    assert max(turns) - min(turns) <= turn * (2 + 2 / min(weight for weight, _ in rows))  # what is left of two turns


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 99)), max_size=60), st.integers(1, 8), st.floats(1, 200)
)
def test_every_item_comes_once_in_the_order_of_its_caller(rows: list[tuple[str, int]], most: int, work: float) -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue()
    for place, (name, cost) in enumerate(rows):
        queue.put(Caller.alone(name), (name, place), cost)
    assert len(queue) == len(rows)
    assert queue.work == sum(cost for _, cost in rows)
    taken = []
    while queue:
        batch = queue.take(most, work)
        costs = [rows[place][1] for _, place in batch]
        assert 1 <= len(batch) <= most
        assert len(batch) == 1 or sum(costs) <= work
        taken += batch
    assert queue.work == 0
    assert queue.take() == []
    for name in "abcd":
        assert [place for who, place in taken if who == name] == [n for n, (who, _) in enumerate(rows) if who == name]


def test_one_who_comes_late_is_in_the_next_batch() -> None:
    now = [0.0]
    queue: FairQueue[str] = FairQueue(lambda: now[0])
    for _ in range(100):
        queue.put(GREEDY, "greedy", 10)
    assert len(queue.take(32)) == 32  # alone it has whole batches
    queue.put(MODEST, "modest", 1)
    assert sorted(queue.take(32)) == ["greedy", "modest"]
    assert queue.take(32) == ["greedy"]  # the other will ask again, and waits for one image then
    now[0] = 2.0
    assert len(queue.take(32)) == 32


def test_many_addresses_without_a_key_have_one_weight_together() -> None:
    many = strangers(9)
    given = shares([MODEST, *many], {caller.name: 1 for caller in [MODEST, *many]}, 200, 360)
    assert 160 <= given["modest"] <= 200
    assert max(given[one.name] for one in many) - min(given[one.name] for one in many) <= 2


def test_a_weight_of_a_hundredth_is_served_too() -> None:
    slow = Caller("slow", Tenant(name="slow", weight=0.01))
    given = shares([MODEST, slow], {"modest": 1, "slow": 1}, 500, 303)
    assert given["slow"] in (2, 3, 4)


def test_places_are_left_for_others_however_many_take_all_they_may() -> None:
    places = Places(120)
    for number in range(5):
        while places.take(Caller.alone(str(number))):
            pass
        assert places.take(Caller.alone("late")), number
        places.give_back(Caller.alone("late"))
    assert places.of["caller", "0", "0"] == 60


def test_strangers_together_leave_places_for_tenants() -> None:
    places, crowd = Places(120), strangers(200)
    for one in crowd:
        while places.take(one):
            pass
    assert places.taken <= 60
    assert places.take(MODEST, 50)
    for one in crowd:
        places.give_back(one, places.of["caller", "strangers", one.name])
    places.give_back(MODEST, 50)
    assert places.taken == 0
    assert not places.of


def test_all_places_can_be_asked_for_at_once() -> None:
    assert Places(64).take(MODEST, 64)
    assert not Places(64).take(MODEST, 65)


def test_a_budget_is_overdrawn_once_and_refills() -> None:
    now = [0.0]
    budgets, tenant = Budgets(lambda: now[0]), Tenant(name="a", gmacs=2.0)
    assert budgets.wait(tenant) == 0
    budgets.spend(tenant, 20e9)  # ten seconds' worth, of which five were saved up
    assert budgets.wait(tenant) == pytest.approx(5)
    now[0] = 4.0
    assert budgets.wait(tenant) == pytest.approx(1)
    now[0] = 100.0
    assert budgets.wait(tenant) == 0
    budgets.spend(tenant, 12e9)
    assert budgets.wait(tenant) == pytest.approx(1)  # no more than five seconds were saved up
    budgets.spend(Tenant(name="b"), 1e18)
    assert budgets.wait(Tenant(name="b")) == 0


def test_a_pool_lets_callers_take_turns_and_hands_errors_on() -> None:
    order: list[str] = []
    gate = threading.Event()

    def work(name: str) -> str:
        gate.wait(60)
        order.append(name)
        if name == "bad":
            raise ValueError(name)
        return name

    async def main() -> None:
        with ThreadPoolExecutor(1) as threads:
            pool = FairPool(threads, 1)
            greedy = [pool.submit(GREEDY, 1, lambda n=n: work(f"greedy{n}")) for n in range(20)]  # type: ignore[misc]
            greedy[7].cancel()
            modest, bad = pool.submit(MODEST, 1, lambda: work("modest")), pool.submit(MODEST, 1, lambda: work("bad"))
            gate.set()
            assert await modest == "modest"
            assert len(order) <= 4
            with pytest.raises(ValueError, match="bad"):
                await bad
            done = await asyncio.gather(*greedy, return_exceptions=True)
            assert isinstance(done[7], asyncio.CancelledError)
            assert "greedy7" not in order
            assert len(order) == 21

    asyncio.run(main())
