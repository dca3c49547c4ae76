"""Write the package from the notebooks: `python tools/export.py`; with `--check`, only say where they differ.

A lesson names its module with `#| default_exp unet`. A cell that begins with `#| export` goes to that module, one that
begins with `#| export losses` to the module `losses`. The docstring is the line `> …` under the lesson's title; that of
a further module is a second directive, `#| doc One sentence.`, in its first cell.
"""

import argparse
import ast
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
HEADER = "# Exported from notebooks/{} by tools/export.py: edit the notebook, not this file.\n"
DIRECTIVE = re.compile(r"#\s?\|\s*(default_exp|export|doc)\b\s*(.*)")


def split_directives(source):
    """A cell's leading directives as a dict, and the code below them."""
    directives, lines = {}, source.strip().splitlines()
    while lines and (match := DIRECTIVE.fullmatch(lines[0])):
        directives[match[1]] = match[2].strip()
        del lines[0]
    code = "\n".join(lines).strip()
    if stray := re.search(r"^#\s?\|.*", code, re.MULTILINE):
        raise ValueError(f"`{stray[0]}` is not a known directive at the top of its cell")
    return directives, code


def read_modules(path):
    """What one notebook exports, {module: source}, in the order in which the modules begin."""
    cells, modules, default = nbformat.read(path, as_version=4).cells, {}, ""
    quote = re.search(r"^> (.+)", cells[0].source, re.MULTILINE)
    for cell in (cell for cell in cells if cell.cell_type == "code"):
        directives, code = split_directives(cell.source)
        default = directives.get("default_exp", default)
        if "export" not in directives:
            continue
        module = directives["export"] or default
        if not module.isidentifier():
            raise ValueError(f"`#| export {module}` names no module, and no `#| default_exp` stands above it")
        if module in modules:
            modules[module] += gap(modules[module], code) + code + "\n"
            continue
        doc = directives.get("doc") or (quote and module == default and quote[1].strip())
        if not doc:
            raise ValueError(f"module {module} needs a docstring: `> …` under the title, or `#| doc …`")
        head = HEADER.format(path.name) + f'"""{doc}"""\n'
        modules[module] = head + gap(head, code) + code + "\n"
    return modules


def gap(before, code):
    """The blank lines that ruff wants between two cells: two, but one from imports or docstring to a statement."""
    last, first = ast.parse(before).body[-1], ast.parse(code).body[0]
    definition = isinstance(first, (ast.FunctionDef, ast.ClassDef))
    return "\n" if isinstance(last, (ast.Import, ast.ImportFrom, ast.Expr)) and not definition else "\n\n"


def collect(root=ROOT):
    """What all notebooks export, {module: (notebook, source)}, in the order of the course."""
    modules = {}
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        try:
            for module, source in read_modules(path).items():
                file = root / "minildm" / f"{module}.py"
                if module in modules:
                    raise ValueError(f"module {module} already belongs to {modules[module][0]}")
                if file.exists() and not is_exported(file):
                    raise ValueError(f"minildm/{module}.py is written by hand, so choose another name to export to")
                modules[module] = path.name, source
        except ValueError as error:
            raise ValueError(f"notebooks/{path.name}: {error}.") from None
    return modules


def module_numbers(root=ROOT):
    """The number of the lesson that each module comes from, {module: number}, in the order of the course."""
    return {module: int(notebook.split("_")[0]) for module, (notebook, _) in collect(root).items()}


def is_exported(file):
    """Whether the first line of a file says that it was exported."""
    return file.read_text(encoding="utf-8").startswith(HEADER.split("{")[0])


def compare(root=ROOT):
    """Yield what differs as (file, reason, source); the source of an orphan is None."""
    wanted = {root / "minildm" / f"{module}.py": source for module, (_, source) in collect(root).items()}
    for file, source in wanted.items():
        if not file.exists():
            yield file, "is missing", source
        elif file.read_text(encoding="utf-8") != source:
            yield file, "differs from its notebook", source
    for file in sorted((root / "minildm").glob("*.py")):
        if file not in wanted and is_exported(file):
            yield file, "is exported by no notebook", None


def export(root=ROOT):
    """Write, or delete, every module that differs; none is ever seen half-written."""
    for file, _, source in compare(root):
        if source is None:
            file.unlink()
        else:
            draft = file.with_suffix(".tmp")
            draft.write_text(source, encoding="utf-8", newline="\n")
            draft.replace(file)
        print(f"minildm/{file.name} {'deleted' if source is None else 'written'}")


def main():
    parser = argparse.ArgumentParser(description="Write the package minildm from the notebooks.")
    parser.add_argument("--check", action="store_true", help="write nothing, and fail when the package differs")
    try:
        if not parser.parse_args().check:
            return export()
        differences = [f"minildm/{file.name} {reason}" for file, reason, _ in compare()]
    except ValueError as error:
        sys.exit(str(error))
    if differences:
        sys.exit("\n".join([*differences, "Run `make package`."]))


if __name__ == "__main__":
    main()
