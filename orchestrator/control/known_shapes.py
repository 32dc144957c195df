"""Models and devices that the latency model knows without measuring. Pure.

Sources. H100: the steps and streams in docs/simulation.md, measured on one H100 80GB HBM3, which these figures fit (of the memory curve only
72 of 132 SMs were measured alone; the rest follows from decode beside prefill, as does the contention); KV to another process in
docs/performance.md (268 MB in 1.66 ms). A100: not measured; NVIDIA's data sheets (312 TFLOP/s and 2.04 TB/s beside 989 and 3.35) at the same
parts of the peaks, and memory at full rate from 30 of its 108 SMs on (Bullet, ASPLOS'26). Models: the config.json of each.
"""

from workers.step_shape import Contention, DeviceShape, ModelShape

MODELS = {
    # 32 layers of 4096, 32 heads of 128 over 8 of KV, MLP 14336, vocabulary 128256.
    "llama-3-8b": ModelShape("llama-3-8b", 6_979_321_856, 525_336_576, 2.0, 32, 4096, 131_072),
    # 80 layers of 8192, 64 heads over 8, MLP 28672.
    "llama-3-70b": ModelShape("llama-3-70b", 68_451_041_280, 1_050_673_152, 2.0, 80, 8192, 327_680),
    # 30 layers of 576, 9 heads of 64 over 3, MLP 1536, vocabulary 49152, in float32.
    "smollm2-135m": ModelShape("smollm2-135m", 106_168_320, 28_311_552, 4.0, 30, 576, 46_080),
}

#: TFLOP/s of a large bf16 product in a green context of so many of an H100's 132 SMs; 767 on all.
_H100_GEMM = ((8, 57), (16, 115), (32, 226), (48, 343), (64, 442), (72, 495), (96, 631), (112, 683))

DEVICES = {
    "h100": DeviceShape(
        "h100",
        flops_per_s=615e12,
        attention_flops_per_s=400e12,
        bytes_per_s=2.92e12,
        step_overhead_s=0.6e-3,
        memory_bytes=80e9,
        transfer_bytes_per_s=160e9,
        compute_curve=tuple((sms / 132, tflops / 767) for sms, tflops in _H100_GEMM),
        memory_curve=((24 / 132, 0.33), (40 / 132, 0.47), (56 / 132, 0.63), (72 / 132, 0.79), (0.69, 1.0)),
        contention=Contention(compute=1.5, memory=1.12, sliced=1.9, upper=1.15),
    ),
    "a100": DeviceShape(
        "a100",
        flops_per_s=194e12,
        attention_flops_per_s=126e12,
        bytes_per_s=1.78e12,
        step_overhead_s=0.6e-3,
        memory_bytes=80e9,
        transfer_bytes_per_s=97e9,
        memory_curve=((0.28, 1.0),),
    ),
}
