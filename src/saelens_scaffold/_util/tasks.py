"""Independent pieces of work, how far they have got, and doing them one after the other."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from saelens_scaffold._util.progress import Progress


@dataclass(eq=False)
class Task:
    """
    A piece of work that another process can do: its call can be pickled.

    Attributes:
        key: What it is to whoever asked for it.
        name: What it is in words.
        kind: Kind of work, of which the pace is measured.
        call: Does it; is given a `Reporter`.
        amount: How much work it is, in steps of any size.
        n_bytes: Memory that it needs at least, of the machine or else of its GPU.
    """

    key: Any
    name: str
    kind: str
    call: Callable[["Reporter"], Any]
    amount: int = 1
    n_bytes: int = 0


class Done(NamedTuple):
    """What became of a task: what its call returned, or why it did not return."""

    task: Task
    value: Any = None
    error: Exception | None = None


class Reporter:
    """
    Says how far a task has got, where it is done.

    The first report is where the work begins, after what had to be loaded.

    Args:
        send: Is given how far it is, what was done since the last report, the seconds
            that this took, and a progress bar to show it on.
        pause: Least time between two reports, in seconds.
    """

    def __init__(self, send: Callable[[int, int, float, Any], None], pause: float = 0):
        self._send, self._pause = send, pause
        self._at, self._since = 0, time.monotonic()
        self._has_begun = False

    def __call__(self, at: int, bar: Any = None) -> None:
        if self._has_begun and time.monotonic() - self._since < self._pause:
            return
        if not self._has_begun:
            self._has_begun, self._at, self._since = True, at, time.monotonic()
        self._tell(at, bar)

    def end(self, amount: int) -> None:
        """All is done."""
        if amount != self._at:
            self._tell(amount)

    def _tell(self, at: int, bar: Any = None) -> None:
        now = time.monotonic()
        self._send(at, at - self._at, now - self._since, bar)
        self._at, self._since = at, now


class TaskQueue:
    """
    Tasks to do, and the display of how far they have got.

    Args:
        tasks: The tasks.
        noun: What each of them is.
        workers: Who does them.
        left: Words for the time that is left.
    """

    def __init__(
        self, tasks: Iterable[Task], noun: str, workers: "Workers", left: str = "left"
    ):
        self.tasks = [*tasks]
        self.waiting = deque(self.tasks)
        self.running: set[Task] = set()
        self._ended: set[Task] = set()
        self._at: Counter[Task] = Counter()
        self._noun, self._left = noun, left
        self._at_once, self._is_elsewhere = workers.at_once, workers.device is not None
        self._progress = Progress()
        self._bar: Any = None
        self._text = ""

    def replace(self, task: Task, *others: Task) -> None:
        """Do others next, in place of a task that could not be done."""
        place = self.tasks.index(task)
        self.tasks[place : place + 1] = others
        self._ended.discard(task)
        self.waiting.extendleft(reversed(others))

    def begin(self, task: Task) -> None:
        """A task has begun, perhaps not for the first time."""
        self.running.add(task)
        self._show(task)

    def advance(
        self, task: Task, at: int, amount: int, seconds: float, bar: Any = None
    ) -> None:
        """A report of a task."""
        self._at[task] = at
        self._progress.done(task.kind, amount, seconds)
        if bar is not None or self._is_elsewhere:
            self._show(task, bar)

    def end(self, task: Task) -> None:
        """A task has ended."""
        self.running.discard(task)
        self._ended.add(task)
        self._at[task] = task.amount
        if self._is_elsewhere:
            self._show(task)

    def _show(self, task: Task, bar: Any = None) -> None:
        left: Counter[str] = Counter()
        for each in self.tasks:
            left[each.kind] += max(each.amount - self._at[each], 0)
        n_ended, n = len(self._ended), len(self.tasks)
        of = [task]
        text = f"{self._noun} {n_ended + 1} of {n} {task.name}"
        if self._is_elsewhere:
            of = self.tasks
            text = f"{n_ended} of {n} {self._noun}s done, {len(self.running)} running"
            # no bar in a log
            self._bar = bar = self._bar or tqdm(total=1, disable=None)
        at, amount = sum(self._at[t] for t in of), sum(t.amount for t in of)
        if at and max(each.amount for each in of) > 1:
            text += f" · {100 * at / amount:.0f} %"
        at_once = min(self._at_once, n - n_ended)
        if at_once and (time_left := self._progress.time_left(left, at_once)):
            text += f" · {time_left} {self._left}"
        self._text = text
        self._progress.show(text, bar)
        if self._bar is not None:
            self._bar.n, self._bar.total = at, amount
            self._bar.refresh()

    def close(self) -> None:
        """End the display."""
        if self._bar is not None:
            self._bar.close()
            if self._bar.disable:  # in a log, which has not said all
                self._progress.show(self._text)


class Workers:
    """
    Who does tasks: this process, one after the other. `cluster.Cluster` is many.

    Attributes:
        at_once: Number of tasks that are done at the same time.
        device: Device of other machines' tasks; None where they are done here.
    """

    at_once: int = 1
    device: str | None = None

    def run(self, queue: TaskQueue) -> Iterator[Done]:
        """
        Do tasks, also those that come to the queue meanwhile.

        Raises:
            Exception: What a task raises, where it is done here.
        """
        while queue.waiting:
            task = queue.waiting.popleft()
            queue.begin(task)
            report = Reporter(partial(queue.advance, task))
            value = task.call(report)
            report.end(task.amount)
            queue.end(task)
            yield Done(task, value)

    def sharing(self, folder: Path) -> AbstractContextManager[None]:
        """Where tasks read and write a folder."""
        return nullcontext()
