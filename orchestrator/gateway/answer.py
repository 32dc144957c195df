"""What a client is sent: tokens, text, and at the end how it went. Pure."""

from collections.abc import Callable, Sequence

from orchestrator.control.record_wire import encode_fields
from orchestrator.control.request_actions import DeliverDrafts
from orchestrator.control.request_machine import RequestMachine
from orchestrator.gateway.detokeniser import TextStream
from orchestrator.gateway.live_request import LiveRequest, LiveSample, Progress
from protos import inference_pb2 as pb
from workers.api import FinishReason, KvTransferred, TokenLogprobs

_FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


class Answer:
    """Makes the messages of one request.

    new_text: a stream for one more sample. token_text: what a token alone stands for.
    stop: a sample's text ended within its first so many tokens, by a stop string; it wants no more.
    """

    def __init__(
        self,
        request: LiveRequest,
        *,
        new_text: Callable[[], TextStream],
        token_text: Callable[[int], str],
        stop: Callable[[LiveSample, int], None],
    ) -> None:
        self._request = request
        self._new_text = new_text
        self._token_text = token_text
        self._stop = stop
        self._texts = [new_text() for _ in request.samples]
        self._num_open = len(request.samples)

    @property
    def is_over(self) -> bool:
        """The last message was made."""
        return self._num_open == 0

    def message(self, progress: Progress, now_s: float) -> pb.GenerateResponse:
        """The next message. now_s: on the clock of the machines."""
        sample = self._request.samples[progress.sample_index]
        text, token_ids, finish_reason, stop_text = self._text(sample, progress)
        message = pb.GenerateResponse(
            request_id=sample.machine.request_id,
            token_ids=token_ids,
            first_token_index=progress.first_index,
            text_delta=text,
            finish_reason=_FINISH_REASONS[finish_reason],
            sample_index=sample.index,
            stop_text=stop_text,
        )
        if progress.logprobs:
            message.logprobs.extend(map(self._logprobs, progress.logprobs[: len(token_ids)]))
        if progress.prompt_logprobs:
            message.prompt_logprobs.extend(map(self._logprobs, progress.prompt_logprobs))
        if progress.drafts is not None:
            message.drafts.extend(self._drafts(progress.drafts, sample.machine))
        if finish_reason is not None:
            message.timings.CopyFrom(timings(sample.machine, now_s))
            self._num_open -= 1
            if self.is_over:
                message.usage.CopyFrom(usage([sample.machine for sample in self._request.samples]))
        return message

    def _text(
        self, sample: LiveSample, progress: Progress
    ) -> tuple[str, tuple[int, ...], FinishReason | None, str]:
        """New text, the tokens that count, the end if that is it, and the stop string if one made it."""
        stream, token_ids = self._texts[sample.index], progress.token_ids
        # A stop token ends the text and is not part of it. A grammar may end it without one.
        is_stopped = progress.finish_reason is FinishReason.STOP
        stop_token_ids = sample.machine.sampling.stop_token_ids
        has_stop_token = is_stopped and any(token_id in stop_token_ids for token_id in token_ids[-1:])
        delta = stream.push(token_ids[:-1] if has_stop_token else token_ids)
        if delta.stop is not None:
            num_tokens = progress.first_index + delta.num_tokens
            self._stop(sample, num_tokens)
            return delta.text, token_ids[: delta.num_tokens], FinishReason.STOP, delta.stop
        if progress.finish_reason is None:
            return delta.text, token_ids, None, ""
        rest = stream.finish()
        finish_reason = FinishReason.STOP if rest.stop is not None else progress.finish_reason
        return delta.text + rest.text, token_ids, finish_reason, rest.stop or ""

    def _drafts(self, drafts: DeliverDrafts, machine: RequestMachine) -> list[pb.Draft]:
        found = []
        for token_ids, logprob in zip(drafts.drafts, drafts.logprobs, strict=True):
            stops = [i for i, token_id in enumerate(token_ids) if token_id in machine.sampling.stop_token_ids]
            stream = self._new_text()
            text = stream.push(token_ids[: stops[0]] if stops else token_ids).text + stream.finish().text
            found.append(pb.Draft(token_ids=token_ids, text=text, logprob=logprob))
        return found

    def _logprobs(self, logprobs: TokenLogprobs) -> pb.TokenLogprobs:
        return pb.TokenLogprobs(
            token_id=logprobs.token_id,
            logprob=logprobs.logprob,
            rank=logprobs.rank,
            text=self._token_text(logprobs.token_id),
            top=[
                pb.TokenLogprob(token_id=token_id, logprob=logprob, text=self._token_text(token_id))
                for token_id, logprob in logprobs.top
            ],
        )


def usage(machines: Sequence[RequestMachine]) -> pb.Usage:
    """Of a request with these samples. The prompt counts once."""
    first = machines[0]
    message = pb.Usage(
        prompt_tokens=len(first.prompt_ids),
        completion_tokens=sum(len(machine.delivered) + sum(map(len, machine.drafts)) for machine in machines),
        cached_tokens=first.num_cached_tokens,
        fetched_tokens=first.num_fetched_tokens,
        reused_tokens=first.num_reused_tokens,
        image_tokens=first.images.num_embeddings if first.images is not None else 0,
    )
    if (reduced := first.images_reduced) is not None:
        message.image_reduction.encoded_tokens = reduced.num_encoded
        message.image_reduction.kept_tokens = reduced.num_kept
        message.image_reduction.prefill_share = reduced.prefill_share
        message.image_reduction.is_too_long = reduced.is_too_long
    for machine in machines:
        report = machine.decoding_report
        if report is not None:
            message.decoding.num_steps += report.num_steps
            message.decoding.num_rows += report.num_rows
            message.decoding.num_tokens += report.num_tokens
    return message


def timings(machine: RequestMachine, now_s: float) -> pb.Timings:
    """How a finished sample went. now_s: when its last token leaves, on the machine's clock."""
    times, route = machine.times, machine.route
    assert route is not None
    message = pb.Timings(
        prefill_s=times.prefill_s,
        total_s=now_s - times.arrived_at_s,
        prefill_worker_id=route.prefill.worker_id,
        decode_worker_id=route.decode.worker_id,
        attempts=machine.num_attempts,
    )
    if times.submitted_at_s is not None:
        message.queue_s = times.submitted_at_s - times.arrived_at_s + times.worker_queue_s
    if times.first_token_at_s is not None and times.last_token_at_s is not None:
        message.ttft_s = times.first_token_at_s - times.arrived_at_s
        message.decode_s = times.last_token_at_s - times.first_token_at_s
        if len(machine.delivered) > 1:
            message.tpot_s = message.decode_s / (len(machine.delivered) - 1)
            if times.second_token_at_s is not None:
                message.second_token_s = times.second_token_at_s - times.first_token_at_s
    if times.kv_transfer is not None:
        message.kv_transfer.CopyFrom(_transfer(times.kv_transfer))
    if times.images_wanted_at_s is not None and times.images_encoded_at_s is not None:
        message.encode_s = times.images_encoded_at_s - times.images_wanted_at_s
        message.encode_start_s = times.images_wanted_at_s - times.arrived_at_s
    message.encodes.extend(
        pb.EncodeTimings(**encode_fields(record, times.arrived_at_s)) for record in machine.encodes.records
    )
    return message


def _transfer(event: KvTransferred) -> pb.KvTransferTimings:
    return pb.KvTransferTimings(
        num_bytes=event.num_bytes,
        num_chunks=event.num_chunks,
        transfer_s=event.transfer_s,
        exposed_s=event.exposed_s,
        transport=event.transport,
        transport_reason=event.transport_reason,
        codec=event.codec,
        num_wire_bytes=event.num_wire_bytes,
        num_resent_chunks=event.num_resent_chunks,
        num_resumes=event.num_resumes,
        busy_s=event.busy_s,
    )
