"""Files to write in folders that are absent, that are folders, or that cannot be written."""

import pytest

# Commands whose input does not exist: an output that cannot be written is reported before that.
OUTPUTS = {
    "evaluate --json": ["evaluate", "none.pth", "--data=shapes", "--json={}.json"],
    "evaluate --confusion": ["evaluate", "none.pth", "--data=shapes", "--confusion={}.svg"],
    "calibrate --out": ["calibrate", "none.pth", "--data=shapes", "--out={}.json"],
    "calibrate --plot": ["calibrate", "none.pth", "--data=shapes", "--plot={}.svg"],
    "calibrate --json": ["calibrate", "none.pth", "--data=shapes", "--json={}.json"],
    "predict --json": ["predict", "none.pth", "x.png", "--out=predicted", "--json={}.json"],
    "predict --out": ["predict", "none.pth", "x.png", "--out={}/deeper"],
    "convert to a file": ["convert", "none.pth", "{}.pth"],
    "convert to a folder": ["convert", "none.pth", "{}.new"],
    "export onnx": ["export", "none.pth", "{}.onnx"],
    "export stablehlo": ["export", "none.pth", "{}.stablehlo"],
    "demo --export-dir": ["demo", "none.pth", "--export-dir={}.new"],
    "summary --json": ["summary", "none.pth", "--json={}.json"],
    "summary --plot": ["summary", "none.pth", "--plot={}.png"],
    "summary --receptive-field": ["summary", "none.pth", "--receptive-field={}.pdf"],
    "plan --json": ["plan", "none.py", "--topology=v5e:2x2", "--json={}.json"],
    "submit --out": ["submit", "none.pth", "--out={}.tgz"],
    "data check --json": ["data", "check", "none", "--json={}.json"],
    "data check --sheet": ["data", "check", "none", "--sheet={}.png"],
    "data crops": ["data", "crops", "none.py", "{}.png"],
}


@pytest.fixture
def command(command, tmp_path, monkeypatch):
    """Runs a command in `tmp_path`, which must fail; its stderr."""
    monkeypatch.chdir(tmp_path)

    def run(arguments, output):
        code, _, err = command(*(argument.format(output) for argument in arguments))
        assert code == 2
        return err.strip()

    return run


@pytest.mark.parametrize("arguments", OUTPUTS.values(), ids=OUTPUTS)
def test_absent_folders_are_made(tmp_path, command, arguments):
    assert "none" in command(arguments, "new/deep/out")  # the input is what is wrong
    assert (tmp_path / "new" / "deep").is_dir()


@pytest.mark.parametrize("arguments", OUTPUTS.values(), ids=OUTPUTS)
def test_a_file_in_place_of_a_folder_is_an_error_at_once(tmp_path, command, arguments):
    (tmp_path / "new").write_text("")
    error = command(arguments, "new/deep/out")
    assert "cannot be written to: Not a directory" in error
    assert "none" not in error


@pytest.mark.parametrize("arguments", OUTPUTS.values(), ids=OUTPUTS)
def test_a_folder_in_place_of_a_file_is_an_error_at_once(tmp_path, command, arguments):
    output = arguments[-1].partition("=")[2] or arguments[-1]
    if output.endswith("deeper"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "deeper").write_text("")  # a file in place of the folder
        assert "out/deeper cannot be written to: File exists" in command(arguments, "out")
        return
    (tmp_path / output.format("out")).mkdir()
    error = command(arguments, "out")
    assert f"{output.format('out')} " in error
    assert "is a folder" in error or "exists already" in error


@pytest.mark.parametrize("name", ["config.json", "inputs.json"])
def test_no_output_replaces_what_a_run_needs(tmp_path, command, name):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    arguments = ["evaluate", "run", "--json={}"]
    assert "belongs to a run" in command(arguments, f"run/{name}")


def test_two_pictures_in_one_file_are_refused(command):
    arguments = ["summary", "none.pth", "--plot={0}", "--receptive-field={0}"]
    assert "are the same file, x.png" in command(arguments, "x.png")


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "{}"],
        ["summary", "shapes", "--json={}.json"],
        ["convert", "{}.pth", "new"],
    ],
)
def test_a_path_that_is_too_long_is_an_error(command, arguments):
    error = command(arguments, "a" * 300)
    assert "File name too long" in error
    assert "Traceback" not in error
