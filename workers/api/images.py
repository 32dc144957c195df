"""The pictures of a prompt: where their embeddings stand, and how they get fewer."""

from dataclasses import dataclass

MAX_REDUCTION_LAYERS = 16


@dataclass(frozen=True, slots=True)
class ImageTile:
    """Where the embeddings of one tile of a picture stand in a prompt, and what they are.

    start: index in the prompt of the first of them. key: names their content, see `embedding_key`; equal keys are
    equal embeddings. grid: see ImagePlan; with models whose positions follow it (M-RoPE) only.
    """

    start: int
    num_embeddings: int
    key: bytes
    grid: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class ImageReduction:
    """How pictures get fewer embeddings than a prompt has tokens for: an approximation, see docs/multimodal.md.

    A window of embeddings becomes one when its mean pairwise cosine is at least merge_threshold, in the encoder; 0
    merges none. An embedding leaves the prompt when it gets less than global_threshold of the attention that all text
    gives to pictures, and no token of text gives it as much as individual_threshold; 0 in either drops none.
    key_fraction: the part of a tile's embeddings that never leave, those that its other patches attend to most.
    layers: of the text model, after which embeddings leave, as fractions of its depth, ascending. All are 0 to 1.
    Source: MustDrop (arXiv 2411.10803), whose layers are 2, 6, 10 and 14 of 32.
    """

    merge_threshold: float = 0.0
    global_threshold: float = 0.0
    individual_threshold: float = 0.0
    key_fraction: float = 0.08
    layers: tuple[float, ...] = (0.0625, 0.1875, 0.3125, 0.4375)

    @property
    def is_merging(self) -> bool:
        """Some embeddings may become one."""
        return self.merge_threshold > 0

    @property
    def is_filtering(self) -> bool:
        """Some embeddings may leave the prompt."""
        return self.global_threshold > 0 and self.individual_threshold > 0 and bool(self.layers)

    @property
    def is_on(self) -> bool:
        """It may change anything."""
        return self.is_merging or self.is_filtering

    @property
    def encode_text(self) -> str:
        """All of it that embeddings and what is kept beside them depend on; part of their key."""
        return f"merge={self.merge_threshold!r},key={self.key_fraction!r}" if self.is_on else ""

    @property
    def text(self) -> str:
        """All of it that the KV of a prompt depends on; part of its digest."""
        filters = f"{self.global_threshold!r},{self.individual_threshold!r},{self.layers!r}"
        return f"{self.encode_text},filter={filters}" if self.is_filtering else self.encode_text
