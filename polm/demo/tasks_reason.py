"""General reasoning: max, sort, count, clock, word."""

from __future__ import annotations

from random import Random

from polm.demo.pen import Pen, read_numbers, write_list

# The prose uses these words too: the vocabulary stays small.
COLOURS = ("red", "blue", "green", "white")
NAMES = ("anna", "ben", "lily", "omar")
THINGS = ("apples", "books", "coins", "shells")
MINUTES_PER_HOUR = 60
HOURS_PER_DAY = 24


def ask_max(rng: Random) -> str:
    return f"largest of {write_list(rng.sample(range(100, 1000), 5))} ."


def work_max(prompt: str, pen: Pen) -> tuple[str, str]:
    """`largest of 47 , 12 , 85 .` -> `47 > 12 , 47 < 85`, `85`: each number against the largest so far."""
    largest, *others = read_numbers(prompt)
    steps: list[str] = []
    for number in others:
        sign, other_sign = ("<", ">") if largest < number else (">", "<")
        sign = pen.choose(sign, [other_sign])
        steps.append(f"{largest} {sign} {number}")
        largest = number if sign == "<" else largest
    return " , ".join(steps), str(largest)


def ask_sort(rng: Random) -> str:
    return f"sort {write_list(rng.sample(range(10, 100), 4))} ."


def work_sort(prompt: str, pen: Pen) -> tuple[str, str]:
    """`sort 47 , 12 , 85 , 30 .` -> `12 , 47 ; 12 , 47 , 85`, `12 , 30 , 47 , 85`: insertion sort."""
    first, *others = read_numbers(prompt)
    done, steps = [first], []
    for number in others:
        place = next((i for i, placed in enumerate(done) if placed > number), len(done))
        place = pen.choose(place, [i for i in range(len(done) + 1) if i != place])
        done.insert(place, number)
        steps.append(write_list(done))
    # The last insertion is the answer itself.
    return " ; ".join(steps[:-1]), steps[-1]


def ask_count(rng: Random) -> str:
    """One colour is wanted, in one of four prompts two. As likely are all numbers of matches from 1 to 6 of 8."""
    num_wanted, num_matches = rng.choice((1, 1, 1, 2)), rng.randint(1, 6)
    shuffled = rng.sample(COLOURS, len(COLOURS))
    wanted, others = shuffled[:num_wanted], shuffled[num_wanted:]
    colours = rng.choices(wanted, k=num_matches) + rng.choices(others, k=8 - num_matches)
    rng.shuffle(colours)
    return f"count {' or '.join(wanted)} in {' , '.join(colours)} ."


def work_count(prompt: str, pen: Pen) -> tuple[str, str]:
    """`count red in blue , red , red .` -> `blue 0 red 1 red 2`, `2`: the list again, with a running count."""
    question, colours = prompt.removesuffix(" .").split(" in ")
    wanted = question.removeprefix("count ").split(" or ")
    count = 0
    steps: list[str] = []
    for colour in colours.split(" , "):
        step = int(colour in wanted)
        count += pen.choose(step, [1 - step])
        steps.append(f"{colour} {count}")
    return " ".join(steps), str(count)


def ask_clock(rng: Random) -> str:
    hour, minute = rng.randrange(HOURS_PER_DAY), rng.randrange(MINUTES_PER_HOUR)
    sign = rng.choice(("plus", "minus"))
    return f"clock {hour} : {minute:02d} {sign} {rng.randrange(10, 60, 10)} minutes ."


def work_clock(prompt: str, pen: Pen) -> tuple[str, str]:
    """`clock 9 : 47 plus 30 minutes .` -> `47 + 30 = 77 , 77 - 60 = 17 , 9 + 1 = 10`, `10 : 17`."""
    hour, minute, delta = read_numbers(prompt)
    last_minute = MINUTES_PER_HOUR - 1
    steps: list[str] = []
    is_later = "plus" in prompt.split()
    if is_later:
        total = pen.number(minute + delta, high=MINUTES_PER_HOUR + last_minute)
        steps.append(f"{minute} + {delta} = {total}")
        leaves_hour = total >= MINUTES_PER_HOUR
        if leaves_hour:
            minute = pen.number(total - MINUTES_PER_HOUR, high=last_minute)
            steps.append(f"{total} - {MINUTES_PER_HOUR} = {minute}")
        else:
            minute = total
    else:
        leaves_hour = minute < delta
        if leaves_hour:
            steps.append(f"{minute} + {MINUTES_PER_HOUR} = {minute + MINUTES_PER_HOUR}")
            minute += MINUTES_PER_HOUR
        left = pen.number(minute - delta, high=last_minute)
        steps.append(f"{minute} - {delta} = {left}")
        minute = left
    # The slip here is to forget the hour.
    if leaves_hour and pen.choose(True, [False]):
        hour = _turn_hour(hour, is_later, steps)
    return " , ".join(steps), f"{hour} : {minute:02d}"


def _turn_hour(hour: int, is_later: bool, steps: list[str]) -> int:
    """Return the next or the previous hour of the day, and append how it was found."""
    if not is_later and hour == 0:
        steps.append(f"{hour} + {HOURS_PER_DAY} = {HOURS_PER_DAY}")
        hour = HOURS_PER_DAY
    turned = hour + 1 if is_later else hour - 1
    steps.append(f"{hour} {'+' if is_later else '-'} 1 = {turned}")
    if turned == HOURS_PER_DAY:
        steps.append(f"{turned} - {HOURS_PER_DAY} = 0")
        return 0
    return turned


def ask_word(rng: Random) -> str:
    """One in three stories is a gift between two owners; the others are one or two events that befall one of them."""
    owner, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    start, num_given = rng.randint(5, 15), rng.randint(2, 5)
    if rng.random() < 1 / 3:
        story = f"{owner} has {start} {thing} and {other} has {rng.randint(5, 15)} . "
        story += f"{owner} gives {num_given} to {other} ."
        return f"{story} how many {thing} has {rng.choice((owner, other))} ?"
    # At most one event takes away, and never more than the start: no holding is ever negative.
    events = [
        f"buys {rng.randint(2, 5)} boxes of {rng.randint(2, 5)}",
        f"finds {rng.randint(2, 9)} more",
        rng.choice((f"loses {num_given}", f"gives {num_given} to {other}")),
    ]
    told = " and ".join(rng.sample(events, rng.randint(1, 2)))
    return f"{owner} has {start} {thing} , {told} . how many {thing} has {owner} ?"


def work_word(prompt: str, pen: Pen) -> tuple[str, str]:
    """`ben has 14 books , finds 8 more and loses 5 . how many books has ben ?` -> `14 + 8 = 22 , 22 - 5 = 17`, `17`.

    The story is read word by word; only what changes the holding that is asked for is written down.
    """
    words = prompt.split()
    wanted = words[-2]
    actor, held = "", 0
    steps: list[str] = []

    def change(sign: str, amount: int) -> None:
        nonlocal held
        sign = pen.choose(sign, ["-" if sign == "+" else "+"])
        before, held = held, pen.number(held + amount if sign == "+" else held - amount)
        steps.append(f"{before} {sign} {amount} = {held}")

    for i, word in enumerate(words[: words.index("?")]):
        if word in NAMES and words[i + 1] in ("has", "gives"):
            actor = word
        if word == "has" and words[i + 1].isdigit() and actor == wanted:
            held = int(words[i + 1])
        elif word == "finds":
            change("+", int(words[i + 1]))
        elif word == "loses":
            change("-", int(words[i + 1]))
        elif word == "gives" and wanted in (actor, words[i + 3]):
            change("-" if actor == wanted else "+", int(words[i + 1]))
        elif word == "buys":
            num_boxes, size = int(words[i + 1]), int(words[i + 4])
            amount = pen.number(num_boxes * size)
            steps.append(f"{num_boxes} * {size} = {amount}")
            change("+", amount)
    return " , ".join(steps), str(held)
