"""Models and devices that the latency model knows without measuring. Pure.

Sources. H100: workers/known_gpu.py. A100: not measured; NVIDIA's data sheets (312 TFLOP/s and 2.04 TB/s beside 989 and 3.35) at the same
parts of the peaks, and memory at full rate from 30 of its 108 SMs on (Bullet, ASPLOS'26). Models: the config.json of each.
"""

from workers.known_gpu import H100
from workers.step_shape import DeviceShape, ModelShape

MODELS = {
    # 32 layers of 4096, 32 heads of 128 over 8 of KV, MLP 14336, vocabulary 128256.
    "llama-3-8b": ModelShape("llama-3-8b", 6_979_321_856, 525_336_576, 2.0, 32, 4096, 131_072),
    # 80 layers of 8192, 64 heads over 8, MLP 28672.
    "llama-3-70b": ModelShape("llama-3-70b", 68_451_041_280, 1_050_673_152, 2.0, 80, 8192, 327_680),
    # 30 layers of 576, 9 heads of 64 over 3, MLP 1536, vocabulary 49152, in float32.
    "smollm2-135m": ModelShape("smollm2-135m", 106_168_320, 28_311_552, 4.0, 30, 576, 46_080),
}

DEVICES = {
    "h100": H100,
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
