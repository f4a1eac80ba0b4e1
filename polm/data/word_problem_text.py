"""How a word problem is written for a small language model, and variants of it for training.

Four steps, all of them functions of the question alone, so held-out questions are treated exactly alike:

1. Numbers are masked and called N0, N1, ... by size, the largest first (equal ones in order of appearance). Which of
   two numbers is larger decides between N0 - N1 and N1 - N0, and a masked number would hide it.
2. Words are lower-cased and stand between single spaces, as do punctuation marks.
3. Names become name0, name1, ...: it never matters who has the apples, only who is who.
4. What is counted becomes thing0, thing1, ...: the words after a number that the question mentions again. Which
   number the question asks about is then visible even if the word itself was never seen in training.

Names and things are counted from the part that asks ("how many ..."), then from the beginning: name0 and thing0 are
whom and what the question is about.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random

from polm.data.benchmarks import ANSWER_MARKER
from polm.data.word_problem_sources import Problem, compute_value
from polm.text.arithmetic import Node, format_expression

CommonWords = frozenset[str]

# Words after a number within which the counted thing is looked for: "N0 large red balloons".
THING_WINDOW = 3
_WORD = re.compile(r"N[0-9](?![0-9])|'s\b|[^\W\d_]+(?:'(?!s\b)[^\W\d_]+)?|[0-9]+(?:\.[0-9]+)?|[^\w\s]")
_VARIABLE = re.compile(r"N[0-9]")
_SYMBOL = re.compile(r"(name|thing)[0-9]+")
_TITLE = re.compile(r"\b(Dr|Mr|Mrs|Ms)\.")  # with this full stop a title would end a sentence
_SENTENCE_ENDS = frozenset('.?!"')
_QUESTION_WORDS = frozenset(["how", "what", "which"])
# A skipped word may stand between a number and its thing ("N0 more of the ..."); a kept one is no thing itself.
_SKIPPED_WORDS = frozenset(["more", "other", "different", "of"])
_KEPT_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        a about after again ago all already also altogether always am amount an and another any are as at away back bag
        bags be because become been before began begin being between both bought box boxes break broke but buy by came
        can cent cents change combined come cost costs could cut day days did divide divided do does dollar dollars done
        double down dozen dozens during each earn earned eat ended enough equal equally evenly every everyone extra far
        few fewer find first fit for found friend friends from full gave get gets give given go goes gone got group
        groups had half has have he heavy help her hers high him his hour hours how i if in into is it its just keep
        keeps kept last later leave leaves left less let long longer lost made make makes many me minute minutes money
        month months most much must my need needed needs new next no not now number off on once one only or order others
        our out over own paid part pay people per person piece pieces place placed price put rate receive received
        remain remained remaining rest row rows same save saved second seconds sell sells share shared she short should
        sold some spend spends spent split start started still take takes tall taller than that the their theirs them
        then there these they third this those three times to today together tomorrow took total twice two under until
        up use used was we week weeks weigh weighs weight went were what when where which while who whole whose will
        with without work would year years yesterday yet you your
        """,
    )
)


@dataclass(frozen=True)
class Rendered:
    """What a model sees and shall write; `numbers` are in the order of N0, N1, ... of the prompt."""

    prompt: str
    solution: str
    numbers: tuple[float, ...]


def split_words(text: str) -> list[str]:
    """Words, numbers, variables and punctuation marks; the possessive 's is a word of its own."""
    return _WORD.findall(_TITLE.sub(r"\1", text.replace("\u2019", "'")))


def collect_common_words(questions: Iterable[str]) -> CommonWords:
    """Words that occur in lower case somewhere and are not mostly capitalised: every other capitalised word is a name.

    Capital letters at the beginning of a sentence say nothing and are not counted.
    """
    lower: Counter[str] = Counter()
    upper: Counter[str] = Counter()
    for question in questions:
        before = "."
        for word in split_words(question):
            if word[0].isalpha() and not _VARIABLE.fullmatch(word):
                if word[0].islower():
                    lower[word] += 1
                elif before not in _SENTENCE_ENDS:
                    upper[word.lower()] += 1
            before = word
    return frozenset(word for word, count in lower.items() if count > upper[word])


def render_problem(problem: Problem, common_words: CommonWords) -> Rendered:
    """The prompt, its solution and its numbers, as described at the top of this file.

    Solution: `#### N0 - N1`, an expression whose operands of + and * stand in ascending order.
    """
    order = sorted(range(len(problem.numbers)), key=lambda index: (-problem.numbers[index], index))
    names = {f"N{index}": f"N{rank}" for rank, index in enumerate(order)}
    words = _mask_words(problem.masked, common_words)
    prompt = " ".join(names.get(word, word) for word in words)
    expression = format_expression(_sort_operands(_rename(problem.equation, names)))
    numbers = tuple(problem.numbers[index] for index in order)
    return Rendered(prompt, f"{ANSWER_MARKER} {expression}", numbers)


def normalise_question(problem: Problem) -> str:
    """The question in lower case with every number as N: equal for the same question with other numbers."""
    return " ".join("N" if _VARIABLE.fullmatch(word) else word.lower() for word in split_words(problem.masked))


def mask_question(problem: Problem, common_words: CommonWords) -> str:
    """The question with names and things masked and every number as N: equal for questions of one pattern."""
    words = _mask_words(problem.masked, common_words)
    return " ".join("N" if _VARIABLE.fullmatch(word) else word for word in words)


def renumber(problem: Problem, rng: Random) -> Problem | None:
    """The same question with other numbers, under which every step of the equation keeps its kind of result.

    Numbers change places and are multiplied by small factors; each step's value must stay on its side of zero and of
    one (what is subtracted stays smaller), and all numbers must be different. None where no such numbers were found.
    """
    kinds = _list_step_kinds(problem.equation, problem.numbers)
    for _ in range(8):
        numbers = [value * rng.choice((1, 1, 2, 3)) for value in rng.sample(problem.numbers, len(problem.numbers))]
        is_new = len(set(numbers)) == len(numbers) and tuple(numbers) != problem.numbers
        if is_new and _list_step_kinds(problem.equation, numbers) == kinds:
            answer = compute_value(problem.equation, numbers)
            return replace(problem, numbers=tuple(numbers), answer=answer, equations=(problem.equation,))
    return None


@lru_cache(maxsize=20_000)
def stem(word: str) -> str:
    """A plural in its singular, roughly; other words as they are."""
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if re.search(r"(?:ch|sh|x|ss|z|o)es$", word):
        return word[:-2]
    return word[:-1] if len(word) > 3 and re.search(r"[^siu]s$", word) else word


@lru_cache(maxsize=20_000)  # every variant of a question has the same words
def _mask_words(masked: str, common_words: CommonWords) -> tuple[str, ...]:
    """The words of a question with masked names and things, both counted as described at the top of this file."""
    words = _name_things(_name_persons(split_words(masked), common_words))
    seen: Counter[str] = Counter()
    names: dict[str, str] = {}
    for word in [*words[_find_asking_part(words)], *words]:
        if (symbol := _SYMBOL.fullmatch(word)) and word not in names:
            names[word] = f"{symbol[1]}{seen[symbol[1]]}"
            seen[symbol[1]] += 1
    return tuple(names.get(word, word) for word in words)


def _find_asking_part(words: Sequence[str]) -> slice:
    """The last sentence with a question mark (else the last one), from its question word on."""
    ends = [index for index, word in enumerate(words) if word in ".?!"]
    starts = [0, *(index + 1 for index in ends)]
    sentences = [range(begin, end) for begin, end in zip(starts, [*starts[1:], len(words)], strict=True) if begin < end]
    asking = [sentence for sentence in sentences if "?" in words[sentence.start : sentence.stop]]
    last = (asking or sentences or [range(0)])[-1]
    begin = next((index for index in last if words[index] in _QUESTION_WORDS), last.start)
    return slice(begin, last.stop)


def _name_persons(words: Sequence[str], common_words: CommonWords) -> list[str]:
    """Lower-cases the words; names become name0, ..., and a name of several words becomes one."""
    known: dict[str, str] = {}
    named: list[str] = []
    follows_name = False
    for word in words:
        lower = word.lower()
        is_name = word[0].isupper() and not _VARIABLE.fullmatch(word) and lower != "i" and lower not in common_words
        if is_name and follows_name:  # a surname: alone, it means the same person
            known.setdefault(lower, named[-1])
        elif is_name:
            named.append(known.setdefault(lower, f"name{len(set(known.values()))}"))
        else:
            named.append(word if _VARIABLE.fullmatch(word) else lower)
        follows_name = is_name
    return named


def _name_things(words: Sequence[str]) -> list[str]:
    """Words after a number that occur again (in singular or plural) become thing0, thing1, ... everywhere."""
    stems = [stem(word) for word in words]
    counts = Counter(stems)
    things: set[str] = set()
    for index, word in enumerate(words):
        if not _VARIABLE.fullmatch(word):
            continue
        for candidate in range(index + 1, min(index + 1 + THING_WINDOW, len(words))):
            if words[candidate] in _SKIPPED_WORDS:
                continue
            if not words[candidate].isalpha() or words[candidate] in _KEPT_WORDS:
                break
            if counts[stems[candidate]] > 1:
                things.add(stems[candidate])
    ordered = sorted(things, key=stems.index)
    names = {thing: f"thing{index}" for index, thing in enumerate(ordered)}
    return [names.get(stems[index], word) for index, word in enumerate(words)]


def _rename(tree: Node, names: Mapping[str, str]) -> Node:
    if isinstance(tree, tuple):
        return (tree[0], _rename(tree[1], names), _rename(tree[2], names))
    return names[tree] if isinstance(tree, str) else tree


def _sort_operands(tree: Node) -> Node:
    """Chains of + (or of *) of plain operands in ascending order, so that one function has one spelling."""
    if not isinstance(tree, tuple):
        return tree
    symbol = tree[0]
    if symbol not in "+*":
        return (symbol, _sort_operands(tree[1]), _sort_operands(tree[2]))
    operands = [_sort_operands(operand) for operand in _list_operands(tree, symbol)]
    # Bracketed operands first: ( N1 + N2 ) * N0. Within a kind by name; literals after variables.
    operands.sort(key=lambda node: (not isinstance(node, tuple), isinstance(node, float), format_expression(node)))
    first, *others = operands
    for operand in others:
        first = (symbol, first, operand)
    return first


def _list_operands(tree: Node, symbol: str) -> list[Node]:
    if isinstance(tree, tuple) and tree[0] == symbol:
        return _list_operands(tree[1], symbol) + _list_operands(tree[2], symbol)
    return [tree]


def _list_step_kinds(tree: Node, numbers: Sequence[float]) -> list[str]:
    """For each operation, inner ones first: is its value undefined, negative, zero, below one, or one and more."""
    if not isinstance(tree, tuple):
        return []
    value = compute_value(tree, numbers)
    kind = "undefined" if math.isnan(value) else "negative" if value < 0 else "zero" if value == 0 else "below one"
    inner = _list_step_kinds(tree[1], numbers) + _list_step_kinds(tree[2], numbers)
    return [*inner, "one and more" if value >= 1 else kind]
