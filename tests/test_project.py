"""The project's own rules: what is packaged, which way imports point, what pure modules may not touch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "slum": ROOT / "slum",
    "slum.node": ROOT / "node",
    "slum.operators": ROOT / "operators",
    "slum.exports": ROOT / "exports",
}
PURE = (
    "slum.model",
    "slum.plan",
    "slum.actions",
    "slum.changes",
    "slum.drift",
    "slum.validate",
    "slum.validate_service",
    "slum.validate_operator",
    "slum.interpolate",
    "slum.node.supervise",
    "slum.node.actions",
    "slum.node.observed",
    "slum.node.failures",
    "slum.node.reports",
    "slum.server.decide",
)
IMPURE = {"asyncio", "socket", "subprocess", "time", "random", "os", "threading", "select", "selectors", "shutil"}
NEVER = {
    "slum.node": ("slum.server", "slum.ledger", "slum.cli", "slum.client", "slum.operators", "slum.exports"),
    "slum.operators": ("slum.server", "slum.ledger", "slum.cli", "slum.client", "slum.exports", "slum.plan"),
    "slum.exports": ("slum.server", "slum.ledger", "slum.cli", "slum.client", "slum.operators", "slum.node"),
    "slum.ledger": ("slum.server", "slum.cli", "slum.client", "slum.operators", "slum.exports", "slum.node"),
    "slum.server": ("slum.cli", "slum.client", "slum.render", "slum.backup"),
    "slum.backup": ("slum.cli", "slum.client", "slum.render"),
    "slum.client": ("slum.server", "slum.ledger.state", "slum.ledger.member"),
}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            if package == "slum" and file.relative_to(folder).parts[0] in ("node", "operators", "exports"):
                continue
            parts = file.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = file
    return found


def imports(file: Path) -> set[str]:
    """Every module named by an import statement, at any depth, without those for type checkers only."""
    tree = ast.parse(file.read_text())
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            skipped.update(id(inner) for part in node.body for inner in ast.walk(part))
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def test_packages_are_listed_exactly() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    there = {name for name, file in modules().items() if file.name == "__init__.py"}
    folders = {name.rsplit(".", 1)[0] for name, file in modules().items() if file.name != "__init__.py"}
    assert folders <= there, "a folder with modules has no __init__.py"
    assert listed == there


def test_symlinks_show_type_checkers_the_same_names() -> None:
    for name in ("node", "operators", "exports"):
        link = ROOT / "slum" / name
        assert link.is_symlink()
        assert link.resolve() == ROOT / name


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_touch_nothing(name: str) -> None:
    found = {module.split(".")[0] for module in imports(modules()[name])} & IMPURE
    assert not found, f"{name} decides and must not act, but imports {sorted(found)}"


def test_imports_point_one_way() -> None:
    wrong = []
    for name, file in modules().items():
        for owner, forbidden in NEVER.items():
            if name == owner or name.startswith(owner + "."):
                wrong += [
                    f"{name} imports {module}"
                    for module in imports(file)
                    for bad in forbidden
                    if module == bad or module.startswith(bad + ".")
                ]
        wrong += [
            f"{name} imports {module}: say slum.{module}"
            for module in imports(file)
            if module.split(".")[0] in ("node", "operators", "exports")
        ]
    assert not wrong, "\n".join(sorted(set(wrong)))


def test_the_keeper_is_standard_library_only() -> None:
    own = ("slum.node.keeper", "slum.node.hang", "slum.alive", "slum.paths", "slum.errors")
    for name, file in modules().items():
        if name.startswith(own[:3]) and name != "slum.node.keeperclient":
            foreign = {m.split(".")[0] for m in imports(file)} - set(sys.stdlib_module_names) - {"slum"}
            ours = {m for m in imports(file) if m.startswith("slum.") and not m.startswith(own)}
            assert not foreign, f"{name} imports {foreign}"
            assert not {m for m in ours if m != "slum.node" and m != "slum.__version__"}, f"{name} imports {ours}"


def test_only_the_ledger_knows_its_engine() -> None:
    guilty = [
        name
        for name, file in modules().items()
        if any(m.split(".")[0] == "pysyncobj" for m in imports(file)) and not name.startswith("slum.ledger.")
    ]
    assert guilty == []


@pytest.mark.timeout(180)
def test_the_wheel_holds_every_module_and_nothing_else(tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            str(tmp_path),
            str(copy(tmp_path)),
        ],
        check=True,
    )
    wheel = next(tmp_path.glob("*.whl"))
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    expected = {
        name.replace(".", "/") + ("/__init__.py" if file.name == "__init__.py" else ".py")
        for name, file in modules().items()
    }
    assert names == expected
    assert "slum/py.typed" in zipfile.ZipFile(wheel).namelist()


def copy(tmp_path: Path) -> Path:
    """A copy of what is tracked and what is there, so that building leaves nothing in the checkout."""
    target = tmp_path / "tree"
    for part in ("slum", "node", "operators", "exports"):
        for file in sorted((ROOT / part).rglob("*")):
            relative = file.relative_to(ROOT)
            if (
                file.is_file()
                and "__pycache__" not in relative.parts
                and not any((ROOT / parent).is_symlink() for parent in relative.parents)
            ):
                (target / relative).parent.mkdir(parents=True, exist_ok=True)
                (target / relative).write_bytes(file.read_bytes())
    for name in ("node", "operators", "exports"):
        (target / "slum" / name).symlink_to(f"../{name}")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (target / name).write_bytes((ROOT / name).read_bytes())
    return target


def test_every_link_in_the_docs_leads_somewhere() -> None:
    broken = []
    for page in (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))):
        targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
        broken += [f"{page.name} -> {to}" for to in targets if "://" not in to and not (page.parent / to).exists()]
    assert not broken


def test_the_project_speaks_of_itself_alone() -> None:
    """No path of a developer's machine, no registry's address."""
    words = re.compile(r"/work/main|/work/shared|/root/\.pyenv|pypi\.org|deb\.debian\.org|registry\.npmjs")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    guilty = [
        name
        for name in listed
        if name != "tests/test_project.py"
        and (ROOT / name).is_file()
        and words.search((ROOT / name).read_text(errors="replace"))
    ]
    assert not guilty
