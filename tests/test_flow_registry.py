"""A registry: one value for each key, ended when idle, and never two of one key."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool.errors import Overloaded
from pool.flow import Registry
from tests.interleaving import run

seeds = st.integers(0, 2**32 - 1)


class Value:
    def __init__(self, key):
        self.key = key
        self.is_idle = True
        self.is_over = False


class Shop:
    """What a registry makes and lets go."""

    def __init__(self, **settings):
        self.made, self.gone = [], []
        self.takes_s = 0.0
        self.registry = Registry(
            self.make,
            self.let_go,
            lambda value: value.is_idle,
            is_over=lambda value: value.is_over,
            **settings,
        )

    def make(self, key):
        self.made.append(key)
        return Value(key)

    async def let_go(self, value):
        await asyncio.sleep(self.takes_s)
        self.gone.append(value.key)


def test_a_key_has_one_value_until_it_has_been_idle():
    async def main():
        shop = Shop(idle_s=10)
        registry = shop.registry
        first = await registry.get("a")
        assert await registry.get("a") is first
        await asyncio.sleep(6)
        assert await registry.get("a") is first
        await registry.get("b")
        assert len(registry) == 2
        await asyncio.sleep(9)
        assert await registry.get("b") is not first  # so that it outlives the other
        assert len(registry) == 2
        await asyncio.sleep(1.5)
        assert shop.gone == ["a"]
        assert "a" not in registry
        assert "b" in registry
        assert await registry.get("a") is not first
        await registry.close()
        assert shop.made == ["a", "b", "a"]
        assert shop.gone == ["a", "a", "b"]
        await asyncio.sleep(100)

    run(main())


def test_what_is_not_idle_stays():
    async def main():
        shop = Shop(idle_s=10)
        value = await shop.registry.get("a")
        value.is_idle = False
        await asyncio.sleep(95)
        assert "a" in shop.registry
        value.is_idle = True
        await asyncio.sleep(11)
        assert shop.gone == ["a"]

    run(main())


def test_beyond_the_limit_the_one_idle_for_longest_goes():
    async def main():
        shop = Shop(limit=3)
        values = {key: await shop.registry.get(key) for key in "abc"}
        values["b"].is_idle = False
        await shop.registry.get("a")
        await shop.registry.get("d")
        assert [key for key in "abcd" if key in shop.registry] == ["a", "b", "d"]
        await shop.registry.get("e")
        assert [key for key in "abde" if key in shop.registry] == ["b", "d", "e"]
        for key in "bde":
            (await shop.registry.get(key)).is_idle = False
        with pytest.raises(Overloaded, match="there are 3 of at most 3, and none is idle"):
            await shop.registry.get("f")
        await shop.registry.close()
        assert sorted(shop.gone) == sorted(shop.made)

    run(main())


def test_a_new_value_waits_until_the_one_before_is_gone():
    async def main():
        shop = Shop()
        shop.takes_s = 5.0
        await shop.registry.get("a")
        shop.registry.drop("a")
        shop.registry.drop("a")  # once is enough
        began = asyncio.get_running_loop().time()
        await asyncio.gather(*(shop.registry.get("a") for _ in range(3)))
        assert asyncio.get_running_loop().time() == began + 5.0
        assert shop.made == ["a", "a"]
        await shop.registry.close()

    run(main())


def test_what_has_ended_by_itself_is_made_anew():
    async def main():
        shop = Shop()
        (await shop.registry.get("a")).is_over = True
        assert not (await shop.registry.get("a")).is_over
        await shop.registry.close()
        assert shop.made == ["a", "a"]
        assert shop.gone == ["a"]

    run(main())


@given(
    seeds,
    st.lists(st.tuples(st.sampled_from("abcde"), st.floats(0, 6)), max_size=30),
    st.none() | st.integers(1, 4),
)
def test_there_are_never_two_of_one_key_nor_too_many(seed, uses, limit):
    async def main():
        shop = Shop(idle_s=3, limit=limit)
        shop.takes_s = 0.5
        living = {}

        async def use(key, at):
            await asyncio.sleep(at)
            value = await shop.registry.get(key)
            assert living.setdefault(key, value) is value or key in shop.gone
            living[key] = value
            assert shop.made.count(key) - shop.gone.count(key) == 1
            if limit is not None:
                assert len(shop.registry) <= limit

        await asyncio.gather(*(use(key, at) for key, at in uses))
        await asyncio.sleep(10)
        assert len(shop.registry) == 0
        assert sorted(shop.made) == sorted(shop.gone)

    run(main(), seed)


def test_what_goes_wrong_in_letting_go_is_heard_when_it_closes():
    """And all others are let go."""

    async def main():
        shop = Shop()
        for key in "abc":
            await shop.registry.get(key)

        async def let_go(value):
            await asyncio.sleep(1)
            if value.key == "b":
                raise ZeroDivisionError
            shop.gone.append(value.key)

        shop.registry._let_go = let_go
        with pytest.raises(ZeroDivisionError):
            await shop.registry.close()
        assert sorted(shop.gone) == ["a", "c"]
        assert await shop.registry.get("b")
        shop.registry.forget()

    run(main())


@pytest.mark.parametrize("idle_s", [0, -1.0, float("nan")])
def test_a_value_stays_for_some_time(idle_s):
    """A busy one would be looked at again and again in the same turn of the loop, which would never end."""
    with pytest.raises(ValueError, match=r"idle_s is .*; wanted more than 0"):
        Shop(idle_s=idle_s)
