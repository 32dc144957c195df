"""Kernels that the interpreter runs are compiled for a GPU too, which needs none: it says what the interpreter does not mind."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from phasewise_kernels.kv_int4.rows import row_bytes

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

#: An A100's, the oldest that is supported, and an H100's.
CAPABILITIES = (80, 90)
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], *, capability: int = 90, **options: int
) -> dict[str, str]:
    """What it becomes on the way, by name. types: of the arguments that are no constants; pointers lie at multiples of 16 bytes, as torch has them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_for

    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in types if types[name][0] == "*"}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs, aligned)
    asm: dict[str, str] = compile_for(source, target=GPUTarget("cuda", capability, 32), options=options).asm
    return asm


def attention_types(**more: str) -> dict[str, str]:
    pointers = {
        "query": "*bf16",
        "k_cache": "*u8",
        "v_cache": "*u8",
        "out": "*bf16",
        "block_tables": "*i32",
        "query_starts": "*i32",
        "context_lens": "*i32",
        "tree_masks": "*i64",
        "partial_lse": "*fp32",
        "partial_outputs": "*fp32",
        "semaphores": "*i32",
    }
    numbers = ("num_sequences", "window", "q_token", "q_head", "out_token", "out_head", "table_stride")
    return pointers | dict.fromkeys(numbers, "i32") | {"scale": "fp32"} | more


def attention_constants(row: int = row_bytes(HEAD_DIM), **more: Any) -> dict[str, Any]:
    """row: bytes of a head."""
    strides = {"block": BLOCK_SIZE * NUM_KV_HEADS * row, "slot": NUM_KV_HEADS * row, "head": row}
    shape = {
        "num_kv_heads": NUM_KV_HEADS,
        "group": NUM_HEADS // NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "block_size": BLOCK_SIZE,
        "block_d": HEAD_DIM,
        "block_sequences": 64,
        "has_window": True,
        "has_tree": True,
    }
    return {f"{one}_{name}": size for one in "kv" for name, size in strides.items()} | shape | more


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_decode_over_a_cache_in_four_bits(capability: int) -> None:
    from phasewise_kernels.paged_attention.lean_triton import lean_kernel

    constants = attention_constants(
        block_m=16, block_r=16, tile_tokens=32, max_query_len=4, has_byte_tiles=False
    )
    asm = compiled(
        lean_kernel, attention_types(), constants, capability=capability, num_warps=1, num_stages=2
    )
    # Codes are on their way to shared memory while others are multiplied, each by the thread that has cut it out.
    assert "cp.async" in asm["ptx"]
    assert len(re.findall(r"tt\.dot ", asm["ttgir"])) == 6
    assert not re.findall(r"ttg\.convert_layout .*dot_op<\{opIdx = 0", asm["ttgir"])


#: The first that has fp8, and an H100's.
@pytest.mark.parametrize("capability", [89, 90])
@pytest.mark.parametrize(("tile_tokens", "num_warps", "num_stages"), [(32, 1, 2), (64, 4, 3)])
def test_decode_over_a_cache_in_fp8(
    capability: int, tile_tokens: int, num_warps: int, num_stages: int
) -> None:
    from phasewise_kernels.paged_attention.lean_triton import lean_kernel

    types = attention_types(k_cache="*fp8e4nv", v_cache="*fp8e4nv")
    constants = attention_constants(
        HEAD_DIM, block_m=16, block_r=16, tile_tokens=tile_tokens, max_query_len=4, has_byte_tiles=True
    )
    asm = compiled(
        lean_kernel, types, constants, capability=capability, num_warps=num_warps, num_stages=num_stages
    )
    assert "cp.async" in asm["ptx"]
    # Two numbers at a time, each by the thread that has loaded and multiplies it.
    assert asm["ptx"].count("cvt.rn.f16x2.e4m3x2") == 4 * tile_tokens // num_warps
    assert not re.findall(r"ttg\.convert_layout .*dot_op<\{opIdx = 0", asm["ttgir"])


def test_chunks_over_a_cache_in_four_bits() -> None:
    from phasewise_kernels.paged_attention.chunk_triton import chunk_kernel

    types = attention_types(num_groups="i32", part_tokens="i32")
    constants = attention_constants(
        block_m=128, tile_tokens=128, min_query_len=5, max_waves=4, merged_rows=32
    )
    assert "cp.async" in compiled(chunk_kernel, types, constants, num_warps=8, num_stages=2)["ptx"]


def test_rotation_and_write_into_a_cache_in_four_bits() -> None:
    from phasewise_kernels.rope_write.int4_kernel import rope_write_int4_kernel

    types = dict.fromkeys(("heads", "cos", "sin", "query"), "*bf16") | {
        "slots": "*i64",
        "keys": "*u8",
        "values": "*u8",
        "factor": "fp32",
    }
    constants = {
        "num_heads": NUM_HEADS,
        "num_kv_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "log_dim": 7,
        "row_bytes": row_bytes(HEAD_DIM),
        "heads_block": 8,
        "is_rotated": True,
    }
    assert "st.global" in compiled(rope_write_int4_kernel, types, constants, num_warps=2)["ptx"]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_search_for_the_token_of_a_flat_row(capability: int) -> None:
    from phasewise_kernels.sample.search_kernel import level_kernel, token_kernel
    from phasewise_kernels.sample.triton_kernel import BITS, LEVELS, REGISTERS, TILE

    types = dict.fromkeys(("temperatures", "top_ps", "min_ps", "numbers", "scales"), "*fp64")
    types |= dict.fromkeys(("top_ks", "states", "all_sums", "token_ids"), "*i64")
    types |= {"all_logits": "*bf16", "highests": "*fp32", "semaphores": "*i32", "tie_counts": "*i32"}
    constants = {"vocab_size": 128256, "tile": TILE, "num_bins": 1 << BITS, "shift": 16}
    more: list[tuple[Any, dict[str, Any]]] = [
        (level_kernel, {"is_first": True}),
        (level_kernel, {"is_first": False}),
        (token_kernel, {"max_levels": 3 * LEVELS, "parts_block": 64}),
    ]
    for kernel, own in more:
        own_types = {name: kind for name, kind in types.items() if name in kernel.arg_names}
        asm = compiled(
            kernel, own_types, constants | own, capability=capability, num_warps=8, maxnreg=REGISTERS
        )
        # Sums are in whole numbers, in any order.
        assert "relaxed.add.u64" in asm["ptx"]
        assert not re.findall(r"atom\S+f64", asm["ptx"])
