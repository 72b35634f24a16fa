"""The loop of the fuzzers: cases by number, each read or refused within a second of processor time, counted in a JSON file.

The number of a case is the seed of everything drawn for it, so that a failing one is repeated by its number alone. A run whose
`--state` exists continues behind its last case; `--only 17,23` repeats cases without counting them.
"""

import argparse
import json
import resource
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelpatch.atomic import write_bytes
from modelpatch.errors import ModelpatchError

LONGEST = 1.0  # seconds of processor time
HANGING = 20.0  # seconds of processor time after which a case is stopped
MEMORY = 4 * 2**30  # bytes: a size that a damaged file states is not to be believed
SAVED_EVERY = 200  # cases
Case = Callable[[], str]  # reads, and returns a word for the outcome


class Hang(BaseException):
    """A case that was stopped."""


@dataclass
class Tally:
    """Counts of a run: the first case and the next one, outcomes, failures by case, and the slowest case."""

    first: int
    next: int
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0  # of processor time, of all cases
    slowest: float = 0.0
    slowest_case: int = -1

    @classmethod
    def load(cls, path: Path | None, first: int) -> "Tally":
        """The counts of an earlier part of the run, if there was one."""
        if path is None or not path.exists():
            return cls(first, first)
        given: dict[str, Any] = json.loads(path.read_text())
        return cls(**{**given, "outcomes": Counter(given["outcomes"])})

    def save(self, path: Path | None) -> None:
        """Write the counts where a file is given."""
        if path is not None:
            write_bytes(path, json.dumps(vars(self), indent=1).encode())


def options(about: str | None, default: int) -> argparse.ArgumentParser:
    """The options that fuzzers share."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=default, help="cases, from --seed on")
    parser.add_argument("--seed", type=int, default=0, help="the first case")
    parser.add_argument("--state", type=Path, help="a JSON file of counts, from which a repeated run continues")
    parser.add_argument("--only", help="numbers of cases to repeat, separated by commas")
    return parser


def run(prepare: Callable[[int], Case], given: argparse.Namespace) -> None:
    """Run the cases; `prepare(number)`, which is not timed, returns one. Ends with status 1 where one fails or is slow."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, _stop)
    only = [int(one) for one in given.only.split(",")] if given.only else None
    state = None if only else given.state
    tally = Tally.load(state, given.seed)
    prepare(-1)()  # what is imported and cached once
    for done, number in enumerate(only or range(tally.next, given.seed + given.count), 1):
        outcome, seconds, trace = _try(prepare(number))
        if seconds > LONGEST:  # once more: a stall of the machine is none of the case
            again = _try(prepare(number))
            outcome, seconds, trace = min((outcome, seconds, trace), again, key=lambda tried: tried[1])
        if seconds > LONGEST:
            trace, outcome = trace or f"{seconds:.2f} s", "slow"
        if trace:
            tally.failures[str(number)] = trace
            print(f"case {number}: {trace}", flush=True)
        if seconds > tally.slowest:
            tally.slowest, tally.slowest_case = seconds, number
        tally.outcomes[outcome] += 1
        tally.seconds += seconds
        tally.next = number + 1
        if done % SAVED_EVERY == 0:
            tally.save(state)
    tally.save(state)
    counts = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(tally.outcomes.items()))
    print(
        f"cases {tally.first:,} to {tally.next - 1:,}: {counts}; {tally.seconds:,.0f} s of processor time, the slowest",
        end="",
    )
    print(f" {tally.slowest:.2f} s (case {tally.slowest_case}), {len(tally.failures)} failures")
    raise SystemExit(bool(tally.failures))


def _stop(*_: Any) -> None:
    raise Hang


def _try(case: Case) -> tuple[str, float, str]:
    """The outcome of a case, its seconds of processor time, and the trace of an error that is none of the library's."""
    began, trace = time.process_time(), ""
    signal.setitimer(signal.ITIMER_PROF, HANGING)
    try:
        outcome = case()
    except ModelpatchError:
        outcome = "refused"
    except Hang:
        outcome, trace = "hang", traceback.format_exc(limit=-6)
    except Exception:
        outcome, trace = "raw error", traceback.format_exc(limit=-4)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return outcome, time.process_time() - began, trace
