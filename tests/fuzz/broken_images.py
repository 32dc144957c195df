"""Broken pictures by the thousand through what workers read them with.

    python tests/fuzz/broken_images.py [--count N] [--seed S]

Each is one of the files of tests/support/image_files.py with some bytes changed. It must become pixels as promised, or be
refused; anything else stops the run and keeps the file.
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.image_files import is_taken, mutations, seeds

FOUND = Path(tempfile.gettempdir()) / "broken-image.bin"
REPORT_EVERY = 10_000


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100_000, metavar="N", help="files (default: 100000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="same seed, same files (default: 0)")
    args = parser.parse_args()
    began_s = time.perf_counter()
    num_taken = 0
    for number, data in enumerate(mutations(seeds(), args.count, args.seed), start=1):
        try:
            num_taken += is_taken(data)
        except BaseException:
            FOUND.write_bytes(data)
            print(f"file {number} of seed {args.seed} is in {FOUND}", file=sys.stderr)
            raise
        if number % REPORT_EVERY == 0:
            peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            spent_s = time.perf_counter() - began_s
            print(f"{number} files, {num_taken} taken, {spent_s:.0f} s, at most {peak_mib:.0f} MiB resident")
    print(f"{args.count} files: {num_taken} taken, {args.count - num_taken} refused, nothing else")
    return 0


if __name__ == "__main__":
    sys.exit(main())
