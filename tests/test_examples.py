"""Every script in examples/ runs and draws, with small settings.

``distributed_calibration.py`` is run in tests/test_accumulate.py.
"""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = {
    "another_domain": ["--steps", "30"],
    "calibrate_and_filter": ["--images", "30"],
    "certified_labels": ["--images", "60"],
    "many_classes": [],
    "ship_onnx": [],
    "video_units": ["--draws", "20"],
}


def draw(name: str, picture: Path) -> None:
    module = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    module["main"](["--output", str(picture), *SMALL[name]])


def test_every_example_is_run_here() -> None:
    found = {path.stem for path in EXAMPLES.glob("*.py")}
    assert found == {*SMALL, "distributed_calibration"}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", SMALL)
def test_an_example_draws_its_picture(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    if name == "ship_onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    picture = tmp_path / f"{name}.png"
    draw(name, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    told = capsys.readouterr().out
    if name == "another_domain":
        before, after = (float(share) for share in re.findall(r"([\d.]+)% of", told)[-2:])
        assert after > before
    if name == "ship_onnx":
        assert "bytes; 0 labels differ" in told
    if name == "many_classes":
        strict, pooled, tuned = (
            float(share) for share in re.findall(r"rare covered ([\d.]+)%", told)
        )
        assert strict == 100
        assert pooled < tuned
