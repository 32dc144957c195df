"""Which workers have the KV of which beginnings of prompts, as they tell of it. Pure.

It may be wrong in both directions: what it knows is as old as the last event, and a worker may have evicted a block since. A
wrong guess costs time and nothing else, as workers look for themselves.
"""

from collections.abc import Iterator, Sequence

from orchestrator.control.view import WorkerView
from workers.api import KvBlocksRemoved, KvBlocksStored, KvEvent, KvEventsLost, WorkerId
from workers.block_hash import block_hash

#: One process of a worker.
WorkerKey = tuple[WorkerId, int]


class PromptChain:
    """The names of a prompt's blocks, computed when they are first asked for.

    root: see workers.block_hash. token_ids: the prompt up to its first picture. The last token of a prompt is always
    computed, so a block that ends with it is left out when it is all of the prompt.
    """

    def __init__(self, root: bytes, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self._root = root
        self._token_ids = token_ids
        self._hashes: dict[int, list[bytes]] = {}

    def hashes(self, block_size: int) -> Iterator[bytes]:
        """Of its full blocks of this size, each the child of the one before it. Computed as far as anybody asks."""
        known = self._hashes.setdefault(block_size, [])
        yield from known
        num_tokens = min(len(self._token_ids), self.num_prompt_tokens - 1)
        for end in range(block_size * (len(known) + 1), num_tokens + 1, block_size):
            parent = known[-1] if known else self._root
            known.append(block_hash(parent, self._token_ids[end - block_size : end]))
            yield known[-1]


class PrefixIndex:
    """Blocks by name, each with the set of workers that have it, as the bits of a number."""

    def __init__(self) -> None:
        self._have: dict[bytes, int] = {}
        #: Of each worker that is known: its bit, and the size of its blocks.
        self._bits: dict[WorkerKey, int] = {}
        self._block_sizes: dict[WorkerKey, int] = {}
        self._blocks: dict[WorkerKey, set[bytes]] = {}
        self._free_bits: list[int] = []
        self._keys: dict[int, WorkerKey] = {}

    @property
    def num_blocks(self) -> int:
        """Different ones, over all workers."""
        return len(self._have)

    def add(self, worker: WorkerView, block_size: int) -> None:
        """A worker will tell of its cache. What it told before is void."""
        key = worker.worker_id, worker.incarnation
        self.remove(worker)
        bit = 1 << (self._free_bits.pop() if self._free_bits else len(self._bits))
        self._bits[key], self._keys[bit] = bit, key
        self._block_sizes[key] = block_size
        self._blocks[key] = set()

    def remove(self, worker: WorkerView) -> None:
        """Its cache is not known any more. Nothing happens when it was not."""
        key = worker.worker_id, worker.incarnation
        bit = self._bits.pop(key, None)
        if bit is None:
            return
        del self._block_sizes[key], self._keys[bit]
        for name in self._blocks.pop(key):
            self._drop(name, bit)
        self._free_bits.append(bit.bit_length() - 1)

    def apply(self, worker: WorkerView, events: Sequence[KvEvent]) -> bool:
        """The worker tells; False when it has to be asked anew. Of one that was not added nothing is kept."""
        key = worker.worker_id, worker.incarnation
        bit, blocks, have = self._bits.get(key), self._blocks.get(key), self._have
        if bit is None or blocks is None:
            return True
        for event in events:
            match event:
                case KvBlocksStored(hashes=names):
                    blocks.update(names)
                    for name in names:
                        have[name] = have.get(name, 0) | bit
                case KvBlocksRemoved():
                    for name in event.hashes:
                        if name in blocks:
                            blocks.remove(name)
                            self._drop(name, bit)
                case KvEventsLost():
                    self.add(worker, self._block_sizes[key])
                    return False
        return True

    def cached_tokens(self, chain: PromptChain) -> dict[WorkerKey, int]:
        """Of each worker that has the beginning of this prompt, how many tokens of it; without those that have none."""
        found: dict[WorkerKey, int] = {}
        lefts: dict[int, int] = {}
        for key, block_size in self._block_sizes.items():
            lefts[block_size] = lefts.get(block_size, 0) | self._bits[key]
        for block_size, left in lefts.items():
            num_tokens, have = 0, self._have
            for name in chain.hashes(block_size):
                still = left & have.get(name, 0)
                if still != left:
                    self._note(found, left & ~still, num_tokens)
                    left = still
                    if not left:
                        break
                num_tokens += block_size
            self._note(found, left, num_tokens)
        return found

    def _note(self, found: dict[WorkerKey, int], bits: int, num_tokens: int) -> None:
        """These workers have so many tokens and no more."""
        while bits and num_tokens:
            bit = bits & -bits
            found[self._keys[bit]] = num_tokens
            bits ^= bit

    def num_blocks_by_worker(self) -> dict[WorkerKey, int]:
        """That each worker has told of."""
        return {key: len(blocks) for key, blocks in self._blocks.items()}

    def check_invariants(self) -> None:
        """Both ways of looking agree."""
        have = self._have
        for key, blocks in self._blocks.items():
            bit = self._bits[key]
            assert blocks <= have.keys()
            assert all(map(bit.__and__, map(have.__getitem__, blocks)))
        # And nothing beyond that.
        assert sum(map(int.bit_count, have.values())) == sum(map(len, self._blocks.values()))
        assert all(have.values())
        assert self._bits.keys() == self._block_sizes.keys() == self._blocks.keys()
        assert self._keys == {bit: key for key, bit in self._bits.items()}
        bits = [bit.bit_length() - 1 for bit in self._bits.values()]
        assert sorted([*bits, *self._free_bits]) == list(range(len(bits) + len(self._free_bits)))

    def _drop(self, name: bytes, bit: int) -> None:
        left = self._have[name] & ~bit
        if left:
            self._have[name] = left
        else:
            del self._have[name]
