"""Who may import whom, read from the source with `ast`; and what importing the package may cost."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import recollect

PACKAGE = Path(recollect.__file__).parent

# A module imports its own rank or lower; ranks 4 and 5 hold methods, which do not import each other.
RANKS = {
    "errors": 1,
    "types": 1,
    "rng": 1,
    "io": 1,
    "config": 1,
    "progress": 1,
    "journal": 1,
    "tracking": 1,
    "data": 2,
    "backbones": 2,
    "prompts": 2,
    "eval": 2,
    "checkpoints": 3,
    "loop": 3,
    "tokenize": 3,
    "recommenders": 3,
    "ctr": 3,
    "agents": 4,
    "search": 4,
    "distill": 4,
    "continual": 4,
    "federated": 4,
    "integrations": 5,
    "cli": 5,
    "__main__": 6,
}
METHOD_RANK = 4
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "pyarrow",
    "chromadb",
    "matplotlib",
    "sklearn",
    "scipy",
    "pandas",
    "rich",
    "jinja2",
    "httpx",
}

# `Report.save` and `recollect.backbones.protocol` are named by the shared nouns on purpose.
ALLOWED_UPWARD = {("types", "eval"), ("journal", "backbones")}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(tree: ast.AST, *, at_module_level: bool):
    """(module name, line) of every import; type-checking blocks never count, bodies of functions where asked for."""
    pending = list(ast.iter_child_nodes(tree))
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.lineno
        elif not is_skipped(node, at_module_level):
            pending.extend(ast.iter_child_nodes(node))


def is_skipped(node: ast.AST, at_module_level: bool) -> bool:
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return True
    return at_module_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def upward_imports(path: Path, text: str):
    own = room(path)
    if own == "__init__":
        return []
    found = []
    for name, line in imported(ast.parse(text), at_module_level=False):
        parts = name.split(".")
        if parts[0] != "recollect" or len(parts) < 2 or parts[1] not in RANKS:
            continue
        target = parts[1]
        is_sideways = RANKS[own] == RANKS[target] == METHOD_RANK and own != target
        if (RANKS[target] > RANKS[own] or is_sideways) and (own, target) not in ALLOWED_UPWARD:
            found.append(f"{path.relative_to(PACKAGE)}:{line} imports recollect.{target}")
    return found


def test_every_room_has_a_rank():
    rooms = {room(path) for path in modules()} - {"__init__"}
    assert rooms <= set(RANKS)


def test_lower_rooms_never_import_higher_ones():
    found = [line for path in modules() for line in upward_imports(path, path.read_text(encoding="utf-8"))]
    assert found == []


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("rng.py", "from recollect.data import load_dataset"),
        ("eval/metrics.py", "def f():\n    import recollect.agents.memory"),
        ("agents/memory.py", "from recollect.search.store import Store"),
        ("backbones/store.py", "import recollect.cli.main"),
    ],
)
def test_a_planted_upward_import_is_found(where, text):
    assert upward_imports(PACKAGE / where, text)


# Modules that exist to wrap one library may import it at their top; the packages' __init__ and these may not.
LIGHT = (
    "__init__.py",
    "errors.py",
    "types.py",
    "rng.py",
    "io.py",
    "config.py",
    "progress.py",
    "journal.py",
    "__main__.py",
)


def test_light_modules_import_nothing_heavy_at_their_top():
    light = [path for path in modules() if room(path) == "cli" or path.name in LIGHT]
    found = [
        f"{path.relative_to(PACKAGE)}:{line} imports {name}"
        for path in light
        for name, line in imported(ast.parse(path.read_text(encoding="utf-8")), at_module_level=True)
        if name.split(".")[0] in HEAVY
    ]
    assert found == []


def modules_after(code: str) -> set[str]:
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import recollect",
        "from recollect.cli.main import main; assert main(['--help']) == 0",
        "from recollect.cli.main import main; assert main(['simulate', '--help']) == 0",
        "from recollect.cli.main import main; assert main(['data', 'import', '--help']) == 0",
        "from recollect.cli.main import main; assert main(['models', 'list']) == 0",
        "import recollect.types, recollect.eval.report",
    ],
)
def test_starting_up_loads_no_heavy_library(code):
    heavy = HEAVY - ({"rich"} if "'list'" in code else set())
    assert not modules_after(code) & heavy


def test_importing_the_package_loads_no_numpy():
    assert "numpy" not in modules_after("import recollect")


def test_every_public_name_is_listed_once_and_only_known_ones_resolve():
    assert len(set(recollect.__all__)) == len(recollect.__all__)
    assert set(recollect.__all__) <= set(dir(recollect))
    assert recollect.Report is __import__("recollect.types", fromlist=["Report"]).Report
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        recollect.nonsense  # noqa: B018 - the access is the test


@pytest.mark.parametrize("name", sorted(set(recollect.__all__) - {"__version__"}))
def test_every_public_name_is_the_thing_it_names(name):
    assert getattr(recollect, name).__name__ == name
