"""Prints the answer of one request as it comes."""

from collections.abc import Iterable, Sequence
from typing import Self

from protos import inference_pb2 as pb


class AnswerPrinter:
    """Prints one sample as it comes, and several one after the other, each when it has ended.

    Ends its line when left, for whatever reason. num_samples: as asked for.
    """

    def __init__(self, num_samples: int = 1) -> None:
        self._num_samples = num_samples
        self._texts: dict[int, str] = {}
        self._logprobs: dict[int, list[pb.TokenLogprobs]] = {}
        self._prompt_logprobs: list[pb.TokenLogprobs] = []
        self._is_line_open = False
        #: The last message of each sample that has ended, in the order in which they ended.
        self.ends: list[pb.GenerateResponse] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._end_line()

    @property
    def text(self) -> str:
        """What came so far of the first sample, or of the likeliest draft."""
        return self._texts.get(0, "")

    def take(self, response: pb.GenerateResponse) -> None:
        """Take one message, and print at once what can be."""
        index = response.sample_index
        self._texts[index] = self._texts.get(index, "") + response.text_delta
        self._logprobs.setdefault(index, []).extend(response.logprobs)
        self._prompt_logprobs.extend(response.prompt_logprobs)
        is_end = response.finish_reason != pb.FINISH_REASON_UNSPECIFIED
        if is_end:
            self.ends.append(response)
        if self._num_samples == 1:
            self._write(response.text_delta)
        elif is_end:
            self._write_block(f"[sample {index}]", self._texts[index])
        if response.drafts:
            self._texts[0] = response.drafts[0].text
            for number, draft in enumerate(response.drafts):
                self._write_block(f"[draft {number}, logprob {draft.logprob:.2f}]", draft.text)
        if is_end:
            self._write_logprobs(index)

    def _write_logprobs(self, index: int) -> None:
        for title, logprobs in (
            ("prompt", self._prompt_logprobs),
            ("generated", self._logprobs[index]),
        ):
            if logprobs:
                self._end_line()
                print("\n" + "\n".join(logprob_lines(title, logprobs)), flush=True)
        # Those of the prompt come with the first sample only.
        self._prompt_logprobs = []

    def _write_block(self, head: str, text: str) -> None:
        self._end_line()
        self._write(f"{head}\n{text}")
        self._end_line()

    def _write(self, text: str) -> None:
        if text:
            print(text, end="", flush=True)
            self._is_line_open = not text.endswith("\n")

    def _end_line(self) -> None:
        if self._is_line_open:
            print(flush=True)
            self._is_line_open = False


def logprob_lines(title: str, logprobs: Sequence[pb.TokenLogprobs]) -> Iterable[str]:
    """A table with one line for each token; the likeliest ones behind it."""
    width = max(len(title), *(len(repr(token.text)) for token in logprobs))
    yield f"{title:<{width}}        id  logprob    rank"
    for token in logprobs:
        top = "  ".join(f"{other.text!r} {other.logprob:.3f}" for other in token.top)
        line = f"{token.text!r:<{width}}  {token.token_id:>8} {token.logprob:>8.3f} {token.rank:>7}"
        yield f"{line}  {top}" if top else line
