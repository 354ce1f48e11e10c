"""What holds of the repository as a whole: which way imports point, names, sizes, docs that tell the truth."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import cli_docs
import pytest
from typer.main import get_command

from pippin.cli import app
from pippin.config import flag_of
from pippin.server.app import ROUTES
from pippin.types import SamplingParams

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "pippin"
SOURCES = sorted(PACKAGE.rglob("*.py"))
DOCS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])

# --- imports ---

# Who may import whom: a unit may import whatever stands to its left in a line, and what that may import. A unit is
# a file or a folder of src/pippin; a folder's own files may import each other.
CHAINS = """
errors <- types <- cache <- runs <- planner <- scheduler <- core
errors <- config <- loading
config <- options <- bench
config <- logs <- worker
footprint <- memory
watermarks <- memory
claims <- loading
core <- loading <- bench
engine <- terminal <- bench
environment <- bench <- cli <- bench_one_batch
cli <- bench_offline_throughput
interrupts <- launch_server
cli <- check_env
kernels <- bench <- kernels_cli <- cli
cli <- bench_serving
errors <- backend <- core
backend <- models
errors <- gguf_files <- models
folders <- gguf_files
folders <- kernels
gguf_files <- text
gguf_files <- exchange
backend <- worker
garbage <- worker
garbage <- bench
backend <- transport
types <- inputs <- attention <- runner <- probe <- memory <- core
cache <- attention
cache <- inputs
errors <- kernels <- cache
kernels <- models
kernels <- replay <- graph
linkage <- mlx_cuda <- replay
replay <- loading
config <- models <- attention
types <- penalties <- sampler <- graph_inputs <- graph <- sampler_graphs <- runner
pooling <- flight <- runner
cache <- warmup <- runner
inputs <- warmup
types <- pieces <- inputs
kernels <- pieces
sampler <- flight <- core
inputs <- pooling <- runner
inputs <- models
client <- embedding <- server
loading <- estimate <- cli
types <- catalogue <- cli
embedding <- engine
text <- embedding
inputs <- attention <- graph
inputs <- graph_inputs
kernels <- graph_inputs
kernels <- uploads <- penalties
uploads <- inputs
sampler_graphs <- jit_ahead <- loading
worker <- jit_ahead
kernels <- sampler
demo <- models
demo <- text
config <- worker <- transport <- carried <- supervisor <- client <- completion <- server <- cli <- launch_server
types <- messages <- worker
recorder <- worker
footprint <- rest <- worker
messages <- journal
config <- preflight
backend <- preflight
logs <- preflight <- server
preflight <- engine
handover <- engine
messages <- exchange <- engine
config <- exchange <- server
messages <- preflight
messages <- carried
messages <- scheduler
messages <- grammar
restarts <- journal <- supervisor
restarts <- server
types <- bounds <- planner
bounds <- worker
errors <- types <- limits <- planner
messages <- profile <- runner
profile <- worker
messages <- models
types <- text <- completion <- sglang <- engine <- terminal <- cli
memory <- environment <- cli
models <- probe <- memory <- torch <- loading
runner <- torch
backend <- environment
sglang <- server
scheduler <- kvdisk <- core
types <- restore_choice <- kvdisk
cache <- disk_reads <- kvdisk
uploads <- landing <- runner
config <- kvdisk <- memory
config <- grammar <- constrained <- core
scheduler <- constrained
errors <- masks <- grammar
masks <- flight
masks <- mask_table <- runner
uploads <- mask_table
types <- text <- grammar <- sglang
"""

# Files that must run where MLX is not, or where loading it would cost the HTTP process its memory.
WITHOUT_MLX = (
    "types", "messages", "errors", "config", "scheduler", "cache.holdings", "cache.radix", "cache.slots",
    "cache.snapshots", "cache.windows",
    "client", "completion", "engine", "cli", "server", "grammar", "text", "transport", "supervisor", "restarts",
    "journal", "carried", "preflight", "exchange", "bounds", "limits", "planner", "runs",
    "masks",
    "cache.canary", "cache.disk", "cache.disk_windows", "cache.digest", "kvdisk", "disk_reads", "restore_choice",
    "profile.control", "profile.marks", "profile.replay", "profile.summary",
)  # fmt: skip


def module_name(path: Path) -> str:
    """``src/pippin/cache/radix.py`` is ``cache.radix``; the package itself is the empty string."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit(module: str) -> str:
    return module.split(".")[0]


@cache
def imports(path: Path) -> frozenset[str]:
    """Every module that a file imports, anywhere in it, by full name."""
    package = ["pippin", *path.relative_to(PACKAGE).parts[:-1]]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            outer = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*outer, *([node.module] if node.module else [])])
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return frozenset(found)


def our_imports(path: Path) -> Iterator[str]:
    """Units of ours that a file imports, other than its own."""
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "pippin" and len(parts) > 1 and unit(module_name(path)) != parts[1]:
            yield parts[1]


def below() -> dict[str, set[str]]:
    """The units that each unit may import: the transitive closure of CHAINS."""
    graph: dict[str, set[str]] = {}
    for line in CHAINS.strip().splitlines():
        names = line.split(" <- ")
        for lower, upper in pairwise(names):
            graph.setdefault(upper, set()).add(lower)
            graph.setdefault(lower, set())
    while True:
        grown = {name: seen.union(*(graph[s] for s in seen)) for name, seen in graph.items()}
        if grown == graph:
            return graph
        graph = grown


def test_chains_have_no_circle() -> None:
    assert [name for name, seen in below().items() if name in seen] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: module_name(p) or "pippin")
def test_imports_point_one_way(path: Path) -> None:
    allowed = below()
    name = unit(module_name(path))
    units = {unit(module_name(p)) for p in SOURCES}
    if name in ("", "__main__"):
        return
    assert name in allowed, f"pippin.{name} is new: say in CHAINS where it stands"
    wrong = {other for other in our_imports(path) if other in units and other not in allowed[name]}
    assert not wrong, f"pippin.{name} may not import {sorted(wrong)}"


def imports_of(module: str) -> set[str]:
    files = [p for p in SOURCES if module_name(p) == module or module_name(p).startswith(module + ".")]
    return {name.split(".")[0] for p in files for name in imports(p)}


@pytest.mark.parametrize("module", WITHOUT_MLX)
def test_runs_without_mlx(module: str) -> None:
    assert not imports_of(module) & {"mlx", "mlx_lm"}


def test_what_runs_without_mlx_loads_none() -> None:
    loaded = loaded_by("import " + ", ".join(f"pippin.{name}" for name in WITHOUT_MLX))
    assert "pippin" in loaded
    assert not loaded & {"mlx", "mlx_lm", "torch"}


def test_torch_stays_in_its_folder() -> None:
    importers = [module_name(p) for p in SOURCES if any(i.split(".")[0] == "torch" for i in imports(p))]
    assert [m for m in importers if unit(m) != "torch"] == []


def loaded_by(statement: str) -> set[str]:
    """Top-level modules loaded once a fresh interpreter has run the statement."""
    code = f"import sys\n{statement}\nprint(*{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


@pytest.mark.parametrize("statement", ["import pippin", "from pippin import SamplingParams"])
def test_importing_pippin_is_light(statement: str) -> None:
    assert not loaded_by(statement) & {"mlx", "mlx_lm", "torch", "transformers", "fastapi", "numpy"}


# --- names ---

VAGUE = {"Manager", "Mixin", "Base", "Impl", "Helper", "Helpers", "Stub", "Dummy", "Wrapper", "Util", "Utils"}

# Where a value comes from files or objects that are not ours, so that a field may or may not be there.
READS_FOREIGN_OBJECTS = {
    "config.py": "validates its own fields by name",
    "types.py": "validates its own fields by name",
    "models/deferred.py": "hands on to the array whatever a value that stands in for one is asked",
    "models/load.py": "reads config.json, and mlx.core's dtypes by name",
    "models/quantize.py": "asks layers of mlx-lm's models what they are",
}


def words(name: str) -> set[str]:
    """The words of a CamelCase or snake_case name, capitalized."""
    return {w.capitalize() for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: module_name(p) or "pippin")
def test_names_say_something(path: Path) -> None:
    classes = [node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    assert [name for name in [*classes, path.stem] if words(name) & VAGUE] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: module_name(p) or "pippin")
def test_attributes_are_not_guessed(path: Path) -> None:
    if path.relative_to(PACKAGE).as_posix() in READS_FOREIGN_OBJECTS:
        return
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    guesses = [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id in ("getattr", "hasattr")]
    assert not guesses, f"getattr or hasattr in lines {guesses}: see READS_FOREIGN_OBJECTS"


# --- packaging ---


@cache
def project() -> dict[str, object]:
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert isinstance(found, dict)
    return found


def test_every_dependency_has_its_reason() -> None:
    section = re.search(r"^dependencies = \[\n(.*?)^\[project\.scripts", text_of("pyproject.toml"), re.M | re.S)
    assert section
    lines = [line for line in section[1].splitlines() if re.match(r'\s*"', line) or ("= [" in line and '"' in line)]
    assert len(lines) > 15
    assert [line for line in lines if not re.search(r"# \S", line) or line.count('"') > 2] == []


def test_versions_agree() -> None:
    import pippin

    assert project()["version"] == pippin.__version__
    assert f"## {pippin.__version__}" in text_of("CHANGELOG.md")


# --- what is committed ---


def text_of(path: str) -> str:
    return (ROOT / path).read_text()


@cache
def tracked() -> tuple[Path, ...]:
    """Files of the commit that this checkout has, those that are still there."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return tuple(path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file())


def test_no_large_files() -> None:
    weights = [p for p in tracked() if p.suffix == ".safetensors" and PACKAGE / "demo" in p.parents]
    assert sum(p.stat().st_size for p in weights) <= 24_000_000
    assert [str(p) for p in tracked() if p.stat().st_size > 8 * 2**20 and p not in weights] == []


# Written so that this file does not hold what it looks for.
PRIVATE = re.compile("|".join([r"/" + r"(?:work|root|farm|tmp/brief)/", "file:" + "///", "bash_" + "jobs"]))


def test_no_paths_of_one_machine() -> None:
    found = []
    for path in tracked():
        if path.suffix in (".safetensors", ".png") or path.name == "tokenizer.json":
            continue
        lines = path.read_text(errors="replace").splitlines()
        found += [f"{path.name}:{n}" for n, line in enumerate(lines, 1) if PRIVATE.search(line)]
    assert found == []


def test_examples_are_short() -> None:
    examples = sorted((ROOT / "examples").glob("*.py"))
    assert examples
    assert [p.name for p in examples if len(p.read_text().splitlines()) > 40] == []


# --- docs ---


def code_in(markdown: str) -> list[str]:
    """The text of code blocks and code spans."""
    blocks = re.findall(r"^```.*?\n(.*?)^```", markdown, re.M | re.S)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S))
    return blocks + spans


def commands_in(markdown: str, program: str) -> set[str]:
    """The words that follow a program's name at the start of a line of code: ``make test`` gives ``test``."""
    pattern = rf"^(?:[$#] )?(?:[A-Z_]+=\S+ )*{program} ([a-z][a-z0-9-]*)"
    return {m for code in code_in(markdown) for m in re.findall(pattern, code, re.M)}


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", text_of("Makefile"), re.M))
    assert commands_in(path.read_text(), "make") <= targets


COMMANDS = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
COMMANDS |= {str(group.typer_instance.info.name) for group in app.registered_groups if group.typer_instance}


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_pippin_commands_exist(path: Path) -> None:
    assert commands_in(path.read_text(), "pippin") <= COMMANDS


def test_every_command_is_documented() -> None:
    assert commands_in(text_of("docs/cli.md"), "pippin") == COMMANDS


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_flags_of_pippin_exist(path: Path) -> None:
    """Flags in lines of code that run ``pippin``, or that our launch module takes."""
    classes = cli_docs.CLASSES.values()
    known = {name for c in classes for f in fields(c) for name in (flag_of(f.name), f.metadata["flag"])}
    lines = [line for code in code_in(path.read_text()) for line in code.splitlines()]
    ours = [line for line in lines if re.search(r"(^|[$] |-m )pippin[ .]", line)]
    assert {flag for line in ours for flag in re.findall(r"(?<!\S)--[a-z-]+", line)} <= known | options(
        get_command(app)
    )


def options(command: Any) -> set[str]:
    """Every option of a command and of those below it."""
    own = {name for parameter in command.params for name in parameter.opts} | {"--help"}
    return own.union(*(options(below) for below in vars(command).get("commands", {}).values()))


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_links_resolve(path: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(target)
    assert broken == []


def anchors(path: Path) -> set[str]:
    """Ids that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_makefile_lists_its_targets() -> None:
    makefile = text_of("Makefile")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.M))
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.M)
    assert phony
    assert set(phony[1].split()) == targets


def test_option_tables_are_current() -> None:
    page = text_of("docs/cli.md")
    assert cli_docs.render(page) == page, "run `make docs`"
    assert all(f"`{flag_of(f.name)}`" in page for c in cli_docs.CLASSES.values() for f in fields(c))


def python_in(markdown: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", markdown, re.M | re.S)


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_python_in_docs_imports_what_there_is(path: Path) -> None:
    for code in python_in(path.read_text()):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pippin":
                module = importlib.import_module(node.module or "")
                assert [a.name for a in node.names if not hasattr(module, a.name)] == []


def test_docs_list_every_sampling_parameter() -> None:
    section = text_of("docs/python.md").split("## sampling_params")[1].split("## ")[0]
    listed = {name for line in section.splitlines() if line.startswith("| `") for name in named_first(line)}
    fields_of_their_own = {"logprobs", "top_logprobs", "prompt_logprobs", "grammar", "lora_path"}
    assert listed == set(SamplingParams.__struct_fields__) - fields_of_their_own


def named_first(row: str) -> list[str]:
    """The code spans in a table row's first cell."""
    return re.findall(r"`(\w+)`", row.split("|")[1])


def test_every_endpoint_and_field_is_documented() -> None:
    page = text_of("docs/api.md")
    fields_page = page + text_of("docs/compatibility.md")  # which is written from the bodies
    paths = {path.replace("{model:path}", "{name}") for _, path, _, _ in ROUTES}
    assert {path for path in paths if f"{path}`" not in page} == set()
    spelled = set(re.findall(r"(?:GET|POST) `?(/[^`\s]*)`", page)) - {"/openapi.json"}
    assert spelled <= paths
    fields_of_bodies = {name for *_, body in ROUTES if body is not None for name in body.__struct_fields__}
    assert {name for name in fields_of_bodies if f"`{name}`" not in fields_page} == set()
