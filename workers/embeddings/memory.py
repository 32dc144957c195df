"""The memory of a worker's embeddings.

They travel as KV does, by the same leases and sessions: to `kvtransfer` an embedding is one token of one layer with one
head, whose first half lies where K would and whose second half where V would.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kvtransfer.host_pool import HostPool
from kvtransfer.layout import KvLayout, blocks_needed
from kvtransfer.pool import KvPool
from kvtransfer.pool_tensor import pool_shape
from kvtransfer.shared_memory import SharedMemory

#: Embeddings of one block.
BLOCK_SIZE = 16
#: Blocks of one tile, which of its embeddings is the first, and how many are meant.
Span = tuple[Sequence[int], int, int]


def embedding_layout(hidden_size: int, *, model_digest: str, processor_digest: str) -> KvLayout:
    """What the bytes of the pool mean. hidden_size: of the text model, even."""
    return KvLayout(
        model_digest=model_digest,
        dtype="float32",
        block_size=BLOCK_SIZE,
        num_layers=1,
        num_kv_heads=1,
        head_dim=hidden_size // 2,
        position_encoding=f"embedding:{processor_digest}",
    )


class EmbeddingMemory:
    """[num_blocks, BLOCK_SIZE] embeddings of hidden_size fp32 values each.

    memory: of the shape of the pool, fp32. On a GPU all work is put on the stream that is current in the calling thread,
    and not waited for: whoever reads and writes does so on one stream.
    """

    def __init__(self, memory: torch.Tensor, pool: KvPool) -> None:
        self._memory = memory
        self.pool = pool
        self.num_blocks = memory.shape[2]

    @property
    def num_embeddings(self) -> int:
        """What it holds when all blocks are full."""
        return self.num_blocks * BLOCK_SIZE

    def read(self, spans: Sequence[Span]) -> torch.Tensor:
        """The embeddings of all spans, one after the other, [sum of num, hidden_size] fp32, copied."""
        halves = self._memory[0, :, :, :, 0].flatten(1, 2)[:, self._on_device(_places(spans))]
        return torch.cat((halves[0], halves[1]), dim=-1)

    def copy(self, block_ids: Sequence[int], source: "EmbeddingMemory", source_ids: Sequence[int]) -> None:
        """Fill these blocks with what as many blocks of another memory on the same device hold."""
        ids, source_places = self._on_device(block_ids), self._on_device(source_ids)
        self._memory[0][:, ids] = source._memory[0][:, source_places]

    def write(self, block_ids: Sequence[int], tiles: Sequence[torch.Tensor]) -> None:
        """Put all embeddings of some tiles, [num, hidden_size] each, into these blocks, in order; each tile begins a block."""
        hidden_size = tiles[0].shape[1]
        padded = self._memory.new_zeros(len(block_ids) * BLOCK_SIZE, hidden_size)
        end = 0
        for tile in tiles:
            padded[end : end + len(tile)] = tile
            end += blocks_needed(len(tile), BLOCK_SIZE) * BLOCK_SIZE
        assert end == len(padded)
        halves = padded.view(len(block_ids), BLOCK_SIZE, 2, hidden_size // 2)
        self._memory[0][:, self._on_device(block_ids), :, 0] = halves.permute(2, 0, 1, 3)

    def _on_device(self, indices: Sequence[int] | NDArray[np.int64]) -> torch.Tensor:
        """From page-locked memory, so that nothing waits for what runs on the stream."""
        found = torch.from_numpy(np.asarray(indices, np.int64))
        if self._memory.is_cuda:
            found = found.pin_memory().to(self._memory.device, non_blocking=True)
        return found


def host_memory(
    layout: KvLayout, num_blocks: int, shared: SharedMemory | None = None, *, is_in_nixl: bool = False
) -> EmbeddingMemory:
    """On the CPU. shared: memory that other processes can read; None takes private memory."""
    shape = pool_shape(layout, num_blocks)
    memory = (
        shared.tensor(shape, torch.float32) if shared is not None else torch.zeros(shape, dtype=torch.float32)
    )
    return EmbeddingMemory(memory, HostPool(memory, layout, shared, is_in_nixl=is_in_nixl))


def _places(spans: Sequence[Span]) -> NDArray[np.int64]:
    """block_id * BLOCK_SIZE + offset of each embedding."""
    found = []
    for block_ids, first, num in spans:
        offsets = np.arange(first, first + num)
        found.append(np.asarray(block_ids)[offsets // BLOCK_SIZE] * BLOCK_SIZE + offsets % BLOCK_SIZE)
    return np.concatenate(found)
