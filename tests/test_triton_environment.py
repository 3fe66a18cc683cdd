"""The embedded server's environment: when it counts as there, and what an installation that fails leaves."""

import json

import pytest

from resources.errors import ServerError
from resources.triton.environment import _require_ours, install, is_installed, require_installed, requirements


def test_an_environment_that_is_there_is_not_touched(triton_settings):
    said = []
    install(triton_settings.environment, progress=said.append)
    assert said == []


def test_the_environment_holds_what_is_measured_here(triton_settings):
    """The same runtimes as ours, and the numpy that Triton's Python backend needs."""
    packages = next(triton_settings.environment.glob("lib/python3*/site-packages"))
    names = {path.name for path in packages.glob("*.dist-info")}
    runtimes = requirements()["whole"][1:]
    assert runtimes[0].startswith("onnxruntime")
    for runtime in runtimes:
        assert runtime.replace("-", "_").replace("==", "-") + ".dist-info" in names
    assert any(name.startswith("numpy-1.") for name in names)
    assert "nvidia_pytriton-0.7.0.dist-info" in names


@pytest.mark.parametrize("change", ["another version", "moved", "damaged"])
def test_an_environment_of_another_kind_counts_as_none(triton_settings, tmp_path, change):
    stamp = json.loads((triton_settings.environment / "refinery.json").read_text())
    stamp["place"] = str(tmp_path / "elsewhere" if change == "moved" else tmp_path)
    file = tmp_path / "refinery.json"
    file.write_text(json.dumps(stamp))
    assert is_installed(tmp_path) is (change != "moved")
    if change == "another version":
        file.write_text(json.dumps({**stamp, "alone": ["nvidia-pytriton==0.6.0"]}))
    elif change == "damaged":
        file.write_text(file.read_text()[:-5])
    assert not is_installed(tmp_path)
    with pytest.raises(ServerError, match=r"embedded Triton is out of date .* Run: refinery setup"):
        require_installed(tmp_path)


def test_pip_that_fails_is_quoted_and_leaves_no_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    environment = tmp_path / "triton"
    with pytest.raises(ServerError) as caught:
        install(environment, progress=lambda line: None)
    assert "The embedded Triton cannot be installed" in str(caught.value)
    assert "No matching distribution found for nvidia-pytriton==0.7.0" in str(caught.value)
    assert not is_installed(environment)
    with pytest.raises(ServerError, match="is not installed"):
        require_installed(environment)
    _require_ours(environment)  # the next attempt begins anew over what is left


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ServerError, match=r"cannot be installed into .*file/triton: File exists.*ENVIRONMENT"):
        install(tmp_path / "file" / "triton", progress=lambda line: None)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(ServerError, match=r"photos holds something that `refinery setup` did not make"):
        install(tmp_path / "photos", progress=lambda line: None)
    assert (tmp_path / "photos" / "cat.jpg").exists()
