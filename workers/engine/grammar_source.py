"""Turns the four kinds of grammar into what the library reads."""

import json
from typing import Any

from llguidance import LLMatcher, regex_to_lark

from workers.api import Grammar, GrammarKind
from workers.errors import InvalidGrammar
from workers.grammar_template import escape_regex

MAX_CHOICES = 10_000
#: Where JSON may have whitespace: one space, or a new line and its indentation. Without a bound, a small model
#: fills its budget with it.
JSON_WHITESPACE = r" |\n {0,20}"


def library_grammar(grammar: Grammar) -> str:
    """The grammar as the library takes it.

    Raises InvalidGrammar for what shows without the library, and ValueError for what it cannot even read.
    """
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            return _schema_grammar(_read_json(grammar))
        case GrammarKind.REGEX:
            return _regex_grammar(grammar.text)
        case GrammarKind.EBNF:
            return LLMatcher.grammar_from_lark(grammar.text)
        case GrammarKind.CHOICE:
            return _regex_grammar(_choice_regex(_read_json(grammar)))


def _regex_grammar(regex: str) -> str:
    """Digits, letters and spaces are those of ASCII: who writes \\d does not mean Bengali digits."""
    if (len(regex) - len(regex.rstrip("\\"))) % 2:
        # The library would drop it.
        raise InvalidGrammar("regex", "ends with a backslash that escapes nothing")
    return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(regex, 'dws')}/")


def _schema_grammar(schema: Any) -> str:
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise InvalidGrammar("json_schema", "is not a JSON object")
    # A keyword that is not supported is refused, whatever the schema itself asks of the library.
    overrides: Any = {"whitespace_pattern": JSON_WHITESPACE, "lenient": False}
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=overrides)


def _choice_regex(choices: Any) -> str:
    if not isinstance(choices, list) or not all(isinstance(text, str) and text for text in choices):
        raise InvalidGrammar("choice", "is not a JSON array of texts that are not empty")
    if not 0 < len(choices) <= MAX_CHOICES:
        raise InvalidGrammar("choice", f"has {len(choices)} texts; 1 to {MAX_CHOICES} are allowed")
    return "|".join(escape_regex(text) for text in choices)


def _read_json(grammar: Grammar) -> Any:
    try:
        return json.loads(grammar.text)
    except json.JSONDecodeError as error:
        reason = f"is not JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        raise InvalidGrammar(grammar.kind.value, reason) from error
    except RecursionError as error:
        raise InvalidGrammar(grammar.kind.value, "is nested too deeply") from error
