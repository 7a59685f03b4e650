import numpy as np
import pytest

from dcryo.data.tracks import Track, read_track, write_track
from dcryo.errors import InputError


def track(frames=5):
    rng = np.random.Generator(np.random.Philox(2))
    return Track(rng.standard_normal((frames, 2)), rng.standard_normal((2, 18)))


def test_what_is_written_is_read(tmp_path):
    path, made = tmp_path / "a.star", track()
    write_track(path, made, {"rlnMicrographOriginalPixelSize": 0.885}, np.array([[3, 4]]))
    found, pixel_size_A = read_track(path)
    assert pixel_size_A == 0.885
    np.testing.assert_allclose(found.whole_px, made.whole_px, rtol=1e-9)
    np.testing.assert_allclose(found.local_px, made.local_px, rtol=1e-9)


def test_a_file_without_a_local_model_has_none(tmp_path):
    path = tmp_path / "a.star"
    path.write_text(
        "data_global_shift\n\nloop_\n_rlnMicrographShiftX\n_rlnMicrographShiftY\n0 0\n1.5 -2\n", encoding="utf-8"
    )
    found, pixel_size_A = read_track(path)
    assert pixel_size_A == 0.0 and not found.local_px.any()
    np.testing.assert_array_equal(found.whole_px, [[0, 0], [1.5, -2]])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data_x\n\n_rlnA 1\n", "data_global_shift"),
        ("data_global_shift\n\nloop_\n_rlnMicrographShiftX\n0\n", "rlnMicrographShiftY"),
        ("data_global_shift\n\nloop_\n_rlnMicrographShiftX\n_rlnMicrographShiftY\n0 nan\n", "no finite number"),
        ("data_global_shift\n\nloop_\n_rlnMicrographShiftX\n_rlnMicrographShiftY\n0 word\n", "no finite number"),
        (
            "data_global_shift\n\nloop_\n_rlnMicrographShiftX\n_rlnMicrographShiftY\n0 0\n\n"
            "data_local_motion_model\n\nloop_\n_rlnMotionModelCoeff\n1\n2\n",
            "expected 36",
        ),
    ],
)
def test_what_is_no_track_is_refused(tmp_path, text, told):
    path = tmp_path / "a.star"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=told):
        read_track(path)
