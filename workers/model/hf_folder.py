"""A model as Hugging Face keeps it: a folder with config.json, tokenizer.json and safetensors files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from workers.errors import CorruptModel, ModelUnavailable, UnsupportedModel

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
#: Where processors of transformers 4 keep it, as JSON.
OLD_TEMPLATE = "chat_template.json"
#: Of the image processor; the second is that of old folders.
PROCESSOR = "processor_config.json"
PREPROCESSOR = "preprocessor_config.json"
#: Key of config.json: the model that text weights, tokenizer and chat template are those of, as a manifest names it.
TEXT_SOURCE = "phasewise_text_source"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: Ends of names of files that Python's pickle reads, which can run any program.
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HOW_TO_CONVERT = "safetensors; transformers' save_pretrained writes it"
#: Larger ones are damage, and products of two could be too large for any number.
MAX_INTEGER = 2**48
MAX_NUMBER = 1e30


@dataclass(frozen=True, slots=True)
class JsonValues:
    """Typed look-ups in an object of JSON. A value of another type is an error that names it.

    An absent key is one too where there is no default; null counts as absent.
    """

    path: str
    values: Mapping[str, object]

    def get(self, key: str) -> object:
        """Whatever is there; None when nothing is."""
        return self.values.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer that is 0 or more."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._wrong(key, value, "a non-negative integer")
        if value > MAX_INTEGER:
            raise self._wrong(key, value, f"at most {MAX_INTEGER}")
        return value

    def positive(self, key: str, default: int | None = None) -> int:
        """An integer that is 1 or more."""
        value = self.integer(key, default)
        if value == 0:
            raise self._wrong(key, value, "a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= MAX_NUMBER:
            raise self._wrong(key, value, f"a positive number up to {MAX_NUMBER:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def items(self, key: str) -> list[object] | None:
        """An array; None when it is absent."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, list):
            raise self._wrong(key, value, "an array")
        return value

    def inner(self, key: str) -> "JsonValues":
        """An object; empty when it is absent."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return JsonValues(f"{self.path} ({key})", value or {})

    def _get(self, key: str, default: object) -> object:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise CorruptModel(self.path, None, f"it lacks {key!r}")
        return value

    def _wrong(self, key: str, value: object, expected: str) -> CorruptModel:
        return CorruptModel(self.path, None, f"{key!r} is {str(value)[:80]!r}, not {expected}")


def read_json(path: Path) -> JsonValues:
    """The object in this file; empty when there is no file. Raises CorruptModel when it holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        # A text with half of a character could not be written again.
        json.dumps(values, ensure_ascii=False).encode()
    except FileNotFoundError:
        values = {}
    except RecursionError as error:
        raise CorruptModel(str(path), None, "it is nested too deeply") from error
    except ValueError as error:
        raise CorruptModel(str(path), None, f"it is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CorruptModel(str(path), None, "it is not an object of JSON")
    return JsonValues(str(path), values)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files, sorted.

    Raises UnsupportedModel when there are pickles instead, ModelUnavailable when a file is missing, and
    CorruptModel when the index is damaged.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.name.endswith(PICKLE_SUFFIXES))
        if pickles:
            refuse_pickle(str(folder), pickles[0])
        raise ModelUnavailable(
            str(folder), f"it holds neither {WEIGHTS} nor {INDEX}", "Complete the download of the model"
        )
    names = set(read_json(folder / INDEX).inner("weight_map").values.values())
    files = []
    for name in sorted(map(str, names)):
        # A name with a folder in it would lead out of this one.
        if Path(name).name != name or name.endswith(PICKLE_SUFFIXES):
            raise CorruptModel(str(folder / INDEX), None, f"it names the file {name!r}")
        if not (folder / name).is_file():
            raise ModelUnavailable(str(folder), f"{name} is missing", "Complete the download of the model")
        files.append(folder / name)
    if not files:
        raise CorruptModel(str(folder / INDEX), None, "it names no file")
    return files


def refuse_pickle(source: str, name: str) -> None:
    """Raise UnsupportedModel for weights in this file."""
    raise UnsupportedModel(
        source, f"its weights in {name!r}, a pickle, which could run any program", HOW_TO_CONVERT
    )


def files_that_matter(folder: Path) -> list[Path]:
    """All files that decide what the model answers, in a fixed order. Raises as `weight_files`."""
    names = (
        CONFIG, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS, TEMPLATE, OLD_TEMPLATE, PROCESSOR,
        PREPROCESSOR, INDEX,
    )  # fmt: skip
    return [folder / name for name in names if (folder / name).is_file()] + weight_files(folder)


def read_tokenizer(folder: Path) -> tuple[bytes, Tokenizer]:
    """tokenizer.json as it is, and the tokenizer that it describes.

    Raises ModelUnavailable when there is none and CorruptModel when it is none.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        problem = f"{TOKENIZER} is missing"
        if (folder / "tokenizer.model").is_file():
            problem += "; tokenizer.model alone is not read"
        remedy = (
            "Write it with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder), "
            "or download it"
        )
        raise ModelUnavailable(str(folder), problem, remedy)
    content = path.read_bytes()
    try:
        return content, Tokenizer.from_str(content.decode("utf-8"))
    # The library raises Exception itself.
    except Exception as error:
        raise CorruptModel(str(path), None, f"it is not a tokenizer: {error}") from error


def chat_template(folder: Path) -> str:
    """Jinja source of the chat template; empty when the model has none. Of several the one named "default"."""
    if (folder / TEMPLATE).is_file():
        try:
            return (folder / TEMPLATE).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CorruptModel(str(folder / TEMPLATE), error.start, "it is not UTF-8") from error
    values = read_json(folder / OLD_TEMPLATE)
    if values.get("chat_template") is None:
        values = read_json(folder / TOKENIZER_CONFIG)
    template = values.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CorruptModel(values.path, None, "'chat_template' is neither a text nor a list of named texts")
    return template or ""


def special_token(folder: Path, name: str, tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """Text of `bos_token` or `eos_token`: as the tokenizer's files say, else the first of these ids; or empty."""
    for file in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
        value = read_json(folder / file).get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            return value
    text: str | None = tokenizer.id_to_token(token_ids[0]) if token_ids else None
    return text or ""
