"""EmbeddingMemory: what is read is what was written, wherever blocks lie."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.embeddings.memory import BLOCK_SIZE, embedding_layout, host_memory

HIDDEN_SIZE, NUM_BLOCKS = 6, 12
LAYOUT = embedding_layout(HIDDEN_SIZE, model_digest="m", processor_digest="p")


@given(st.data())
def test_spans_of_tiles_are_read_as_they_were_written(data: st.DataObject) -> None:
    memory, other = host_memory(LAYOUT, NUM_BLOCKS), host_memory(LAYOUT, NUM_BLOCKS)
    sizes = data.draw(st.lists(st.integers(1, 3 * BLOCK_SIZE), min_size=1, max_size=4))
    free = data.draw(st.permutations(range(NUM_BLOCKS)))
    numbers = torch.arange(1.0, 1 + sum(sizes) * HIDDEN_SIZE).view(-1, HIDDEN_SIZE)
    tiles = list(numbers.split(sizes))
    blocks: list[tuple[int, ...]] = []
    for size in sizes:
        num = -(-size // BLOCK_SIZE)
        blocks.append(tuple(free[:num]))
        free = free[num:]
    written = [block for some in blocks for block in some]
    memory.write(written, tiles)
    moved = dict(zip(written, data.draw(st.permutations(written)), strict=True))
    other.copy([moved[block] for block in written], memory, written)
    spans, wanted = [], []
    for _ in range(data.draw(st.integers(1, 4))):
        i = data.draw(st.integers(0, len(sizes) - 1))
        first = data.draw(st.integers(0, sizes[i] - 1))
        num = data.draw(st.integers(1, sizes[i] - first))
        spans.append((blocks[i], first, num))
        wanted.append(tiles[i][first : first + num])
    assert torch.equal(memory.read(spans), torch.cat(wanted))
    there = [(tuple(moved[block] for block in some), first, num) for some, first, num in spans]
    assert torch.equal(other.read(there), torch.cat(wanted))
