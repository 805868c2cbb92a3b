"""What CONTRIBUTING.md says of imports, versions and files is so.

The tables below are its rules. A module that moves changes a row here, and the page.
"""

import ast
import functools
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import optax_flash

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "optax_flash"

# Packages and modules of optax_flash, by layer: each may import from its own layer and
# from those before it. The longest name that fits a module counts.
LAYERS = [
    {"codecs", "meshes"},
    {"fusion"},
    {"fusion.backends"},
    {"transforms", "lowrank"},
    {
        "aliases",
        "flax",
        "io",
        "plan",
        "release",
        "reports",
        "sharding",
    },
]

# Imports that look down the layers: fusion reaches the backends, through their table.
DOWN = {("fusion", "fusion.backends")}

# Who may import what: modules and packages from the left, files and folders that may.
ONLY = {
    "flax": {"flax/"},
    "jax.experimental.pallas": {"fusion/backends/"},
    "jax_triton": {"fusion/backends/"},
    "triton": {"fusion/backends/"},
    "jax.extend": {"fusion/unstable.py"},
    "jax.interpreters": {"fusion/unstable.py"},
    "jax.experimental.custom_partitioning": {"fusion/unstable.py"},
    "jax.experimental.xla_metadata": {"fusion/unstable.py"},
    "orbax": {"io/"},
    "safetensors": {"io/"},
    "jax._src": set(),
    # Formats whose reader runs what a file says, see SECURITY.md.
    "pickle": set(),
    "cloudpickle": set(),
    "dill": set(),
    "marshal": set(),
    "shelve": set(),
    "joblib": set(),
}


@functools.cache
def imports(path):
    """What a file imports, as (dotted name, whether when the file is imported)."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(path, node)
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            first = node.args[0]
            names = [first.value] if isinstance(first, ast.Constant) else []
        found += [(name, id(node) not in inside) for name in names]
    return found


def _absolute(path, node):
    """The module that "from" names; dots are resolved."""
    if not node.level:
        return node.module
    package = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join([*package[: -node.level], *filter(None, [node.module])])


def files():
    return sorted(PACKAGE.rglob("*.py"))


def short(path):
    return path.relative_to(PACKAGE).as_posix()


def is_in(name, package):
    return name == package or name.startswith(f"{package}.")


def module_of(name):
    """The longest part of an imported name that is a module of ours, or None."""
    parts = name.split(".")
    while parts[0] == "optax_flash" and len(parts) > 1:
        path = PACKAGE.joinpath(*parts[1:])
        if path.with_suffix(".py").exists() or (path / "__init__.py").exists():
            return ".".join(parts[1:])
        parts.pop()
    return None


def unit_of(module):
    """The row of a module in LAYERS, as (number of the layer, name)."""
    rows = [(i, x) for i, layer in enumerate(LAYERS) for x in layer]
    fitting = [(i, x) for i, x in rows if is_in(module, x)]
    assert fitting, f"optax_flash.{module} is in no layer of tests/test_contributing.py"
    return max(fitting, key=lambda row: len(row[1]))


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_layers_import_one_way():
    wrong = []
    for path in files():
        if short(path) in ("__init__.py", "plan/__main__.py"):
            continue
        layer, unit = unit_of(name_of(path))
        for name, _ in imports(path):
            module = module_of(name)
            if module is None:
                continue
            other, other_unit = unit_of(module)
            if other > layer and (unit, other_unit) not in DOWN:
                wrong.append(f"{short(path)} imports optax_flash.{module}")
    assert not wrong, "\n".join(wrong)


def test_every_row_of_the_layers_exists():
    for name in set().union(*LAYERS):
        path = PACKAGE.joinpath(*name.split("."))
        assert path.is_dir() or path.with_suffix(".py").exists(), name


def test_no_modules_import_each_other_in_a_circle():
    graph = {name_of(path): set() for path in files() if name_of(path)}
    for path in files():
        if name_of(path):
            # Inside of functions, too: what two modules share is in a third one.
            found = {module_of(x) for x, _ in imports(path)}
            graph[name_of(path)] = found - {None, name_of(path)}
    done = set()

    def visit(module, way):
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, [*way, module])
            done.add(module)

    for module in graph:
        visit(module, [])


@pytest.mark.parametrize("package", ONLY)
def test_only_some_files_import(package):
    found = {
        short(path)
        for path in files()
        if any(is_in(name, package) for name, _ in imports(path))
    }
    wrong = {x for x in found if not x.startswith(tuple(ONLY[package]))}
    assert not wrong, f"{sorted(wrong)} import {package}"
    assert found or not ONLY[package], f"nothing imports {package}: the row is stale"


def test_the_library_needs_only_jax_and_optax():
    """No module at the top of a file is of another package, outside of its folder."""
    known = {"jax", "jaxlib", "numpy", "optax", "optax_flash", *sys.stdlib_module_names}
    extra = {package.split(".")[0] for package, where in ONLY.items() if where} - known
    for path in files():
        tops = {name.split(".")[0] for name, at_import in imports(path) if at_import}
        assert tops - known <= extra, f"{short(path)} imports {tops - known - extra}"
    refused = "".join(f"sys.modules[{x!r}] = None\n" for x in sorted(extra))
    code = f"import sys\n{refused}import optax_flash"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_the_page_has_the_layers_and_the_files():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (\d) \| (.*?) \|", page, re.MULTILINE)
    named = [
        {x.strip("/").removesuffix(".py").replace("/", ".") for x in names}
        for names in (re.findall(r"`([^`]+)`", cells) for _, cells in rows)
    ]
    assert named == LAYERS
    for file in re.findall(r"`(?:optax_flash/)?(\w[\w/]*/(?:\w+\.py)?)`", page):
        here = [x / file for x in (ROOT, PACKAGE)]
        assert any(x.exists() for x in here) or file == "runs/", file


def test_versions_are_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {optax_flash.__version__}\n" in citation
    assert f"\nlicense: {project['license']}\n" in citation
    assert all(
        f"- name: {author['name']}\n" in citation for author in project["authors"]
    )

    readme = (ROOT / "README.md").read_text()
    table = re.findall(r"^\| (3\.\d+) \| (0\.\d+) \|", readme, re.MULTILINE)
    pythons, jaxes = zip(*table, strict=True)
    assert project["requires-python"] == f">={pythons[0]}"
    kinds = [x.rpartition(" ")[2] for x in project["classifiers"] if ":: 3." in x]
    assert kinds == list(pythons)
    major, minor = jaxes[-1].split(".")
    bounds = f"jax>={jaxes[0]},<{major}.{int(minor) + 1}"
    assert bounds in project["dependencies"]
    ci = (ROOT / ".ci" / "run").read_text()
    assert set(re.findall(r"interpreter (3\.\d+)", ci)) == set(pythons)


def test_the_library_stands_alone_and_benchmarks_start_in_one_way():
    """Tests import benchmarks, these examples, and all of them the library."""
    order = ("optax_flash", "examples", "benchmarks", "tests")
    for i, folder in enumerate(order):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom | ast.Import):
                    names = [alias.name for alias in node.names]
                    if isinstance(node, ast.ImportFrom):
                        names = [node.module or ""]
                    tops = {name.split(".")[0] for name in names}
                    assert not tops & set(order[i + 1 :]), path
                if isinstance(node, ast.Attribute):
                    assert ast.unparse(node) != "sys.path", path
