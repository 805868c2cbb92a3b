"""What is released: a wheel and an sdist, built here without a network."""

import email
import pathlib
import subprocess
import sys
import tarfile
import zipfile

import pytest

import optax_flash

ROOT = pathlib.Path(__file__).parent.parent
ROOT_FILES = {
    ".ci/run",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "RELEASING.md",
    "SECURITY.md",
    "mkdocs.yml",
    "pyproject.toml",
}
FOLDERS = ("benchmarks", "docs", "examples", "optax_flash", "tests")

# Only what the wheel asks for may be imported: no extra is there, nor the tree itself.
STEP = """
import pathlib, sys
wheel = pathlib.Path(sys.argv[1])
sys.path.insert(0, str(wheel))
for extra in "flax jax_triton matplotlib orbax rich safetensors triton".split():
    sys.modules[extra] = None
import jax, jax.numpy as jnp, optax, optax_flash
assert wheel in pathlib.Path(optax_flash.__file__).parents

params = {"kernel": jnp.ones((64, 64), jnp.bfloat16)}
tx = optax_flash.master_weights(optax_flash.adamw8(0.125))
state = tx.init(params)
grads = jax.tree.map(jnp.ones_like, params)

@jax.jit
def step(params, state):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

params, state = step(params, state)
print(params["kernel"].dtype, float(params["kernel"].mean()))
"""


@pytest.fixture(name="built", scope="module")
def built_fixture(tmp_path_factory):
    """Paths of the wheel and of the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(name="metadata")
def metadata_fixture(built):
    with zipfile.ZipFile(built[0]) as wheel:
        (name,) = (x for x in wheel.namelist() if x.endswith("dist-info/METADATA"))
        return email.message_from_bytes(wheel.read(name))


def sources(folder):
    """Files that somebody wrote, by their paths from the root."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not {"__pycache__", "site", "runs"} & set(path.parts)
    }


def test_the_wheel_is_the_library_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = {x for x in wheel.namelist() if ".dist-info/" not in x}
        licenses = [x for x in wheel.namelist() if x.endswith("licenses/LICENSE")]
    assert names == sources("optax_flash")
    assert "optax_flash/py.typed" in names
    assert licenses


def test_the_wheel_says_what_it_is(built, metadata):
    assert metadata["Name"] == "optax_flash"
    assert metadata["Version"] == optax_flash.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == "The optax_flash authors"
    needed = [x for x in metadata.get_all("Requires-Dist") if "extra ==" not in x]
    assert sorted(x.split(">")[0].split("<")[0] for x in needed) == ["jax", "optax"]
    assert built[0].name.endswith("-py3-none-any.whl")


def test_the_sdist_has_what_its_tests_read(built):
    with tarfile.open(built[1]) as sdist:
        sizes = {
            x.name.partition("/")[2]: x.size for x in sdist.getmembers() if x.isfile()
        }
    for folder in FOLDERS:
        assert sources(folder) <= sizes.keys(), sources(folder) - sizes.keys()
    assert ROOT_FILES <= sizes.keys(), ROOT_FILES - sizes.keys()
    # Compact summaries, and no raw runs.
    assert sum(size for x, size in sizes.items() if "/results/" in x) < 1_000_000
    others = {x for x in sizes if not x.startswith(tuple(f"{x}/" for x in FOLDERS))}
    assert others - ROOT_FILES <= {"PKG-INFO", ".gitignore"}


@pytest.mark.full
def test_the_wheel_alone_makes_a_step(built, tmp_path):
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(tmp_path / "wheel")
    done = subprocess.run(
        [sys.executable, "-I", "-c", STEP, tmp_path / "wheel"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # The first step of Adam is the learning rate, here a number of bfloat16.
    assert done.stdout.split() == ["bfloat16", "0.875"]
