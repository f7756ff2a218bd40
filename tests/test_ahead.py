import threading
import time

import pytest

from wireframe.ahead import in_order


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_results_come_in_the_order_of_the_items(workers):
    def slower_for_even(item):
        time.sleep(0.002 * (item % 2 == 0))
        return item * item

    assert list(in_order(slower_for_even, range(50), workers)) == [i * i for i in range(50)]
    assert list(in_order(slower_for_even, [], workers)) == []


def test_two_workers_work_at_the_same_time():
    both = threading.Barrier(2, timeout=60)
    assert sorted(in_order(lambda _: both.wait(), range(2), 2)) == [0, 1]


def test_one_worker_is_map_in_the_calling_thread():
    taken = []
    results = in_order(lambda item: (item, threading.get_ident()), (taken.append(i) or i for i in range(3)), 1)
    assert next(results) == (0, threading.get_ident()) and taken == [0]


def test_only_so_many_items_are_taken_ahead():
    taken = []
    results = in_order(str, (taken.append(i) or i for i in range(100)), 2)
    assert [next(results) for _ in range(10)] == [str(i) for i in range(10)]
    assert len(taken) == 4 * 2 + 10
    results.close()


@pytest.mark.parametrize("workers", [1, 3])
def test_an_exception_of_the_items_comes_after_the_results_before_it(workers):
    def breaking_off():
        yield from range(5)
        raise ValueError("broke off")

    results, found = in_order(str, breaking_off(), workers), []
    with pytest.raises(ValueError, match="broke off"):
        found.extend(results)
    assert found == list("01234")


@pytest.mark.parametrize("workers", [1, 3])
def test_an_exception_of_the_function_comes_in_its_place(workers):
    results, found = in_order(lambda item: 1 / (3 - item), range(9), workers), []
    with pytest.raises(ZeroDivisionError):
        for result in results:
            found.append(result)
    assert found == [1 / 3, 1 / 2, 1]


def test_closing_drops_what_no_thread_has_begun_and_waits_for_the_rest():
    begun, ended, release = [], [], threading.Event()

    def wait(item):
        begun.append(item)
        if item > 0:
            release.wait(60)
        ended.append(item)
        return item

    results = in_order(wait, range(100), 2)
    assert next(results) == 0
    while len(begun) < 3:
        time.sleep(0.001)
    threading.Timer(0.2, release.set).start()
    results.close()
    assert sorted(begun) == sorted(ended) == [0, 1, 2]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("wireframe-ahead")]
