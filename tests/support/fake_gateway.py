"""A gateway without workers, for tests of the command line: it answers what it was told to."""

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc

from protos import control_pb2, control_pb2_grpc, inference_pb2_grpc
from protos import inference_pb2 as pb

WAIT_S = 20.0


def messages(*texts: str, finish_reason: pb.FinishReason.ValueType = pb.FINISH_REASON_STOP) -> list[Any]:
    """An answer with one token for each text, and the numbers of a request on two workers at its end."""
    found = [
        pb.GenerateResponse(request_id="r-1", token_ids=[100 + i], first_token_index=i, text_delta=text)
        for i, text in enumerate(texts)
    ]
    found[-1].finish_reason = finish_reason
    found[-1].usage.CopyFrom(pb.Usage(prompt_tokens=37, completion_tokens=len(texts)))
    found[-1].timings.CopyFrom(
        pb.Timings(
            ttft_s=0.256,
            tpot_s=0.066,
            queue_s=0.0124,
            prefill_s=0.242,
            decode_s=0.53,
            total_s=0.789,
            prefill_worker_id="prefill-0",
            decode_worker_id="decode-0",
            attempts=1,
            second_token_s=0.53,
            kv_transfer=pb.KvTransferTimings(
                num_bytes=37 * 46080,
                num_chunks=6,
                transfer_s=0.215,
                busy_s=0.215,
                exposed_s=0.014,
                transport="shm",
                transport_reason="both are on this host",
                codec="none",
                num_wire_bytes=37 * 46080,
            ),
        )
    )
    return found


class FakeGateway(
    inference_pb2_grpc.InferenceServiceServicer, control_pb2_grpc.GatewayControlServiceServicer
):
    """Attributes say what it answers; it remembers the requests it got."""

    def __init__(self) -> None:
        self.answer: list[pb.GenerateResponse] = messages("Paris", ".")
        #: After the answer: status to end with, or None for OK.
        self.status: tuple[grpc.StatusCode, str] | None = None
        #: After the answer the request goes on until it is cancelled.
        self.goes_on = False
        #: Called in the server's thread when the answer has been sent and the request goes on.
        self.on_going_on: Callable[[], None] = lambda: None
        self.view = control_pb2.GetViewResponse()
        self.ledgers = control_pb2.GetKvLedgerResponse()
        self.asked_worker_ids: list[str] = []
        #: None: no such request is remembered.
        self.record: control_pb2.RequestRecord | None = None
        self.requests: list[pb.GenerateRequest] = []
        self.was_cancelled = threading.Event()
        #: host:port, once it listens.
        self.address = ""

    def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        self.requests.append(request)
        yield from self.answer
        if self.status:
            context.abort(*self.status)
        if self.goes_on:
            ended = threading.Event()
            if not context.add_callback(ended.set):
                ended.set()
            self.on_going_on()
            assert ended.wait(WAIT_S), "nobody cancels the request"
            self.was_cancelled.set()

    def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:  # noqa: N802
        return pb.AbortResponse()

    def GetModelInfo(self, request: Any, context: Any) -> pb.GetModelInfoResponse:  # noqa: N802
        return pb.GetModelInfoResponse(model="smol", max_context_tokens=512, vocab_size=1000)

    def PublishView(self, request: Any, context: Any) -> control_pb2.PublishViewResponse:  # noqa: N802
        return control_pb2.PublishViewResponse()

    def GetView(self, request: Any, context: Any) -> control_pb2.GetViewResponse:  # noqa: N802
        return self.view

    def GetKvLedger(  # noqa: N802
        self, request: control_pb2.GetKvLedgerRequest, context: grpc.ServicerContext
    ) -> control_pb2.GetKvLedgerResponse:
        self.asked_worker_ids.append(request.worker_id)
        return self.ledgers

    def Explain(  # noqa: N802
        self, request: control_pb2.ExplainRequest, context: grpc.ServicerContext
    ) -> control_pb2.ExplainResponse:
        if self.record is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no request {request.request_id!r} is remembered")
        return control_pb2.ExplainResponse(record=self.record)


@contextmanager
def running(gateway: FakeGateway) -> Iterator[FakeGateway]:
    """The gateway listens, on threads: the command line has event loops of its own."""
    server = grpc.server(futures.ThreadPoolExecutor(8))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(gateway, server)
    control_pb2_grpc.add_GatewayControlServiceServicer_to_server(gateway, server)
    gateway.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield gateway
    finally:
        server.stop(None).wait()
