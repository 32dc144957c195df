"""Answers in a given form: a JSON object, one of some words, a time of day.

    phasewise up deploy/manifests/laptop.yaml
    python examples/02_structured_output.py [HOST:PORT]

No question asks for the form: the engine lets nothing else come out. Whether the answer is right is up to the
model.
"""

import argparse
import json
import sys

import grpc

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceServiceStub

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
MOODS = ["positive", "negative", "neutral"]
TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]"


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("address", nargs="?", default="127.0.0.1:8480", metavar="HOST:PORT")
    address = parser.parse_args().address
    try:
        with grpc.insecure_channel(address) as channel:
            _ask_all(InferenceServiceStub(channel))
    except grpc.RpcError as error:
        print(f"the gateway at {address} said {error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    return 0


def _ask_all(gateway: InferenceServiceStub) -> None:
    text = _answer(
        gateway,
        'Who is this about? "Maria is 34 years old and lives in Lisbon."',
        pb.SamplingParams(max_tokens=64, json_schema=json.dumps(PERSON)),
    )
    person = json.loads(text)
    print(f"JSON schema  {person['name']!r} is {person['age'] + 1} next year")
    text = _answer(
        gateway,
        'Is this positive, negative or neutral? "I loved every minute of this film."',
        pb.SamplingParams(max_tokens=16, choice=pb.Choices(texts=MOODS)),
    )
    print(f"choice       {text!r}, which is mood {MOODS.index(text) + 1} of {len(MOODS)}")
    text = _answer(
        gateway,
        "The train to Lisbon leaves at 14:35. When does the train leave?",
        pb.SamplingParams(max_tokens=16, regex=TIME),
    )
    hour, minute = map(int, text.split(":"))
    print(f"regex        {text}, {60 * hour + minute} minutes after midnight")


def _answer(gateway: InferenceServiceStub, question: str, sampling: pb.SamplingParams) -> str:
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=question)])
    request = pb.GenerateRequest(chat=chat, sampling=sampling)
    return "".join(response.text_delta for response in gateway.Generate(request, timeout=60))


if __name__ == "__main__":
    sys.exit(main())
