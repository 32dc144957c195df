"""Sizes of published vision-language models, counted from their configurations. Pure."""

from dataclasses import dataclass

from orchestrator.control.stage_cost import Pass, causal, transformer


@dataclass(frozen=True, slots=True)
class Encoder:
    """A vision transformer as its configuration has it. Biases and norms are below 0.5 % and left out.

    num_matrices: of the MLP, 3 with a gate. num_positions: rows of a learned table; 0 where positions are rotated.
    connector: weights between encoder and text model, which the encode worker holds too. patch_values: of a patch's pixels.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    patch_values: int
    num_positions: int
    connector: int
    num_matrices: int = 2
    #: Patches that a patch attends to in most layers, and how many layers attend to all; 0 when all do.
    window: int = 0
    num_full_layers: int = 0

    @property
    def layer_weights(self) -> int:
        """Of all layers."""
        layer = 4 * self.hidden_size**2 + self.num_matrices * self.hidden_size * self.intermediate_size
        return self.num_layers * layer

    @property
    def num_weights(self) -> int:
        """Of the encoder and its connector."""
        return (
            self.layer_weights + self.hidden_size * (self.patch_values + self.num_positions) + self.connector
        )

    def flops(self, num_patches: int) -> float:
        """To encode a tile of so many patches; the connector is left out."""
        cost = transformer(
            num_weights=self.layer_weights,
            weight_bytes=2,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
        )
        num_full = self.num_full_layers if self.window else self.num_layers
        in_windows = (self.num_layers - num_full) * min(self.window, num_patches)
        num_pairs = num_patches * (num_full * num_patches + in_windows) // self.num_layers
        return cost.work([Pass(num_patches, num_pairs)]).flops


@dataclass(frozen=True, slots=True)
class Text:
    """A language model as its configuration has it; the output matrix is not tied to the embeddings in any of these."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int

    @property
    def kv_values(self) -> int:
        """K and V of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.hidden_size // self.num_heads

    @property
    def layer_weights(self) -> int:
        """Of all layers."""
        kv_size = self.hidden_size // self.num_heads * self.num_kv_heads
        attention = 2 * self.hidden_size**2 + 2 * self.hidden_size * kv_size
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def num_weights(self) -> int:
        """All of them."""
        return self.layer_weights + 2 * self.vocab_size * self.hidden_size

    def flops(self, num_tokens: int) -> float:
        """To prefill so many tokens that begin a prompt; logits are left out."""
        cost = transformer(
            num_weights=self.layer_weights,
            weight_bytes=2,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
        )
        return cost.work([causal(num_tokens)]).flops


@dataclass(frozen=True, slots=True)
class Published:
    """A model. num_published: parameters of its checkpoint as it is commonly given, to check the count by.

    tile_patches, tile_embeddings: what a tile has, and what it becomes; of Qwen2.5-VL, a picture of 448 x 448 pixels.
    """

    name: str
    encoder: Encoder
    text: Text
    num_published: float
    tile_patches: int = 1024
    tile_embeddings: int = 64

    @property
    def encode_to_prefill(self) -> float:
        """FLOPs of encoding a tile to those of the prefill of its embeddings."""
        return self.encoder.flops(self.tile_patches) / self.text.flops(self.tile_embeddings)


#: SigLIP-base, patches of 16, 512 pixels: google/siglip-base-patch16-512. The connector takes 4 x 4 patches to one embedding.
def _siglip_base(text_hidden_size: int) -> Encoder:
    return Encoder(12, 768, 3072, 3 * 16 * 16, 32 * 32, connector=16 * 768 * text_hidden_size)


#: As the checkpoint named in each comment is commonly described; not compared with the files themselves.
MODELS = (
    # HuggingFaceTB/SmolVLM-256M-Instruct
    Published("SmolVLM-256M", _siglip_base(576), Text(30, 576, 1536, 9, 3, 49280), 256.5e6),
    # HuggingFaceTB/SmolVLM-500M-Instruct
    Published("SmolVLM-500M", _siglip_base(960), Text(32, 960, 2560, 15, 5, 49280), 507.5e6),
    # HuggingFaceTB/SmolVLM-Instruct; SigLIP-so400m with patches of 14, 384 pixels, 3 x 3 to one embedding
    Published(
        "SmolVLM-2.2B",
        Encoder(27, 1152, 4304, 3 * 14 * 14, 27 * 27, connector=9 * 1152 * 2048),
        Text(24, 2048, 8192, 32, 32, 49155),
        2.246e9,
        tile_patches=27 * 27,
        tile_embeddings=81,
    ),
    # Qwen/Qwen2.5-VL-7B-Instruct; two frames of 14 x 14 pixels a patch, merged 2 x 2 by two matrices
    Published(
        "Qwen2.5-VL-7B",
        Encoder(
            32,
            1280,
            3420,
            2 * 3 * 14 * 14,
            0,
            connector=(4 * 1280) ** 2 + 4 * 1280 * 3584,
            num_matrices=3,
            window=8 * 8,
            num_full_layers=4,
        ),
        Text(28, 3584, 18944, 28, 4, 152064),
        8.292e9,
        tile_embeddings=256,
    ),
    # openbmb/MiniCPM-V-2_6; 70 x 70 positions; a resampler of 64 queries: K and V from the encoder's size, one attention, an
    # output matrix
    Published(
        "MiniCPM-V 2.6",
        Encoder(27, 1152, 4304, 3 * 14 * 14, 70 * 70, connector=1152 * 3584 + 4 * 3584**2 + 3584**2),
        Text(28, 3584, 18944, 28, 4, 151666),
        8.099e9,
    ),
    # OpenGVLab/InternVL2-8B; InternViT-300M, 448 pixels, 2 x 2 to one embedding by two matrices
    Published(
        "InternVL2-8B",
        Encoder(24, 1024, 4096, 3 * 14 * 14, 32 * 32 + 1, connector=2 * 4096**2),
        Text(32, 4096, 14336, 32, 8, 92553),
        8.076e9,
        tile_embeddings=256,
    ),
)
