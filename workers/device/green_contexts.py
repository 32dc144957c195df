"""Green contexts by the CUDA driver API: sets of SMs of one GPU, with a stream on each.

torch.cuda.GreenContext splits the whole device anew with each call, so that two of them overlap. Here one split gives groups, and
parts made of different groups are disjoint.

Source: CUDA driver API 13.0, green contexts. cuda.bindings comes with torch for CUDA.
"""

from dataclasses import dataclass
from typing import Any

import torch

from workers.device.sm_layouts import SmGroups, SmPart

#: Larger than any device has groups; the driver gives as many as there are.
_MANY = 1024


class GreenContextError(Exception):
    """A call of the driver failed; `name` is what CUDA calls the error."""

    def __init__(self, call: str, name: str) -> None:
        super().__init__(call, name)
        self.call = call
        self.name = name

    def __str__(self) -> str:
        return f"{self.call} failed with {self.name}"


@dataclass(frozen=True, slots=True)
class GreenContext:
    """One set of SMs. stream: whatever is put on it runs there; num_sms: as the driver counts them."""

    stream: torch.cuda.Stream
    num_sms: int
    handle: Any


class GreenContexts:
    """Of one GPU, split once. Raises GreenContextError, also from every method."""

    def __init__(self, device_index: int) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self._device_index = device_index
        # The primary context is to be there before, or each green context makes it anew.
        torch.cuda.synchronize(device_index)
        self._device = self._call("cuDeviceGet", device_index)
        kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        whole = self._call("cuDeviceGetDevResource", self._device, kind)
        self._kind = kind
        least = _least_sms(whole, torch.cuda.get_device_capability(device_index))
        pieces, count, remainder = self._call("cuDevSmResourceSplitByCount", _MANY, whole, 0, least)
        # The list is as long as was asked for; behind `count` there is nothing.
        self._pieces = pieces[:count]
        self._remainder = remainder
        self.groups = SmGroups(
            group_sms=self._pieces[0].sm.smCount if count else least,
            num_groups=count,
            remainder_sms=whole.sm.smCount - sum(piece.sm.smCount for piece in self._pieces),
        )

    def make(self, part: SmPart) -> GreenContext:
        """A context of these groups, and its stream. About 1 ms."""
        pieces = self._pieces[part.first_group : part.first_group + part.num_groups]
        if part.has_remainder:
            pieces = [*pieces, self._remainder]
        driver = self._driver
        description = self._call("cuDevResourceGenerateDesc", pieces, len(pieces))
        flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
        context = self._call("cuGreenCtxCreate", description, self._device, flags)
        try:
            flag = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
            stream = self._call("cuGreenCtxStreamCreate", context, flag, 0)
            num_sms = self._call("cuGreenCtxGetDevResource", context, self._kind).sm.smCount
        except GreenContextError:
            self._call("cuGreenCtxDestroy", context)
            raise
        wrapped = torch.cuda.ExternalStream(int(stream), self._device_index)  # type: ignore[no-untyped-call]
        return GreenContext(wrapped, num_sms, context)

    def destroy(self, context: GreenContext) -> None:
        """Waits for what was put on its stream. Graphs captured on it are to be gone."""
        context.stream.synchronize()
        self._call("cuStreamDestroy", context.stream.cuda_stream)
        self._call("cuGreenCtxDestroy", context.handle)

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self._driver, name)(*arguments)
        if int(status):
            raise GreenContextError(name, status.name)
        return values[0] if len(values) == 1 else values


def _least_sms(whole: Any, capability: tuple[int, int]) -> int:
    """Of a group: what the driver says, from 13.0 on; before that what its documentation has by architecture."""
    said = getattr(whole.sm, "minSmPartitionSize", 0)
    if said:
        return int(said)
    return 8 if capability >= (9, 0) else 4 if capability >= (8, 0) else 2
