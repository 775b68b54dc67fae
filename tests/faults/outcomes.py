"""The outcome of one fault: clean, or one of the four ways in which a program fails a person."""

from __future__ import annotations

import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from simpletuner.errors import SimpleTunerError

HANG_S = 60
DISK_FULL_STATUS = 507
KINDS = ("clean", "traceback", "hang", "wrong code", "lost")


class Hang(BaseException):
    """No answer in time; not an Exception, so that no code under test catches it."""


class WrongCode(Exception):
    """Another exit code than this fault must have; the text says which."""


class Lost(Exception):
    """Something that was sound before the fault is gone or different; the text says what."""


@dataclass
class Tally:
    """Outcomes of one campaign. examples: the first of each kind that is not clean."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def try_one(self, label: str, attempt: Callable[[], object]) -> None:
        kind, text = "clean", ""
        try:
            with time_limit():
                attempt()
        except SimpleTunerError:
            pass
        except Hang:
            kind = "hang"
        except WrongCode as error:
            kind, text = "wrong code", str(error)
        except Lost as error:
            kind, text = "lost", str(error)
        except Exception:  # what this campaign looks for
            kind, text = "traceback", traceback.format_exc(limit=-8)
        self.counts[kind] += 1
        if kind != "clean":
            self.examples.setdefault(kind, f"{label}: {text}")

    @property
    def failures(self) -> int:
        return sum(self.counts[kind] for kind in KINDS[1:])

    def __str__(self) -> str:
        counts = "".join(f"{self.counts[kind]:>12}" for kind in KINDS)
        return f"{self.name:<28}{sum(self.counts.values()):>8}{counts}"


def require_answer(status: int) -> None:
    """Raise WrongCode for the answer of a program that has failed. A full disk is no failure."""
    if status >= 500 and status != DISK_FULL_STATUS:
        raise WrongCode(f"status {status}")


def heading() -> str:
    return f"{'':<28}{'tried':>8}" + "".join(f"{kind:>12}" for kind in KINDS)


def report(tallies: Iterable[Tally]) -> int:
    """Print the table, and the first example of each failure; return the number of failures."""
    failures = 0
    print(heading())
    for tally in tallies:
        print(tally, flush=True)
        failures += tally.failures
        for kind, example in tally.examples.items():
            print(f"    {kind}: {example}")
    return failures


@contextmanager
def time_limit() -> Iterator[None]:
    def expire(number: int, frame: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(HANG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
