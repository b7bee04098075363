"""Imports go down the ladder, and the library needs torch alone."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
PACKAGE = SOURCE / "longnet"

WITHOUT_TORCH_EMPTY = {"longnet.slides", "longnet.slides.finetune", "longnet.training"}

# A unit (a module or folder of longnet) may import units of lower rungs and itself, never its neighbours on the rung.
LADDER: tuple[tuple[str, ...], ...] = (
    ("checks", "hashed", "compat.spellings"),
    ("geometry",),
    ("runtime",),
    ("nn",),
    ("attention.call", "attention.key_ranges", "attention.merge"),
    ("attention.by_offset", "attention.chunked", "attention.operators"),
    ("attention.backends",),
    ("attention.sharding",),
    ("attention.packed", "attention.padding"),
    ("attention.definition",),
    ("attention.functional",),
    ("attention.module_checks", "attention.streaming"),
    ("attention.module",),
    ("attention", "position"),
    ("models",),
    ("distributed", "compress", "compat"),
    ("gigapath",),
    ("figures",),
    ("slides",),
    ("training",),
    ("reading", "hf", "slides.finetune"),
    ("cli",),
)
RUNG = {tuple(unit.split(".")): rung for rung, units in enumerate(LADDER) for unit in units}

# Imports in functions that go up the ladder: training dilates models of transformers, and hf reads the folders of training. No
# file is in a circle, as ``test_no_file_imports_itself_through_others`` shows.
UPWARDS = {
    ("longnet", "training", name): ("longnet", "hf")
    for name in ("initial", "models", "transformer", "transformer_config")
}

# What a unit may import besides the standard library; torch alone where nothing is said.
THIRD_PARTY = {
    "checks": set(),
    "hashed": set(),
    "geometry": set(),
    "compress": {"torch", "torchao"},
    "gigapath": {"torch", "huggingface_hub", "safetensors"},
    "figures": {"matplotlib", "numpy"},
    "hf": {"torch", "transformers", "safetensors"},
    "slides": {"torch", "h5py", "lifelines", "matplotlib", "numpy", "safetensors", "scipy", "sklearn"},
    "training": {"torch", "datasets", "matplotlib", "numpy", "pyarrow", "rich", "safetensors", "tokenizers"},
    "cli": {"torch", "rich", "typer"},
}

# The only modules that import triton. Kernels run on its tensors, never on torch's.
KERNELS = ("longnet", "attention", "backends", "triton", "kernels")
STREAMING = ("longnet", "attention", "streaming")
POSITION = ("longnet", "nn", "position")
EVERY_KERNEL = (
    *(
        KERNELS,
        (*STREAMING, "kernels"),
        (*STREAMING, "band_kernels"),
        ("longnet", "nn", "kernels"),
        (*POSITION, "kernels"),
    ),
)
MEETS_TRITON = {
    KERNELS: {"triton"},
    (*STREAMING, "kernels"): {"triton"},
    (*STREAMING, "band_kernels"): {"triton"},
    ("longnet", "nn", "kernels"): {"triton"},
    (*POSITION, "kernels"): {"triton"},
    (*STREAMING, "fused"): {"torch", "triton"},
    (*STREAMING, "band_fused"): {"torch", "triton"},
    ("longnet", "runtime", "launcher_internals"): {"torch", "triton"},
    ("longnet", "runtime", "triton_internals"): {"torch", "triton"},
}

# `import longnet` must do without all of these.
OPTIONAL = ("triton", "transformers", "torchao", "h5py", "matplotlib", "numpy", "safetensors", "typer", "rich")

MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES = {path: path.relative_to(SOURCE).with_suffix("").parts for path in MODULES}


def imports_of(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line, dotted name) of every import, inside functions and ``if TYPE_CHECKING`` too.

    ``from a import b`` is a.b: only so can ``from longnet import mixing`` be told from ``import longnet``.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:
                yield node.lineno, (*base, alias.name)


def starts_with(name: tuple[str, ...], prefixes: Iterable[tuple[str, ...]]) -> tuple[str, ...] | None:
    """The longest of the prefixes that ``name`` starts with."""
    return max((prefix for prefix in prefixes if name[: len(prefix)] == prefix), key=len, default=None)


def unit_of(name: tuple[str, ...]) -> tuple[str, ...] | None:
    """The unit of a module or of a name in it, ("longnet", ...)."""
    return starts_with(name[1:], RUNG)


BACKENDS = ("longnet", "attention", "backends")


def may_know(module: tuple[str, ...], target: tuple[str, ...]) -> bool:
    """Whether a module of longnet.attention.backends may import this one of them: a backend is a file, or a folder."""
    own, other = module[0], target[0]
    return own in ("select", "__init__", other) or (other == "views" and own != "views")


def inside_functions(source: str) -> set[int]:
    """The lines of a module that lie inside its functions."""
    functions = [one for one in ast.walk(ast.parse(source)) if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {line for one in functions for line in range(one.lineno, (one.end_lineno or one.lineno) + 1)}


def broken_rules(name: tuple[str, ...], source: str) -> list[str]:
    """What the module ``name`` (("longnet", "geometry", "plan"), say) imports although it may not."""
    found = []
    own = unit_of(name)
    for line, target in imports_of(ast.parse(source), name[:-1]):
        where = f"{'/'.join(name)}.py:{line} imports {'.'.join(target)}"
        other = unit_of(target)
        if target[0] == "LongNet":
            found.append(f"{where}: the alias is for users")
        elif target[0] != "longnet":
            meets = starts_with(name, MEETS_TRITON)
            allowed = THIRD_PARTY.get(own[0] if own else "", {"torch"}) if meets is None else MEETS_TRITON[meets]
            if target[0] not in sys.stdlib_module_names and target[0] not in allowed:
                found.append(f"{where}: expected the standard library or {sorted(allowed)}")
        elif target == ("longnet", "__version__"):
            continue
        elif other is None:
            found.append(f"{where}: expected the unit it comes from, as the package itself imports this one")
        elif name in UPWARDS and target[:2] == UPWARDS[name] and line in inside_functions(source):
            continue
        elif own is not None and own != other and RUNG[own] <= RUNG[other]:
            found.append(f"{where}: {'.'.join(own)} is not above {'.'.join(other)} on the ladder")
        elif name[:3] == target[:3] == BACKENDS and len(target) > 3 and not may_know(name[3:], target[3:]):
            found.append(f"{where}: backends share views.py and never import each other; select.py chooses")
        elif target[:5] == KERNELS and name[:4] != KERNELS[:4] and not starts_with(name, EVERY_KERNEL):
            found.append(f"{where}: these kernels are the Triton backend's")
        elif name[:5] == KERNELS and target[:5] != KERNELS:
            found.append(f"{where}: kernels import one another only")
    return found


@pytest.mark.parametrize("path", MODULES, ids=["/".join(NAMES[path][1:]) for path in MODULES])
def test_a_module_imports_only_downwards(path: Path) -> None:
    name = NAMES[path]
    assert name[1] in ("__init__", "__main__") or unit_of(name), f"{path} has no place on the ladder"
    assert broken_rules(name, path.read_text(encoding="utf-8")) == []


def test_no_file_imports_itself_through_others() -> None:
    """Of files, not only of units; imports in functions and under ``TYPE_CHECKING`` count."""
    modules = {name[:-1] if name[-1] == "__init__" else name: path for path, name in NAMES.items()}
    edges = {}
    for name, path in modules.items():
        package = name if path.stem == "__init__" else name[:-1]
        targets = (target for _, target in imports_of(ast.parse(path.read_text(encoding="utf-8")), package))
        edges[name] = {found for target in targets if (found := starts_with(target, modules)) not in (None, name)}
    # Files that import nothing that is left are taken away until none is; what stays is in a circle or leads into one.
    while free := [name for name, targets in edges.items() if not targets & edges.keys()]:
        for name in free:
            del edges[name]
    assert edges == {}, {"/".join(name): ["/".join(one) for one in targets] for name, targets in edges.items()}


def empty_without_torch(name: tuple[str, ...], source: str) -> list[str]:
    """Names that a module takes from a package whose __init__ imports nothing as long as torch is not imported.

    The command imports such packages for their settings, before torch: then they stay empty.
    """
    targets = [target for _, target in imports_of(ast.parse(source), name[:-1])]
    modules = {one[:-1] if one[-1] == "__init__" else one for one in NAMES.values()}
    return [
        ".".join(target) for target in targets if ".".join(target[:-1]) in WITHOUT_TORCH_EMPTY and target not in modules
    ]


def test_names_come_from_the_modules_that_define_them() -> None:
    for path in MODULES:
        assert empty_without_torch(NAMES[path], path.read_text(encoding="utf-8")) == [], path
    name = ("longnet", "cli", "slide_files")
    assert empty_without_torch(name, "from longnet.slides import SLIDE_FORMATS") == ["longnet.slides.SLIDE_FORMATS"]
    assert (
        empty_without_torch(name, "from longnet.slides import files\nfrom longnet.slides.files import read_slide") == []
    )


def private_names(name: tuple[str, ...], source: str) -> list[str]:
    """Names with an underscore that a module takes from another unit of longnet, by import or as an attribute of a module."""
    tree, found, modules = ast.parse(source), [], {}
    for line, target in imports_of(tree, name[:-1]):
        other = unit_of(target)
        if target[0] == "longnet" and other is not None:
            modules[target[-1]] = other
            if other[0] != name[1] and any(part.startswith("_") for part in target):
                found.append(f"{'/'.join(name)}.py:{line} imports {'.'.join(target)}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr.startswith("_"):
            other = modules.get(node.value.id)
            if other is not None and other[0] != name[1] and not node.attr.startswith("__"):
                found.append(f"{'/'.join(name)}.py:{node.lineno} uses {node.value.id}.{node.attr}")
    return found


def test_no_private_name_is_used_outside_its_room() -> None:
    assert [one for path in MODULES for one in private_names(NAMES[path], path.read_text(encoding="utf-8"))] == []


def test_the_check_sees_a_private_name() -> None:
    name = ("longnet", "training", "loop")
    assert len(private_names(name, "from longnet.models.loss import _chunks")) == 1
    assert len(private_names(name, "from longnet.models import loss\nloss._chunks()")) == 1
    assert private_names(name, "from longnet.training.files import _write\nself._x = torch._C") == []


# Where torch's operators are defined: they take flat arguments.
FLAT = {("longnet", "runtime", "operators"), ("longnet", "attention", "operators")}


def arguments_by_place(source: str) -> list[str]:
    """Functions with an argument like ``*settings: Any``; not autograd's own, wrappers (``*args``) and unused ones (``*_``)."""
    functions = [one for one in ast.walk(ast.parse(source)) if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [
        function.name
        for function in functions
        if (more := function.args.vararg) is not None
        and more.arg not in ("args", "_")
        and isinstance(more.annotation, ast.Name)
        and more.annotation.id == "Any"
        and (not function.args.args or function.args.args[0].arg != "ctx")
    ]


def test_no_function_takes_a_tuple_of_settings() -> None:
    # Methods in hf stand for transformers' own, whatever these take.
    looked_at = [path for path in MODULES if NAMES[path] not in FLAT and NAMES[path][1] != "hf"]
    found = {path: arguments_by_place(path.read_text(encoding="utf-8")) for path in looked_at}
    assert {str(path): names for path, names in found.items() if names} == {}
    assert arguments_by_place("def f(x, *settings: Any): ...\ndef g(ctx, *grads: Any): ...") == ["f"]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("longnet/geometry/plan", "import torch"),
        ("longnet/geometry/plan", "from longnet.attention.merge import merge_"),
        ("longnet/runtime/cache", "from longnet.attention.call import lse_dtype"),
        ("longnet/attention/merge", "import numpy"),
        ("longnet/attention/merge", "from longnet.attention.call import lse_dtype"),
        ("longnet/attention/backends/portable", "from longnet.attention.backends.cpu_flash import forward"),
        ("longnet/attention/backends/portable", "from longnet.attention.backends import cpu_flash"),
        ("longnet/attention/backends/portable", "from . import cpu_flash"),
        ("longnet/attention/operators", "from longnet.attention import functional"),
        ("longnet/attention/backends/triton/backend", "import triton"),
        ("longnet/attention/backends/triton/backend", "from longnet.attention.backends import portable"),
        ("longnet/attention/backends/portable", "from longnet.attention.backends.triton.kernels import forward"),
        ("longnet/gigapath/layer", "from longnet.attention.backends.triton.kernels.rows import pick"),
        ("longnet/attention/backends/triton/kernels/rows", "from longnet.attention.backends.views import tile_view"),
        ("longnet/attention/backends/triton/kernels/rows", "import torch"),
        ("longnet/attention/functional", "def f():\n    from longnet import DilatedAttention"),
        ("longnet/attention/functional", "import longnet"),
        ("longnet/attention/functional", "from longnet.attention.streaming import DilatedCache"),
        ("longnet/attention/streaming/cache", "from longnet.attention import DilatedAttention"),
        ("longnet/attention/streaming/cache", "import safetensors"),
        ("longnet/models/config", "from ..training import settings"),
        ("longnet/figures", "import torch"),
        ("longnet/training/loop", "import typer"),
        ("longnet/training/loop", "def f():\n    from longnet.hf.dilation import apply"),
        ("longnet/training/transformer", "from longnet.hf.dilation import apply"),
        ("longnet/attention/module", "from LongNet import DilatedAttention"),
    ],
)
def test_the_check_sees_a_forbidden_import(module: str, source: str) -> None:
    assert len(broken_rules(tuple(module.split("/")), source)) == 1


def test_the_check_lets_through_what_is_allowed() -> None:
    source = "import math\nimport torch.nn.functional as F\nfrom longnet.attention import merge\n"
    source += "from longnet.geometry import Tile\nfrom .views import tile_view"
    assert broken_rules((*BACKENDS, "portable"), source) == []
    kernel = (
        "import triton\nimport triton.language as tl\nfrom longnet.attention.backends.triton.kernels.rows import pick\n"
    )
    assert broken_rules((*KERNELS, "forward"), kernel) == []
    inside = "from .launches import Blocks\ndef f():\n    from .kernels.forward import forward_kernel"
    assert broken_rules((*BACKENDS, "triton", "backend"), inside) == []


def test_kernels_are_imported_when_they_run() -> None:
    """Importing one needs triton, so nothing does it at its top."""
    for path in MODULES:
        if starts_with(NAMES[path], EVERY_KERNEL):
            continue
        top = [
            node
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        for line, target in imports_of(ast.Module(top, []), NAMES[path][:-1]):
            assert not starts_with(target, EVERY_KERNEL), f"{path}:{line} imports a kernel at its top"


def in_a_fresh_process(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program that finds the sources and nothing of this process."""
    start = f"import sys\nsys.path.insert(0, {str(SOURCE)!r})\n"
    return subprocess.run(
        [sys.executable, "-I", "-c", start + program], capture_output=True, text=True, timeout=120, check=False
    )


def without(*names: str) -> str:
    """The start of a program without these packages: importing one raises, looking for one finds None."""
    return f"""
import importlib.abc, importlib.util

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"{{name}} is missing", name=name)

def look_for(name, package=None, look=importlib.util.find_spec):
    return None if name.partition(".")[0] in {names!r} else look(name, package)

sys.meta_path.insert(0, Missing())
importlib.util.find_spec = look_for
"""


def test_the_library_works_with_torch_alone() -> None:
    program = """
import warnings
warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch's own, without numpy
import torch, longnet
from LongNet import DilatedAttention
assert DilatedAttention is longnet.DilatedAttention
x = torch.randn(2, 20, 8)
out = DilatedAttention(8, 4, (1, 2), (4, 8), causal=True, use_xpos=True, use_rel_pos_bias=True)(x)
assert out.shape == x.shape and out.isfinite().all()
tokens = torch.zeros(1, 20, dtype=torch.int64)
model = longnet.LongNetLM(longnet.LongNetConfig.preset("nano"))
model.loss(tokens, tokens).backward()
assert model.generate(tokens, 2, temperature=0).shape == (1, 22)
cache = longnet.DilatedCache((4, 8), (1, 2), batch_size=2, heads=4, head_dim=2)
x = torch.randn(2, 4, 20, 2)
assert longnet.stream_attention(x, x, x, cache).shape == x.shape and cache.position == 20
print("done")
"""
    result = in_a_fresh_process(without(*OPTIONAL) + program)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


def test_the_library_imports_nothing_optional_that_torch_has_not() -> None:
    program = f"""
import torch
before = set(sys.modules)
import longnet, LongNet
print(*sorted({{name.partition(".")[0] for name in set(sys.modules) - before}} & set({OPTIONAL!r})))
"""
    result = in_a_fresh_process(program)
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stderr


@pytest.mark.parametrize("arguments", [[], ["longnet"]])
def test_another_package_that_imports_the_library_runs_as_a_module(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "__init__.py").write_text("from longnet import DilatedAttention\n")
    (tmp_path / "project" / "run.py").write_text("import project; print(project.DilatedAttention.__name__)\n")
    found = subprocess.run(
        [sys.executable, "-m", "project.run", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
    )
    assert (found.returncode, found.stdout) == (0, "DilatedAttention\n"), found.stderr


COMMAND = "from longnet.cli.entry import main\nmain()"


@pytest.mark.parametrize("missing", ["typer", "rich", "matplotlib"])
def test_the_command_says_which_extra_it_needs(missing: str) -> None:
    arguments = "sys.argv = ['longnet', 'inspect', '--segments', '4', '--rates', '1', '--out', '/dev/null']\n"
    result = in_a_fresh_process(without(missing) + arguments + COMMAND)
    expected = f"longnet: error: the longnet command needs {missing}, which is not installed. "
    assert (result.returncode, result.stderr) == (2, expected + "In a checkout of longnet: pip install '.[train]'\n")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["train", "--help"], ["choose-layers", "--help"], ["inspect", "--help"]],
)
@pytest.mark.parametrize("missing", [(), ("typer",)])
def test_the_command_answers_without_torch(arguments: list[str], missing: tuple[str, ...]) -> None:
    program = f"sys.argv = ['bin/longnet', *{arguments!r}]\n" + (
        "try:\n    from longnet.cli.entry import main\n    main()\n"
        "except SystemExit as end:\n    print('exit', end.code, 'torch' in sys.modules)"
    )
    result = in_a_fresh_process(without(*missing) + program)
    assert result.stdout.splitlines()[-1] == f"exit {2 if missing else 0} False", result.stderr


@pytest.mark.parametrize("own", [None, "ACTIVE"])
def test_the_command_lets_waiting_threads_sleep_unless_told_otherwise(own: str | None) -> None:
    """OpenMP reads the variables when torch is imported: they have to be there before."""
    mine = {} if own is None else {"OMP_WAIT_POLICY": own, "KMP_BLOCKTIME": "7"}
    expected = [own or "PASSIVE", "0" if own is None else "7"]
    program = f"""
import importlib.abc, os
os.environ.pop("OMP_WAIT_POLICY", None), os.environ.pop("KMP_BLOCKTIME", None)
os.environ.update({mine!r})
sys.argv = ["longnet", "generate", "no-such-run", "--prompt", "a"]
class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print([os.environ.get("OMP_WAIT_POLICY"), os.environ.get("KMP_BLOCKTIME")] == {expected!r}, flush=True)
            os._exit(7)
sys.meta_path.insert(0, Watch())
from longnet.cli.entry import main
main()
"""
    result = in_a_fresh_process(program)
    assert (result.returncode, result.stdout) == (7, "True\n"), result.stderr


def test_another_missing_module_keeps_its_traceback() -> None:
    result = in_a_fresh_process(without("tomllib") + COMMAND)
    assert "Traceback" in result.stderr
    assert "tomllib is missing" in result.stderr
