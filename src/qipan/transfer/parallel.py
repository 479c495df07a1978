"""The same call on many items, a few at a time, on daemon threads: a process that ends does not wait for them."""

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def in_parallel(items: Sequence[Item], call: Callable[[Item], Answer], workers: int) -> list[Answer]:
    """The answers in the items' order.  The first error ends it once the calls under way are over, and is raised."""
    if len(items) <= 1:
        return [call(item) for item in items]
    answers: dict[int, Answer] = {}
    errors: list[BaseException] = []
    left = iter(range(len(items)))
    turn = threading.Lock()

    def work() -> None:
        while not errors:
            with turn:
                number = next(left, None)
            if number is None:
                return
            try:
                answers[number] = call(items[number])
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(items)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [answers[number] for number in range(len(items))]
