"""`deeplab-jax demo`: its files, its server, and the page in a browser."""

import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

import deeplab_jax as dl
from conftest import ROOT, SHARED
from deeplab_jax.export.demo import runtime as runtime_lib
from deeplab_jax.export.demo.server import Handler, make_server
from deeplab_jax.inference.calibration import FORMAT, Calibration
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.paths import CALIBRATION
from deeplab_jax.weights import hub_folder
from deeplab_jax.weights.convert import read_model

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
TRAINED = SHARED / "weights" / "deeplabv3_mnv2_pascal_quant.tflite"

# Uses the page, in a frame, as a person does, and posts what the person sees.
DRIVER = """<!doctype html><iframe src="index.html" width="900" height="900"></iframe>
<script type="module">
const frame = document.querySelector("iframe"), page = () => frame.contentDocument;
const at = (id) => page()?.getElementById(id);
const post = (name, body) => fetch(`/${name}`, { method: "POST", body });
const pause = () => new Promise((done) => setTimeout(done, 20));
const until = async (what) => { while (!what()) await pause(); };
const alert = () => at("alert")?.textContent;
const text = (id) => at(id).textContent;
async function finished() {
  await until(() => at("status").dataset.seconds || alert());
  return { status: text("status"), alert: alert(), seconds: at("status").dataset.seconds,
    legend: [...at("legend").children].map((item) => item.innerText.split("\\n")) };
}
async function choose(name) {
  delete at("status").dataset.seconds;
  const chosen = new DataTransfer();
  chosen.items.add(new File([await (await fetch(name)).blob()], name));
  at("file").files = chosen.files;
  at("file").dispatchEvent(new Event("change"));
  return finished();
}
await until(() => at("status")?.textContent === "Ready." || alert());
const seen = { loading: alert(), runtime: text("runtime"), images: {} };
if (!seen.loading) {
  for (const name of NAMES) {
    seen.images[name] = await choose(name);
    const { width, height } = at("overlay");
    const pixels = at("overlay").getContext("2d").getImageData(0, 0, width, height);
    seen.images[name].size = [height, width];
    await post(name, pixels.data);
  }
  at("view").focus();
  seen.keys = ["ArrowRight", "ArrowDown"].map((key) => {
    at("view").dispatchEvent(new KeyboardEvent("keydown", { key, shiftKey: true }));
    return text("here");
  });
  const { left, top } = at("overlay").getBoundingClientRect();
  const corner = { clientX: left + 1, clientY: top + 1 };
  at("view").dispatchEvent(new PointerEvent("pointermove", corner));
  seen.pointer = text("here");
  await until(() => !at("camera").hidden);
  at("camera").click();
  await until(() => text("camera") === "Take the picture");
  delete at("status").dataset.seconds;
  at("camera").click();
  seen.camera = await finished();
  seen.broken = await choose("model.json");
}
await post("end", JSON.stringify(seen));
</script>"""


@pytest.fixture(scope="module")
def fake_runtime(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runtime")
    for name in runtime_lib.FILES:
        (folder / name).write_text(name)
    return folder


@pytest.fixture(scope="module")
def real_runtime(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    folder = tmp_path_factory.mktemp("runtime")
    try:
        runtime_lib.copy_runtime(folder)
    except UserError as error:
        pytest.skip(f"onnxruntime-web is not here: {error}")
    return folder


def browse(folder, names, *flags):
    """Lets Chromium use the page in a folder on images; what was seen, the pixels by name."""
    (folder / "driver.html").write_text(DRIVER.replace("NAMES", json.dumps(names)))
    posted, end = {}, threading.Event()

    class Receiver(Handler):
        def do_POST(self):
            name = self.path.removeprefix("/")
            posted[name] = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            if name == "end":
                end.set()

    with make_server(folder, port=0) as server:
        server.RequestHandlerClass = functools.partial(Receiver, directory=os.fspath(folder))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        fakes = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        where = [f"--user-data-dir={folder.parent / 'profile'}", *fakes, *flags]
        url = f"http://localhost:{server.server_port}/driver.html"
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", *where, url]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as it:
            ended = end.wait(120)
            it.terminate()
        server.shutdown()
    assert ended, f"the page did not end; posted: {list(posted)}"
    return json.loads(posted.pop("end")), posted


def write_site(command, checkpoint, folder, runtime, *arguments):
    arguments = ("--export-dir", folder, "--runtime", runtime, *arguments)
    code, out, err = command("demo", checkpoint, *arguments)
    assert code == 0, err
    assert out == f"{folder}: serve this folder by any web server, index.html is the page\n"
    return err


def require_same(segmenter, path, seen, pixels):
    """Compares what the page shows of an image with `Segmenter.predict`."""
    ids = segmenter.predict(path)
    assert seen["alert"] == ""
    assert seen["size"] == list(ids.shape)
    shown = np.frombuffer(pixels, np.uint8).reshape(*ids.shape, 4)
    colors = np.concatenate([segmenter.palette, np.full((256, 1), 255, np.uint8)], axis=1)
    colors[0] = 0  # the background stays clear
    lines = np.array([[255, 255, 255, 255], [40, 40, 40, 255]])
    hatched = (shown[..., None, :] == lines).all(-1).any(-1)
    same = (shown == colors[ids]).all(-1)
    assert (same | hatched).mean() >= 0.999
    rows = [(name, area.removeprefix("< ")) for name, area in seen["legend"]]
    listed = {name: float(area.removesuffix(" %")) / 100 for name, area in rows}
    counts = {segmenter.classes[i]: (ids == i).mean() for i in np.unique(ids)}
    if segmenter.calibration is None:
        assert not hatched.any()
    else:
        probabilities = segmenter.probabilities(path)
        sureness = segmenter.calibration.sureness(probabilities, probabilities.argmax(-1))
        unsure = sureness < segmenter.calibration.threshold
        counts["unsure"] = unsure.mean()
        assert hatched[unsure].mean() == pytest.approx(2 / 7, abs=0.05)
        assert (hatched & ~unsure).mean() < 0.001
    for name in counts | listed:
        assert listed.get(name, 0) == pytest.approx(counts.get(name, 0), abs=0.002)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of image files that browsers may read otherwise than Python."""
    folder = tmp_path_factory.mktemp("images")
    y, x = np.mgrid[:90, :120]
    waves = np.stack([np.sin(x / 9), np.cos(y / 13), np.sin((x + y) / 17)], -1)
    image = Image.fromarray(np.uint8(127 + 120 * waves))
    image.save(folder / "waves.png")
    image.putalpha(Image.fromarray(np.uint8(x * 2)))
    image.save(folder / "transparent.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.convert("RGB").save(folder / "turned.jpg", quality=95, exif=exif)
    return folder


NAMES = ["waves.png", "transparent.png", "turned.jpg"]


def test_the_page_shows_what_the_model_predicts(command, model, images, tmp_path, real_runtime):
    folder = tmp_path / "site"
    write_site(command, model, folder, real_runtime)
    shutil.copytree(images, folder, dirs_exist_ok=True)
    seen, pixels = browse(folder, NAMES)
    segmenter = dl.load(model)
    for name in NAMES:
        require_same(segmenter, images / name, seen["images"][name], pixels[name])
    assert f"{min(os.cpu_count(), 8)} thread" in seen["runtime"]
    ids = segmenter.predict(images / NAMES[-1])
    row, column = (side // 2 for side in ids.shape)
    assert seen["keys"] == [
        f"{segmenter.classes[ids[r, c]]} (column {c}, row {r})"
        for r, c in ((row, column + 1), (row + 1, column + 1))
    ]
    assert re.fullmatch(rf"{segmenter.classes[ids[0, 0]]} \(column \d, row \d\)", seen["pointer"])
    assert seen["camera"]["alert"] == ""
    assert "pixels, in" in seen["camera"]["status"]
    assert "is not an image that this browser can read" in seen["broken"]["alert"]


def test_unsure_pixels_are_those_of_the_calibration(command, model, images, tmp_path, real_runtime):
    checkpoint, folder = tmp_path / "fox", tmp_path / "site"
    shutil.copytree(model, checkpoint)
    plain = dl.load(model)
    probabilities = plain.probabilities(images / NAMES[0])
    ids, temperatures = probabilities.argmax(-1), (1.5, 0.7, 2.0)
    views = {"output_stride": plain.architecture.output_stride, "scales": [1.0], "flip": False}
    found = Calibration(
        FORMAT, plain.classes, views, 1.0, temperatures, 0.0, 0.1, None, {"data": "/home/me"}
    )
    for of in (None, 1):
        found = dataclasses.replace(found, of=of)
        sureness = found.sureness(probabilities, ids)
        median = float(np.median(sureness[np.isfinite(sureness)]))
        found = dataclasses.replace(found, threshold=median)
        found.write(checkpoint / CALIBRATION)
        if of is None:
            assert "warning" not in write_site(command, checkpoint, folder, real_runtime)
            shutil.copytree(images, folder, dirs_exist_ok=True)
            assert "/home/me" not in (folder / CALIBRATION).read_text()
        else:
            found.write(folder / CALIBRATION)
        seen, pixels = browse(folder, NAMES[:1])
        name = NAMES[0]
        require_same(dl.load(checkpoint), images / name, seen["images"][name], pixels[name])


def test_a_trained_model_on_photos(command, shared_data, tmp_path, real_runtime):
    if not TRAINED.exists():
        pytest.skip(f"there is no {TRAINED}")
    folder = tmp_path / "site"
    write_site(command, TRAINED, folder, real_runtime)
    names = []
    for photo in sorted((shared_data / "voc_mini").rglob("*.jpg"))[:2]:
        names += [photo.name, f"{photo.stem}.png"]
        shutil.copy(photo, folder)
        Image.open(photo).save(folder / names[-1])
    seen, pixels = browse(folder, names)
    segmenter = dl.load(TRAINED)
    for name in names:
        require_same(segmenter, folder / name, seen["images"][name], pixels[name])


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")
def test_a_browser_without_simd_is_told(tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    shutil.copy(ROOT / "deeplab_jax" / "export" / "demo" / "index.html", folder)
    seen, _ = browse(folder, [], "--js-flags=--no-enable-sse4-1")
    assert "lacks WebAssembly SIMD" in seen["loading"]


def test_the_folder_is_complete_and_served(command, model, tmp_path, fake_runtime):
    folder = tmp_path / "site"
    write_site(command, model, folder, fake_runtime)
    types = {
        "": "text/html; charset=utf-8",
        "model.json": "application/json",
        "model.onnx": "application/octet-stream",
        "runtime/ort.wasm.bundle.min.mjs": "text/javascript",
        "runtime/ort-wasm-simd-threaded.wasm": "application/wasm",
    }
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == types.keys() - {""} | {"index.html"}
    about = json.loads((folder / "model.json").read_text())
    assert about["classes"] == ["background", "red fox", "bluebird"]
    assert about["palette"] == [[0, 0, 0], [200, 0, 0], [0, 0, 200]]
    assert (about["mean"], about["std"]) == ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
    assert about["background"] is True
    # Nothing is loaded from elsewhere.
    assert not re.search(r"https?://", (folder / "index.html").read_text())
    with make_server(folder, port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, kind in types.items():
            url = f"http://127.0.0.1:{server.server_port}/{name}"
            with urllib.request.urlopen(url) as answer:
                assert answer.read() == (folder / (name or "index.html")).read_bytes()
                assert answer.headers["Content-Type"] == kind
                assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
                assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        for missing in (f"{url}.map", f"{url}%00", f"{url}/../../../../etc/passwd"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(missing)
        code, _, err = command("demo", model, "--port", server.server_port)
        assert code == 2
        assert f"cannot serve at 127.0.0.1 port {server.server_port}: Address already in use" in err
        assert "--port" in err
        server.shutdown()
    code, _, err = command("demo", model, "--export-dir", folder, "--runtime", fake_runtime)
    assert code == 2
    assert "exists already; choose another path" in err


def test_the_calibration_beside_weights_as_on_the_hub(command, model, tmp_path, fake_runtime):
    hub_folder.write(read_model(model), tmp_path / "fox")
    names = dl.load(model).classes
    found = Calibration(FORMAT, names, {}, 1.0, (1.0,) * 3, 0.5, 0.1, None, {})
    found.write(tmp_path / "fox" / CALIBRATION)
    write_site(command, tmp_path / "fox", tmp_path / "site", fake_runtime)
    assert (tmp_path / "site" / CALIBRATION).read_bytes() == (
        tmp_path / "fox" / CALIBRATION
    ).read_bytes()


def test_it_serves_until_ctrl_c(model, fake_runtime):
    command = [sys.executable, "-m", "deeplab_jax.cli", "demo", model, "--port=0"]
    with subprocess.Popen(
        [*map(str, command), f"--runtime={fake_runtime}"], stdout=subprocess.PIPE, text=True
    ) as running:
        url = running.stdout.readline().split()[0]
        with urllib.request.urlopen(f"{url}/model.json") as answer:
            assert json.load(answer)["name"] == "fox"
        running.send_signal(2)
        assert running.wait(30) == 0


def test_a_runtime_that_is_incomplete(command, model, tmp_path):
    code, _, err = command("demo", model, "--export-dir=x", "--runtime", tmp_path)
    assert code == 2
    assert "ort.wasm.bundle.min.mjs and ort-wasm-simd-threaded.wasm" in err
    assert "npm pack onnxruntime-web@" in err


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A small package as if it were the published one, and the folder of the user's cache."""
    package = tmp_path / "runtime.tgz"
    with tarfile.open(package, "w:gz") as archive:
        for name in runtime_lib.FILES:
            (tmp_path / "file").write_text(name)
            archive.add(tmp_path / "file", f"package/dist/{name}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(runtime_lib, "URL", package.as_uri())
    monkeypatch.setattr(runtime_lib, "SHA256", hashlib.sha256(package.read_bytes()).hexdigest())
    return package, tmp_path / "cache" / "deeplab_jax"


def test_a_read_only_cache_is_enough_if_it_has_the_runtime(published, tmp_path, monkeypatch):
    def refuse(folder, **options):
        raise UserError(f"{folder} cannot be written to")

    with monkeypatch.context() as patches:
        patches.setattr(runtime_lib, "require_writable", refuse)
        with pytest.raises(UserError, match="cannot be written to"):
            runtime_lib.copy_runtime(tmp_path)
    runtime_lib.copy_runtime(tmp_path)
    monkeypatch.setattr(runtime_lib, "require_writable", refuse)
    runtime_lib.copy_runtime(tmp_path)


def test_the_runtime_is_downloaded_once_and_again_if_damaged(published, tmp_path):
    package, cache = published
    runtime_lib.copy_runtime(tmp_path)
    for name in runtime_lib.FILES:
        assert (tmp_path / name).read_text() == name
    content = package.read_bytes()
    package.unlink()
    runtime_lib.copy_runtime(tmp_path)
    (cached,) = cache.iterdir()
    assert cached.read_bytes() == content
    cached.write_bytes(content[:-1])
    with pytest.raises(UserError, match="could not be downloaded"):
        runtime_lib.copy_runtime(tmp_path)
    package.write_bytes(content)
    runtime_lib.copy_runtime(tmp_path)
    assert cached.read_bytes() == content


def test_a_runtime_that_cannot_be_downloaded(published, tmp_path):
    package, cache = published
    package.write_bytes(b"of a proxy")
    with pytest.raises(
        UserError, match=r"not the published one(.|\n)*name its folder by --runtime"
    ):
        runtime_lib.copy_runtime(tmp_path)
    assert not list(cache.iterdir())
