"""The study of several resolutions and of cascades over them, at a tiny scale."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from conftest import color_task, make_tiny


@pytest.fixture(scope="module")
def study() -> ModuleType:
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        import multires
    finally:
        sys.path.remove(folder)
    return multires


def test_a_study_has_a_row_for_each_sharing_and_one_for_each_cascade(study: ModuleType) -> None:
    settings = {"epochs": 2, "batch_size": 8, "seeds": 2}
    comparison, results = study.study(make_tiny(), color_task(40), (16, 24), ("private", "shared"), **settings)
    columns, rows = study.sharing_rows(comparison)
    assert columns == ["own", "16 px", "± 16", "24 px", "± 24", "mean", "±", "parameters"]
    assert [row[0] for row in rows] == ["private", "shared"]
    assert all(len(row) == len(columns) for row in rows)
    assert rows[0][5] == pytest.approx((rows[0][1] + rows[0][3]) / 2)
    cascades = study.cascade_rows(results)
    rules = len(study.RULES)
    assert [row[0] for row in cascades] == [0] * (rules + 1) + [1] * (rules + 1) + ["mean"] * rules
    for reference, *others in (cascades[: rules + 1], cascades[rules + 1 : 2 * (rules + 1)]):
        assert (reference[1], *reference[6:]) == ("best alone", 0, 0)
        papers, cautious, _ = others
        assert min(papers[3], cautious[3]) >= reference[3]
        assert cautious[6] == pytest.approx(100 * (1 - cautious[5] / reference[5]))
    assert cascades[-rules][5] == pytest.approx((cascades[1][5] + cascades[rules + 2][5]) / 2)


@pytest.mark.real
def test_the_documented_command_runs(
    study: ModuleType, real_data: Callable[[str], Path], real_backbone: object, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = real_data("pacs_photo").parent
    asked = "--task pacs_photo --images 90 --epochs 1 --seeds 1 --resolutions 32,48 --sharing private,shared"
    arguments = [*asked.split(), "--cache", str(folder), "--json", str(tmp_path / "rows.json")]
    monkeypatch.setattr(sys, "argv", ["multires.py", *arguments])
    study.main()
    assert (tmp_path / "rows.json").read_text().count('"own"') == 2
    assert (tmp_path / "rows-cascade.json").read_text().count('"saved %"') == 1 + 2 * len(study.RULES)
