"""What `phasewise explain` prints of a request. Pure."""

from orchestrator.cli import encode_text, transfer_text
from orchestrator.cli.transfer_text import counted, seconds
from protos import control_pb2 as pb

_ENDED = (pb.REQUEST_STATE_FINISHED, pb.REQUEST_STATE_FAILED)


def state_name(state: "pb.RequestState.ValueType") -> str:
    """As in `control.request_machine.RequestState`."""
    return pb.RequestState.Name(state).removeprefix("REQUEST_STATE_").lower()


def lines(record: pb.RequestRecord) -> list[str]:
    """All that is remembered of it."""
    prompt = counted(record.num_prompt_tokens, "token")
    found = [f"request {record.request_id}: a prompt of {prompt}, arrived {seconds(record.age_s)} ago"]
    for index, sample in enumerate(record.samples):
        if len(record.samples) > 1:
            found += ["", f"[sample {index}]"]
        found += _sample(sample, record.age_s)
    return found


def _sample(sample: pb.SampleRecord, age_s: float) -> list[str]:
    states = sample.states
    found = [f"  {_summary(sample, age_s)}", ""]
    for state in states:
        reason = f"  {state.reason}" if state.reason else ""
        found.append(f"  {seconds(state.at_s):>9}  {state_name(state.state):<8}{reason}".rstrip())
    if sample.order_reason:
        found += ["", f"  began {sample.order_reason}"]
    for number, attempt in enumerate(sample.attempts, start=1):
        found += ["", *_attempt(attempt, number)]
        found += [_migration(one) for one in sample.migrations if one.attempt == attempt.attempt]
    return found


def _migration(migration: pb.MigrationRecord) -> str:
    where = f"from {migration.source_worker_id} to {migration.target_worker_id}"
    found = [f"at {seconds(migration.at_s)} {where}", f"after {counted(migration.num_tokens, 'token')}"]
    if migration.HasField("pause_s"):
        found.append(f"next token {seconds(migration.pause_s)} later")
    if migration.HasField("transfer"):
        found.append(f"KV in {seconds(migration.transfer.transfer_s)} by {migration.transfer.transport}")
    return f"    moved        {', '.join(found)}: {migration.reason}"


def _summary(sample: pb.SampleRecord, age_s: float) -> str:
    last = sample.states[-1]
    reuse = transfer_text.reuse(
        sample.num_cached_tokens, sample.num_fetched_tokens, sample.num_reused_tokens, "of the prompt cached"
    )
    tokens = counted(sample.num_tokens, "token") + reuse
    if last.state in _ENDED:
        what = f"{state_name(last.state)} after {seconds(last.at_s)}, {tokens}"
    else:
        what = f"{state_name(last.state)} for {seconds(age_s - last.at_s)} now, {tokens} so far"
    if not sample.HasField("first_token_at_s"):
        return what
    found = [what, f"TTFT {seconds(sample.first_token_at_s)}"]
    found.append(f"{seconds(sample.worker_queue_s)} of it in the worker's queue")
    if sample.prefix_fetch_s:
        found.append(f"{seconds(sample.prefix_fetch_s)} of that for KV of other workers")
    found.append(f"{seconds(sample.prefill_s)} in prefill")
    if sample.HasField("images_reduced"):
        reduced = sample.images_reduced
        found.append(
            encode_text.reduced(
                reduced.num_planned,
                reduced.num_encoded,
                reduced.num_kept,
                reduced.prefill_share,
                is_too_long=reduced.is_too_long,
            )
        )
    if sample.HasField("second_token_at_s"):
        wait_s = sample.second_token_at_s - sample.first_token_at_s
        found.append(f"second token {seconds(wait_s)} after the first")
    return ", ".join(found)


def _attempt(attempt: pb.AttemptRecord, number: int) -> list[str]:
    prefill = f"{attempt.prefill_worker_id} (incarnation {attempt.prefill_incarnation})"
    decode = f"{attempt.decode_worker_id} (incarnation {attempt.decode_incarnation})"
    is_together = attempt.prefill_worker_id == attempt.decode_worker_id
    where = f"on {prefill}" if is_together else f"prefill on {prefill}, decode on {decode}"
    found = [f"  attempt {number} at {seconds(attempt.at_s)}: {where}", f"    why          {attempt.reason}"]
    found += [
        f"    {'' if i else 'pictures':<13}{text}"
        for i, text in enumerate(encode_text.lines(attempt.encodes))
    ]
    if attempt.HasField("transfer"):
        texts = transfer_text.lines(attempt.transfer)
        found += [f"    {'' if i else 'KV transfer':<13}{text}" for i, text in enumerate(texts)]
    elif not is_together:
        found.append("    KV transfer  not reported")
    if attempt.problem:
        found.append(f"    ended by     {attempt.problem}")
    return found
