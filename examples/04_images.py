"""Encode, prefill and decode on three workers, on this machine: one question without a picture, and one about a picture.

    python examples/04_images.py [--manifest FILE] [--image FILE] [QUESTION]

`make demo` runs this. It starts what deploy/manifests/images.yaml declares, as `phasewise up` would, and stops it again,
also after Ctrl-C. The model knows drawn shapes, not photographs.
"""

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

import grpc

from orchestrator import interruptible
from orchestrator.cli import request, timeline
from orchestrator.cli.answer_printer import AnswerPrinter
from orchestrator.cli.progress import shown_progress
from orchestrator.errors import PhasewiseOrchestratorError
from orchestrator.manifest.load import load
from orchestrator.runtime.launch import local_deployment
from protos import inference_pb2 as pb

ROOT = Path(__file__).parent.parent
MANIFEST = ROOT / "deploy" / "manifests" / "images.yaml"
IMAGE = ROOT / "examples" / "images" / "heart_and_moon.png"
TEXT_QUESTION = "What is the capital of France?"
IMAGE_QUESTION = "What is in this picture?"


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("question", nargs="?", default=IMAGE_QUESTION, metavar="QUESTION")
    parser.add_argument("--image", type=Path, default=IMAGE, metavar="FILE")
    parser.add_argument("--manifest", type=Path, default=MANIFEST, metavar="FILE")
    args = parser.parse_args()
    if not args.image.is_file():
        parser.error(f"argument --image: there is no file {args.image}")
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    try:
        _show(args.manifest, args.image, args.question)
    except KeyboardInterrupt:
        print("interrupted; everything that was started is stopped", file=sys.stderr)
        return 130
    except PhasewiseOrchestratorError as error:
        print(error, file=sys.stderr)
        return 1
    except grpc.RpcError as error:
        print(f"the request failed: {error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    print("\neverything is stopped")
    return 0


def _show(manifest: Path, image: Path, question: str) -> None:
    with local_deployment(load(manifest), shown_progress) as running:
        print(f"an encode, a prefill and a decode worker serve at {running.address}\n")
        print(f"> {TEXT_QUESTION}")
        _ask(running.address, pb.ChatMessage(role="user", content=TEXT_QUESTION))
        print(f"\n> [{image.name}] {question}")
        picture = pb.ContentPart(image=pb.Image(data=image.read_bytes()))
        message = pb.ChatMessage(role="user", parts=[picture, pb.ContentPart(text=question)])
        last = _ask(running.address, message)
    print()
    print("\n".join(timeline.lines(last)))


def _ask(address: str, message: pb.ChatMessage) -> pb.GenerateResponse:
    """Print the answer as it comes; its last message has the times."""
    asked = pb.GenerateRequest(
        chat=pb.ChatMessages(messages=[message]), sampling=pb.SamplingParams(max_tokens=32)
    )
    with AnswerPrinter() as printer:
        last = interruptible.run(request.stream(address, asked, timeout_s=60, on_message=printer.take))
    print()
    return last


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
