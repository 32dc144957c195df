"""What the exit code of `phasewise` means, for every verb."""

OK = 0
#: It was tried and failed; the last line on stderr says why.
FAILURE = 1
#: The command line is wrong (argparse's own code).
USAGE = 2
INVALID_MANIFEST = 3
#: No gateway or controller answers at the address.
UNREACHABLE = 4
#: Ctrl-C, as shells count signals: 128 + SIGINT.
INTERRUPTED = 130
#: Whoever read the output has gone, as after `| head`: 128 + SIGPIPE.
BROKEN_PIPE = 141

MEANINGS = {
    OK: "done",
    FAILURE: "it was tried and failed; the last line on stderr says why",
    USAGE: "the command line is wrong",
    INVALID_MANIFEST: "the manifest is not valid",
    UNREACHABLE: "nothing answers: no such deployment, no gateway at the address, or no worker ready",
    INTERRUPTED: "interrupted by Ctrl-C",
    BROKEN_PIPE: "whoever read the output has gone",
}
