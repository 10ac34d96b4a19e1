"""What fronts tell each other of the batches they gave: each reads all rows and writes its own."""

from __future__ import annotations

import os

import pytest

from pool.shm.board import Board


@pytest.fixture
def boards():
    lead = Board.create(3)
    made = [lead, *(Board(os.dup(lead.fd), front, 3) for front in (1, 2))]
    yield made
    for board in made:
        board.close()


def test_a_front_sees_what_the_others_gave_and_not_what_it_gave_itself(boards):
    lead, first, second = boards
    lead.add(4, 1)
    first.add(4, 2)
    second.add(5, 1)
    assert [board.others(4) for board in boards] == [2, 1, 3]
    assert [board.others(5) for board in boards] == [1, 1, 0]
    first.add(4, -2)
    assert [board.others(4) for board in boards] == [0, 1, 1]


def test_answers_are_counted_over_all_fronts(boards):
    lead, first, second = boards
    for board in (lead, first, first):
        board.add(3, 1)
        board.answered(3)
    assert [board.answers(3) for board in boards] == [3, 3, 3]
    assert [board.others(3) for board in boards] == [0, 0, 0]
    assert second.answers(4) == 0
    lead.clear(1)
    assert second.answers(3) == 1


def test_the_last_place_is_that_of_what_may_kill_the_last_of_all_workers(boards):
    boards[2].add(1024, 1)
    assert boards[0].others(1024) == 1
    assert boards[1].others(0) == 0


def test_what_a_front_gave_that_has_ended_is_forgotten(boards):
    lead, first, second = boards
    first.add(0, 2)
    second.add(0, 1)
    lead.clear(1)
    assert lead.others(0) == 1
    assert second.others(0) == 0
