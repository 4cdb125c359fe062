"""The arithmetic world: its answers, its splits, its chance levels and its tokenizer."""

import itertools
import random
import re
import subprocess
import sys
from collections import Counter

import pytest

from sparing.worlds import arithmetic
from sparing.worlds.vocabulary import word_tokenizer

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def drawn():
    return arithmetic.examples("train", 150, seed=3) + arithmetic.examples("test", 50, seed=4)


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(arithmetic.WORDS, arithmetic.MARKERS)


def solve(question):
    """Answers a question from its text alone, by other means than the generator's."""
    if re.fullmatch(r"(columns )?\d+\+\d+", question):
        return str(sum(int(number) for number in re.findall(r"\d+", question)))
    task, _, rest = question.partition(" ")
    items = rest.split()
    numbers = [int(number) for number in re.findall(r"\d+", question)]
    match task:
        case "copy":
            return rest
        case "reverse":
            return " ".join(reversed(items))
        case "lookup":
            return dict(pair.split("=") for pair in items[:-1])[items[-1].rstrip("?")]
        case "words":
            return spell(rest)
        case "compare":
            return ["less", "equal", "more"][(numbers[0] > numbers[1]) - (numbers[0] < numbers[1]) + 1]
        case "largest":
            return str(sorted(numbers)[-1])
        case "sort":
            return " ".join(item for digit in "0123456789" for item in items if item == digit)
        case "count":
            return str(items[2:].count(items[0]))
        case "chain":
            known = {}
            for line in items[:-1]:
                name, _, value = line.partition("=")
                known[name] = eval(value, {"__builtins__": {}}, known)
            return str(known[items[-1].rstrip("?")])
    signs = [-1 if "gives" in part or "than" in part else 1 for part in re.findall(r"[^\d]+(?=\d)|\D+$", question)]
    if "how many more than" in question:
        signs = [1, -1]
    return str(sum(sign * number for sign, number in zip(signs, numbers, strict=False)))


def spell(digits):
    """Spells digits place by place, from a table of its own."""
    small = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    small = (small + "sixteen seventeen eighteen nineteen").split()
    tens = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
    if int(digits) == 0:
        return "zero"
    thousands, hundreds, rest = int(digits) // 1000, int(digits) // 100 % 10, int(digits) % 100
    words = [small[thousands], "thousand"] if thousands else []
    words += [small[hundreds], "hundred"] if hundreds else []
    if rest >= 20:
        words += [tens[rest // 10 - 2]] + ([small[rest % 10]] if rest % 10 else [])
    elif rest:
        words += [small[rest]]
    return " ".join(words)


def test_answers_agree_with_an_independent_solver(drawn):
    for made in drawn:
        question = made.prompt.removeprefix("Q: ").removesuffix("\nA:")
        assert made.solution == solve(question), made.text


def test_written_steps_are_true(drawn):
    checked = 0
    for made in drawn:
        steps = made.text[len(made.prompt) : made.answer[0]]
        for left, right in re.findall(r"(?:^| |=)(\d+(?:[+-]\d+)+)=(\d+)", steps):
            assert eval(left) == int(right), made.text
            checked += 1
    assert checked > 500


def test_text_is_two_lines_and_the_span_is_the_answer(drawn):
    for made in drawn:
        assert re.fullmatch(r"Q: [^\n]+\nA: [^\n]+\n", made.text)
        assert made.text.endswith(f" {made.solution}\n")
        assert arithmetic.final_answer(made.text[len(made.prompt) :] + "Q: more\nA: so 1\n") == made.solution


def test_same_seed_same_problems_in_another_process():
    code = "from sparing.worlds.arithmetic import examples; import sys; sys.stdout.write(examples('test', 3, seed=5)[-1].text)"
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert elsewhere == arithmetic.examples("test", 3, seed=5)[-1].text
    assert arithmetic.examples("test", 3, seed=6) != arithmetic.examples("test", 3, seed=5)


def test_longer_list_begins_with_the_shorter():
    assert arithmetic.examples("test", 6, seed=2)[:36] == arithmetic.examples("test", 3, seed=2)


def test_stream_repeats_and_holds_every_task():
    first, again = (list(itertools.islice(arithmetic.stream("train", 1), 200)) for _ in range(2))
    assert first == again
    assert {made.task for made in first} == set(arithmetic.TASKS)


def test_splits_share_no_problem_whatever_the_seeds():
    keys = {split: {made.key for made in arithmetic.examples(split, 150, seed=0)} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not keys[one] & keys[other]
    for split in SPLITS:
        assert all(arithmetic.split_of(key) == split for key in keys[split])


def test_a_held_out_sum_is_held_out_in_either_order_and_of_every_task_that_asks_for_it():
    split = {}
    for name in SPLITS:
        for made in arithmetic.examples(name, 300, seed=1, tasks=["add", "columns", "story"]):
            question = made.text.split("\n")[0]
            if "gives" not in question and "than" not in question:
                pair = tuple(sorted(int(number) for number in re.findall(r"\d+", question)))
                assert split.setdefault(pair, name) == name, made.text


def test_split_shares():
    shares = Counter(arithmetic.split_of(f"problem {number}") for number in range(4000))
    assert shares["train"] / 4000 == pytest.approx(0.9, abs=0.02)
    assert shares["test"] / 4000 == pytest.approx(0.05, abs=0.015)


def test_guesses_are_the_chance_of_a_blind_guesser():
    rng = random.Random(0)
    for made in arithmetic.examples("train", 20, seed=8, tasks=["largest", "sort", "reverse", "lookup"]):
        items = made.text.split("\n")[0].split()[2:]
        if made.task == "lookup":
            values = [pair.split("=")[1] for pair in items[:-1]]
            hits = sum(value == made.solution for value in values) / len(values)
        elif made.task == "largest":
            hits = sum(item == made.solution for item in items) / len(items)
        else:
            orders = {tuple(rng.sample(items, len(items))) for _ in range(3000)} if len(items) < 5 else None
            hits = 1 / len(orders) if orders else made.guess
        assert made.guess == pytest.approx(hits), made.text


def test_chance_is_the_better_guesser():
    made = arithmetic.examples("test", 200, seed=1)
    levels = arithmetic.chance(made)
    assert list(levels) == list(arithmetic.TASKS)
    for task, level in levels.items():
        group = [example for example in made if example.task == task]
        for constant in {example.solution for example in group}:
            assert level >= sum(example.solution == constant for example in group) / len(group)
        assert level >= sum(example.guess for example in group) / len(group)
        assert level < 0.5


def test_unknown_task_names_the_known_ones():
    with pytest.raises(ValueError, match="copy, reverse.*got 'cook'"):
        arithmetic.example("cook", "train", random.Random(0))


def test_tokenizer_gives_any_ascii_text_back(tokenizer, drawn):
    odd = "Hello, World!\n\n  sorted so-so 3.5 ' x  Q:A: <pad ~"
    for text in [odd, *(made.text for made in drawn)]:
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_splits_at_the_end_of_the_prompt(tokenizer, drawn):
    for made in drawn:
        parts = [made.prompt, made.text[len(made.prompt) :]]
        ids = tokenizer(parts, add_special_tokens=False).input_ids
        assert list(itertools.chain(*ids)) == tokenizer(made.text, add_special_tokens=False).input_ids


def test_tokenizer_specials_and_size(tokenizer):
    specials = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert specials == [0, 1, 2, 3]
    assert tokenizer.padding_side == "left"
    assert len(tokenizer) < 256
    assert tokenizer.convert_ids_to_tokens(tokenizer("Q: sort 4 12").input_ids) == [
        "<bos>", "Q:", " sort", " 4", " 1", "2",
    ]  # fmt: skip
