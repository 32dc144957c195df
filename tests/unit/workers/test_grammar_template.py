"""Templates: fixed text is fixed, wildcards match what they say."""

import re

import pytest

from tests.support.grammar_world import random_text
from workers.grammar_template import template_grammar


@pytest.mark.parametrize(
    ("template", "text", "is_match"),
    [
        ("Reasoning: {line}\nAnswer: {int}", "Reasoning: 2 and 2.\nAnswer: -4", True),
        ("Reasoning: {line}\nAnswer: {int}", "Reasoning: 2\nand\nAnswer: 4", False),
        ("a.b*{{x}}", "a.b*{x}", True),
        ("a.b*{{x}}", "acb*{x}", False),
        ("{choice:yes|no (never)}!", "no (never)!", True),
        ("{choice:yes|no}!", "maybe!", False),
        ("{number} km", "12.5 km", True),
        ("{number} km", "012 km", False),
        ("{word}, {text}", "hello, all\nof you", True),
    ],
)
def test_a_template_matches_its_texts_alone(template: str, text: str, is_match: bool) -> None:
    pattern = re.sub(
        r"\\x\{([0-9a-f]+)\}", lambda m: re.escape(chr(int(m[1], 16))), template_grammar(template).text
    )
    assert bool(re.fullmatch(pattern, text)) == is_match


@pytest.mark.parametrize(
    "template", ["", "{}", "{name}", "{int:5}", "{choice:}", "{choice:a|}", "{int!r}", "{int"]
)
def test_a_template_that_means_nothing_is_refused(template: str) -> None:
    with pytest.raises(ValueError):
        template_grammar(template)


def test_random_logits_fill_the_wildcards_and_keep_the_fixed_text() -> None:
    grammar = template_grammar("Reasoning: {line}\nAnswer: {int} ({choice:sure|unsure})")
    for seed in range(10):
        text, state, _tokens = random_text("level", grammar, seed=seed, max_new_tokens=100)
        assert state.is_complete
        assert re.fullmatch(r"Reasoning: [^\n]+\nAnswer: -?\d+ \((sure|unsure)\)", text.decode())
