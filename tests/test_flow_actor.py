"""Actors and their supervision: every question gets one answer, everything that begins ends, in order."""

from __future__ import annotations

import asyncio
import logging
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pool.errors import Cancelled, DeadlineExceeded, Overloaded
from pool.flow import Actor, ActorStopped, Directive, Ref, Supervision, System
from tests.interleaving import run, turns

seeds = st.integers(0, 2**32 - 1)


class Crash(Exception):
    """What a message asks for."""


class Counter(Actor[str, int]):
    """Counts the messages that this object had."""

    def __init__(self, log=None, name=""):
        self.count = 0
        self.log = [] if log is None else log
        self.name = name

    async def receive(self, message):
        self.count += 1
        match message:
            case "crash":
                raise Crash(self.count)
            case "sleep":
                await asyncio.sleep(10)
            case "leave":
                self.leave()
        return self.count

    async def stopped(self):
        self.log.append(self.name)


class Parent(Counter):
    """A counter with children, which it names."""

    def __init__(self, log=None, name="", children=(), supervision=None):
        super().__init__(log, name)
        self.supervision = supervision or Supervision()
        self.children = children
        self.refs = {}

    async def started(self):
        for name in self.children:
            self.refs[name] = self.spawn(lambda name=name: Counter(self.log, name), name)

    async def receive(self, message):
        return self.refs[message] if message in self.refs else await super().receive(message)


def test_it_handles_one_message_after_the_other():
    class Slow(Actor[int, int]):
        def __init__(self):
            self.inside = 0
            self.seen = []

        async def receive(self, message):
            assert not self.inside
            self.inside += 1
            await turns(message % 3)
            self.inside -= 1
            self.seen.append(message)
            return message

    async def main():
        async with System() as system:
            slow = Slow()
            ref = system.spawn(lambda: slow)
            assert ref.is_idle
            for number in range(5):
                await ref.tell(number)
            assert not ref.is_idle
            assert await ref.ask(5) == 5
            assert slow.seen == [0, 1, 2, 3, 4, 5]
            await turns(2)
            assert ref.is_idle
            assert "system/Slow" in repr(ref)
            assert len({ref, Ref(ref._cell)}) == 1

    run(main())


def test_an_answer_that_does_not_come_in_time():
    async def main():
        async with System() as system:
            ref = system.spawn(Counter)
            slow = asyncio.ensure_future(ref.ask("sleep"))
            await turns(2)
            with pytest.raises(DeadlineExceeded):
                await ref.ask("x", timeout=1)
            assert await slow == 1
            assert await ref.ask("x") == 2  # the one that nobody waited for was not begun

    run(main())


def test_a_question_that_is_cancelled_is_not_begun():
    async def main():
        async with System() as system:
            ref = system.spawn(Counter)
            questions = [asyncio.ensure_future(ref.ask(what)) for what in ("sleep", "x", "x")]
            await turns(3)
            questions[1].cancel()
            assert await questions[2] == 2

    run(main())


def test_a_mailbox_is_bounded():
    class Small(Counter):
        mailbox_capacity = 2

    async def main():
        async with System() as system:
            small = Small()
            ref = system.spawn(lambda: small)
            sent = 0

            async def flood():
                nonlocal sent
                while True:
                    await ref.tell("sleep")
                    sent += 1

            task = asyncio.ensure_future(flood())
            await asyncio.sleep(95)
            assert small.count == 10
            assert sent == 12
            with pytest.raises(DeadlineExceeded):
                await ref.ask("x", timeout=5)
            task.cancel()

    run(main())


def test_one_that_raised_begins_anew_with_its_mailbox(caplog):
    async def main():
        async with System() as system:
            log = []
            ref = system.spawn(lambda: Counter(log, "a"), "a")
            assert await ref.ask("x") == 1
            questions = [asyncio.ensure_future(ref.ask(what)) for what in ("x", "crash", "x", "x")]
            outcomes = await asyncio.gather(*questions, return_exceptions=True)
            assert outcomes[0] == 2
            assert outcomes[1].args == (3,)
            assert outcomes[2:] == [1, 2]
            assert log == ["a"]

    with caplog.at_level(logging.WARNING, "pool.flow"):
        run(main())
    assert "actor failed actor=system/a error=Crash(3)" in caplog.text


@pytest.mark.parametrize("when", ["started", "receive"])
def test_what_it_waits_for_may_be_cancelled_by_others(when):
    """Which is an error of the actor, not its end: or what is in its mailbox would wait for ever."""

    class Waiting(Counter):
        objects = 0

        async def started(self):
            Waiting.objects += 1
            if when == "started" and Waiting.objects == 1:
                await self.wait()

        async def receive(self, message):
            if message == "wait" and when == "receive":
                await self.wait()
            return await super().receive(message)

        async def wait(self):
            future = asyncio.get_running_loop().create_future()
            future.cancel()
            await future

    async def main():
        decided = []

        def decide(error):
            decided.append(type(error))
            return Directive.RESTART

        async with System(Supervision(decide=decide)) as system:
            ref = system.spawn(Waiting)
            questions = [asyncio.ensure_future(ref.ask(what)) for what in ("wait", "x")]
            outcomes = await asyncio.gather(*questions, return_exceptions=True)
            if when == "receive":
                assert isinstance(outcomes[0], ActorStopped)
                assert "system/Waiting met a cancel of what it waited for" in str(outcomes[0])
                assert outcomes[1] == 1
            else:
                assert outcomes == [1, 2]
            assert Waiting.objects == 2
        assert decided == [Cancelled]

    run(main())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tasks do not count their cancels before Python 3.11")
def test_a_loop_that_ends_restarts_nobody():
    made = []

    def make():
        made.append(Counter())
        return made[-1]

    async def main():
        system = System()
        question = asyncio.ensure_future(system.spawn(make).ask("sleep"))
        await turns(3)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.wait([question])
        await turns(5)
        assert len(made) == 1
        await system.stop()

    run(main())


def test_too_many_restarts_escalate_to_the_system():
    async def main():
        log = []
        with pytest.raises(Crash):  # noqa: PT012 - it is raised by leaving
            async with System(Supervision(max_restarts=2, within_s=5)) as system:
                ref = system.spawn(lambda: Counter(log, "a"))
                other = system.spawn(lambda: Counter(log, "b"))
                for wait in (0, 3, 3, 3):  # never three within five seconds
                    await asyncio.sleep(wait)
                    await ref.tell("crash")
                assert await ref.ask("x") == 1
                for _ in range(3):
                    await ref.tell("crash")
                with pytest.raises(ActorStopped):
                    await ref.ask("x")
                await asyncio.sleep(0.1)
                with pytest.raises(ActorStopped, match="system/Counter has stopped"):
                    await other.ask("x")
                with pytest.raises(ActorStopped):
                    system.spawn(Counter)
        assert log[-2:] == ["b", "a"]

    run(main())


def test_a_parent_decides_by_the_error():
    def decide(error):
        if isinstance(error, ZeroDivisionError):
            return Directive.STOP
        return Directive.RESTART

    class Dividing(Counter):
        async def receive(self, message):
            if message == "divide":
                return 1 // 0
            return await super().receive(message)

    async def main():
        async with System(Supervision(decide=decide)) as system:
            ref = system.spawn(Dividing)
            with pytest.raises(Crash):
                await ref.ask("crash")
            assert await ref.ask("x") == 1
            with pytest.raises(ZeroDivisionError):
                await ref.ask("divide")
            await turns(5)
            assert ref.is_stopped
            with pytest.raises(ActorStopped):
                await ref.tell("x")

    run(main())


def test_a_decision_that_raises_escalates():
    async def main():
        with pytest.raises(Crash):  # noqa: PT012 - it is raised by leaving
            async with System(Supervision(decide=lambda _: 1 // 0)) as system:
                ref = system.spawn(Counter)
                with pytest.raises(Crash):
                    await ref.ask("crash")
                await asyncio.sleep(1)

    run(main())


@pytest.mark.parametrize("one_for_all", [False, True])
def test_a_restart_is_of_one_or_of_all(one_for_all):
    async def main():
        log = []
        supervision = Supervision(one_for_all=one_for_all)
        async with System() as system:
            parent = system.spawn(lambda: Parent(log, "p", "abc", supervision))
            a, b, c = [await parent.ask(name) for name in "abc"]
            assert [await ref.ask("x") for ref in (a, b, c)] == [1, 1, 1]
            asleep = asyncio.ensure_future(c.ask("sleep"))
            behind = asyncio.ensure_future(c.ask("x"))
            await turns(3)
            with pytest.raises(Crash):
                await b.ask("crash")
            await asyncio.sleep(20)
            if one_for_all:
                assert log == ["c", "b", "a"]  # in the opposite order of their beginning
                assert await asyncio.gather(a.ask("x"), b.ask("x")) == [1, 1]
                with pytest.raises(ActorStopped, match="system/Parent/c was ended while it worked"):
                    await asleep
                assert await behind == 1  # the mailbox is the same
            else:
                assert log == ["b"]
                assert [await ref.ask("x") for ref in (a, b)] == [2, 1]
                assert (await asleep, await behind) == (2, 3)
            assert await parent.ask("x") > 0

    run(main())


def test_two_that_crash_at_the_same_time_are_one_restart_of_all():
    async def main():
        log = []
        supervision = Supervision(one_for_all=True, max_restarts=1)
        async with System() as system:
            parent = system.spawn(lambda: Parent(log, "p", "abc", supervision))
            refs = [await parent.ask(name) for name in "abc"]
            await asyncio.gather(*(ref.ask("crash") for ref in refs[:2]), return_exceptions=True)
            await asyncio.sleep(1)
            assert log == ["c", "b", "a"]
            assert [await ref.ask("x") for ref in refs] == [1, 1, 1]

    run(main())


def test_what_escalates_ends_the_parent_and_all_its_children():
    def escalate(_):
        return Directive.ESCALATE

    async def main():
        log = []
        async with System() as system:
            parent = system.spawn(lambda: Parent(log, "p", "ab", Supervision(decide=escalate)))
            a, b = [await parent.ask(name) for name in "ab"]
            with pytest.raises(Crash):
                await a.ask("crash")
            await turns(10)
            assert log == ["b", "a", "p"]
            for old in (a, b):  # those of the parent's new object are others
                with pytest.raises(ActorStopped):
                    await old.ask("x")
            assert await (await parent.ask("a")).ask("x") == 1

    run(main())


def test_nothing_begins_anew_below_one_that_ends():
    made = []

    class Slow(Counter):
        async def stopped(self):
            await asyncio.sleep(5)

    def make():
        made.append(Slow())
        return made[-1]

    class Above(Counter):
        async def receive(self, _):
            return self.spawn(make)

    async def main():
        async with System() as system:
            parent = system.spawn(Above)
            child = await parent.ask("child")
            with pytest.raises(Crash):
                await child.ask("crash")
            await asyncio.sleep(1)  # it is to be restarted, as soon as it has ended
            await parent.stop()
            assert asyncio.get_running_loop().time() == 5
        assert len(made) == 1

    run(main())


def test_of_children_that_fail_together_one_fails_their_parent():
    decided = []

    def decide(error):
        decided.append(error)
        return Directive.ESCALATE

    async def main():
        log = []
        async with System() as system:
            parent = system.spawn(lambda: Parent(log, "p", "ab", Supervision(decide=decide)))
            refs = [await parent.ask(name) for name in "ab"]
            await asyncio.gather(*(ref.ask("crash") for ref in refs), return_exceptions=True)
            await turns(10)
            assert log == ["b", "a", "p"]
        assert len(decided) == 1

    run(main())


def test_leaving_the_system_stops_in_order():
    async def main():
        log = []
        async with System() as system:
            first = system.spawn(lambda: Parent(log, "first", "ab"))
            await first.ask("x")
            await system.spawn(lambda: Counter(log, "second")).ask("x")
        assert log == ["second", "b", "a", "first"]

    run(main())


def test_stopping_finishes_one_message_and_refuses_the_others():
    async def main():
        log = []
        async with System() as system:
            ref = system.spawn(lambda: Counter(log, "a"))
            questions = [asyncio.ensure_future(ref.ask(what)) for what in ("sleep", "x")]
            await turns(3)
            stops = [asyncio.ensure_future(ref.stop(grace_s=20)) for _ in range(2)]
            await turns(3)
            with pytest.raises(ActorStopped):
                await questions[1]
            with pytest.raises(ActorStopped):
                await ref.tell("x")
            assert await questions[0] == 1
            await asyncio.gather(*stops)
            assert log == ["a"]
            ref = system.spawn(lambda: Counter(log, "b"))
            question = asyncio.ensure_future(ref.ask("sleep"))
            await turns(3)
            began = asyncio.get_running_loop().time()
            await ref.stop(grace_s=1)
            assert asyncio.get_running_loop().time() == began + 1
            with pytest.raises(ActorStopped):
                await question
            assert log == ["a", "b"]

    run(main())


def test_who_stops_one_that_is_being_restarted_waits_for_its_end_too():
    """Or what it saves would not be there when the next one of its key begins."""

    class Saving(Counter):
        async def stopped(self):
            await asyncio.sleep(5)
            await super().stopped()

    async def main():
        log = []
        async with System() as system:
            ref = system.spawn(lambda: Saving(log, "a"))
            with pytest.raises(Crash):
                await ref.ask("crash")
            await asyncio.sleep(1)
            await ref.stop()
            assert log == ["a"]
            assert asyncio.get_running_loop().time() == 5
            await asyncio.sleep(10)
        assert log == ["a"]

    run(main())


def test_whoever_has_the_least_patience_is_waited_for_no_longer():
    """Or an actor that has left, and does not come to an end, would keep the system from ending."""

    class Staying(Parent):
        async def started(self):
            for name in self.children:
                self.refs[name] = self.spawn(lambda name=name: Staying(self.log, name), name)

        async def receive(self, message):
            if message == "stay":
                self.leave()
                await asyncio.sleep(1000)
            return await super().receive(message)

    async def main():
        loop = asyncio.get_running_loop()
        log = []
        async with System() as system:
            ref = system.spawn(lambda: Staying(log, "p"))
            question = asyncio.ensure_future(ref.ask("stay"))
            await turns(3)
            stops = [asyncio.ensure_future(ref.stop(grace_s)) for grace_s in (100, 7, 50)]
            with pytest.raises(ActorStopped):
                await question
            assert loop.time() == 7
            await asyncio.gather(*stops)
            # Also its children, for whose ends it waits.
            ref = system.spawn(lambda: Staying(log, "p", "ab"))
            children = [await ref.ask(name) for name in "ab"]
            questions = [asyncio.ensure_future(child.ask("stay")) for child in children]
            await turns(3)
            assert await ref.ask("leave") == 1
            await asyncio.sleep(20)
        assert loop.time() == 7 + 20 + 5 + 5
        for outcome in await asyncio.gather(*questions, return_exceptions=True):
            assert isinstance(outcome, ActorStopped)
        assert log == ["p", "b", "a", "p"]
        await asyncio.sleep(1000)

    run(main())


def test_an_actor_may_leave_but_not_wait_for_itself():
    class Selfish(Counter):
        async def receive(self, message):
            if message == "stop":
                await self.me.stop()
            if message == "ask":
                await self.me.ask("x")
            return await super().receive(message)

    async def main():
        async with System(Supervision(max_restarts=9)) as system:
            ref = system.spawn(Selfish)
            for message in ("stop", "ask"):
                with pytest.raises(RuntimeError, match="actor system/Selfish cannot"):
                    await ref.ask(message)
            assert await ref.ask("leave") == 1
            await turns(5)
            assert ref.is_stopped

    run(main())


def test_an_object_that_cannot_be_made_anew_fails_again():
    made = 0

    def make():
        nonlocal made
        made += 1
        if made in (2, 3):
            raise Crash(made)
        return Counter()

    async def main():
        async with System() as system:
            ref = system.spawn(make)
            with pytest.raises(Crash):
                await ref.ask("crash")
            assert await ref.ask("x") == 1
        assert made == 4

    run(main())


def test_what_fails_in_its_beginning_or_end(caplog):
    class Broken(Counter):
        beginnings = 0

        async def started(self):
            Broken.beginnings += 1
            if Broken.beginnings < 3:
                raise Crash

        async def stopped(self):
            raise Crash

    async def main():
        async with System() as system:
            assert await system.spawn(Broken).ask("x") == 1
        assert Broken.beginnings == 3

    run(main())
    assert "cannot stop in order actor=system/Broken" in caplog.text


def test_actors_by_key():
    async def main():
        log = []
        async with System() as system:
            users = system.registry(lambda key: Counter(log, key), idle_s=10, limit=3)
            for key in ("ann", "bob", "ann"):
                await (await users.get(key)).tell("x")
            assert await (await users.get("ann")).ask("x") == 3
            await asyncio.sleep(11)
            assert sorted(log) == ["ann", "bob"]
            assert await (await users.get("ann")).ask("leave") == 1
            await turns(5)
            assert await (await users.get("ann")).ask("x") == 1  # which is a new one
            refs = [await users.get(key) for key in ("ann", "bob", "cid")]
            asleep = [asyncio.ensure_future(ref.ask("sleep")) for ref in refs]
            await turns(3)
            with pytest.raises(Overloaded):
                await users.get("dan")
            await asyncio.gather(*asleep)
            await users.get("dan")
            assert len(users) == 3
        assert log.count("dan") == log.count("bob") - 1 == 1
        await asyncio.sleep(100)

    run(main())


# -- any tree, any crashes -------------------------------------------------------------------------

supervisions = st.builds(
    Supervision,
    one_for_all=st.booleans(),
    max_restarts=st.integers(0, 4),
    within_s=st.just(5.0),
    decide=st.sampled_from([*Directive]).map(lambda directive: lambda _: directive),
)
trees = st.recursive(
    st.tuples(supervisions, st.just([])),
    lambda children: st.tuples(supervisions, st.lists(children, min_size=1, max_size=3)),
    max_leaves=6,
)
whats = st.sampled_from(["x", "crash", "crash", "leave", "sleep", "stop"])
messages = st.lists(st.tuples(st.integers(0, 20), whats, st.integers(0, 12)), max_size=30)


class Grove:
    """A tree of actors, which note what is wrong: what they raise themselves would be a crash like others."""

    def __init__(self):
        self.refs = []
        self.living = []
        self.wrong = []
        self.at_work = set()

    def expect(self, condition, what):
        if not condition:
            self.wrong.append(what)

    def plant(self, tree, parent):
        grove = self
        supervision, children = tree

        class Node(Counter):
            async def started(self):
                grove.expect(parent is None or parent in grove.living, "it begins after its parent's end")
                grove.living.append(self)
                grove.refs.append(self.me)
                for child in children:
                    await asyncio.sleep(0.5)
                    self.spawn(grove.plant(child, self))

            async def receive(self, message):
                grove.expect(self in grove.living, "it works before its beginning or after its end")
                grove.expect(self.me not in grove.at_work, "two of one place work at the same time")
                grove.at_work.add(self.me)
                try:
                    await asyncio.sleep(0.5)
                    return await super().receive(message)
                finally:
                    grove.at_work.discard(self.me)

            async def stopped(self):
                await asyncio.sleep(0.5)
                grove.expect(not self.is_over, "it ends twice")
                self.is_over = True
                if self in grove.living:  # it began
                    grove.living.remove(self)
                left = [each for each in grove.living if each.parent is self]
                grove.expect(not left, "it ends before its children")

        def make():
            node = Node()
            node.parent = parent
            node.is_over = False
            node.supervision = supervision
            return node

        return make


async def question(ref, what):
    """An answer, if the actor lives to give one; there is always something."""
    try:
        return await ref.ask(what, timeout=1000)
    except (Crash, ActorStopped):
        return None


@given(seeds, supervisions, trees, messages)
@settings(max_examples=300)
def test_whatever_crashes_every_question_is_answered_and_everything_ends(seed, root, tree, questions):
    async def main():
        grove = Grove()

        async def ask(number, what, wait):
            await asyncio.sleep(wait / 4)
            ref = grove.refs[number % len(grove.refs)]
            if what == "stop":
                await ref.stop(1.0)
            else:
                await question(ref, what)

        try:
            async with System(root) as system:
                system.spawn(grove.plant(tree, None))
                await asyncio.sleep(0.1)  # it has begun
                await asyncio.gather(*(ask(*each) for each in questions))
                await asyncio.sleep(100)
                for ref in [ref for ref in grove.refs if not ref.is_stopped]:
                    assert await question(ref, "x") is not None  # who has not stopped has begun anew
        except Crash:
            assert any(what == "crash" for _, what, _ in questions)
        assert grove.living == []
        assert grove.wrong == []

    run(main(), seed)
