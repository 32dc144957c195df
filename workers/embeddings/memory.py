"""The memory of a worker's embeddings.

They travel as KV does, by the same leases and sessions: to `kvtransfer` an embedding is one token of one layer with one
head, whose first half lies where K would and whose second half where V would.
"""

from collections.abc import Sequence

import torch

from kvtransfer.host_pool import HostPool, pool_shape
from kvtransfer.layout import KvLayout, blocks_needed
from kvtransfer.shared_memory import SharedMemory

#: Embeddings of one block.
BLOCK_SIZE = 16


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
    """[num_blocks, BLOCK_SIZE] embeddings of hidden_size fp32 values each, on the CPU.

    shared: memory that other processes can read; None takes private memory.
    """

    def __init__(
        self,
        layout: KvLayout,
        num_blocks: int,
        shared: SharedMemory | None = None,
        *,
        is_in_nixl: bool = False,
    ) -> None:
        shape = pool_shape(layout, num_blocks)
        self._memory = (
            shared.tensor(shape, torch.float32)
            if shared is not None
            else torch.zeros(shape, dtype=torch.float32)
        )
        self.pool = HostPool(self._memory, layout, shared, is_in_nixl=is_in_nixl)
        self.num_blocks = num_blocks

    @property
    def num_embeddings(self) -> int:
        """What it holds when all blocks are full."""
        return self.num_blocks * BLOCK_SIZE

    def read(self, block_ids: Sequence[int], first: int, num: int) -> torch.Tensor:
        """Embeddings [first, first + num) of those that these blocks hold, [num, hidden_size] fp32, copied."""
        halves = self._memory[0][:, list(block_ids)].flatten(1, 2)[:, first : first + num, 0]
        return torch.cat((halves[0], halves[1]), dim=-1)

    def copy(self, block_ids: Sequence[int], source: "EmbeddingMemory", source_ids: Sequence[int]) -> None:
        """Fill these blocks with what as many blocks of another memory hold."""
        self._memory[0][:, list(block_ids)] = source._memory[0][:, list(source_ids)]

    def write(self, block_ids: Sequence[int], embeddings: torch.Tensor) -> None:
        """Put all embeddings of one tile, [num, hidden_size] fp32, into its blocks."""
        num, hidden_size = embeddings.shape
        assert len(block_ids) == blocks_needed(num, BLOCK_SIZE)
        padded = torch.zeros(len(block_ids) * BLOCK_SIZE, hidden_size)
        padded[:num] = embeddings
        halves = padded.view(len(block_ids), BLOCK_SIZE, 2, hidden_size // 2)
        self._memory[0][:, list(block_ids), :, 0] = halves.permute(2, 0, 1, 3)
