"""The arithmetic world: twelve kinds of small problem in plain text, with their answers.

A problem is two lines, a question and an answer; some kinds show their steps before `so` and the answer:

    Q: sort 4 9 1 7
    A: 1 4 7 9
    Q: columns 57+48
    A: 7+8=15 5+4+1=10 so 105

The kinds ask for different computations (copying, recall from the context, recall from the weights, comparing,
counting, carrying, following a chain), so that removing one module of a model hurts them differently.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sparing.worlds.splits import Split, split_of

LETTERS = "abcdefghijklmnopqrstuvwxyz"
NAMES = ("Ann", "Bob", "Eva", "Max", "Mia", "Tom")
THINGS = ("apples", "books", "coins", "pears", "shells", "stones")
ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
        "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")  # fmt: skip
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
TALE = ("has", "and", "gets", "gives", "more", "away", "how", "many", "together", "than")
CHAIN_LIMIT = 20
STORY_LIMIT = 49


@dataclass(frozen=True)
class Example:
    """One problem with its answer.

    Attributes:
        text: question, steps and answer, with a newline at the end of each of the two lines.
        answer: start and end of the final answer in `text`, in characters.
        task: the kind of problem, a key of `TASKS`.
        difficulty: digits, items or steps, whichever the kind grows with; comparable within a kind only.
        guess: how often a guess is right that knows the form of the answer but computes nothing.
        key: what the problem is, without its wording; decides the split.
    """

    text: str
    answer: tuple[int, int]
    task: str
    difficulty: int
    guess: float
    key: str

    @property
    def prompt(self) -> str:
        """Everything up to and including `A:`, the text a model is given."""
        return self.text[: self.text.index("\nA:") + len("\nA:")]

    @property
    def solution(self) -> str:
        """The final answer."""
        return self.text[slice(*self.answer)]


class _Draft(NamedTuple):
    question: str
    answer: str
    key: str
    difficulty: int
    guess: float
    steps: str = ""


def example(task: str, split: Split, rng: random.Random) -> Example:
    """Draws one problem of a kind from a split.

    Raises:
        ValueError: `task` is not a key of `TASKS`.
    """
    if task not in TASKS:
        raise ValueError(f"expected one of the tasks {', '.join(TASKS)}, got {task!r}")
    while split_of((draft := TASKS[task](rng)).key) != split:
        pass
    head = f"Q: {draft.question}\nA: " + (f"{draft.steps} so " if draft.steps else "")
    span = (len(head), len(head) + len(draft.answer))
    return Example(f"{head}{draft.answer}\n", span, task, draft.difficulty, draft.guess, draft.key)


def examples(split: Split, per_task: int, seed: int = 0, tasks: Sequence[str] | None = None) -> list[Example]:
    """Draws `per_task` problems of every kind, no text twice, kinds in turn.

    The first problems of a longer list are those of a shorter one with the same seed.
    """
    drawn, seen = [], set()
    rng = random.Random(f"{split}/{seed}")
    for _ in range(per_task):
        for task in tasks or TASKS:
            while (made := example(task, split, rng)).text in seen:
                pass
            seen.add(made.text)
            drawn.append(made)
    return drawn


def stream(split: Split, seed: int | str) -> Iterator[Example]:
    """Yields problems without end, their kinds drawn uniformly; the same seed gives the same stream."""
    rng = random.Random(f"stream/{split}/{seed}")
    tasks = list(TASKS)
    while True:
        yield example(rng.choice(tasks), split, rng)


def final_answer(completion: str) -> str:
    """Returns the answer in what a model wrote after `A:`: the first line, after the last `so` if there is one."""
    line = completion.lstrip(" ").partition("\n")[0]
    return line.rpartition("so ")[2].strip()


def chance(drawn: Iterable[Example]) -> dict[str, float]:
    """Returns, per task, how often the better of two guessers is right on exactly these problems.

    One guesser draws at random among the answers of the right form (an item of the list, an order of the
    items, a number of the right length); the other always says the most frequent answer of the set, which it
    is told. The second makes the level an optimistic one, so that beating it means something.
    """
    by_task: dict[str, list[Example]] = {}
    for made in drawn:
        by_task.setdefault(made.task, []).append(made)
    return {
        task: max(
            sum(made.guess for made in group) / len(group),
            Counter(made.solution for made in group).most_common(1)[0][1] / len(group),
        )
        for task, group in by_task.items()
    }


def in_words(number: int) -> str:
    """Spells a number below ten thousand in English, without hyphens or `and`."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10] + (f" {ONES[number % 10]}" if number % 10 else "")
    unit, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    return f"{ONES[number // unit]} {name}" + (f" {in_words(number % unit)}" if number % unit else "")


def _copy(rng: random.Random) -> _Draft:
    size = rng.randint(3, 8)
    items = " ".join(rng.choices(LETTERS, k=size))
    return _Draft(f"copy {items}", items, f"copy {items}", size, len(LETTERS) ** -size)


def _reverse(rng: random.Random) -> _Draft:
    size = rng.randint(3, 8)
    items = " ".join(rng.choices(LETTERS, k=size))
    # Some orders coincide when letters repeat; a random order is the guess, as for sorting.
    return _Draft(f"reverse {items}", items[::-1], f"reverse {items}", size, 1 / _orders(items.split()))


def _lookup(rng: random.Random) -> _Draft:
    size = rng.randint(3, 8)
    names, values = rng.sample(LETTERS, size), rng.choices("0123456789", k=size)
    asked = rng.randrange(size)
    pairs = " ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
    question = f"lookup {pairs} {names[asked]}?"
    return _Draft(question, values[asked], question, size, values.count(values[asked]) / size)


def _words(rng: random.Random) -> _Draft:
    digits = rng.randint(1, 4)
    number = _number(rng, digits)
    return _Draft(f"words {number}", in_words(number), f"words {number}", digits, 1 / _numbers(digits))


def _compare(rng: random.Random) -> _Draft:
    digits = rng.randint(1, 3)
    relation = rng.choice(("less", "equal", "more"))
    while True:
        left = _number(rng, digits)
        # Half of the pairs agree in all but the last digit, so that the first digit alone does not decide.
        right = left // 10 * 10 + rng.randint(0, 9) if rng.random() < 0.5 else _number(rng, digits)
        right = left if relation == "equal" else right
        if relation == ("less" if left < right else "more" if left > right else "equal"):
            break
    low, high = sorted((left, right))
    return _Draft(f"compare {left} {right}", relation, f"compare {low} {high}", digits, 1 / 3)


def _largest(rng: random.Random) -> _Draft:
    size = rng.randint(3, 6)
    items = rng.sample(range(100), size)
    key = f"largest {sorted(items)}"
    return _Draft(f"largest {_join(items)}", str(max(items)), key, size, 1 / size)


def _sort(rng: random.Random) -> _Draft:
    size = rng.randint(3, 7)
    items = rng.choices(range(10), k=size)
    return _Draft(f"sort {_join(items)}", _join(sorted(items)), f"sort {sorted(items)}", size, 1 / _orders(items))


def _count(rng: random.Random) -> _Draft:
    size = rng.randint(4, 9)
    asked = rng.choice(LETTERS)
    times = rng.randint(0, size)
    items = [asked] * times + rng.choices(LETTERS.replace(asked, ""), k=size - times)
    rng.shuffle(items)
    question = f"count {asked} in {' '.join(items)}"
    return _Draft(question, str(times), question, size, 1 / (size + 1))


def _add(rng: random.Random) -> _Draft:
    digits = rng.randint(1, 3)
    left, right = _number(rng, digits), _number(rng, digits)
    # The most frequent sum of two uniform numbers of N values has probability 1/N.
    return _Draft(f"{left}+{right}", str(left + right), _sum_key(left, right), digits, 1 / _numbers(digits))


def _columns(rng: random.Random) -> _Draft:
    digits = rng.randint(2, 4)
    left, right = _number(rng, digits), _number(rng, digits)
    steps, carry = [], 0
    for place in range(digits):
        upper, lower = left // 10**place % 10, right // 10**place % 10
        total = upper + lower + carry
        steps.append(f"{upper}+{lower}" + ("+1" if carry else "") + f"={total}")
        carry = total // 10
    key = _sum_key(left, right)
    return _Draft(f"columns {left}+{right}", str(left + right), key, digits, 1 / _numbers(digits), " ".join(steps))


def _chain(rng: random.Random) -> _Draft:
    size = rng.randint(2, 5)
    names = rng.sample(LETTERS, size)
    values = [rng.randint(0, 9)]
    given, steps = [f"{names[0]}={values[0]}"], [f"{names[0]}={values[0]}"]
    for here in range(1, size):
        source = rng.randrange(here)
        before = values[source]
        change = rng.choice([step for step in range(-9, 10) if step and 0 <= before + step <= CHAIN_LIMIT])
        values.append(before + change)
        given.append(f"{names[here]}={names[source]}{change:+d}")
        steps.append(f"{names[here]}={before}{change:+d}={values[-1]}")
    question = f"chain {' '.join(given)} {names[-1]}?"
    return _Draft(question, str(values[-1]), question, size - 1, 1 / (CHAIN_LIMIT + 1), " ".join(steps))


def _story(rng: random.Random) -> _Draft:
    who, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    form = rng.choice(("gets", "gives", "together", "more", "gets and gives"))
    first, second = rng.randint(2, STORY_LIMIT), rng.randint(2, STORY_LIMIT)
    if form in ("gives", "more"):
        second, first = sorted((first, second))
    total = first + second
    guess = 1 / (2 * STORY_LIMIT)
    start = f"{who} has {first} {thing}"
    if form == "gets":
        tale, steps, answer = f"{start} and gets {second} more, how many", f"{first}+{second}={total}", total
    elif form == "together":
        tale, steps, answer = (
            f"{start} and {other} has {second}, how many together",
            f"{first}+{second}={total}",
            total,
        )
    elif form == "gets and gives":
        third = rng.randint(2, total)
        answer = total - third
        tale = f"{start}, gets {second} more and gives {third} away, how many"
        steps = f"{first}+{second}={total} {total}-{third}={answer}"
        return _Draft(f"{tale}?", str(answer), f"story {first} {second} {third}", 2, guess, steps)
    else:
        answer = first - second
        tale = (
            f"{start} and gives {second} away, how many" if form == "gives" else f"{start}, how many more than {second}"
        )
        steps = f"{first}-{second}={answer}"
        return _Draft(f"{tale}?", str(answer), f"difference {first} {second}", 1, guess, steps)
    return _Draft(f"{tale}?", str(answer), _sum_key(first, second), 1, guess, steps)


TASKS: dict[str, Callable[[random.Random], _Draft]] = {
    "copy": _copy,
    "reverse": _reverse,
    "lookup": _lookup,
    "words": _words,
    "compare": _compare,
    "largest": _largest,
    "sort": _sort,
    "count": _count,
    "add": _add,
    "columns": _columns,
    "chain": _chain,
    "story": _story,
}

WORDS = (
    *TASKS,
    *ONES,
    *filter(None, TENS),
    "hundred",
    "thousand",
    "less",
    "equal",
    "in",
    "so",
    *NAMES,
    *THINGS,
    *TALE,
)
MARKERS = ("Q:", "A:")


def _smallest(digits: int) -> int:
    return 0 if digits == 1 else 10 ** (digits - 1)


def _numbers(digits: int) -> int:
    return 10**digits - _smallest(digits)


def _number(rng: random.Random, digits: int) -> int:
    return rng.randrange(_smallest(digits), 10**digits)


def _orders(items: Sequence) -> int:
    return math.factorial(len(items)) // math.prod(math.factorial(times) for times in Counter(items).values())


def _sum_key(left: int, right: int) -> str:
    # One key for a sum in either order and in every kind that asks for just this sum: held out of one is held out
    # of all. Two-step stories and chains may still show it as a step.
    return f"sum {min(left, right)} {max(left, right)}"


def _join(items: Iterable[int]) -> str:
    return " ".join(map(str, items))
