"""Fifty small tasks with a format each: what is asked, how the format is said in words, how to check both."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jsonschema

from workers.api import Grammar, GrammarKind
from workers.grammar_template import template_grammar


@dataclass(frozen=True, slots=True)
class Task:
    """task: the prompt without a word on the format; in_words: the format, for the other prompts."""

    family: str
    task: str
    in_words: str
    grammar: Grammar
    is_valid: Callable[[str], bool]
    #: None where there is no right answer.
    is_right: Callable[[str], bool] | None


MOODS = ["positive", "negative", "neutral"]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "city": {"type": "string", "maxLength": 40},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
PROFILE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 40},
        "job": {"type": "string", "minLength": 1, "maxLength": 40},
        "skills": {
            "type": "array",
            "items": {"type": "string", "minLength": 1, "maxLength": 30},
            "minItems": 1,
            "maxItems": 3,
        },
        "level": {"enum": ["beginner", "skilled", "master"]},
    },
    "required": ["name", "job", "skills", "level"],
    "additionalProperties": False,
}

SUMS = [
    ("Tom has 3 apples and buys 4 more. How many apples does he have?", 7),
    ("A bus has 12 passengers and 5 get off. How many are left?", 7),
    ("There are 6 boxes with 2 pens each. How many pens are there?", 12),
    ("Anna reads 10 pages a day for 3 days. How many pages does she read?", 30),
    ("A farmer has 20 eggs and sells 8. How many eggs are left?", 12),
    ("Five children share 15 sweets equally. How many does each get?", 3),
    ("A train goes 50 km in one hour. How far does it go in 2 hours?", 100),
    ("Max is 9 years old and his sister is 4 years older. How old is she?", 13),
    ("A book costs 8 dollars. What do 3 books cost in dollars?", 24),
    ("There are 14 birds and 6 fly away. How many stay?", 8),
]
REVIEWS = [
    ("I loved every minute of this film.", "positive"),
    ("The food was cold and the waiter rude.", "negative"),
    ("The parcel arrived on Tuesday.", "neutral"),
    ("Best phone I have ever owned!", "positive"),
    ("It broke after two days. Never again.", "negative"),
    ("The meeting starts at nine in room four.", "neutral"),
    ("What a wonderful, friendly hotel.", "positive"),
    ("The book was boring and far too long.", "negative"),
    ("The shop sells shoes and bags.", "neutral"),
    ("Terrible service, I want my money back.", "negative"),
]
PEOPLE = [
    ("Maria", 34, "Lisbon"),
    ("John", 27, "Boston"),
    ("Aiko", 41, "Osaka"),
    ("Peter", 19, "Prague"),
    ("Fatima", 52, "Cairo"),
    ("Lukas", 38, "Vienna"),
    ("Priya", 23, "Mumbai"),
    ("Carlos", 60, "Bogota"),
    ("Emma", 31, "Oslo"),
    ("Chen", 45, "Shanghai"),
]
CHARACTERS = [
    "a pirate captain",
    "a baker in a small town",
    "a robot gardener",
    "a young wizard",
    "a deep-sea diver",
    "a desert trader",
    "a chess player",
    "a mountain guide",
    "a space pilot",
    "a violin maker",
]
DATES = [
    ("5 March 2021", "2021-03-05"),
    ("17 July 1999", "1999-07-17"),
    ("1 January 2000", "2000-01-01"),
    ("31 December 2023", "2023-12-31"),
    ("9 May 1945", "1945-05-09"),
    ("20 July 1969", "1969-07-20"),
    ("12 October 1492", "1492-10-12"),
    ("4 July 1776", "1776-07-04"),
    ("29 February 2024", "2024-02-29"),
    ("8 August 2008", "2008-08-08"),
]


def tasks() -> list[Task]:
    """All fifty, ten of each family."""
    return [
        *(_sum(*item) for item in SUMS),
        *(_mood(*item) for item in REVIEWS),
        *(_person(*item) for item in PEOPLE),
        *(_profile(text) for text in CHARACTERS),
        *(_date(*item) for item in DATES),
    ]


def _sum(question: str, answer: int) -> Task:
    def value(text: str) -> int | None:
        found = re.fullmatch(r"Reasoning: [^\n]+\nAnswer: (-?[0-9]{1,18})", text)
        return int(found[1]) if found else None

    grammar = template_grammar("Reasoning: {line}\nAnswer: {int}")
    words = (
        'Write one line that begins with "Reasoning: ", then a line that is "Answer: " and the number alone.'
    )
    return Task(
        "arithmetic",
        question,
        words,
        grammar,
        lambda text: value(text) is not None,
        lambda text: value(text) == answer,
    )


def _mood(review: str, mood: str) -> Task:
    return Task(
        "classification",
        f'What is the mood of this text, positive, negative or neutral? "{review}"',
        "Answer with one of the words positive, negative, neutral in small letters and nothing else.",
        Grammar(GrammarKind.CHOICE, json.dumps(MOODS)),
        lambda text: text in MOODS,
        lambda text: text == mood,
    )


def _person(name: str, age: int, city: str) -> Task:
    right = {"name": name, "age": age, "city": city}
    return Task(
        "extraction",
        f"Who is this about, how old are they and where do they live? "
        f'"{name} is {age} years old and has lived in {city} for many years."',
        'Answer with a JSON object with the keys "name" (string), "age" (integer) and "city" (string) only.',
        Grammar(GrammarKind.JSON_SCHEMA, json.dumps(PERSON)),
        lambda text: _instance(text, PERSON) is not None,
        lambda text: _instance(text, PERSON) == right,
    )


def _profile(character: str) -> Task:
    words = (
        'Answer with a JSON object with the keys "name" (string), "job" (string), "skills" (1 to 3 strings) '
        'and "level" ("beginner", "skilled" or "master") only.'
    )
    return Task(
        "profile",
        f"Invent {character}: a name, a job, some skills and how good they are.",
        words,
        Grammar(GrammarKind.JSON_SCHEMA, json.dumps(PROFILE)),
        lambda text: _instance(text, PROFILE) is not None,
        None,
    )


def _date(text: str, iso: str) -> Task:
    pattern = r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
    return Task(
        "date",
        f"Which day is {text}, as year, month and day?",
        "Answer with the date as YYYY-MM-DD and nothing else.",
        Grammar(GrammarKind.REGEX, pattern),
        lambda answer: re.fullmatch(pattern, answer) is not None,
        lambda answer: answer == iso,
    )


def _instance(text: str, schema: dict[str, Any]) -> Any:
    """The value, if the text is JSON that the schema allows."""
    try:
        value = json.loads(text)
        jsonschema.validate(value, schema)
    except (json.JSONDecodeError, jsonschema.ValidationError):
        return None
    return value
