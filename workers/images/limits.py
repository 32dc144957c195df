"""How many pictures a request may have, and how large. Pure."""

from dataclasses import dataclass

MIB = 2**20
#: Pillow calls what has more pixels a decompression bomb, and warns.
MOST_PIXELS = 89_478_485
#: What the formats can say; WebP and GIF say less.
MOST_SIDE = 65535


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """The most that is taken. The defaults take every photo of a telephone or a camera of 60 megapixels."""

    max_images: int = 32
    #: Of one file.
    max_bytes: int = 20 * MIB
    #: Of all files of a request.
    max_total_bytes: int = 64 * MIB
    #: Width times height of one picture; 64 Mi of them are 192 MiB of RGB.
    max_pixels: int = 64 * MIB
    #: Width and height of one picture.
    max_side: int = 16384

    def validate(self) -> None:
        """Raises ValueError that names the field, its value and what is allowed."""
        most = {
            "max_images": 10_000,
            "max_bytes": 2**31 - 1,
            "max_total_bytes": 2**31 - 1,
            "max_pixels": MOST_PIXELS,
            "max_side": MOST_SIDE,
        }
        for name, bound in most.items():
            value: int = getattr(self, name)
            if not 1 <= value <= bound:
                raise ValueError(f"{name} is {value}; allowed: 1 to {bound}")
        if self.max_bytes > self.max_total_bytes:
            raise ValueError(
                f"max_bytes is {self.max_bytes}; allowed: up to max_total_bytes, {self.max_total_bytes}"
            )
