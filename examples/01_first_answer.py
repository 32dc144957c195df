"""Prefill and decode on two workers, on this machine: start them, ask one question, show where its time went.

    python examples/01_first_answer.py [--manifest FILE]

It starts what deploy/manifests/laptop.yaml declares, as `phasewise up` would, and stops
it again, also after Ctrl-C.
"""

import argparse
import signal
import sys
import time
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

MANIFEST = Path(__file__).parent.parent / "deploy" / "manifests" / "laptop.yaml"
QUESTION = "What is the capital of France?"


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--manifest", type=Path, default=MANIFEST, metavar="FILE")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    try:
        return _demo(args.manifest)
    except KeyboardInterrupt:
        print("interrupted; everything that was started is stopped", file=sys.stderr)
        return 130
    except PhasewiseOrchestratorError as error:
        print(error, file=sys.stderr)
        return 1
    except grpc.RpcError as error:
        print(f"the request failed: {error.code().name}: {error.details()}", file=sys.stderr)
        return 1


def _demo(manifest: Path) -> int:
    began_s = time.monotonic()
    with local_deployment(load(manifest), shown_progress) as running:
        started_s = time.monotonic() - began_s
        print(f"a prefill worker and a decode worker serve at {running.address}, after {started_s:.0f} s\n")
        print(f"> {QUESTION}")
        asked = pb.GenerateRequest(
            chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=QUESTION)]),
            sampling=pb.SamplingParams(max_tokens=64),
        )
        with AnswerPrinter() as printer:
            last = interruptible.run(
                request.stream(running.address, asked, timeout_s=60, on_message=printer.take)
            )
        print()
        print("\n".join(timeline.lines(last)))
    print("\neverything is stopped")
    return 0 if "Paris" in printer.text else 1


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
