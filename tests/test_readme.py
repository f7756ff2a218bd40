import re
from pathlib import Path

from wireframe.bench import static, static_table

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_every_source_file_is_in_the_readmes_file_tree():
    files = [
        path.name
        for folder in ("wireframe", "kernels", "train", "bench")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".sh") and not path.name.startswith("__")
    ]
    assert len(files) > 40
    tree = README.split("```")[-2]
    assert [name for name in files if name not in tree] == []


def test_every_file_the_readme_names_is_there():
    named = set(re.findall(r"\b((?:wireframe|kernels|train|bench|tests|docs)/[\w./]+\.(?:py|sh|jsonl?|png))\b", README))
    assert named and [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_the_table_of_kernels_is_that_of_the_report():
    table = static_table.table(static.read_report(static.REPORT)["rows"])
    assert [line for line in table.splitlines() if line not in README] == []
    # And no line between them.
    assert table in README


def test_no_placeholder_is_left():
    assert re.findall(r"@@|@\w+@", README) == []


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    scope = {}
    for code in blocks:
        exec(code, scope)
    assert scope["found"].vertices.shape[1] == 3 and scope["score"].hss > 0.8
    assert (tmp_path / "scene.png").read_bytes().startswith(b"\x89PNG")
