"""Everyday prose from a slot grammar: short, plain, varied stories without facts, so that generations read as text.

About one sentence in twelve (a stable hash of its words) is never trained; those sentences measure perplexity.
"""

from __future__ import annotations

import random

from mega_core.embedded.facts import unit_hash

HELD_OUT = 0.08  # share of sentences kept out of training

_PEOPLE = (  # (name, pronoun, possessive)
    ("Anna", "she", "her"), ("Tom", "he", "his"), ("Lucy", "she", "her"), ("Ben", "he", "his"), ("Clara", "she", "her"),
    ("the teacher", "she", "her"), ("the farmer", "he", "his"), ("my uncle", "he", "his"), ("my aunt", "she", "her"),
    ("the doctor", "she", "her"), ("the baker", "he", "his"), ("our neighbour", "he", "his"),
    ("the girl", "she", "her"),
    ("the boy", "he", "his"), ("my sister", "she", "her"), ("my brother", "he", "his"), ("the old man", "he", "his"),
    ("the young woman", "she", "her"), ("the student", "she", "her"), ("the driver", "he", "his"),
    ("the nurse", "she", "her"),
    ("the gardener", "he", "his"), ("my grandmother", "she", "her"), ("my grandfather", "he", "his"),
)  # fmt: skip
_PLACES = (
    "market", "library", "park", "station", "school", "garden", "kitchen", "museum", "beach", "forest", "lake",
    "village",
    "harbour", "bakery", "office", "hospital", "theatre", "farm", "bookshop", "playground",
)  # fmt: skip
_THINGS = (
    "book", "letter", "map", "lamp", "chair", "bicycle", "camera", "clock", "basket", "coat", "umbrella", "box", "key",
    "picture", "radio", "guitar", "ball", "blanket", "bottle", "newspaper",
)  # fmt: skip
_FOODS = ("bread", "soup", "apples", "cheese", "cake", "rice", "tomatoes", "fish", "pancakes", "honey", "tea", "coffee")
_ANIMALS = ("dog", "cat", "horse", "bird", "rabbit", "goat", "duck", "cow", "fox", "squirrel")
_ADJECTIVES = ("old", "small", "quiet", "bright", "warm", "heavy", "new", "green", "blue", "red", "broken", "beautiful")
_FEELINGS = ("happy", "tired", "hungry", "proud", "surprised", "calm", "nervous", "glad", "curious", "cheerful")
_TIMES = (
    "In the morning", "In the evening", "On Sunday", "Last night", "After lunch", "Before dinner", "Every day",
    "One day",
    "Last week", "On a rainy day", "In the summer", "At noon", "On the weekend", "Early in the day",
)  # fmt: skip
_WEATHER = ("rainy", "sunny", "cold", "windy", "cloudy", "warm", "foggy", "mild")
_ROOMS = ("kitchen", "garden", "living room", "garage", "hall", "yard")

_OPENINGS = (
    "{T}, {p} went to the {l}.",
    "{T}, {p} walked to the {l} with a {n}.",
    "{P} wanted to buy some {f} at the {l}.",
    "{P} found a {a} {n} near the {l}.",
    "{P} has a {a} {n} at home.",
    "It was a {w} day and {p} stayed in the {r}.",
    "It was a {w} day, so {p} took a walk to the {l}.",
    "{T}, {p} met {q} in front of the {l}.",
    "There is a {a} {l} at the end of the street.",
    "{P} lives in a {a} house near the {l}.",
    "{T}, {p} made some {f} for {q}.",
    "{P} lost a {n} on the way to the {l}.",
    "{P} saw a {a} {c} behind the {l}.",
    "You can see a {a} {c} in the {l}.",
    "I went to the {l} because I needed a {n}.",
    "I like to sit in the {l} with a {n}.",
    "The {l} was full of people that day.",
    "{T}, the {c} of {p} ran away.",
    "Therefore, {p} decided to visit the {l}.",
    "Because it was {w}, {p} did not go to the {l}.",
    "Because {p} was {e}, nobody wanted to leave the {l}.",
    "You should bring a {n} when you go to the {l}.",
    "Therefore, {p} took the {a} {n} and left.",
)
_MIDDLES = (
    "{S} put the {n} on the table in the {r}.",
    "{S} looked at the {a} {c} for a long time.",
    "{S} talked with {q} about the {l}.",
    "{S} bought some {f} and a {a} {n}.",
    "{S} was {e} and began to sing.",
    "{S} opened the door and saw a {c}.",
    "{S} gave the {n} to {q}.",
    "{S} asked {q} for some {f}.",
    "{S} read a story about a {a} {c}.",
    "{S} cleaned the {r} and then made {f}.",
    "{S} waited near the {l} for an hour.",
    "{S} forgot the {n} in the {r}.",
    "The {n} was {a} but it worked well.",
    "The {c} slept under the {a} tree.",
    "The {f} tasted very good.",
    "The people at the {l} were friendly.",
    "The weather was {w} all day.",
    "{Q} was {e} about the news.",
    "{Q} came home with a {n} and some {f}.",
    "There was some {f} on the table.",
    "They talked about the {w} weather.",
    "They walked along the river to the {l}.",
    "They sat in the {r} and ate {f}.",
    "Nobody knew where the {n} was.",
    "It was {w} outside, but the {r} was warm.",
)
_ENDINGS = (
    "Then {s} went home.",
    "In the end, everyone was {e}.",
    "At night, {s} slept well.",
    "After that, {s} went back to the {l}.",
    "Later, {s} told {q} about the {n}.",
    "{S} wants to come back next week.",
    "It was a good day for {p}.",
    "{S} thanked {q} and smiled.",
    "They had dinner and talked for hours.",
    "The {c} was {e} again.",
    "{S} will need a new {n} soon.",
    "{S} kept the {n} for many years.",
    "Soon it was dark and {s} closed the window.",
    "They all laughed and ate some {f}.",
)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def noun(rng: random.Random) -> str:
    """A plain word."""
    return rng.choice(rng.choice((_PLACES, _THINGS, _FOODS, _ANIMALS, _ADJECTIVES)))


def held_out(sentence: str) -> bool:
    """True when training never shows this sentence."""
    return unit_hash(sentence, "prose") < HELD_OUT


def _fill(pattern: str, rng: random.Random, hero: tuple[str, str, str], other: tuple[str, str, str]) -> str:
    slots = {
        "{T}": lambda: rng.choice(_TIMES),
        "{p}": lambda: hero[0],
        "{P}": lambda: _capital(hero[0]),
        "{s}": lambda: hero[1],
        "{S}": lambda: _capital(hero[1]),
        "{q}": lambda: other[0],
        "{Q}": lambda: _capital(other[0]),
        "{l}": lambda: rng.choice(_PLACES),
        "{n}": lambda: rng.choice(_THINGS),
        "{f}": lambda: rng.choice(_FOODS),
        "{c}": lambda: rng.choice(_ANIMALS),
        "{a}": lambda: rng.choice(_ADJECTIVES),
        "{e}": lambda: rng.choice(_FEELINGS),
        "{w}": lambda: rng.choice(_WEATHER),
        "{r}": lambda: rng.choice(_ROOMS),
    }
    for slot, choose in slots.items():
        while slot in pattern:
            pattern = pattern.replace(slot, choose(), 1)
    return pattern.replace(" a old ", " an old ").replace("for I", "for me")


def _draw(
    patterns: tuple[str, ...], rng: random.Random, hero: tuple[str, str, str], other: tuple[str, str, str], hidden: bool
) -> str:
    for _ in range(2000):
        text = _fill(rng.choice(patterns), rng, hero, other)
        if held_out(text) == hidden:
            return text
    raise RuntimeError("no sentence on the wanted side of the split; widen the grammar")


def _cast(rng: random.Random) -> tuple[tuple[str, str, str], tuple[str, str, str]]:
    hero, other = rng.sample(_PEOPLE, 2)
    return hero, other


def sentence(rng: random.Random) -> str:
    """One trained sentence that can stand alone."""
    hero, other = _cast(rng)
    return _draw(_OPENINGS, rng, hero, other, hidden=False)


def story(rng: random.Random, held_out: bool = False) -> str:
    """Two to five sentences about the same person; with `held_out`, only sentences training never shows."""
    hero, other = _cast(rng)
    parts = [_OPENINGS, *[_MIDDLES] * rng.randint(1, 3)]
    if rng.random() < 0.6:
        parts.append(_ENDINGS)
    return " ".join(_draw(part, rng, hero, other, held_out) for part in parts)
