"""`phasewise chat`: one message to the model, or a conversation."""

import argparse
import contextlib
import io
import sys
from collections.abc import Sequence

import grpc

from orchestrator import interruptible
from orchestrator.cli import arguments, exit_codes, images, request, target, timeline
from orchestrator.errors import BrokenAnswer, DeploymentNotFound
from orchestrator.runtime.registry import Registry
from protos import inference_pb2 as pb

MODEL_INFO_TIMEOUT_S = 10.0
IMAGE_COMMAND = "/image "

EXAMPLES = """\
examples:
  phasewise chat "What is the capital of France?"
  phasewise chat "What is the capital of France?" --timeline
  phasewise chat --system "Answer in one sentence." --temperature 0.7
  phasewise chat "Name a colour." --json-schema '{"type": "string"}'
  phasewise chat --image photo.png "What is in this picture?"
  phasewise chat --image before.png --image after.png "What has changed?"
  cat question.txt | phasewise chat - --address 127.0.0.1:8480

Without MESSAGE it is a conversation, in which the model sees what was said before:
  /image FILE     add a picture to the next message; so does --image to the first one
  /reset          forget the conversation
  /exit, Ctrl-D   leave; so does Ctrl-C at the prompt
  Ctrl-C          while an answer comes, stop it; what has come so far counts as the answer
Pictures stand before the text of their message, in the order in which they were given.
With --n the first sample counts as the answer, with --superposed the likeliest draft.

exit codes: 0 answered, or the conversation was left; 1 refused or failed, 2 wrong command line,
4 no such deployment, no gateway or no worker ready, 130 interrupted
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "chat",
        help="talk to the model, with its chat template",
        description="Send one message and print the answer as it comes, or hold a conversation.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "message",
        nargs="?",
        type=arguments.utf8,
        metavar="MESSAGE",
        help="a single message; - reads it from stdin (default: a conversation)",
    )
    parser.add_argument("--system", type=arguments.utf8, metavar="TEXT", help="how the model is to behave")
    images.add_argument(parser, "of the message, or of a conversation's first one")
    target.add_arguments(parser)
    request.add_arguments(parser, default_max_tokens=None)
    parser.add_argument("--timeline", action="store_true", help="show after each answer where its time went")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit code."""
    try:
        address = target.gateway_address(args, Registry())
        pictures = images.read_images(args.image)
        message = None if args.message is None else arguments.text_or_stdin(args.message)
    except DeploymentNotFound as error:
        print(error, file=sys.stderr)
        return exit_codes.UNREACHABLE
    except argparse.ArgumentTypeError as error:
        print(error, file=sys.stderr)
        return exit_codes.USAGE
    conversation = Conversation(address, args)
    conversation.add(pictures)
    if message is not None:
        return conversation.ask(message)
    return _converse(address, conversation)


class Conversation:
    """What was said so far, and the gateway that it is said to."""

    def __init__(self, address: str, args: argparse.Namespace) -> None:
        self._address = address
        self._args = args
        self._messages: list[pb.ChatMessage] = []
        #: Of the next message.
        self._pictures: list[pb.Image] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self._pictures = []
        system = self._args.system
        self._messages = [] if system is None else [pb.ChatMessage(role="system", content=system)]

    def add(self, pictures: Sequence[images.ImageArgument]) -> None:
        """They are part of the next message."""
        self._pictures += images.to_pb(pictures)

    def ask(self, text: str) -> int:
        """Send the next message and print the answer; returns the exit code. Ctrl-C goes on to the caller.

        A message without any answer is forgotten with its pictures, so that the next one does not follow it.
        """
        question = self._question(text)
        chat = pb.ChatMessages(messages=[*self._messages, question])
        asked = request.fill(pb.GenerateRequest(chat=chat), self._args)
        printer = request.printer(self._args)
        try:
            with printer:
                stream = request.stream(
                    self._address, asked, timeout_s=self._args.timeout_s, on_message=printer.take
                )
                interruptible.run(stream)
        except grpc.RpcError as error:
            return target.failed(self._address, error)
        except BrokenAnswer as error:
            print(error, file=sys.stderr)
            return exit_codes.FAILURE
        finally:
            if printer.text:
                answer = pb.ChatMessage(role="assistant", content=printer.text)
                self._messages += [question, answer]
        # A draft is as long as was asked for.
        if any(end.finish_reason == pb.FINISH_REASON_LENGTH and not end.drafts for end in printer.ends):
            print("(cut at the length limit)", file=sys.stderr)
        if self._args.timeline:
            print("\n" + "\n".join(timeline.lines_of_all(printer.ends)))
        return exit_codes.OK

    def _question(self, text: str) -> pb.ChatMessage:
        """The next message."""
        pictures, self._pictures = self._pictures, []
        if not pictures:
            return pb.ChatMessage(role="user", content=text)
        parts = [*(pb.ContentPart(image=picture) for picture in pictures), pb.ContentPart(text=text)]
        return pb.ChatMessage(role="user", parts=parts)


def _converse(address: str, conversation: Conversation) -> int:
    """Message by message until the user leaves; a failed one is said and ends nothing."""
    try:
        info = interruptible.run(request.model_info(address, timeout_s=MODEL_INFO_TIMEOUT_S))
    except grpc.RpcError as error:
        return target.failed(address, error)
    if isinstance(sys.stdin, io.TextIOWrapper):
        # A line that is no UTF-8 can then be refused without losing the others that were read with it.
        sys.stdin.reconfigure(errors="surrogateescape")
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        # Gives input() a history and keys to edit with, where Python was built with it.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
        print(
            f"{info.model} at {address}. /image FILE adds a picture, /reset forgets, /exit or Ctrl-D leaves, "
            "Ctrl-C stops an answer."
        )
    while True:
        try:
            line = input("\n> " if is_terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            if is_terminal:
                print()
            return exit_codes.OK
        if line == "/exit":
            return exit_codes.OK
        if line:
            _take(line, conversation)


def _take(line: str, conversation: Conversation) -> None:
    """Do what one line says, other than leaving."""
    if line == "/reset":
        conversation.reset()
        print("(forgotten)", file=sys.stderr)
    elif line.startswith(IMAGE_COMMAND):
        _add_picture(line.removeprefix(IMAGE_COMMAND).strip(), conversation)
    elif line == IMAGE_COMMAND.strip():
        print("which picture? /image FILE", file=sys.stderr)
    elif line.startswith("/") and " " not in line:
        print(f"there is no command {line}; there are /image FILE, /reset and /exit", file=sys.stderr)
    else:
        try:
            conversation.ask(arguments.utf8(line))
        except UnicodeEncodeError:
            print("that is not valid UTF-8", file=sys.stderr)
        except KeyboardInterrupt:
            print("(stopped)", file=sys.stderr)


def _add_picture(name: str, conversation: Conversation) -> None:
    try:
        pictures = images.read_images([name])
    except argparse.ArgumentTypeError as error:
        print(error, file=sys.stderr)
        return
    conversation.add(pictures)
    for picture in pictures:
        size = f"{picture.width} x {picture.height}"
        print(f"({picture.name!r}, {size} pixels, goes with the next message)", file=sys.stderr)
