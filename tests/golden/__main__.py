"""``python -m tests.golden``: writes the golden file of every shipped configuration anew."""

from __future__ import annotations

from tests.configs.files import model_of
from tests.golden.describe import FOLDER, describe, files

wanted = files()
for old in set(FOLDER.rglob("*.txt")) - set(wanted.values()):
    old.unlink()
for path, golden in wanted.items():
    golden.parent.mkdir(exist_ok=True)
    golden.write_text(describe(model_of(path)), encoding="utf-8")
    print(golden.relative_to(FOLDER.parents[1]))
