"""The floors of the package (floors.toml): nothing imports upwards, in a circle, or CuPy outside its place."""

import ast
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
RULES = tomllib.loads((TESTS / "floors.toml").read_text(encoding="utf-8"))
FLOOR_OF = {name: number for number, names in enumerate(RULES["floors"]) for name in names}

Imports = dict[str, set[str]]


def imports_of(sources: dict[str, str]) -> Imports:
    """Return the modules that each module imports, anywhere in its code; gac's by their full names."""
    return {name: _imported(ast.parse(source), sources) for name, source in sources.items()}


def _imported(tree: ast.Module, sources: dict[str, str]) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {each if each in sources else node.module for each in members}
    return names


def violations(imports: Imports) -> list[str]:
    """Return what breaks the rules, one line each."""
    found = []
    for module, names in imports.items():
        if "cupy" in {name.partition(".")[0] for name in names} and not module.startswith(tuple(RULES["names_cupy"])):
            found.append(f"{module} imports CuPy")
        if module != "gac":
            upwards = {name for name in names if name == "gac" or _floor(name) > _floor(module)}
            found += [f"{module} imports {name}, which is above it" for name in sorted(upwards)]
    try:
        TopologicalSorter({module: names & imports.keys() for module, names in imports.items()}).prepare()
    except CycleError as error:
        found.append(f"a circle: {' <- '.join(error.args[1])}")
    return found


def _floor(module: str) -> int:
    package, _, rest = module.partition(".")
    return FLOOR_OF[rest.partition(".")[0]] if package == "gac" else -1


def package_sources() -> dict[str, str]:
    root = TESTS.parent
    names = {path: ".".join(path.relative_to(root).with_suffix("").parts) for path in (root / "gac").rglob("*.py")}
    return {name.removesuffix(".__init__"): path.read_text(encoding="utf-8") for path, name in names.items()}


def test_the_package_keeps_to_its_floors():
    sources = package_sources()
    assert {name.split(".")[1] for name in sources if "." in name} == FLOOR_OF.keys()
    assert violations(imports_of(sources)) == []


@pytest.mark.parametrize(
    ("module", "statement", "expected"),
    [
        ("gac.ops.lif", "from gac.neuron import LIFNode", "gac.ops.lif imports gac.neuron, which is above it"),
        ("gac.ops.lif", "def late():\n    import gac.neuron", "gac.ops.lif imports gac.neuron, which is above it"),
        ("gac.errors", "import gac", "gac.errors imports gac, which is above it"),
        ("gac.neuron", "from cupy.cuda import driver", "gac.neuron imports CuPy"),
        ("gac.ops.lif", "from gac.ops import channels", "a circle: "),
    ],
)
def test_a_broken_rule_is_found(module, statement, expected):
    sources = dict.fromkeys(("gac", "gac.errors", "gac.neuron", "gac.ops", "gac.ops.lif"), "")
    sources["gac.ops.channels"] = "from gac.ops.lif import step"
    sources[module] = statement
    (found,) = violations(imports_of(sources))
    assert found.startswith(expected)


def test_what_takes_long_to_load_is_loaded_by_who_needs_it():
    program = (
        "import sys, gac, gac.cli; gac.load_pretrained('digits')\n"
        "print(*sorted({'torch._dynamo', 'torchvision', 'sklearn'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "\n"
