"""Prose: sentences of a small random grammar.

Prose is the filler of the demo corpus. Its form is easy to learn and its content cannot be predicted: nearly
every word is a free choice among several. The loss on it stays high however long one trains, and it teaches
nothing about the tasks; a good token weighting should spend little on it.
"""

from __future__ import annotations

from random import Random

from polm.demo.tasks_reason import COLOURS, NAMES, THINGS

ADJECTIVES = (*COLOURS, "old", "young", "small", "tall", "quiet", "bright", "cold", "warm")
BEINGS = ("dog", "cat", "bird", "fox", "child", "farmer", "sailor", "king", "queen")
PLACES = ("river", "hill", "house", "garden", "road", "tree", "bridge", "market", "lake")
VERBS = ("sees", "follows", "carries", "likes", "paints", "hides", "calls", "helps", "watches")
MOVES = ("runs", "sleeps", "waits", "sings", "dances", "rests")
ADVERBS = ("slowly", "quickly", "often", "always", "never")
PREPOSITIONS = ("near", "under", "behind", "in")
JOINERS = ("and", "but", "while", "because")

SENTENCES_PER_DOCUMENT = (2, 5)
ADJECTIVE_CHANCE = 0.5
NAME_CHANCE = 0.3
PLURAL_CHANCE = 0.3
INTRANSITIVE_CHANCE = 0.3
ADVERB_CHANCE = 0.3
PLACE_CHANCE = 0.5
JOIN_CHANCE = 0.25


def _adjective(rng: Random) -> list[str]:
    return [rng.choice(ADJECTIVES)] if rng.random() < ADJECTIVE_CHANCE else []


def _thing(rng: Random) -> list[str]:
    """The object of a verb: a name, some things, or a being."""
    draw = rng.random()
    if draw < NAME_CHANCE:
        return [rng.choice(NAMES)]
    if draw < NAME_CHANCE + PLURAL_CHANCE:
        return ["some", *_adjective(rng), rng.choice(THINGS)]
    return ["the", *_adjective(rng), rng.choice(BEINGS)]


def _subject(rng: Random) -> list[str]:
    """A name or a being: the verbs of the grammar are singular."""
    return [rng.choice(NAMES)] if rng.random() < NAME_CHANCE else ["the", *_adjective(rng), rng.choice(BEINGS)]


def _clause(rng: Random) -> list[str]:
    words = _subject(rng)
    if rng.random() < ADVERB_CHANCE:
        words.append(rng.choice(ADVERBS))
    words += [rng.choice(MOVES)] if rng.random() < INTRANSITIVE_CHANCE else [rng.choice(VERBS), *_thing(rng)]
    if rng.random() < PLACE_CHANCE:
        words += [rng.choice(PREPOSITIONS), "the", *_adjective(rng), rng.choice(PLACES)]
    return words


def generate_prose(rng: Random) -> str:
    """Return a document of two to five sentences, such as `the old king never waits behind the hill . ...`."""
    sentences: list[str] = []
    for _ in range(rng.randint(*SENTENCES_PER_DOCUMENT)):
        words = _clause(rng)
        if rng.random() < JOIN_CHANCE:
            words += [rng.choice(JOINERS), *_clause(rng)]
        sentences.append(" ".join([*words, "."]))
    return " ".join(sentences)
