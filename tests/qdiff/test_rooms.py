"""The rooms of the toolkit: a file imports from its own room or from those below it, and from nowhere else."""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
# From the bottom up. A room is a package, or a module of the top of qdiff.
ROOMS = [
    "ddim",
    "ldm",
    "qdiff.utils",
    "qdiff.recipes",
    "qdiff.nn",
    "qdiff.families",
    "qdiff.checkpoints",
    "qdiff.methods",
    "qdiff.calibration",
    "qdiff.deploy",
    "qdiff.evaluation",
    "qdiff.api",
    "qdiff",
    "qdiff.cli",
    "scripts",
]
VERSION = "qdiff.__init__"  # every room may ask the package for its version
NETWORKS = ("ddim", "ldm")
# One piece of code for what may be unpickled: the networks' own files are read below all of qdiff.
SHARED = {("qdiff.utils.pickles", "ddim.pickles")}


def modules(root):
    """Name -> syntax tree of every module below a root."""
    files = [f for top in ("qdiff", "ddim", "ldm", "scripts") for f in sorted((root / top).rglob("*.py"))]
    return {".".join(f.relative_to(root).with_suffix("").parts): ast.parse(f.read_text(encoding="utf8")) for f in files}


def room_of(module):
    """The innermost room that a module is in; `python -m qdiff` is a command line."""
    if module == "qdiff.__main__":
        return "qdiff.cli"
    inside = [room for room in ROOMS if module == room or module.startswith(f"{room}.")]
    return max(inside, key=len)


def imports(tree, names, whole=True):
    """The modules among `names` that a module imports; whole: in functions too, but for what types alone need."""
    found = set()
    nodes = list(ast.walk(tree)) if whole else tree.body
    typing = {id(n) for i in ast.walk(tree) if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.dump(i.test)
              for n in ast.walk(i)}  # fmt: skip
    for node in nodes:
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if _module(name, names) else node.module for name in inner}
    return {_module(name, names) for name in found} - {None}


def _module(name, names):
    return name if name in names else f"{name}.__init__" if f"{name}.__init__" in names else None


def broken(trees):
    """What breaks a rule, a line each."""
    found = []
    for module, tree in trees.items():
        own = ROOMS.index(room_of(module))
        for other in sorted(imports(tree, trees)):
            room = room_of(other)
            if ROOMS.index(room) > own and other != VERSION:
                found.append(f"{module} imports {other}, of a higher room")
            if (module, other) not in SHARED and room in NETWORKS and ROOMS[own] not in (*NETWORKS, "qdiff.families"):
                found.append(f"{module} imports {other}, which families alone know")
    return found + circles(trees)


def circles(trees):
    """Modules that import each other when they are imported, a line for each circle."""
    edges = {module: imports(tree, trees, whole=False) - {module, VERSION} for module, tree in trees.items()}
    done, path, found = set(), [], []

    def walk(module):
        if module in path:
            found.append("circle: " + " -> ".join([*path[path.index(module) :], module]))
            return
        if module in done:
            return
        path.append(module)
        for other in sorted(edges[module]):
            walk(other)
        done.add(path.pop())

    for module in edges:
        walk(module)
    return found


@pytest.fixture(scope="module")
def trees():
    return modules(REPOSITORY)


def test_rooms_import_downwards(trees):
    assert len(trees) > 200 and broken(trees) == []


def test_arguments_are_parsed_in_the_command_lines_alone(trees):
    users = [m for m, tree in trees.items() if "argparse" in {a for n in ast.walk(tree) if isinstance(n, ast.Import)
                                                              for a in [x.name for x in n.names]}]  # fmt: skip
    assert [m for m in users if not m.startswith("qdiff.cli.")] == []


def flags(tree):
    """Flags of commands in a module's strings, apart from docstrings."""
    documented = {id(n.body[0].value) for n in ast.walk(tree) if hasattr(n, "body") and isinstance(n.body, list)
                  if n.body and isinstance(n.body[0], ast.Expr)}  # fmt: skip
    texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
             and id(n) not in documented]  # fmt: skip
    return [flag for text in texts for flag in re.findall(r"(?<![\w-])--[a-z]\w+", text)]


def test_flags_are_known_to_the_command_lines_alone(trees):
    """Below them errors name fields. Command lines as they were published are content."""
    below = {m: flags(tree) for m, tree in trees.items() if room_of(m) not in ("qdiff.cli", "scripts")}
    published = below.pop("qdiff.methods.published_settings")
    assert published and {m: found for m, found in below.items() if found} == {}
    assert flags(ast.parse('"""--of a docstring"""\nraise ValueError(f"{x}: expected --steps")')) == ["--steps"]


def test_scripts_are_short_and_packages_say_what_they_are_for(trees):
    assert [f.name for f in (REPOSITORY / "scripts").glob("*.py") if len(f.read_text().splitlines()) > 40] == []
    rooms = [m for m in trees if m.endswith(".__init__") and m.startswith("qdiff.")]
    assert [m for m in rooms if not (ast.get_docstring(trees[m]) or "").strip()] == []


@pytest.mark.parametrize(
    ("files", "wrong"),
    [
        ({"qdiff/nn/a.py": "from qdiff.calibration.b import c"}, "qdiff.nn.a imports qdiff.calibration.b"),
        ({"qdiff/calibration/b.py": "def f():\n    import ldm.x"}, "qdiff.calibration.b imports ldm.x, which families"),
        ({"ddim/a.py": "import qdiff.utils.b"}, "ddim.a imports qdiff.utils.b, of a higher room"),
        (
            {"qdiff/nn/a.py": "import qdiff.nn.b", "qdiff/nn/b.py": "import qdiff.nn.a"},
            "circle: qdiff.nn.a -> qdiff.nn",
        ),
    ],
)
def test_a_broken_rule_is_found(tmp_path, files, wrong):
    base = {"qdiff/calibration/b.py": "", "ldm/x.py": "", "qdiff/utils/b.py": "", "qdiff/nn/b.py": ""}
    for name, text in (base | files).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = broken(modules(tmp_path))
    assert len(found) >= 1 and any(line.startswith(wrong) for line in found), found
    assert broken(modules(tmp_path / "nothing")) == []
