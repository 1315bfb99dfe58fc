"""``python -m tests.golden`` rewrites the files of the models, the table of configs/README.md and the schemas."""

from __future__ import annotations

from mmscale.cli.config import SchemaName, schema_of
from mmscale.config.json_schema import schema_text
from tests.configs.files import CONFIGS, model_of
from tests.golden.describe import FOLDER, describe, files
from tests.golden.table import README, written

wanted = files()
for old in set(FOLDER.rglob("*.txt")) - set(wanted.values()):
    old.unlink()
for path, golden in wanted.items():
    golden.parent.mkdir(exist_ok=True)
    golden.write_text(describe(model_of(path))[0], encoding="utf-8")
    print(golden.relative_to(FOLDER.parents[1]))
README.write_text(written(), encoding="utf-8")
print(README.relative_to(FOLDER.parents[1]))
for name in SchemaName:
    path = CONFIGS / "schema" / f"{name.value}.json"
    path.write_text(schema_text(schema_of(name.value)) + "\n", encoding="utf-8")
    print(path.relative_to(FOLDER.parents[1]))
