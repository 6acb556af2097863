"""Export a network to other programs: python -m gac.export SUBCOMMAND CHECKPOINT OUTPUT.

Each subcommand writes a file and, beside it, how far what it computes is from our network (OUTPUT.fidelity.json).
"""

import sys
from collections.abc import Sequence
from types import ModuleType

from gac.command_line import Parser, at_least, finish
from gac.errors import InputError, did_you_mean, quoted
from gac.export import deploy, nir, onnx, program

# A module with a docstring, add_options(parser) and run(options); what all have in common is added below.
SUBCOMMANDS: dict[str, ModuleType] = {"onnx": onnx, "nir": nir, "program": program, "deploy": deploy}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 for a file that cannot be written, 2 for bad input."""
    return finish(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> None:
    name, *others = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(f"{__doc__.strip()}\n\nSubcommands (SUBCOMMAND --help lists the options):")
        for each, module in SUBCOMMANDS.items():
            print(f"  {each:<10}{module.__doc__.partition(chr(10))[0]}")
        return
    if name not in SUBCOMMANDS:
        close = did_you_mean(name, {each: each for each in SUBCOMMANDS})
        raise InputError(f"there is no subcommand {quoted(name)}{close}; there are: {', '.join(SUBCOMMANDS)}")
    module = SUBCOMMANDS[name]
    parser = Parser(f"gac.export {name}", module.__doc__)
    parser.add("checkpoint", "file of train.py, weights of this package, or the name of a network that travels in it")
    module.add_options(parser)
    parser.add(
        "--images", "test images, evenly spread, to compare on; 0: none", type=at_least(0), default=256, metavar="N"
    )
    parser.add("--root", "folder of the data set; None: where it lay in training", metavar="FOLDER")
    module.run(parser.parse_args(others))


if __name__ == "__main__":
    sys.exit(main())
