import re
import sys
from pathlib import Path

import pytest

from gac import memory
from gac.errors import InputError


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's files")
def test_what_is_available_is_part_of_what_there_is() -> None:
    total = 1024 * int(re.search(r"MemTotal: +(\d+)", Path("/proc/meminfo").read_text())[1])
    assert 0 < memory.available_memory() < total


def test_the_control_group_and_the_machine_limit_it(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"meminfo": ["MemTotal: 4000 kB", "MemAvailable: 3000 kB"], "memory.max": ["max"], "memory.current": ["9"]}
    monkeypatch.setattr(memory, "_lines", lambda path: files.get(path.name, []))
    assert memory.available_memory() == 3000 * 1024
    files |= {"memory.max": ["2000"], "memory.current": ["500"]}
    assert memory.available_memory() == 1500
    with pytest.raises(InputError, match=r"^the array needs 2\.0 GiB of memory, and 0\.0 GiB are free: take less$"):
        memory.check_fits("the array", 2**31, "take less")
    memory.check_fits("the array", 1500, "take less")
    files.clear()
    monkeypatch.setattr(memory.os, "sysconf_names", {}, raising=False)
    assert memory.available_memory() is None
    memory.check_fits("the array", 2**60, "take less")
