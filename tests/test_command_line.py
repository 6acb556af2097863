"""What the smaller programs have in common."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("lines", [1, 100_000], ids=["flushed at the end", "flushed on the way"])
def test_an_output_that_nobody_reads_is_no_traceback(lines):
    program = f"import sys; from gac.command_line import finish; sys.exit(finish(lambda: print('line\\n' * {lines})))"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
