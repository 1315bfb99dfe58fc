"""``python -m tests.golden`` rewrites the golden file of every shipped model and the table of configs/README.md."""

from __future__ import annotations

from tests.configs.files import model_of
from tests.golden.describe import FOLDER, describe, files
from tests.golden.table import README, written

wanted = files()
for old in set(FOLDER.rglob("*.txt")) - set(wanted.values()):
    old.unlink()
for path, golden in wanted.items():
    golden.parent.mkdir(exist_ok=True)
    golden.write_text(describe(model_of(path)), encoding="utf-8")
    print(golden.relative_to(FOLDER.parents[1]))
README.write_text(written(), encoding="utf-8")
print(README.relative_to(FOLDER.parents[1]))
