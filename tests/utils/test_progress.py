"""Loops in threads: the order of results, and problems that are listed together."""

import concurrent.futures
import threading

import pytest

from deeplab_jax.utils import progress
from deeplab_jax.utils.errors import UserError, raise_problems


def test_parallel_map_keeps_the_order_and_shows_progress_on_stderr(capsys):
    squares = [i * i for i in range(50)]
    assert list(progress.parallel_map(lambda i: i * i, range(50), "Squares")) == squares
    out, err = capsys.readouterr()
    assert (out, "Squares" in err) == ("", True)
    mapped = progress.parallel_map(lambda i: i * i, range(50), "Squares", num_threads=2, quiet=True)
    assert list(mapped) == squares
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("max_items", "max_weight", "expected"), [(3, 100, 3), (9, 4, 4), (9, 0, 1), (1, 100, 1)]
)
def test_bounded_map_keeps_the_order_and_its_limits(max_items, max_weight, expected):
    taken, done = [], threading.Event()

    def items():
        for item in range(20):
            taken.append(item)
            yield item

    def square(item: int) -> int:
        done.wait()
        return item * item

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        mapped = progress.bounded_map(
            *(pool, square, items()),
            max_items=max_items,
            max_weight=max_weight,
            weight=lambda _: 1,
        )
        threading.Timer(0.1, done.set).start()
        assert next(mapped) == 0
        assert len(taken) == expected + 1  # the last one waits for its turn
        assert list(mapped) == [i * i for i in range(1, 20)]


def test_check_all_keeps_the_order_and_lists_all_problems(capsys):
    def check(item: int) -> int:
        if item % 2:
            raise UserError(f"item {item} is odd")
        return item * item

    squares = [i * i for i in range(0, 50, 2)]
    assert progress.check_all(check, range(0, 50, 2), "Checking") == squares
    with pytest.raises(UserError) as raised:
        progress.check_all(check, range(26), "Checking")
    odd = [f"- item {i} is odd" for i in range(1, 20, 2)]
    assert str(raised.value).splitlines() == ["Checking: 13 problems", *odd, "- and 3 more"]
    assert capsys.readouterr().out == ""


def test_check_all_lets_other_errors_through():
    with pytest.raises(ZeroDivisionError):
        progress.check_all(lambda item: 1 // item, [1, 0], "Checking")


def test_one_problem():
    raise_problems("Checking", [])
    with pytest.raises(UserError, match=r"^Checking: 1 problem\n- it$"):
        raise_problems("Checking", ["it"])
