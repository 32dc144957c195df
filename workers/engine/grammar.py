"""Grammars: compiled once for a model's tokenizer, then followed by each sequence token by token.

    Grammar (text) -> GrammarCompiler -> CompiledGrammar -> GrammarState of one sequence
                      a thread of its own   shared            engine thread; masks in GrammarMasks' thread

The library is llguidance; docs/decisions/0007-structured-output.md says why.
"""

import re
from collections import OrderedDict
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from workers.api import Grammar, GrammarKind
from workers.engine.grammar_closing import ClosingSearch, Mask, is_allowed
from workers.engine.grammar_source import library_grammar
from workers.errors import InvalidGrammar

MAX_CACHED_GRAMMARS = 32
#: Characters of a reason that a caller gets to read.
MAX_REASON_CHARS = 400
#: Where this many tokens are left of max_new_tokens, the way to the grammar's end is kept open.
CLOSING_TOKENS = 64
#: While no way is known there, one is searched for every so many tokens.
SEARCH_AGAIN_TOKENS = 8
#: What a grammar may cost. The fuels bound time and memory: a compilation stays under half a second and 20 MB,
#: a mask under some 20 ms. A state takes 1 to 2 kB, and all sequences of one grammar share theirs.
LIMITS = LLParserLimits(
    initial_lexer_fuel=100_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
SILENT = 0


class CompiledGrammar:
    """A grammar made ready for one tokenizer. Can be shared by threads; never changed."""

    def __init__(self, matcher: LLMatcher, eos_token_ids: SequenceOf[int], search: ClosingSearch) -> None:
        self._matcher = matcher
        self._eos_token_ids = tuple(eos_token_ids)
        self._search = search
        #: A sequence met a limit that all sequences of this grammar share: the next one needs it compiled anew.
        self.is_worn = False

    def start(self, *, max_new_tokens: int, stop_token_ids: frozenset[int] = frozenset()) -> "GrammarState":
        """The state before the first generated token.

        stop_token_ids: those of the request; without any, the model's end-of-sequence tokens.
        max_new_tokens: of the request, counted from the first generated token.
        """
        stops = tuple(sorted(stop_token_ids)) or self._eos_token_ids
        return GrammarState(self, self._matcher.deep_copy(), stops, max_new_tokens)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The model's end-of-sequence tokens."""
        return self._eos_token_ids

    @property
    def search(self) -> ClosingSearch:
        """Finds ways to the end."""
        return self._search


class GrammarState:
    """Where one sequence is in its grammar: a function of the grammar and the tokens accepted so far.

    A preempted, handed over or failed-over sequence gets its state back by `accept` of its tokens. Used by
    one thread at a time. A state that meets a limit of the library, or a place where no token can follow,
    says so in `problem`, allows nothing any more, and its request has failed.
    """

    __slots__ = (
        "_closings",
        "_compiled",
        "_is_ended",
        "_matcher",
        "_max_new_tokens",
        "_stop_token_ids",
        "_trial",
        "num_tokens",
        "problem",
    )

    def __init__(
        self,
        compiled: CompiledGrammar,
        matcher: LLMatcher,
        stop_token_ids: tuple[int, ...],
        max_new_tokens: int,
    ) -> None:
        self._compiled = compiled
        self._matcher = matcher
        self._stop_token_ids = stop_token_ids
        self._max_new_tokens = max_new_tokens
        self._is_ended = False
        #: num_tokens -> a way to the end from there, or None for not found; in the closing window only.
        self._closings: dict[int, tuple[int, ...] | None] = {}
        #: (num_tokens, token, way to the end after it): what `settle` found, for `accept`.
        self._trial: tuple[int, int, tuple[int, ...] | None] | None = None
        #: Tokens accepted, a stop token included.
        self.num_tokens = 0
        self.problem: str | None = None

    @property
    def is_complete(self) -> bool:
        """The text so far is in the language, so that the sequence may stop here."""
        return self.problem is None and (self._is_ended or self._matcher.is_accepting())

    @property
    def must_stop(self) -> bool:
        """The text is complete and nothing can follow but a stop token: the sequence ends without one."""
        if not self.is_complete:
            return False
        if self._is_ended or self._matcher.is_stopped():
            return True
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8).copy()
        for token_id in {*self._compiled.eos_token_ids, *self._stop_token_ids}:
            mask[token_id >> 3] &= ~(1 << (token_id & 7)) & 0xFF
        return not mask.any()

    def accept(self, token_ids: SequenceOf[int]) -> int:
        """Go on by these tokens; how many were taken, all unless one does not fit the grammar.

        The state stays before the first one that does not fit. A stop token fits where the text is complete.
        """
        for num_taken, token_id in enumerate(token_ids):
            if not self._accept(token_id):
                return num_taken
        return len(token_ids)

    def rollback(self, num_tokens: int) -> None:
        """Take back the last tokens; 0 <= num_tokens <= self.num_tokens."""
        assert 0 <= num_tokens <= self.num_tokens, f"{num_tokens} of {self.num_tokens} tokens"
        if num_tokens == 0:
            return
        self.num_tokens -= num_tokens
        # The matcher has never seen the stop token.
        num_in_matcher = num_tokens - 1 if self._is_ended else num_tokens
        self._is_ended = False
        if num_in_matcher and not self._matcher.rollback(num_in_matcher):
            self._fail(self._matcher.get_error())
        self._closings = {n: way for n, way in self._closings.items() if n <= self.num_tokens}
        self._trial = None

    def fork(self) -> "GrammarState":
        """A state that goes its own way from here."""
        twin = GrammarState(
            self._compiled, self._matcher.deep_copy(), self._stop_token_ids, self._max_new_tokens
        )
        twin._is_ended = self._is_ended
        twin._closings = dict(self._closings)
        twin.num_tokens = self.num_tokens
        twin.problem = self.problem
        return twin

    def fill(self, row: Mask) -> None:
        """Write one bit for each token into `row`, [ceil(vocab_size / 32)] uint32: 1 for what may come next.

        Stop tokens are allowed exactly where the text is complete, whatever the grammar says of them.
        """
        row[:] = 0
        if self.problem is not None:
            return
        if not self._is_ended:
            self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
            if self._matcher.is_error():
                row[:] = 0
                self._fail(self._matcher.get_error())
                return
        for token_id in {*self._compiled.eos_token_ids, *self._stop_token_ids}:
            row[token_id >> 5] &= np.uint32(~(1 << (token_id & 31)) & 0xFFFFFFFF)
        if self.is_complete:
            for token_id in self._stop_token_ids:
                row[token_id >> 5] |= np.uint32(1 << (token_id & 31))
        elif not row.any():
            self._fail("no token of this model can follow")

    def settle(self, token_id: int) -> int:
        """The token to take for the one that was sampled: mostly the same.

        Among the last CLOSING_TOKENS tokens of max_new_tokens, when a way to the grammar's end is known that
        fits into what is left, a token that would lose it is replaced by the first one of that way. So text
        is complete at max_new_tokens whenever a way was found when CLOSING_TOKENS tokens were left, or later.
        """
        num_left = self._max_new_tokens - self.num_tokens - 1
        if num_left >= CLOSING_TOKENS or self.problem is not None or token_id in self._stop_token_ids:
            return token_id
        closing = self._closing()
        if closing is None:
            return token_id
        after = self._closing_after(token_id, num_left)
        if after is not None:
            return token_id
        if closing:
            return closing[0]
        return self._stop_token_ids[0] if self._stop_token_ids else token_id

    def _accept(self, token_id: int) -> bool:
        if self.problem is not None or self._is_ended:
            return False
        if token_id in self._stop_token_ids:
            self._is_ended = self._matcher.is_accepting()
            self.num_tokens += self._is_ended
            return self._is_ended
        num_left = self._max_new_tokens - self.num_tokens - 1
        closing = self._closing_after(token_id, num_left) if num_left < CLOSING_TOKENS else None
        if self._matcher.try_consume_tokens([token_id]) != 1:
            if self._matcher.is_error():
                self._fail(self._matcher.get_error())
            return False
        self.num_tokens += 1
        if num_left < CLOSING_TOKENS:
            self._closings[self.num_tokens] = closing
        return True

    def _closing(self) -> tuple[int, ...] | None:
        """A way to the end from here that fits into max_new_tokens."""
        if self.num_tokens not in self._closings:
            num_left = self._max_new_tokens - self.num_tokens
            self._closings[self.num_tokens] = self._compiled.search.find(self._matcher, num_left)
        return self._closings[self.num_tokens]

    def _closing_after(self, token_id: int, num_left: int) -> tuple[int, ...] | None:
        """A way to the end after `token_id` in at most `num_left` tokens; None when none is known.

        The way from here mostly still leads there, as in a text or a number: asking that costs some 20
        microseconds, a search milliseconds. What it finds depends on the tokens alone.
        """
        if self._trial is not None and self._trial[:2] == (self.num_tokens, token_id):
            return self._trial[2]
        closing = self._closing()
        after = self._find_after(token_id, closing, num_left)
        self._trial = (self.num_tokens, token_id, after)
        return after

    def _find_after(
        self, token_id: int, closing: tuple[int, ...] | None, num_left: int
    ) -> tuple[int, ...] | None:
        if closing and closing[0] == token_id:
            return closing[1:]
        if closing is None and num_left % SEARCH_AGAIN_TOKENS:
            return None
        child = self._matcher.deep_copy()
        if child.try_consume_tokens([token_id]) != 1:
            return None
        if child.is_accepting():
            return ()
        if closing and len(closing) <= num_left:
            twin = child.deep_copy()
            if twin.try_consume_tokens(list(closing)) == len(closing) and twin.is_accepting():
                return closing
        return self._compiled.search.find(child, num_left)

    def _fail(self, reason: str) -> None:
        self._compiled.is_worn = True
        self.problem = f"grammar: after {self.num_tokens} tokens: {_one_line(reason)}"


class GrammarCompiler:
    """Compiles grammars for one model in a thread of its own, and keeps the ones used last.

    tokenizer_json: of the tokenizers library, UTF-8; byte-level and byte-fallback BPE are known to work.
    vocab_size: of the model's logits; ids past the tokenizer's are never allowed.
    The tokenizer is read with the first grammar, for 0.3 s at 49152 tokens.
    """

    def __init__(self, tokenizer_json: bytes, vocab_size: int, eos_token_ids: SequenceOf[int]) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar-compile")
        self._lock = Lock()
        self._cache: OrderedDict[Grammar, Future[CompiledGrammar]] = OrderedDict()
        self._tools: tuple[LLTokenizer, ClosingSearch] | None = None

    def compile_soon(self, grammar: Grammar) -> Future[CompiledGrammar]:
        """The compiled grammar, or InvalidGrammar, when it is ready. Shared: never cancel it.

        What waits is bounded by the requests that wait. A grammar that was refused is refused from the cache.
        """
        with self._lock:
            future = self._cache.get(grammar)
            if future is None or _is_worn(future):
                future = self._executor.submit(self._compile, grammar)
            self._keep(grammar, future)
            return future

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """The same at once: from the cache, or compiled in this thread, past those that wait for theirs.

        Raises InvalidGrammar with what is wrong and where.
        """
        with self._lock:
            future = self._cache.get(grammar)
        if future is None or not future.done() or _is_worn(future):
            future = Future()
            try:
                future.set_result(self._compile(grammar))
            except InvalidGrammar as error:
                future.set_exception(error)
        with self._lock:
            self._keep(grammar, future)
        return future.result()

    def close(self) -> None:
        """Wait for the compilation that runs; those behind it are cancelled."""
        self._executor.shutdown(cancel_futures=True)

    def _keep(self, grammar: Grammar, future: Future[CompiledGrammar]) -> None:
        """It was used last. Under the lock."""
        self._cache[grammar] = future
        self._cache.move_to_end(grammar)
        while len(self._cache) > MAX_CACHED_GRAMMARS:
            self._cache.popitem(last=False)

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        try:
            source = library_grammar(grammar)
        except ValueError as error:
            # Half of a character, a number that is none, or nesting beyond what the library reads.
            raise InvalidGrammar(grammar.kind.value, _one_line(str(error))) from error
        tokenizer, search = self._read_tokenizer(grammar)
        matcher = LLMatcher(tokenizer, source, log_level=SILENT, limits=LIMITS)
        if not matcher.is_error():
            # Some grammars that nothing satisfies, or that are too much for the limits, show it here.
            mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint32)
            eos = np.array(self._eos_token_ids, dtype=np.int64)
            is_empty = np.bitwise_count(mask).sum() == is_allowed(mask, eos).sum()
            if not matcher.is_error() and is_empty:
                raise InvalidGrammar(grammar.kind.value, "no text but the empty one satisfies it")
        if matcher.is_error():
            raise InvalidGrammar(grammar.kind.value, _reason(grammar.kind, matcher.get_error()))
        return CompiledGrammar(matcher, self._eos_token_ids, search)

    def _read_tokenizer(self, grammar: Grammar) -> tuple[LLTokenizer, ClosingSearch]:
        if self._tools is None:
            try:
                tokenizer = LLTokenizer(
                    self._tokenizer_json.decode(),
                    n_vocab=self._vocab_size,
                    eos_token=list(self._eos_token_ids),
                )
            except ValueError as error:
                reason = f"this model's tokenizer cannot be used with a grammar: {_one_line(str(error))}"
                raise InvalidGrammar(grammar.kind.value, reason) from error
            self._tools = tokenizer, ClosingSearch(tokenizer, self._vocab_size)
        return self._tools


def _is_worn(future: Future[CompiledGrammar]) -> bool:
    """Whether it is ready, and used up."""
    return future.done() and not future.cancelled() and not future.exception() and future.result().is_worn


def _reason(kind: GrammarKind, text: str) -> str:
    """The library's message; a regex has its place in the regex itself, not in what we made of it."""
    return (
        re.sub(r"^at \d+\(\d+\): ", "", _one_line(text)) if kind is not GrammarKind.EBNF else _one_line(text)
    )


def _one_line(text: str) -> str:
    line = " ".join(text.replace("<non-verbose/>", "").split())
    return line if len(line) <= MAX_REASON_CHARS else line[:MAX_REASON_CHARS] + "..."
