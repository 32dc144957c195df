"""An H100: what the latency model knows of it without measuring, and where that of any GPU starts from. Pure.

Sources: the steps and streams in docs/simulation.md, measured on one H100 80GB HBM3, which these figures fit (of the memory curve only
72 of 132 SMs were measured alone; the rest follows from decode beside prefill, as does the contention); KV to another process in
docs/performance.md (268 MB in 1.66 ms).
"""

from workers.step_shape import Contention, DeviceShape

#: TFLOP/s of a large bf16 product in a green context of so many of an H100's 132 SMs; 767 on all.
_GEMM = ((8, 57), (16, 115), (32, 226), (48, 343), (64, 442), (72, 495), (96, 631), (112, 683))

H100 = DeviceShape(
    "h100",
    flops_per_s=615e12,
    attention_flops_per_s=400e12,
    bytes_per_s=2.92e12,
    step_overhead_s=0.6e-3,
    memory_bytes=80e9,
    transfer_bytes_per_s=160e9,
    compute_curve=tuple((sms / 132, tflops / 767) for sms, tflops in _GEMM),
    memory_curve=((24 / 132, 0.33), (40 / 132, 0.47), (56 / 132, 0.63), (72 / 132, 0.79), (0.69, 1.0)),
    contention=Contention(compute=1.5, memory=1.12, sliced=1.9, upper=1.15),
)
