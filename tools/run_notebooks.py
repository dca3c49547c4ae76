"""Execute the lessons and store their outputs: `python tools/run_notebooks.py [notebooks/02_forward_process.ipynb]`."""

import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, CellExecutionError, DeadKernelError

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
OUTER_FOLDERS = re.compile(r"[~/][^\s\x1b]*/(?=(minildm|site-packages)/)")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def tidy(outputs):
    """Join the pieces of a stream, keep the last state of a line overwritten by `\\r`, and shorten paths in errors."""
    tidied = []
    for output in outputs:
        if output.output_type == "stream" and tidied and tidied[-1].get("name") == output.name:
            tidied[-1].text += output.text
        else:
            tidied.append(output)
    for output in tidied:
        if output.output_type == "stream":
            output.text = re.sub(r"^.*\r(?=[^\n])", "", output.text, flags=re.MULTILINE)
        elif output.output_type == "error":
            output.traceback = [OUTER_FOLDERS.sub("", line) for line in output.traceback]
    return tidied


def execute(path, timeout=1800):
    """Execute one notebook in place; the file changes only when every cell has run."""
    notebook = nbformat.read(path, as_version=4)
    started = []
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_execute=lambda cell, cell_index: started.append(cell),
    )
    try:
        client.execute()
    except (CellControlSignal, DeadKernelError) as error:
        reason = f"{error.ename}: {error.evalue}" if isinstance(error, CellExecutionError) else str(error)
        sys.exit(f"\n{path.name}, cell In [{len(started)}]: {reason}")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = tidy(cell.outputs)
    notebook.metadata = nbformat.from_dict(METADATA)  # without widget state and the versions of this machine
    draft = path.with_suffix(".tmp")
    nbformat.write(notebook, draft)
    draft.replace(path)


def main():
    for path in [Path(name).resolve() for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        start = time.perf_counter()
        print(f"{path.name} …", end=" ", flush=True)
        execute(path)
        print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
