"""A process that shares a GPU and computes when it is told to: python -m tests.support.mps_spinner ROOT [PERCENTAGE]

Says how many SMs it has, then does what each line of its input says: `note FILE` computes a while and writes when each kernel began and
ended, by the GPU's clock; `go on` computes until it is killed, and says so now and then.
"""

import sys
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from workers.api import Device, Phase, WorkerId, WorkerSpec
from workers.device.mps_share import sm_count, take_share

#: Of one kernel: short beside the slices of time in which processes take turns.
SPIN_NS = 200_000
NUM_KERNELS = 5000


@triton.jit(do_not_specialize=["index"])
def _spin(out, index, spin_ns: tl.constexpr):
    began_ns = globaltimer()
    now_ns = began_ns
    while now_ns - began_ns < spin_ns:
        now_ns = globaltimer()
    tl.store(out + 2 * index, began_ns)
    tl.store(out + 2 * index + 1, now_ns)


def main(root: Path, percentage: float | None) -> None:
    """Until its input ends."""
    phases = frozenset({Phase.DECODE})
    spec = WorkerSpec(WorkerId("w"), 1, phases, "none", device=Device.CUDA, sm_percentage=percentage)
    member = take_share(spec, root=root)
    notes = torch.zeros(NUM_KERNELS, 2, dtype=torch.int64, device="cuda")
    _spin[(1,)](notes, 0, SPIN_NS)
    torch.cuda.synchronize()
    own = torch.cuda.get_device_properties(0).multi_processor_count
    print(sm_count(spec, member) if member is not None else own, flush=True)
    for line in sys.stdin:
        what, _, path = line.strip().partition(" ")
        while what == "go":
            _compute(notes[:100])
            print("computed", flush=True)
        _compute(notes)
        torch.save(notes.cpu(), path)
        print("noted", flush=True)


def _compute(notes: torch.Tensor) -> None:
    for index in range(len(notes)):
        _spin[(1,)](notes, index, SPIN_NS)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else None)
