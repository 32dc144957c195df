"""On which SMs the kernels of a stream run."""

import torch
import triton
import triton.language as tl

NUM_PROGRAMS = 4096


@triton.jit
def _note_sm(out, num_rounds):
    number = tl.program_id(0)
    sm = tl.inline_asm_elementwise(
        "mov.u32 $0, %smid;", "=r, r", [number], dtype=tl.int32, is_pure=False, pack=1
    )
    # Long enough that the next program goes elsewhere.
    total = 0
    for index in range(num_rounds):
        total += index * sm
    tl.store(out + 2 * number, sm)
    tl.store(out + 2 * number + 1, total)


def sm_ids(stream: torch.cuda.Stream) -> set[int]:
    """Their numbers. Waits for the stream."""
    with torch.cuda.stream(stream):
        out = torch.full((2 * NUM_PROGRAMS,), -1, dtype=torch.int32, device="cuda")
        _note_sm[(NUM_PROGRAMS,)](out, 2000)
        stream.synchronize()
        return set(out[::2].tolist())
