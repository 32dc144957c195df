"""Which workers have which beginnings of prompts: equal to a naive index whatever is told."""

import random

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.control.prefix_index import PrefixIndex, PromptChain, WorkerKey
from orchestrator.control.view import LifecycleState, WorkerView
from workers.api import KvBlocksRemoved, KvBlocksStored, KvEventsLost, Phase, WorkerId
from workers.block_hash import block_hash, root_hash

ROOT = root_hash("model", "tokenizer", "")


def worker(number: int, incarnation: int = 1) -> WorkerView:
    phases = frozenset({Phase.PREFILL})
    return WorkerView(WorkerId(f"w-{number}"), incarnation, phases, LifecycleState.READY)


def chain(*token_ids: int) -> PromptChain:
    return PromptChain(ROOT, token_ids, len(token_ids))


def names(prompt: PromptChain, block_size: int) -> list[bytes]:
    return list(prompt.hashes(block_size))


def stored(prompt: PromptChain, block_size: int, lo: int = 0, hi: int | None = None) -> KvBlocksStored:
    hashes = names(prompt, block_size)
    parent = hashes[lo - 1] if lo else ROOT
    return KvBlocksStored(parent, tuple(hashes[lo:hi]))


def key(number: int, incarnation: int = 1) -> WorkerKey:
    return WorkerId(f"w-{number}"), incarnation


def test_a_chain_names_full_blocks_and_leaves_out_the_last_token() -> None:
    first = block_hash(ROOT, [1, 2])
    assert names(chain(1, 2, 3), 2) == [first]
    assert names(chain(1, 2, 3, 4), 2) == [first]
    assert names(chain(1, 2, 3, 4, 5), 2) == [first, block_hash(first, [3, 4])]
    assert names(chain(1), 1) == names(chain(), 4) == []
    # A prompt that goes on with a picture has its blocks of text whole.
    assert names(PromptChain(ROOT, (1, 2), 70), 2) == [first]


def test_each_worker_is_found_with_as_much_as_it_has() -> None:
    index, prompt = PrefixIndex(), chain(*range(9))
    for number, num_blocks in enumerate((0, 1, 4, 2)):
        index.add(worker(number), 2)
        assert index.apply(worker(number), [stored(prompt, 2, 0, num_blocks)])
    assert index.cached_tokens(prompt) == {key(1): 2, key(2): 8, key(3): 4}
    assert index.cached_tokens(chain(0, 1, 2, 9, 9, 9)) == {key(1): 2, key(2): 2, key(3): 2}
    assert index.cached_tokens(chain(5, 1, 2)) == {}
    index.check_invariants()


def test_blocks_behind_a_missing_one_are_of_no_use() -> None:
    index, prompt = PrefixIndex(), chain(*range(9))
    index.add(worker(0), 2)
    index.apply(worker(0), [stored(prompt, 2), KvBlocksRemoved((names(prompt, 2)[1],))])
    assert index.cached_tokens(prompt) == {key(0): 2}


def test_workers_may_have_blocks_of_different_sizes() -> None:
    index, prompt = PrefixIndex(), chain(*range(9))
    index.add(worker(0), 2)
    index.add(worker(1), 4)
    index.apply(worker(0), [stored(prompt, 2, 0, 3)])
    index.apply(worker(1), [stored(prompt, 4)])
    assert index.cached_tokens(prompt) == {key(0): 6, key(1): 8}


def test_a_worker_that_goes_takes_its_blocks_along_and_its_place_is_used_again() -> None:
    index, prompt = PrefixIndex(), chain(*range(9))
    for number in range(3):
        index.add(worker(number), 2)
        index.apply(worker(number), [stored(prompt, 2)])
    index.remove(worker(1))
    index.remove(worker(1))
    index.add(worker(1, incarnation=2), 2)
    index.check_invariants()
    # What the earlier process still says is not taken for the new one's.
    assert index.apply(worker(1), [stored(prompt, 2)])
    assert index.cached_tokens(prompt) == {key(0): 8, key(2): 8}
    for number in (0, 2):
        index.remove(worker(number))
    assert index.num_blocks == 0


def test_a_worker_that_lost_events_is_asked_anew() -> None:
    index, prompt = PrefixIndex(), chain(*range(9))
    index.add(worker(0), 2)
    index.apply(worker(0), [stored(prompt, 2)])
    assert not index.apply(worker(0), [KvEventsLost()])
    assert index.cached_tokens(prompt) == {}
    assert index.apply(worker(0), [stored(prompt, 2)])
    assert index.cached_tokens(prompt) == {key(0): 8}
    index.check_invariants()


def test_names_are_computed_as_far_as_they_are_asked_for() -> None:
    prompt = chain(*range(100))
    first = next(prompt.hashes(2))
    assert len(prompt._hashes[2]) == 1
    both = prompt.hashes(2), prompt.hashes(2)
    assert next(both[0]) == next(both[1]) == first
    assert list(both[0]) == list(both[1]) == names(prompt, 2)[1:]
    assert len(prompt._hashes[2]) == 49


def test_another_salt_shares_nothing() -> None:
    index = PrefixIndex()
    index.add(worker(0), 2)
    index.apply(worker(0), [stored(chain(1, 2, 3), 2)])
    other = PromptChain(root_hash("model", "tokenizer", "salt"), (1, 2, 3), 3)
    assert index.cached_tokens(other) == {}


@given(st.integers(0, 10**6))
def test_it_finds_what_a_naive_index_finds(seed: int) -> None:
    rng = random.Random(seed)
    prompts = [chain(*(rng.randint(0, 1) for _ in range(rng.randint(1, 12)))) for _ in range(5)]
    sizes = {number: rng.choice((1, 2)) for number in range(4)}
    index, naive = PrefixIndex(), dict[int, set[bytes]]()
    for _ in range(60):
        number = rng.randrange(4)
        prompt = rng.choice(prompts)
        match rng.randrange(5):
            case 0:
                index.add(worker(number), sizes[number])
                naive[number] = set()
            case 1 if rng.random() < 0.3:
                index.remove(worker(number))
                naive.pop(number, None)
            case 2:
                hashes = tuple(
                    rng.sample(
                        names(prompt, sizes[number]), rng.randint(0, len(names(prompt, sizes[number])))
                    )
                )
                index.apply(worker(number), [KvBlocksRemoved(hashes)])
                naive.get(number, set()).difference_update(hashes)
            case _:
                index.apply(worker(number), [stored(prompt, sizes[number])])
                if number in naive:
                    naive[number].update(prompt.hashes(sizes[number]))
        index.check_invariants()
        expected = {}
        for other, blocks in naive.items():
            hashes = names(prompt, sizes[other])
            depth = next((i for i, name in enumerate(hashes) if name not in blocks), len(hashes))
            if depth:
                expected[key(other)] = depth * sizes[other]
        assert index.cached_tokens(prompt) == expected
