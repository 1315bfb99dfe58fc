from __future__ import annotations

from pathlib import Path

import pytest

from tests.near import near


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    files = {
        "code/__init__.py": "",
        "code/low.py": "",
        "code/high.py": "from code import low\n",
        "tests/helper.py": "def run():\n    from code.low import something\n",
        "tests/part/near_by.py": "import code.high\n",
        "tests/part/test_direct.py": "import code.low\n",
        "tests/part/test_by_helper.py": "from tests import helper\n",
        "tests/part/test_relative.py": "from .near_by import x\nfrom ..helper import run\n",
        "tests/test_high.py": "from code.high import x\n",
        "tests/test_other.py": "import os\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_tests_that_import_a_file_themselves_or_by_a_helper(repository: Path) -> None:
    found = near([Path("code/low.py")], repository)
    assert [str(path) for path in found] == [
        "tests/part/test_by_helper.py",
        "tests/part/test_direct.py",
        "tests/part/test_relative.py",
    ]
    assert [str(path) for path in near([Path("code/high.py")], repository)] == [
        "tests/part/test_relative.py",
        "tests/test_high.py",
    ]


def test_a_test_file_counts_itself(repository: Path) -> None:
    assert near([Path("tests/test_other.py")], repository) == [Path("tests/test_other.py")]


def test_an_unknown_file_is_named(repository: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"code/lost\.py: no such file"):
        near([Path("code/lost.py")], repository)
