"""The import law: imports point one way, from the command line down to the kernels."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each module may import those in the layers below its own. What stands in one layer does not import each other.
LAYERS = [
    {
        "kernels._advance",
        "kernels._candidates",
        "kernels._common",
        "kernels._flash_ring",
        "kernels._flash_split",
        "kernels.formats",
        "kernels._hopper",
        "kernels._matmul",
        "kernels._packed",
        "kernels._random",
        "kernels._packed_ring",
        "kernels._ring",
        "kernels._shared",
        "kernels.tiles",
    },
    {"kernels"},
    {"kv_cache"},
    {"model"},
    {"sampling", "chat_template", "checkpoint", "prefill"},
    {"tokenizer", "decoding", "timing"},
    {"convert_hf_checkpoint", "speculative"},
    {"runs"},
    {"generate", "quantize"},
    {"chat", "batching"},
    {"scripts"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
LAZY = {"generate": {"chat", "batching", "quantize"}}  # inside functions only


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "scripts":
        return "scripts"
    if parts[0] == "kernels":
        name = ".".join(parts)
        return name if name in RANK else "kernels"
    return parts[0]


def imports_of(path: Path):
    """(module, is at the top level) for each of the project's own modules that a file imports."""
    tree = ast.parse(path.read_text())
    top = set(tree.body)
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        for name in names:
            name = name if name in RANK else name.split(".")[0]
            if name in RANK:
                yield name, node in top


SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("scripts/*.py")])


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    module = module_of(path)
    assert module in RANK, f"{module} has no layer"
    for name, at_top in imports_of(path):
        if path.parent.name == "kernels":
            allowed = name in LAYERS[0] or path.name == "__init__.py"
            assert allowed, f"{path.name} imports {name}: a kernel file imports {sorted(LAYERS[0])} only"
        elif name in LAZY.get(module, ()):
            assert not at_top, f"{path.name} imports {name} at its top"
        elif module != "scripts":
            assert RANK[name] < RANK[module], f"{path.name} imports {name}"


def test_the_law_can_fail(tmp_path):
    """imports_of sees an import of each form."""
    file = tmp_path / "x.py"
    file.write_text("import generate\nfrom kernels.formats import Weight\ndef f():\n    from chat import main\n")
    assert set(imports_of(file)) == {("generate", True), ("kernels.formats", True), ("chat", False)}
