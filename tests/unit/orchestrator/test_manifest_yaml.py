"""Files that are not the YAML we read, and random ones."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import ManifestError
from orchestrator.manifest.load import load, parse
from orchestrator.manifest.models import Deployment

LAPTOP = Path(__file__).parents[3] / "deploy" / "manifests" / "laptop.yaml"
VALID = LAPTOP.read_text()


def refusal(text: str) -> str:
    """The problems of a text that is no manifest."""
    with pytest.raises(ManifestError) as caught:
        parse(text, file="m.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "m.yaml: is empty"),
        ("# nothing\n", "m.yaml: is empty"),
        ("---\n...\n", "m.yaml: is empty"),
        ("\n- a\n", "m.yaml:2: is not a mapping; allowed: a mapping with apiVersion, kind, metadata and spec"),
        ("5", "m.yaml:1: is not a mapping; allowed: a mapping with apiVersion, kind, metadata and spec"),
        ("a: 1\n---\nb: 1\n", "m.yaml:3: a second YAML document starts here; keep one"),
        ("a:\n\tb: 1\n", "m.yaml:2: a tab indents this line; YAML is indented with spaces"),
        ("a: 1\nb: \x07\n", "m.yaml:2: character U+0007 is not allowed in YAML"),
        ('a: "\\UFFFFFFFF"', "m.yaml: is not YAML: an escape in quotes names no character"),
        ("[" * 100_000, "m.yaml:1: has more than 32 levels of nesting or 20000 values"),
        ("a: [" + "x, " * 50_000, "m.yaml:1: has more than 32 levels of nesting or 20000 values"),
        ("a: &x\n  b: *x\n", "m.yaml:1: unfolds to more than 20000 values or 32 levels; use fewer aliases"),
        ("#" * (2**20 + 1), "m.yaml: is larger than 1 MiB"),
    ],
)  # fmt: skip
def test_a_text_that_is_no_manifest_is_refused_in_one_sentence(text: str, said: str) -> None:
    assert refusal(text) == said


def test_a_syntax_error_has_its_line_and_column() -> None:
    assert refusal("a: 1\nb: {c: [1, 2}\n").startswith("m.yaml:2: is not YAML: ")
    assert refusal("a: 1\nb: {c: [1, 2}\n").endswith("(column 13)")


def test_aliases_that_multiply_are_refused_before_they_fill_memory() -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 20)]
    assert "unfolds to more than 20000 values" in refusal("\n".join(levels))


def test_a_duplicate_key_is_refused_with_both_lines() -> None:
    text = VALID + "  slo: {}\n"
    first = VALID[: VALID.index("  slo:")].count("\n") + 1
    second = VALID.count("\n") + 1
    assert refusal(text) == f"m.yaml:{second}: spec.slo: this key is already on line {first}; keep one"


@pytest.mark.parametrize(
    "value", ["!!python/object:os.system x", "!!int x", "!thing {}", "!!set {a, b}", "!!str [1]"]
)
def test_tags_are_refused(value: str) -> None:
    assert "is not allowed here" in refusal(VALID + f"  network: {{bind: {value}}}\n")


def test_a_few_aliases_and_anchors_work() -> None:
    text = VALID.replace("resources: {cpus: 1}", "resources: &small {cpus: 1}", 1)
    text = text.replace("resources: {cpus: 1}", "resources: *small", 1)
    assert parse(text) == parse(VALID)


@pytest.mark.parametrize("word", ["on", "yes", "12:30", "2026-11-24", "0x10", "1_000", "<<"])
def test_words_that_old_yaml_converts_stay_text(word: str) -> None:
    assert f'is "{word}"; allowed: loopback or node' in refusal(VALID + f"  network: {{bind: {word}}}\n")


def test_a_key_that_is_no_word_is_refused() -> None:
    assert "a key is a list or mapping" in refusal("[1, 2]: 3\n")


def test_half_a_surrogate_pair_is_refused() -> None:
    assert "half of a surrogate pair" in refusal(VALID + '  network: {bind: "\\ud800"}\n')


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    cases = {
        "missing.yaml": (None, "cannot be read: No such file or directory"),
        "latin.yaml": (b"a: 1\nb: caf\xe9\n", ":2: byte 0xE9 is not UTF-8"),
        "large.yaml": (b" " * (2**20 + 1), "is larger than 1 MiB"),
    }
    for name, (content, said) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ManifestError, match=said):
            load(tmp_path / name)
    with pytest.raises(ManifestError, match="Is a directory"):
        load(tmp_path)
    with pytest.raises(ManifestError, match="cannot be read"):
        load(tmp_path / "a\0b")


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + VALID.encode())
    assert load(path) == parse(VALID)


JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def is_answered(text: str) -> None:
    """Fails unless the text is read or refused with problems."""
    answer: Deployment | ManifestError
    try:
        answer = parse(text)
    except ManifestError as error:
        answer = error
    if isinstance(answer, ManifestError):
        assert answer.problems
        assert all(problem.message for problem in answer.problems)


def mutate(data: Any, rng: random.Random, value: Any) -> Any:
    """A copy with one key or item, anywhere, dropped, renamed or replaced by `value`."""
    data = copy.deepcopy(data)
    places: list[tuple[Any, Any]] = []
    pending = [data]
    while pending:
        node = pending.pop()
        entries = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
        places += [(node, key) for key, _ in entries]
        pending += [child for _, child in entries if isinstance(child, dict | list)]
    if not places:
        return value
    container, key = rng.choice(places)
    act = rng.randrange(3)
    if act == 0:
        del container[key]
    elif act == 1:
        container[key] = value
    elif isinstance(container, dict):
        container[f"{key}{rng.choice('sX_')}"] = container.pop(key)
    else:
        container.append(container[key])
    return data


@given(rng=st.randoms(use_true_random=False), values=st.lists(JSON_LIKE, min_size=1, max_size=4))
def test_any_change_of_keys_and_values_is_read_or_refused(rng: random.Random, values: list[Any]) -> None:
    data = yaml.safe_load(VALID)
    for value in values:
        data = mutate(data, rng, value)
        if not isinstance(data, dict | list):
            break
    is_answered(yaml.safe_dump(data, allow_unicode=True))


@given(
    start=st.integers(0, len(VALID)),
    length=st.integers(0, 40),
    patch=st.text(max_size=12) | st.text("[]{}:,&*!|>'\"%@`#-? \n\t\\xU0.~<1", max_size=12),
)
def test_any_change_of_characters_is_read_or_refused(start: int, length: int, patch: str) -> None:
    is_answered(VALID[:start] + patch + VALID[start + length :])


@given(st.text("[]{}:,&*!|>'\"%@`#-? \n\t\\xUuae0.~<1", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    is_answered(text)
