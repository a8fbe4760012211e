"""Videos and cameras: frames, smoothing, memory, time, codecs, damage, and their end."""

import csv
import functools
import json
import os
import pathlib
import re
import struct
import types
import weakref

import cv2
import numpy as np
import pytest
from PIL import Image

import deeplab_jax
from deeplab_jax.config import ShapesConfig
from deeplab_jax.data.datasets import shapes
from deeplab_jax.inference import segmenter, video
from deeplab_jax.inference.positive import PositiveClass
from deeplab_jax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("here")

CLIP = pathlib.Path("clip.avi")
OUT = pathlib.Path("out/clip")


@pytest.fixture
def predict(command, model, loaded, monkeypatch):
    """The command with a model whose programs all tests share."""
    monkeypatch.setattr(segmenter, "load", lambda *_, **options: loaded)
    return functools.partial(command, "predict", model)


def scenes(number, height=40, width=56):
    """Shapes that drift."""
    ground, _ = shapes.draw(np.random.default_rng(3), ShapesConfig(size=96))
    return [np.roll(ground, (i, 2 * i), (0, 1))[:height, :width] for i in range(number)]


def write(frames, path=CLIP, rate=25.0, codec="FFV1"):
    """Writes RGB frames as a video, by default without loss."""
    size = frames[0].shape[1::-1] if frames else (56, 40)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), rate, size)
    assert writer.isOpened()
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()
    return path


def read(path):
    """The BGR frames of a video, and its rate."""
    capture, frames = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG), []
    while (one := capture.read())[0]:
        frames.append(one[1])
    return frames, capture.get(cv2.CAP_PROP_FPS)


def areas(path="out/clip_areas.csv"):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def damage(path, share):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


class Camera:
    """A `cv2.VideoCapture` that gives these frames, and advances the clock by `step` at each."""

    now = 100.0

    def __init__(self, frames, step=0.1, rate=30.0):
        self.frames, self.step, self.rate = iter(frames), step, rate

    def read(self):
        Camera.now += self.step
        frame = next(self.frames, None)
        return frame is not None, frame

    def get(self, what):
        return self.rate if what == cv2.CAP_PROP_FPS else -1.0


@pytest.fixture
def camera(monkeypatch):
    """Replaces camera 0."""
    real = cv2.VideoCapture
    monkeypatch.setattr(video, "time", types.SimpleNamespace(monotonic=lambda: Camera.now))

    def connect(*arguments, **options):
        one = Camera(*arguments, **options)
        monkeypatch.setattr(cv2, "VideoCapture", lambda *a: one if a == (0,) else real(*a))

    return connect


@pytest.mark.parametrize("batch", [1, 4])
def test_frames_are_predicted_as_single_images(model, batch):
    fresh = deeplab_jax.load(model)
    fresh.predictor.max_batch = batch
    frames = scenes(100)
    write(frames, rate=29.97)
    result = video.predict_video(fresh, CLIP, OUT)
    rows, counts = iter(areas()), np.zeros(3, int)
    several = 0
    predicted = video.predict_frames(fresh, video.VideoReader(CLIP))
    for index, (frame, (read_frame, ids)) in enumerate(zip(frames, predicted, strict=True)):
        np.testing.assert_array_equal(read_frame.pixels, frame)
        np.testing.assert_array_equal(ids, fresh.predict(frame))
        present = np.bincount(ids.ravel(), minlength=3)
        counts += present
        several += (present > 0).sum() > 1
        for i in present.nonzero()[0]:
            row = next(rows)
            assert (int(row["frame"]), row["class"]) == (index, fresh.classes[i])
            assert float(row["share"]) == pytest.approx(present[i] / ids.size, abs=1e-6)
            assert float(row["seconds"]) == pytest.approx(index / 29.97, abs=1e-3)
    assert several > 50
    assert next(rows, None) is None
    np.testing.assert_array_equal(result.counts, counts)
    assert (result.num_frames, result.size, result.notes) == (100, (40, 56), ())
    drawn, rate = read("out/clip_overlay.mp4")
    assert (len(drawn), rate) == (100, pytest.approx(29.97, abs=1e-3))


def test_the_overlay_shows_frames_in_order_and_the_colours(loaded):
    frames = [np.full((40, 56, 3), value, np.uint8) for value in range(0, 250, 25)]
    write(frames)
    video.predict_video(loaded, CLIP, OUT, opacity=1)
    ids = [loaded.predict(frame) for frame in frames]
    for frame, picture, one in zip(frames, read("out/clip_overlay.mp4")[0], ids, strict=True):
        panel = picture[: 40 * 8 : 8, : 56 * 8 : 8][..., ::-1].astype(int)
        expected = np.where(one[..., None] == 0, frame, loaded.palette[one])
        assert np.abs(np.median(panel - expected, axis=(0, 1))).max() < 12  # of a lossy codec


@pytest.mark.parametrize("positive", [None, PositiveClass(1, 0.4)])
def test_smoothing_is_a_running_mean(loaded, positive):
    frames = scenes(12)[::3] * 3  # jumps
    write(frames)
    reader, mean, changed = video.VideoReader(CLIP), None, 0
    smoothed = video.predict_frames(loaded, reader, smooth=0.7, positive=positive)
    for frame, (_, ids) in zip(frames, smoothed, strict=True):
        own = loaded.probabilities(frame).astype(np.float64)
        mean = own if mean is None else 0.7 * mean + (1 - 0.7) * own
        ranked, expected = np.sort(mean, axis=-1), mean.argmax(-1)
        is_clear = ranked[..., -1] - ranked[..., -2] > 1e-5
        if positive:
            others = np.where(mean[..., 0] >= mean[..., 2], 0, 2)
            expected = np.where(mean[..., 1] >= 0.4, 1, others)
            is_clear &= np.abs(mean[..., 1] - 0.4) > 1e-5
        assert is_clear.mean() > 0.99
        np.testing.assert_array_equal(ids[is_clear], expected[is_clear])
        changed += (ids != loaded.predict(frame, positive)).sum()
    assert changed > 100


def test_few_frames_are_in_memory_however_long_the_video_is(loaded, monkeypatch):
    monkeypatch.setattr(video, "MAX_IMAGES", 4)
    write(scenes(200))
    alive, most = [], []
    decode = video.VideoReader._decode

    def watched(reader):
        frame = decode(reader)
        if frame is not None:
            alive.append(frame.index)
            weakref.finalize(frame.pixels, alive.remove, frame.index)
            most.append(len(alive))
        return frame

    monkeypatch.setattr(video.VideoReader, "_decode", watched)
    assert video.predict_video(loaded, CLIP, OUT, smooth=0.5).num_frames == 200
    assert 2 <= max(most) <= 2 * 4 + 4


def test_one_of_so_many_frames_and_no_more_than_wanted(loaded):
    frames = scenes(20)
    write(frames)
    result = video.predict_video(loaded, CLIP, OUT, every=3, max_frames=5)
    assert (result.num_frames, result.rate) == (5, pytest.approx(25 / 3))
    read_frames = [
        frame for frame, _ in video.predict_frames(loaded, video.VideoReader(CLIP, every=3))
    ]
    assert len(read_frames) == video.VideoReader(CLIP, every=3).num_frames == 7
    for frame, expected in zip(read_frames, frames[::3], strict=True):
        np.testing.assert_array_equal(frame.pixels, expected)
        assert frame.seconds == pytest.approx(3 * frame.index / 25, abs=1e-3)
    assert float(areas()[-1]["seconds"]) == pytest.approx(12 / 25)


def test_a_camera_with_odd_sides_loses_no_column(loaded, camera):
    # OpenCV writes no test file with odd sides. Frames of 641 pixels are not enlarged.
    camera([np.full((9, 641, 3), 90, np.uint8)] * 3, step=1 / 30)
    result = video.predict_video(loaded, pathlib.Path("camera:0"), pathlib.Path("out/camera_0"))
    assert result.size == (9, 641)
    drawn, _ = read("out/camera_0_overlay.mp4")
    legend = 2 * round(1.6 * 14) + 14 // 2
    assert drawn[0].shape == (9 + legend, 642, 3)


def test_the_time_of_a_camera_is_kept(predict, camera):
    camera(scenes(12), step=0.1, rate=20.0)
    code, out, _ = predict("camera:0", "--out", "out", "--frames", "10", "--json", "areas.json")
    assert code == 0
    assert "camera:0: 10 frames, 20 per second, without sound" in out
    drawn, rate = read("out/camera_0_overlay.mp4")
    assert (len(drawn), rate) == (19, 20)  # 0.9 seconds
    assert float(areas("out/camera_0_areas.csv")[-1]["seconds"]) == pytest.approx(0.9)
    (entry,) = json.loads(pathlib.Path("areas.json").read_text())["videos"]
    assert (entry["video"], entry["frames"], entry["rate"]) == ("camera:0", 10, 20)
    assert sum(one["pixels"] for one in entry["classes"].values()) == 10 * 40 * 56


def test_a_camera_without_a_rate(predict, camera):
    camera(scenes(3), rate=0.0)
    _, out, _ = predict("camera:0", "--out", "out")
    assert "its frame rate is unknown, 30 per second were assumed" in out


def interrupted(items, *_):
    for index, item in enumerate(items):
        if index == 5:
            raise KeyboardInterrupt
        yield item


def test_ctrl_c_ends_the_recording_of_a_camera(predict, camera, monkeypatch):
    monkeypatch.setattr(video, "track", interrupted)
    camera(scenes(100), step=1 / 30)
    code, out, _ = predict("camera:0", "--out", "out")
    assert code == 0
    assert "1 video in out" in out
    assert len(read("out/camera_0_overlay.mp4")[0]) == 5
    assert areas("out/camera_0_areas.csv")[-1]["frame"] == "4"


def test_ctrl_c_in_a_file_leaves_nothing(predict, monkeypatch):
    monkeypatch.setattr(video, "track", interrupted)
    write(scenes(40))
    code, _, _ = predict(CLIP, "--out", "out")
    assert code == 130
    assert os.listdir("out") == []


def test_a_rate_that_varies_is_reported(predict):
    path = write(scenes(10), pathlib.Path("clip.mkv"))
    data = path.read_bytes()
    times = [0, 40, 80, 120, 400, 440, 480, 520, 560, 600]  # ms, of blocks of the first track
    for index in range(9, 3, -1):
        old, new = (struct.pack(">h", ms) for ms in (40 * index, times[index]))
        data, number = re.subn(b"\x81%s([\x80\x00])" % re.escape(old), b"\x81%s\\1" % new, data)
        assert number == 1
    path.write_bytes(data)
    _, out, _ = predict(path, "--out", "out")
    assert "its frame rate varies, that of the overlay is the mean" in out
    found = {row["frame"]: float(row["seconds"]) for row in areas()}
    np.testing.assert_allclose(list(found.values()), np.array(times) / 1000, atol=1e-3)
    write(scenes(10), path)
    assert "rate varies" not in predict(path, "--out", "out")[1]


def test_a_damaged_video_is_predicted_up_to_the_damage(predict):
    write(scenes(30))
    damage(CLIP, 0.5)
    number = len(read(CLIP)[0])
    assert 5 < number < 25
    code, _, err = predict(CLIP, "--out", "out")
    assert code == 2
    assert (
        f"clip.avi: is damaged or incomplete: {number} of 30 frames could be read. They are in"
        in err
    )
    assert len(read("out/clip_overlay.mp4")[0]) == number


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda path: path.write_text("hello\n" * 9),
            "no frame can be decoded: it is no video, is damaged",
        ),
        (lambda path: path.touch(), "no frame can be decoded"),
        (lambda path: write([], path, codec="mp4v"), "no frame can be decoded"),
        (
            lambda path: damage(write(scenes(20), path, codec="mp4v"), 0.6),
            "no frame can be decoded",
        ),
        (lambda path: None, "cannot be read (No such file or directory)"),
        (lambda path: path.mkdir(), "the folder contains no image files"),
    ],
    ids=["text", "empty", "no frames", "truncated", "missing", "folder"],
)
def test_what_is_no_video_is_an_error(predict, capfd, make, message):
    make(pathlib.Path("bad.mp4"))
    write(scenes(3))
    code, _, err = predict("bad.mp4", CLIP, "--out", "out")
    assert code == 2
    assert "bad.mp4: " in err
    assert message in err
    assert "moov" not in err  # messages of libav
    if "folder" not in message:
        assert "1 of 2 files could not be predicted" in err
        assert sorted(os.listdir("out")) == ["clip_areas.csv", "clip_overlay.mp4"]


def test_a_model_of_grey_images_is_an_error():
    write(scenes(2))
    grey = types.SimpleNamespace(architecture=types.SimpleNamespace(in_channels=1))
    with pytest.raises(UserError, match=r"takes images of 1 channels: those of videos are RGB"):
        next(video.predict_frames(grey, video.VideoReader(CLIP)))


def test_a_camera_that_is_absent(predict, camera):
    camera([])
    code, _, err = predict("camera:0", "--out", "out")
    assert code == 2
    assert "camera:0: cannot be opened: there is no such camera" in err


def test_a_size_that_changes(loaded):
    """OpenCV scales later frames to the size of the first one."""
    parts = [
        write(scenes(4, *size), CLIP, codec="MJPG").read_bytes() for size in ((40, 56), (64, 80))
    ]
    CLIP.write_bytes(b"".join(parts))
    assert video.predict_video(loaded, CLIP, OUT).num_frames == 8


class Refusing:
    """A `cv2.VideoWriter` without some codecs, or on a disk that is soon full."""

    real, refused, room = cv2.VideoWriter, (), 1000
    fourcc = staticmethod(cv2.VideoWriter.fourcc)

    def __init__(self, path, code, *rest):
        is_refused = code in [self.fourcc(*codec) for codec in self.refused]
        self.writer = None if is_refused else self.real(path, code, *rest)
        self.written = 0

    def isOpened(self):
        return self.writer is not None and self.writer.isOpened()

    def write(self, picture):
        self.written += 1
        if self.written <= self.room:
            self.writer.write(picture)


def test_codecs_that_are_missing(predict, monkeypatch):
    write(scenes(8))
    monkeypatch.setattr(cv2, "VideoWriter", Refusing)
    monkeypatch.setattr(Refusing, "refused", ("mp4v",))
    code, out, _ = predict(CLIP, "--out", "out")
    assert code == 0
    assert "OpenCV cannot write MPEG-4 here, the overlay is Motion JPEG" in out
    assert len(read("out/clip_overlay.avi")[0]) == 8
    monkeypatch.setattr(Refusing, "refused", ("mp4v", "MJPG"))
    code, _, err = predict(CLIP, "--out", "other")
    assert code == 2
    assert "clip.avi: this OpenCV can write neither MPEG-4 nor Motion JPEG" in err
    assert os.listdir("other") == []


def test_a_full_disk_is_noticed(predict, monkeypatch):
    write(scenes(8))
    monkeypatch.setattr(cv2, "VideoWriter", Refusing)
    monkeypatch.setattr(Refusing, "room", 5)
    code, _, err = predict(CLIP, "--out", "out")
    assert code == 2
    assert "clip.avi: cannot write to out/clip_overlay.mp4. Is the disk full?" in err
    assert os.listdir("out") == []


def test_a_folder_in_place_of_an_output(predict):
    write(scenes(2))
    OUT.with_name("clip_areas.csv").mkdir(parents=True)
    code, _, err = predict(CLIP, "--out", "out")
    assert code == 2
    assert "clip.avi: cannot write to out/clip_areas.csv: Is a directory" in err


def test_images_and_videos_together(predict):
    pathlib.Path("both").mkdir()
    Image.fromarray(scenes(1)[0]).save("both/clip.png")
    write(scenes(4), pathlib.Path("both/clip.avi"))
    _, out, _ = predict("both", "--out", "out")
    assert "1 image in out" in out
    assert sorted(os.listdir("out")) == ["clip_ids.png", "clip_overlay.png"]
    for _ in range(2):  # a second time, the overlay is in the folder
        code, out, _ = predict("both/clip.*", "--out", "both", "--json", "areas.json")
        assert code == 0
        assert "2 files in both" in out
    report = json.loads(pathlib.Path("areas.json").read_text())
    assert [len(report[kind]) for kind in ("images", "videos")] == [1, 1]
    total = sum(area["pixels"] for area in report["total"].values())
    assert total == 5 * 40 * 56
    _, _, err = predict("both/*.mp4", "--out", "both")
    assert "both/*.mp4: no file matches the pattern but what deeplab-jax wrote (1)" in err


def test_no_overlay_replaces_a_video_that_is_predicted(predict):
    pathlib.Path("out").mkdir()
    write(scenes(2), pathlib.Path("out/clip_overlay.mp4"), codec="mp4v")
    before = pathlib.Path("out/clip_overlay.mp4").read_bytes()
    write(scenes(2))
    code, _, _ = predict(CLIP, "out/clip_overlay.mp4", "--out", "out")
    assert code == 0
    assert pathlib.Path("out/clip_overlay.mp4").read_bytes() == before
    assert len(list(pathlib.Path("out").glob("*.mp4"))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clip.avi", "--smooth", "1"], "--smooth must be 0 or more and below 1, got 1"),
        (["clip.avi", "--heatmap", "red fox"], "are for images: predict videos without them"),
        (["photo.png", "--every", "2"], "--smooth, --every and --frames are for videos and"),
        (["videos"], "name them, or use a pattern such as 'videos/*.mp4'"),
    ],
)
def test_options_that_do_not_fit_are_reported(predict, arguments, message):
    pathlib.Path("videos").mkdir()
    pathlib.Path("videos/clip.mp4").touch()
    code, _, err = predict(*arguments, "--out", "out")
    assert code == 2
    assert message in err
