"""Whatever a YAML file or a command line holds, the answer is a configuration or one printable line."""

import os
import random
from pathlib import Path

import pytest
from hypothesis import strategies as st

from gac.config import FIELDS, SECTIONS
from gac.errors import InputError
from gac.options import TrainArguments, parse_train
from hostile import LONG, fuzz

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
# What readers of YAML and of numbers have stumbled over.
PIECES = (
    *"{}[]:,-?!&*|>'\"%@`#~\t\n\r\0\x85\u2028\ufeff",
    "- ", ": ", "<<: *a", "&a ", "*a", "!!python/object:os.system ", "!!binary ", "!!set ", "? [a, b]\n: c\n", "---\n",
    "null", "true", ".nan", ".inf", "-.inf", "1e309", "1e-320", "0x", "0b2", "0o8", "1:30", "2001-13-45", "9" * 5000,
    "[" * 2000, "{a: " * 2000, "- " * 2000, "~nosuchuser/x", "x" * 5000, "\udcff", "é", "𝕏", "\x1b[31m", "1_", "-0",
)  # fmt: skip


def mutated(text: str, draw: random.Random) -> str:
    for _ in range(draw.randint(1, 4)):
        start = draw.randint(0, len(text))
        end = min(len(text), start + draw.choice((0, 0, 1, 5, 40)))
        piece = draw.choice((*PIECES, "", text[: draw.randint(0, 60)], chr(draw.randint(1, 300))))
        text = text[:start] + piece + text[end:]
    return text


def arguments(draw: random.Random, path: Path) -> list[str]:
    # Less and less of the comments, which are most of a file.
    lines = draw.choice(CONFIGS).read_text().splitlines(keepends=True)
    text = "".join(line for line in lines if not line.lstrip().startswith("#"))
    text = text if draw.random() < 0.2 else mutated(text, draw)
    path.write_bytes(text.encode(draw.choice(("utf-8", "utf-8", "utf-8", "utf-16", "latin-1")), "replace"))
    given = ["--config", str(path)]
    for _ in range(draw.randint(0, 3)):
        known = (*FIELDS, *SECTIONS, "output", "resume", "config", "local-rank")
        name = draw.choice((*known, mutated("train.epochs", draw)))
        value = mutated(draw.choice(("3", "0.1", "[1, 2]", "runs/a b", "auto", "~")), draw)
        given += draw.choice(([f"--{name}={value}"], [f"--{name}", value], [f"--{name}"], [value]))
    # No program can be given a null byte.
    return [each.replace("\0", "") for each in given]


def check(draw: random.Random, path: Path) -> None:
    given = arguments(draw, path)
    try:
        result = parse_train(given)
    except InputError as error:
        message = str(error)
        assert message.isprintable(), given
        # Some characters are escaped, in up to ten.
        assert 0 < len(message) < 20_100, given
    except SystemExit:
        assert {"-h", "--help"} & {*given}
    else:
        assert isinstance(result, TrainArguments)
        # What a run writes first.
        assert type(result.config).from_dict(result.config.to_dict()) == result.config
        os.fsencode(result.output)


@pytest.mark.parametrize("seconds", [0, LONG])
def test_a_configuration_or_one_line(seconds: float, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    drawn = st.randoms(use_true_random=False)
    fuzz(lambda draw: check(draw, tmp_path / "run.yaml"), drawn, examples=100, seconds=seconds)
