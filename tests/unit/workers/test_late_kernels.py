"""What Triton compiles once a worker is ready is told of."""

import pytest

from workers.device.late_kernels import watch_late_kernels


def test_a_kernel_compiled_late_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = pytest.importorskip("triton", reason="Triton comes with torch for CUDA").knobs.runtime
    # Put back at the end.
    monkeypatch.setattr(runtime, "jit_cache_hook", None)
    monkeypatch.setattr(runtime, "jit_post_compile_hook", None)
    watch_late_kernels("w-0")
    for key in ("one", "other"):
        assert not runtime.jit_cache_hook(key=key, repr=key, fn=None, compile={}, is_manual_warmup=False)
    for key in ("other", "one"):
        runtime.jit_post_compile_hook(key=key, repr=f"{key}[num_warps=4]", fn=None, already_compiled=False)
    told = [record.getMessage() for record in caplog.records]
    assert ["kernel=other[num_warps=4]" in told[0], "kernel=one[num_warps=4]" in told[1]] == [True, True]
    assert all("kernel_compiled_late worker_id=w-0" in one for one in told)
