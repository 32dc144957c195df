"""Turns a template, fixed text with wildcards, into a grammar: the format apart from the task. Pure.

    Reasoning: {line}
    Answer: {int}

The prompt need not mention the format: the engine writes the fixed text and leaves the wildcards to the model.
Source: the hard-mask form of Deco-G (arXiv 2510.03595), whose templates are pivots and wildcards.
"""

from string import Formatter

from workers.api import Grammar, GrammarKind

#: Wildcard -> what it matches. Bounded, so that no wildcard takes the whole budget.
WILDCARDS = {
    "line": r"[^\n]{1,400}",
    "text": r"(?s:.{1,2000})",
    "word": r"[^\s]{1,40}",
    "int": r"-?(?:0|[1-9][0-9]{0,17})",
    "number": r"-?(?:0|[1-9][0-9]{0,17})(?:\.[0-9]{1,9})?",
}
CHOICE = "choice"


def template_grammar(template: str) -> Grammar:
    """A regex grammar of the template; `{{` and `}}` are braces, `{choice:yes|no}` one of the texts given.

    A wildcard may take in what the fixed text behind it says, so end it with what it does not match: a new
    line after {line}, {word}, {int} or {number}. Raises ValueError, naming what is wrong.
    """
    parts: list[str] = []
    for fixed, name, choices, conversion in Formatter().parse(template):
        parts.append(escape_regex(fixed))
        if name is None:
            continue
        if conversion:
            raise ValueError(f"template: {{{name}!{conversion}}}: a wildcard has no conversion")
        parts.append(_wildcard(name, choices or ""))
    if not "".join(parts):
        raise ValueError("template: is empty")
    return Grammar(kind=GrammarKind.REGEX, text="".join(parts))


def escape_regex(text: str) -> str:
    """A regex that matches this text alone."""
    return "".join(char if char.isalnum() or ord(char) > 127 else f"\\x{{{ord(char):x}}}" for char in text)


def _wildcard(name: str, choices: str) -> str:
    if name == CHOICE:
        texts = choices.split("|")
        if not all(texts):
            raise ValueError("template: {choice:}: name the texts, as in {choice:yes|no}")
        return "(?:" + "|".join(escape_regex(text) for text in texts) + ")"
    if choices or name not in WILDCARDS:
        known = ", ".join(f"{{{wildcard}}}" for wildcard in WILDCARDS)
        raise ValueError(f"template: {{{name}}} is not a wildcard; there are {known} and {{choice:a|b}}")
    return f"(?:{WILDCARDS[name]})"
