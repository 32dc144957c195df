"""A worker refuses what means nothing, with the field, its value and what is allowed."""

import math
from dataclasses import replace
from typing import Any

import pytest

from tests.support.worker_client import submit
from workers.api import (
    CautiousDecoding,
    Encode,
    Grammar,
    GrammarKind,
    ImageTile,
    NgramDrafts,
    RequestId,
    RequestKey,
    Submit,
    SuperposedDecoding,
    WorkerId,
)
from workers.submit_check import encode_problem, submit_problem

VOCAB_SIZE = 100


def with_sampling(**changes: Any) -> Submit:
    base = submit([1, 2])
    return replace(base, sampling=replace(base.sampling, **changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_new_tokens": 0}, "max_tokens: is 0; allowed: 1 or more"),
        (
            {"max_new_tokens": 3, "min_new_tokens": 4},
            "min_tokens: is 4; allowed: 0 to 3, which is max_tokens",
        ),
        (
            {"max_new_tokens": 3, "min_new_tokens": 1, "grammar": Grammar(GrammarKind.REGEX, "a+")},
            "min_tokens: is set together with a grammar; allowed: one of the two",
        ),
        ({"temperature": math.nan}, "temperature: is nan; allowed: 0 to 100"),
        ({"top_k": -1}, "top_k: is -1"),
        ({"top_p": 0.0}, "top_p: is 0; allowed: above 0, up to 1"),
        ({"min_p": 1.1}, "min_p: is 1.1; allowed: 0 to 1"),
        ({"repetition_penalty": math.inf}, "repetition_penalty: is inf; allowed: above 0, up to 10"),
        ({"presence_penalty": -2.1}, "presence_penalty: is -2.1; allowed: -2 to 2"),
        ({"logit_bias": ((100, 1.0),)}, "logit_bias: is for token 100; allowed: tokens 0 to 99"),
        (
            {"logit_bias": ((5, 1.0), (5, 2.0))},
            "logit_bias: is given twice for token 5; allowed: each token once",
        ),
        ({"logit_bias": ((5, math.nan),)}, "logit_bias[5]: is nan; allowed: -100 to 100"),
        (
            {"stop_token_ids": frozenset({5, 100})},
            "stop_token_ids: is 100 among others; allowed: tokens 0 to 99",
        ),
        ({"num_logprobs": 21}, "logprobs: is 21; allowed: 0 to 20"),
        ({"grammar": Grammar(GrammarKind.CHOICE, "[]")}, "choice: is '[]'; allowed: one or more texts"),
        ({"decoding": NgramDrafts(64)}, "ngram_drafts.max_draft_tokens: is 64; allowed: 1 to 63"),
        (
            {"decoding": SuperposedDecoding(), "temperature": 1.0},
            "temperature: is set together with superposed",
        ),
        ({"decoding": CautiousDecoding(), "num_logprobs": 0}, "logprobs: is set together with cautious"),
    ],
)
def test_bad_sampling_options_are_named(changes: dict[str, Any], says: str) -> None:
    problem = submit_problem(with_sampling(**changes), VOCAB_SIZE)
    assert problem is not None
    assert problem.startswith(f"sampling.{says}")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_delivered": 2}, "num_delivered: is 2; allowed: 0 to 1"),
        ({"num_delivered": -1}, "num_delivered: is -1"),
        ({"cache_salt": "x" * 257}, "cache_salt: has 257 characters; at most 256 are allowed"),
        ({"ttft_left_s": math.nan}, "ttft_left_s: is nan; a number of seconds is needed"),
        ({"ttft_left_s": -math.inf}, "ttft_left_s: is -inf"),
        ({"tpot_target_s": 0.0}, "tpot_target_s: is 0; a number of seconds above 0 is needed"),
        ({"tpot_target_s": math.nan}, "tpot_target_s: is nan"),
        ({"tenant_weight": 0.0}, "tenant_weight: is 0; a finite number above 0 is needed"),
        ({"tenant_weight": math.inf}, "tenant_weight: is inf"),
        ({"token_ids": (1, 100)}, "token_ids: 100 is not in the vocabulary"),
    ],
)
def test_bad_fields_are_named(changes: dict[str, Any], says: str) -> None:
    problem = submit_problem(replace(submit([1, 2]), **changes), VOCAB_SIZE)
    assert problem is not None
    assert problem.startswith(says)


def test_limits_themselves_are_allowed() -> None:
    good = with_sampling(
        max_new_tokens=4,
        min_new_tokens=4,
        temperature=100.0,
        top_p=1.0,
        min_p=1.0,
        repetition_penalty=10.0,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        logit_bias=((0, -100.0), (99, 100.0)),
        num_logprobs=20,
        num_prompt_logprobs=0,
    )
    assert submit_problem(replace(good, num_delivered=1, cache_salt="x" * 256), VOCAB_SIZE) is None


ENCODE = Encode(
    RequestKey(RequestId("r1"), 2),
    b"file",
    "image/png",
    width=3,
    height=2,
    tile_lo=0,
    tile_hi=1,
    keys=(b"key",),
    prefill=RequestKey(RequestId("r1"), 1),
    first_tile=0,
    prefill_worker=WorkerId("p-0"),
    prefill_address="127.0.0.1:9",
    prefill_incarnation=1,
    timeout_s=1.0,
)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"key": RequestKey(RequestId(""), 2)}, "request_id: has 0 characters"),
        ({"tile_hi": 0}, "tiles: 0 to 0"),
        ({"width": 0}, "width, height: 0 x 2 pixels"),
        ({"keys": ()}, "keys: 0 for 1 tiles"),
        ({"timeout_s": math.inf}, "timeout_s: is inf"),
        ({"prefill_address": "nowhere"}, "prefill_address: 'nowhere' is not host:port"),
    ],
)
def test_an_encode_that_means_nothing_is_refused(changes: dict[str, Any], says: str) -> None:
    assert encode_problem(ENCODE) is None
    assert says in (encode_problem(replace(ENCODE, **changes)) or "")


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (
            (ImageTile(0, 1, b"a"), ImageTile(0, 1, b"b")),
            "images[1]: 1 embeddings at 0; the tile before ends at 1",
        ),
        ((ImageTile(0, 0, b"a"),), "images[0]: 0 embeddings"),
        ((ImageTile(0, 1, b""),), "images[0].key: has 0 bytes"),
        ((ImageTile(1, 2, b"a"),), "images: they end at 3, and the prompt at 2"),
    ],
)
def test_pictures_stand_one_after_the_other_inside_the_prompt(
    images: tuple[ImageTile, ...], says: str
) -> None:
    problem = submit_problem(replace(submit([1, 2]), images=images), VOCAB_SIZE)
    assert says in (problem or "")


def test_superposed_decoding_needs_text_behind_the_last_picture() -> None:
    decoding = with_sampling(decoding=SuperposedDecoding())
    ends = replace(decoding, images=(ImageTile(1, 1, b"a"),))
    assert "some text has to follow" in (submit_problem(ends, VOCAB_SIZE) or "")
    assert submit_problem(replace(decoding, images=(ImageTile(0, 1, b"a"),)), VOCAB_SIZE) is None
