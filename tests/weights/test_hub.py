"""Published weights: their own URLs, caches, and downloads that go wrong."""

import contextlib
import hashlib
import http.server
import importlib.util
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading

import pytest

from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import hub

CONTENT = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FILE_NAME = f"tiny-{SHA256[:8]}.pth"


class Web:
    """A web server on this machine that gives one answer and counts the requests."""

    def __init__(self):
        self.body = CONTENT
        self.declared = len(CONTENT)  # the length that it promises
        self.status = 200
        self.paths = []
        self.half_sent = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                web.paths.append(self.path)
                self.send_response(web.status)
                self.send_header("Content-Length", str(web.declared))
                self.end_headers()
                half = len(web.body) // 2
                self.wfile.write(web.body[:half])
                self.wfile.flush()
                web.half_sent.set()
                web.go_on.wait(30)
                self.wfile.write(web.body[half:])

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/models/"


@pytest.fixture
def web():
    web = Web()
    threading.Thread(target=web.server.serve_forever, args=(0.01,), daemon=True).start()
    yield web
    web.go_on.set()
    web.server.shutdown()
    web.server.server_close()


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Empty caches, and one small file among the published ones."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCH_HOME", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setitem(hub.FILES, "tiny", ())
    return tmp_path


def fetch(web):
    hub.FILES["tiny"] = (f"{web.url}{FILE_NAME}",)
    return hub.fetch("tiny")


def files_below(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


# --- Names -------------------------------------------------------------------------------------


def test_names_and_urls_are_torchvisions():
    import torch_reference

    models = torch_reference.torchvision.models
    expected = {}
    for model in (
        *("deeplabv3_resnet50", "deeplabv3_resnet101", "deeplabv3_mobilenet_v3_large"),
        *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "mobilenet_v3_large"),
        "mobilenet_v2",
    ):
        versions = {weights.name: weights.url for weights in models.get_model_weights(model)}
        first = "COCO_WITH_VOC_LABELS_V1" if model.startswith("deeplab") else "IMAGENET1K_V1"
        expected[model] = versions[first]
        expected |= {f"{model}.{version}": url for version, url in versions.items()}
    ours = {name: urls for name, urls in hub.FILES.items() if "/" not in name and name != "tiny"}
    assert ours == {name: (url,) for name, url in expected.items()}


def test_names_and_urls_are_mmsegmentations():
    spec = importlib.util.find_spec("mmseg")
    if spec is None:
        pytest.skip("mmsegmentation is not installed")
    folder = pathlib.Path(spec.origin).parent / ".mim/configs/deeplabv3"
    published = set(re.findall(r"Weights: (\S+)", (folder / "metafile.yaml").read_text()))
    ours = {name: urls for name, urls in hub.FILES.items() if name.startswith("mmseg/")}
    assert len(ours) == 11
    for name, (original, of_fork) in ours.items():
        assert of_fork in published
        assert original.startswith("https://download.openmmlab.com/mmsegmentation/v0.5/deeplabv3/")
        assert original.split("/")[-3:] == of_fork.split("/")[-3:]
        depth, data = re.fullmatch(r"mmseg/deeplabv3_(r\d+b?-d\d+\S*?)_(\w+)", name).groups()
        model = original.split("/")[-1]
        assert f"deeplabv3_{depth}_" in model
        steps = [
            int(re.search(r"_(\d+)k_", url)[1])
            for url in published
            if f"_{data}" in url and f"_{depth}_" in url and "769" not in url
        ]
        assert f"_{max(steps)}k_{data}_" in model


def test_published_repositories_are_timms():
    import torch_reference  # noqa: F401 because timm imports torchvision

    timm = pytest.importorskip("timm")
    for name in (name for name in hub.REPOSITORIES if name.startswith("timm/")):
        assert timm.models.get_pretrained_cfg(name.removeprefix("timm/")).hf_hub_id == name


def test_is_name():
    assert hub.is_name("deeplabv3_resnet50")
    assert hub.is_name("resnet50.IMAGENET1K_V2")
    assert hub.is_name("mmseg/deeplabv3_r50-d8_voc12aug")
    assert hub.is_name("timm/resnet50.a1_in1k")
    assert hub.is_name("hf://org/name@v1/folder")
    assert not hub.is_name("resnet50.pth")
    assert not hub.is_name("runs/resnet50")
    assert not hub.is_name("")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("deeplab_resnet50", "did you mean 'deeplabv3_resnet50'"),
        ("resnet18.IMAGENET1K_V2", "did you mean 'resnet18.IMAGENET1K_V1'"),
        ("vgg", ".*resnet34, resnet50"),
    ],
)
def test_the_error_for_an_unknown_name_suggests_the_nearest(name, hint):
    with pytest.raises(UserError, match=rf"{name} is neither a weights file.*{hint}"):
        hub.find_weights(name)


# --- Caches ------------------------------------------------------------------------------------


def test_folders(caches, monkeypatch):
    assert hub.cache_folder() == caches / "cache/deeplab_jax/weights"
    assert hub.torch_cache_folder() == caches / "cache/torch/hub/checkpoints"
    monkeypatch.setenv("TORCH_HOME", str(caches / "elsewhere"))
    assert hub.torch_cache_folder() == caches / "elsewhere/hub/checkpoints"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hub.cache_folder() == pathlib.Path.home() / ".cache/deeplab_jax/weights"


def test_downloads_once(web, caches, capsys):
    path = fetch(web)
    assert path == hub.cache_folder() / FILE_NAME
    assert path.read_bytes() == CONTENT
    assert web.paths == [f"/models/{FILE_NAME}"]
    assert fetch(web) == path
    assert len(web.paths) == 1
    assert files_below(caches) == [path]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Downloading" in captured.err


def test_a_second_server_is_tried(web):
    offline = Web()
    offline.server.server_close()
    hub.FILES["tiny"] = (f"{offline.url}{FILE_NAME}", f"{web.url}{FILE_NAME}")
    assert hub.fetch("tiny").read_bytes() == CONTENT


def test_uses_what_pytorch_downloaded(web):
    path = hub.torch_cache_folder() / FILE_NAME
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert fetch(web) == path
    assert web.paths == []


def test_a_damaged_file_is_downloaded_again_and_pytorchs_is_kept(web, caplog):
    folders = hub.cache_folder(), hub.torch_cache_folder()
    ours, theirs = (folder / FILE_NAME for folder in folders)
    for path in (ours, theirs):
        path.parent.mkdir(parents=True)
        path.write_bytes(CONTENT[:-1])
    assert fetch(web) == ours
    assert ours.read_bytes() == CONTENT
    assert theirs.read_bytes() == CONTENT[:-1]
    assert [str(path) in caplog.text for path in (ours, theirs)] == [True, True]


def test_an_unreadable_file_is_not_used(web, caplog, monkeypatch):
    path = hub.torch_cache_folder() / FILE_NAME
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    real_open = pathlib.Path.open

    def open_denied(opened, mode="r"):
        if opened == path:
            raise PermissionError(13, "Permission denied")
        return real_open(opened, mode)

    monkeypatch.setattr(pathlib.Path, "open", open_denied)
    assert fetch(web) == hub.cache_folder() / FILE_NAME
    assert f"{path} cannot be read (Permission denied)" in caplog.text


# --- Failures ----------------------------------------------------------------------------------


def failure(web):
    with pytest.raises(UserError) as info:
        fetch(web)
    return str(info.value)


def assert_says_what_to_do(message, url):
    place = hub.cache_folder() / FILE_NAME
    assert f"Fetch {url}{FILE_NAME} by other means and put it there as {place}" in message


def test_offline(caches):
    web = Web()
    web.server.server_close()  # nobody listens on its port now
    message = failure(web)
    assert f"{FILE_NAME} could not be downloaded" in message
    assert f"- {web.url}{FILE_NAME}: " in message
    assert "refused" in message
    assert_says_what_to_do(message, web.url)
    assert files_below(caches) == []
    # Following the advice works.
    (hub.cache_folder() / FILE_NAME).write_bytes(CONTENT)
    assert fetch(web).read_bytes() == CONTENT


def test_a_missing_page(web, caches):
    web.status = 404
    message = failure(web)
    assert "HTTP Error 404" in message
    assert_says_what_to_do(message, web.url)
    assert files_below(caches) == []


def test_a_truncated_download(web, caches):
    web.body = CONTENT[:1000]
    message = failure(web)
    assert f"broke off after 1000 of {len(CONTENT)} bytes" in message
    assert_says_what_to_do(message, web.url)
    assert files_below(caches) == []


def test_another_file_than_was_published(web, caches):
    web.body = CONTENT[::-1]
    message = failure(web)
    begins = hashlib.sha256(web.body).hexdigest()[:8]
    assert f"begins with {begins}, expected {SHA256[:8]}" in message
    assert_says_what_to_do(message, web.url)
    assert files_below(caches) == []


def test_a_cache_that_cannot_be_written(web, caches):
    (caches / "cache").write_bytes(b"a file where a folder should be")
    message = failure(web)
    assert f"{hub.cache_folder()} cannot be written to" in message
    assert "Set XDG_CACHE_HOME" in message
    assert web.paths == []


def test_a_full_disk(web, caches, monkeypatch):
    if not pathlib.Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (caches / "full").symlink_to("/dev/full")
    real_open = pathlib.Path.open

    def open_full(path, mode="r"):
        return real_open(caches / "full" if path.suffix == ".partial" else path, mode)

    monkeypatch.setattr(pathlib.Path, "open", open_full)
    message = failure(web)
    assert "No space left on device" in message
    assert files_below(caches / "cache") == []


def test_interrupted_midway_leaves_nothing(web, caches):
    web.go_on.clear()
    # The handler is set because a shell's background jobs inherit that SIGINT is ignored.
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from deeplab_jax.weights import hub; hub.FILES['tiny'] = (sys.argv[1],)\n"
        "hub.fetch('tiny')"
    )
    root = pathlib.Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", script, f"{web.url}{FILE_NAME}"],
        env=os.environ | {"PYTHONPATH": str(root)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert web.half_sent.wait(60)
    folder = hub.cache_folder()
    assert [path.suffix for path in files_below(folder)] == [".partial"]
    for _ in range(5):
        # Python loses a KeyboardInterrupt that is raised in the callback of a weak reference, as
        # after an import ("Exception ignored in ..."). Users then press Ctrl-C again.
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT, errors
    assert files_below(folder) == []


def test_two_at_once_both_get_it(web, caches):
    results = []
    threads = [threading.Thread(target=lambda: results.append(fetch(web))) for _ in range(2)]
    web.go_on.clear()
    for thread in threads:
        thread.start()
    assert web.half_sent.wait(60)
    web.go_on.set()
    for thread in threads:
        thread.join(60)
    assert results == [hub.cache_folder() / FILE_NAME] * 2
    assert files_below(caches) == results[:1]
    assert results[0].read_bytes() == CONTENT
